"""Effect handlers that change what a guide draws at its random sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_elbo_ext.sites import base_name, is_leaf, is_reparameterized

__all__ = ["DetachLeaves", "DetachScored", "Differentiable", "Enumerate"]


class Enumerate(Messenger):
    """Gives a site that asks for ``infer={"enumerate": "parallel"}`` all values of its support at once.

    The n-th such site has them along dimension ``first_dim - n``, left of the particles and the plates; the same
    dimension whenever it is met again.
    """

    def __init__(self, first_dim: int) -> None:
        super().__init__()
        self.first_dim = first_dim
        self.dims: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        how = msg["infer"].get("enumerate")
        if how is None or msg["is_observed"] or msg["done"]:
            return
        if how != "parallel" or msg["infer"].get("num_samples") is not None:
            raise ValueError(
                f"guide site '{msg['name']}' asks for enumeration {how!r} with num_samples="
                f"{msg['infer'].get('num_samples')}; only infer={{'enumerate': 'parallel'}} is summed exactly."
            )
        msg["value"] = self._support(msg["name"], msg["fn"])
        msg["done"] = True

    def _support(self, name: str, fn: Any) -> Tensor:
        try:
            values = fn.enumerate_support(expand=False)
        except NotImplementedError as error:
            raise ValueError(
                f"guide site '{name}' asks for enumeration, but a {base_name(fn)} has no finite support to sum over. "
                "Remove infer={'enumerate': ...} to sample it."
            ) from error
        dim = self.dims.setdefault(name, self.first_dim - len(self.dims))
        return values.reshape(values.shape[:1] + (1,) * (-dim - 1) + tuple(fn.event_shape))


class DetachLeaves(Messenger):
    """Cuts the path through every random site, so that densities alone depend on the guide's parameters."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_leaf(msg):
            msg["value"] = msg["value"].detach()


class DetachScored(Messenger):
    """Cuts the path through sites whose gradient is not taken along it; one reparameterised in part has none."""

    def __init__(self, is_scored: Callable[[Any], bool] = lambda site: not is_reparameterized(site)) -> None:
        super().__init__()
        self.is_scored = is_scored

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_leaf(msg) and isinstance(msg["value"], Tensor) and self.is_scored(msg):
            msg["value"] = msg["value"].detach()


class Differentiable(Messenger):
    """Makes the values of some sites, by default those not reparameterised, start points of differentiation."""

    def __init__(self, chosen: Callable[[Any], bool] = lambda site: not is_reparameterized(site)) -> None:
        super().__init__()
        self.chosen = chosen

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_leaf(msg) and msg["value"].is_floating_point() and self.chosen(msg):
            msg["value"] = msg["value"].detach().requires_grad_()
