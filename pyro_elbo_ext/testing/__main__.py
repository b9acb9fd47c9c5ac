"""``python -m pyro_elbo_ext.testing module:ClassName``: the conformance table of a class."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyro.infer import ELBO

from pyro_elbo_ext.testing import IDENTITIES, Check, Recognised, conformance, recognise
from pyro_elbo_ext.testing.measure import MakeELBO

REQUIRED = {
    "value <= evidence": "values below the evidence",
    "minibatch of 4 in 20": "minibatches equal to the full batch",
    "belief network, gradient in first": "the guide's gradient equal to the sum over all states",
}
WORDS = {True: "pass", False: "FAIL", None: "n/a"}


class _BadInput(Exception):
    """What was asked for cannot be run; one line says why."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pyro_elbo_ext.testing",
        description="Run an ELBO class through the identities C1 to C13. Exit with 0 only if values against the "
        "evidence, minibatches and gradients against enumeration ran and held and nothing else failed, with 1 if "
        "not, with 2 on bad input.",
    )
    add = parser.add_argument
    add("target", metavar="module:ClassName", help="the class; it must take num_particles")
    add("--arg", action="append", default=[], metavar="NAME=VALUE", help="argument of its constructor, repeatable")
    add("--bound", choices=("iwae", "elbo", "any"), help="which bound it is; found out from values if not given")
    add("--gradient", choices=("bound", "rws", "iwae+rws", "none"), help="what the guide's gradient estimates")
    add("--scored", action="store_true", help="hold the gradient to guides that are not to be reparameterised")
    add("--zero-variance", action="store_true", help="no gradient is left where the guide is the posterior")
    add("--slope", nargs=2, type=float, metavar=("LOW", "HIGH"), help="interval of the slope of log sd in log K")
    add("--min-particles", type=int, help="fewest particles that it takes; found out if not given")
    add("--improves", action=argparse.BooleanOptionalAction, help="train a mixture under wake-sleep; with rws on")
    add("--train", action=argparse.BooleanOptionalAction, default=True, help="train a linear VAE to its optimum")
    add("--size", type=float, default=0.2, help="factor on the number of replicates, 0.2 if not given")
    add("--only", metavar="C1,C2,...", help="identities to run")
    add("--json", type=Path, metavar="FILE", help="write the table there too")
    return parser.parse_args(argv)


def _value(text: str) -> Any:
    """Read a constructor's argument: a number, True, None, a list, or else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _load(options: argparse.Namespace) -> MakeELBO:
    """Return what makes the loss for ``num_particles=K``, having seen that it does."""
    module, separator, name = options.target.partition(":")
    if not (module and separator and name):
        raise _BadInput(f"expected module:ClassName, got {options.target!r}")
    sys.path[:0] = [] if os.getcwd() in sys.path else [os.getcwd()]
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
    except Exception as error:  # whatever a module raises when it is imported
        raise _BadInput(f"cannot load {options.target}: {_line(error)}") from error
    if not callable(made):
        raise _BadInput(f"{options.target} is a {type(made).__name__}, not a class or function that returns an ELBO")
    if inspect.isclass(made) and not issubclass(made, ELBO):
        raise _BadInput(f"{options.target} is no subclass of pyro.infer.ELBO")
    pairs = [text.partition("=") for text in options.arg]
    if any(not key.isidentifier() or not separator for key, separator, _ in pairs):
        raise _BadInput(f"--arg takes NAME=VALUE, got {', '.join(options.arg)}")
    return partial(made, **{key: _value(value) for key, _, value in pairs})


def _seen(make: MakeELBO, options: argparse.Namespace) -> Recognised:
    """Make the loss once and find out what it is."""
    try:
        loss = make(num_particles=4)
    except Exception as error:
        raise _BadInput(
            f"{options.target} cannot be made from num_particles=4 {' '.join(options.arg)}: {_line(error)}; "
            "give what else it needs by --arg NAME=VALUE"
        ) from error
    if not isinstance(loss, ELBO):
        raise _BadInput(f"{options.target} returns a {type(loss).__name__}, which is no pyro.infer.ELBO")
    try:
        return recognise(make, options.size, options.scored)
    except Exception:  # the suite's rows say what it raises
        return Recognised(None, "bound", 1, {})


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _claims(options: argparse.Namespace, seen: Recognised) -> dict[str, Any]:
    """Return what the loss is held to: what was claimed, and what was recognised where nothing was."""
    bound = {"any": None, None: seen.bound}.get(options.bound, options.bound)
    gradient = seen.gradient if options.gradient is None else options.gradient
    if options.gradient is None and bound != seen.bound:
        gradient = "bound"
    improves = gradient == "rws" if options.improves is None else options.improves
    return {
        "bound": bound,
        "gradient": None if gradient == "none" else gradient,
        "zero_variance": options.zero_variance,
        "slope": options.slope and tuple(options.slope),
        "scored": options.scored,
        "min_particles": options.min_particles or seen.min_particles,
        "improves": improves,
        "trains": options.train,
    }


def _headline(options: argparse.Namespace, seen: Recognised, claims: dict[str, Any]) -> str:
    values = ", ".join(f"{value:.4f} at K = {k}" for k, value in seen.values.items()) or "no values"
    names = {"iwae": "the importance-weighted bound", "elbo": "the ELBO", None: "no bound of those known"}
    how = "claimed" if options.bound else "recognised"
    gradient = claims["gradient"] or "not held to anything"
    return (
        f"{options.target}: {how} as {names[claims['bound']]} ({values}); "
        f"gradient {'claimed' if options.gradient else 'taken'} as: {gradient}; "
        f"K >= {claims['min_particles']}"
    )


def _verdict(checks: Sequence[Check]) -> tuple[int, str]:
    """Return the exit code, and a line that says what it rests on."""
    failed = [check for check in checks if check.passed is False]
    if failed:
        identities = ", ".join(dict.fromkeys(check.identity for check in failed))
        return 1, f"{len(failed)} of {len(checks)} rows failed, of {identities}"
    shown = {check.name for check in checks if check.passed}
    missing = [what for name, what in REQUIRED.items() if name not in shown]
    if missing:
        return 1, f"nothing failed, but not shown: {'; '.join(missing)}"
    return 0, f"{len([check for check in checks if check.passed])} rows passed, none failed"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the suite's table for ``module:ClassName``; return 0 only if what is required ran and all that ran held."""
    try:
        options = _arguments(argv)
    except SystemExit as stop:  # argparse has said why
        return 2 if stop.code else 0
    try:
        make = _load(options)
        seen = _seen(make, options)
        claims = _claims(options, seen)
        only = options.only and options.only.split(",")
        headline = _headline(options, seen, claims)
        sys.stdout.write(headline + "\n")
        checks = conformance(make, **claims, size=options.size, only=only, complete=True)
    except (_BadInput, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for check in checks:
        sys.stdout.write(f"{WORDS[check.passed]:5}{check.identity:4} {check.name:50} {check.detail}\n")
    code, verdict = _verdict(checks)
    sys.stdout.write(verdict + "\n")
    if options.json:
        rows = [check._asdict() for check in checks]
        found = {"target": options.target, "headline": headline, "claims": claims, "verdict": verdict, "exit": code}
        options.json.write_text(json.dumps(found | {"identities": IDENTITIES, "rows": rows}, indent=1))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
