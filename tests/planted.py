"""Proves that the tests can fail: plants bugs one by one, and takes the steps out of every optimiser.

    python tests/planted.py [--list] [--only NAME ...] [--jobs N]

Each bug of ``PLANTS`` replaces one piece of the package's text in a copy, where one of the tests that are named beside
it has to fail. Then ``INERT`` makes each step of each optimiser leave the parameters where they are, and all tests that
are marked ``convergence`` have to fail. The exit status is 0 only if all of that is so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo", "*.ipynb")
LIMIT = 1200  # seconds that one run of pytest may take
NO_FAILURE = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError")

OWN = ("assert ", "AssertionError", "Failed")  # how what a test says of its own begins

# A plugin of pytest in the copy: it refuses another package than the copy's, and takes down what each test did.
WITNESS = """
import json
import os
from pathlib import Path

import pytest
import pyro_elbo_ext


def pytest_configure(config):
    if not Path(pyro_elbo_ext.__file__).resolve().is_relative_to(config.rootpath.resolve()):
        raise pytest.UsageError(f"the package under test is {pyro_elbo_ext.__file__}, not that of the copy")


def pytest_runtest_logreport(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    message, path = ("", "") if crash is None else (crash.message, str(crash.path))
    with open(os.environ["PLANTED_REPORTS"], "a") as file:
        file.write(json.dumps([report.nodeid, report.when, report.outcome, message, path]) + "\\n")
"""


class Plant(NamedTuple):
    """A bug: in ``file`` of the package, ``old``, which stands there once, becomes ``new``; ``tests`` are to see it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Report(NamedTuple):
    """What pytest says of one phase of one test; of a failure, what it was, and the file where."""

    test: str
    when: str
    outcome: str
    error: str
    path: str

    @property
    def is_claim(self) -> bool:
        """Tell whether an assertion of the test failed, or the package refused; not what others warn of."""
        if (self.when, self.outcome) != ("call", "failed") or self.error.startswith(NO_FAILURE):
            return False
        return self.error.startswith(OWN) or "/copy/pyro_elbo_ext/" in self.path


class Result(NamedTuple):
    """One run of pytest: its exit status, what it says of each test, and the end of its output."""

    status: int
    reports: list[Report]
    output: str

    @property
    def failed(self) -> list[Report]:
        """Tests that failed of themselves, not in a fixture, and not of code that cannot run."""
        failed = [r for r in self.reports if (r.when, r.outcome) == ("call", "failed")]
        return [r for r in failed if not r.error.startswith(NO_FAILURE)] if self.status == 1 else []


def _plant(name: str, file: str, old: str, new: str, *tests: str) -> Plant:
    return Plant(name, file, old, new, tuple(f"tests/{test}" for test in tests))


PLANTS = (
    _plant(
        "scale N/B inside the log",
        "gradients/pathwise.py",
        "    objective = particles.total(bound(particles.log_weight))\n    if signal",
        "    objective = bound(particles.log_weight * particles.scale).sum() + particles.constant\n    if signal",
        "elbo/test_plates.py::test_a_minibatch_estimates_the_full_bound",
    ),
    _plant(
        "leave-one-out mean holds the particle itself",
        "bounds.py",
        "    return (before + after) / others\n",
        "    return log_w.mean(0).expand_as(log_w)\n",
        "test_bounds.py::test_leave_one_out_of_the_elbo_is_rloo",
        "gradients/test_score.py::test_bernoulli_toy",
    ),
    _plant(
        "parameters detached layer by layer",
        "particles.py",
        "        return run_pair(model, guide, self.args, self.kwargs, {**self._indices, **leaves})\n",
        "        held = {name: value.detach() for name, value in leaves.items()}\n"
        "        traces = run_guide(guide, self.args, self.kwargs, {**self._indices, **held})\n"
        "        for name, value in leaves.items():\n"
        "            traces.guide.nodes[name]['value'] = value\n"
        "        return run_model(model, self.args, self.kwargs, traces, self._indices)\n",
        "gradients/test_pathwise.py::test_two_layer_guide",
    ),
    _plant(
        "score of a site without a path left out",
        "particles.py",
        "                    own.append(_log_prob(name, node))\n",
        "                    own.append(_log_prob(name, node).detach())\n",
        "gradients/test_score.py::test_bernoulli_toy",
    ),
    _plant(
        "plates decided by the guide alone",
        "plates.py",
        "        if missing and key in dependents():\n",
        "        if missing and key[0] == 'guide' and key in dependents():\n",
        "elbo/test_plates.py::test_an_observation_outside_that_depends_on_the_plate_forces_the_joint_weight",
    ),
    _plant(
        "compiled step kept when a number changes",
        "run/compiled/call.py",
        "    return type(value), repr(value)\n",
        "    return (type(value),)\n",
        "run/test_compiled.py::test_what_a_step_depends_on_is_noticed",
    ),
    _plant(
        "package on disk found whatever its constants",
        "run/compiled/packages.py",
        "        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())\n",
        "",
        "run/test_compiled.py::test_packages_are_told_apart",
    ),
    _plant(
        "flow's density of its last draw given for another",
        "guides/distribution.py",
        "        if self._drawn is not None and value is self._drawn.value:\n            return self._drawn.log_prob",
        "        if self._drawn is not None and value.shape == self._drawn.value.shape:\n"
        "            return self._drawn.log_prob",
        "guides/test_flows.py::test_only_the_last_draw_is_kept",
    ),
    _plant(
        "sign of a score term swapped",
        "gradients/pathwise.py",
        "            surrogate = surrogate - (v * particles.scale * sampler.log_scores(draws, particles)[1]).sum()\n",
        "            surrogate = surrogate + (v * particles.scale * sampler.log_scores(draws, particles)[1]).sum()\n",
        "gradients/test_score.py::test_mixed_guide",
    ),
    _plant(
        "user's scale dropped",
        "plates.py",
        "        outside = outside if annealed else outside * user[0]\n",
        "",
        "elbo/test_plates.py::test_a_shared_scale_stands_outside_the_log",
    ),
    _plant(
        "mask ignored",
        "particles.py",
        'if node["mask"] is not None:',
        "if False:",
        "elbo/test_plates.py::test_masked_data",
    ),
    _plant(
        "every Delta at its own value",
        "particles.py",
        "    return places[0] == places[1]\n",
        "    return True\n",
        "elbo/test_subtle.py::test_a_point_is_told_from_another",
    ),
    _plant(
        "sum of weights for their mean",
        "bounds.py",
        "torch.logsumexp(log_w, dim=0) - math.log(log_w.shape[0])\n",
        "torch.logsumexp(log_w, dim=0)\n",
        "test_bounds.py::test_equal_weights_are_their_own_bound",
    ),
    _plant(
        "doubly reparameterised by v, not its square",
        "bounds.py",
        "        return torch.softmax(log_w, 0).square()\n",
        "        return torch.softmax(log_w, 0)\n",
        "test_bounds.py::test_closed_form_equals_differentiation",
        "gradients/test_pathwise.py::test_two_layer_guide",
    ),
    _plant(
        "Fisher information of a scale halved",
        "families/gaussian.py",
        '        return {"loc": grad["loc"], "precision": q["scale"] * grad["scale"]}\n',
        '        return {"loc": grad["loc"], "precision": 2 * q["scale"] * grad["scale"]}\n',
        "families/test_families.py::test_a_step_adds_the_expectation_gradient_to_the_natural_parameters",
        "natural/test_exact.py::test_one_step",
    ),
    _plant(
        "natural step uphill in the mean",
        "families/gaussian.py",
        '        return {"loc": q["loc"] - step * scale.square() * direction["loc"], "scale": scale}\n',
        '        return {"loc": q["loc"] + step * scale.square() * direction["loc"], "scale": scale}\n',
        "natural/test_exact.py::test_one_step",
    ),
    _plant(
        "trust region not looked at",
        "natural/blocks.py",
        "    possible = possible & (torch.isfinite(kl) if max_kl is None else kl <= max_kl)\n",
        "    possible = possible & torch.isfinite(kl)\n",
        "natural/test_optim.py::test_noisy_steps_stay_inside",
    ),
    _plant(
        "N/B missing where costs are regressed",
        "gradients/costs.py",
        '* (sites[0].sign * sites[0].node["scale"])\n',
        "* sites[0].sign\n",
        "elbo/test_regression.py::test_minibatches_average_to_the_full_gradient",
    ),
    _plant(
        "error of a regression from a fit to its own row",
        "gradients/gaussian.py",
        "    return torch.where(rest > SMALLEST_REST, errors / rest.clamp(min=SMALLEST_REST), 0.0)\n",
        "    return errors\n",
        "elbo/test_regression.py::test_gradient_is_the_elbos",
    ),
    _plant(
        "KL of a closed form the wrong way round",
        "elbo/mean_field.py",
        "    divergence = kl_divergence(*_comparable(name, by_key))\n    return",
        "    divergence = kl_divergence(*reversed(_comparable(name, by_key)))\n    return",
        "elbo/test_mean_field.py::test_auto_guides",
    ),
    _plant(
        "wake-sleep trains the guide downhill",
        "elbo/wake_sleep.py",
        "(v * finite(particles.log_joint)).sum() + self.insomnia * (v * particles.log_guide).sum()\n",
        "(v * finite(particles.log_joint)).sum() - self.insomnia * (v * particles.log_guide).sum()\n",
        "elbo/test_wake_sleep.py::test_golden_wake_phi",
    ),
    _plant(
        "antithetic pair drawn independently",
        "gradients/antithetic.py",
        "    return torch.bernoulli(torch.where(b == 1, after_one, after_zero))\n",
        "    return torch.bernoulli(p.expand_as(after_one))\n",
        "gradients/test_bernoulli.py::test_the_antithetic_pair_has_both_margins_and_the_right_joint",
    ),
    _plant(
        "k-hat of the smallest weights",
        "diagnostics/weights.py",
        "for column in (columns - columns.amax(0)).unbind(1)]\n",
        "for column in (columns.amin(0) - columns).unbind(1)]\n",
        "diagnostics/test_weights.py::test_tail_index_is_found",
    ),
    _plant(
        "smoothed weights not normalised",
        "diagnostics/weights.py",
        "    smoothed = smoothed - smoothed.logsumexp(0)\n",
        "",
        "diagnostics/test_weights.py::test_smoothed_weights_are_those_of_arviz",
    ),
    _plant(
        "chi bound without its root",
        "diagnostics/evidence.py",
        "    return float(draws.bound(log_mean_exp(order * draws.log_weight) / order))\n",
        "    return float(draws.bound(log_mean_exp(order * draws.log_weight)))\n",
        "diagnostics/test_evidence.py::test_chi_estimate",
    ),
    _plant(
        "leave-one-out ratios upside down",
        "arviz.py",
        "    ratios = (log_weight - log_likelihood).transpose",
        "    ratios = (log_weight + log_likelihood).transpose",
        "test_arviz.py::test_loo_of_a_global_latent",
    ),
    _plant(
        "exported draws mixed up with plates",
        "export/chains.py",
        "    return value.reshape(len(value), *shape)\n",
        "    return value.reshape(*shape, len(value)).movedim(-1, 0)\n",
        "test_arviz.py::test_values_are_the_pairs",
    ),
    _plant(
        "optimiser's state not restored",
        "run/checkpoint.py",
        '    svi.optim.set_state(content["optimizer"])\n',
        "",
        "run/test_checkpoint.py::test_an_interrupted_run_ends_as_the_uninterrupted",
    ),
    _plant(
        "random state not restored",
        "run/checkpoint.py",
        "        set_rng_state(rngs[rank])\n",
        "        pass\n",
        "run/test_checkpoint.py::test_an_interrupted_run_ends_as_the_uninterrupted",
    ),
    _plant(
        "gradients of processes summed",
        "run/distributed/averaging.py",
        "buffer.div_(total), has_grad)\n",
        "buffer, has_grad)\n",
        "run/test_distributed.py::test_two_processes",
    ),
    _plant(
        "embedding's rows not those of the minibatch",
        "guides/plated.py",
        "_along(plates[name].indices.to(self.table.device), dim)",
        "_along(torch.arange(len(plates[name].indices)), dim)",
        "guides/test_auto_guides.py::test_each_row_gets_its_own_whatever_the_minibatch",
    ),
    _plant(
        "log-determinant of a flow's last layer alone",
        "guides/zuko.py",
        "reduce(torch.add, ladjs).sum(-1)\n",
        "ladjs[-1].sum(-1)\n",
        "guides/test_flows.py::test_layers_do_what_zukos_own_composition_does",
    ),
    _plant(
        "Jacobian of positive coordinates not summed over their event",
        "guides/structure.py",
        "        return sum_rightmost(-u, latent.event_dim)\n",
        "        return -u\n",
        "guides/test_auto_guides.py::test_draws_lie_in_the_support_and_weigh_their_jacobian",
    ),
    _plant(
        "step taken though its gradient is not finite",
        "run/steps.py",
        "            for p in params.values():\n                p.grad = None\n",
        "",
        "run/test_fit.py::test_steps_that_are_not_finite_are_skipped_and_counted",
    ),
    _plant(
        "compiled step goes on from what is not finite",
        "run/compiled/step.py",
        "        ok = ok & torch.isfinite(loss) & torch.isfinite(grad).all()\n",
        "",
        "run/test_compiled.py::test_it_stops_before_a_step_that_is_not_finite",
    ),
    _plant(
        "compiled Adam without its first bias correction",
        "run/compiled/updates.py",
        "    return flat - rate / (1 - b1**count) * mean / spread, State(rate, count, (mean, square))\n",
        "    return flat - rate * mean / spread, State(rate, count, (mean, square))\n",
        "run/test_compiled_updates.py::test_the_update_is_the_optimisers",
    ),
    _plant(
        "a run that never stops by itself",
        "run/stopping.py",
        "        return self._quiet >= self.patience and self._end_stage(run)\n",
        "        return False\n",
        "run/test_stopping.py::test_it_ends_near_the_optimum_by_itself",
    ),
    _plant(
        "a run that stops at its first look",
        "run/stopping.py",
        "        return found.gain + found.gain_error < self.tol or self.halvings >= self.max_stages\n",
        "        return True\n",
        "run/test_stopping.py::test_a_gain_that_may_be_large_enough_does_not_stop",
    ),
    _plant(
        "rows of an epoch drawn with replacement",
        "run/minibatches.py",
        '        order = torch.randperm(self.num_rows, generator=self.generator, device="cpu")\n',
        "        size = (self.num_rows,)\n"
        '        order = torch.randint(self.num_rows, size, generator=self.generator, device="cpu")\n',
        "run/test_minibatches.py::test_an_epoch_has_every_row_at_most_once",
    ),
    _plant(
        "VIMCO's other particles hold the particle itself",
        "bounds.py",
        "torch.logaddexp(_log_sum_exp_of_others(log_w), _fill",
        "torch.logaddexp(log_w.logsumexp(0, keepdim=True), _fill",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
    _plant(
        "leave-one-out baseline holds the particle itself",
        "gradients/baselines.py",
        "        return (site.cost.sum(dim, keepdim=True) - site.cost) / (site.cost.shape[dim] - 1)",
        "        return site.cost.mean(dim, keepdim=True).expand_as(site.cost)",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
    _plant(
        "every plate factorised",
        "plates.py",
        "    kept = set(frames) - set(outsiders) if requested is None else set(requested)",
        "    kept = set(frames) if requested is None else set(requested)",
        "test_programs.py::test_known_programs_are_exact[an observation outside]",
    ),
    _plant(
        "sign of the scores swapped, of a bound",
        "gradients/pathwise.py",
        "    return (coefficient * sampler.log_scores(draws, particles)[0]).sum()",
        "    return -(coefficient * sampler.log_scores(draws, particles)[0]).sum()",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
    _plant(
        "sign of the scores swapped, of an average",
        "elbo/score_function.py",
        "        surrogate = (weight * coefficient * costs.scores[name]).sum() / self.num_particles",
        "        surrogate = -(weight * coefficient * costs.scores[name]).sum() / self.num_particles",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
    _plant(
        "mask ignored in the guide",
        "particles.py",
        'scale_and_mask(log_prob, 1.0, node["mask"])',
        'scale_and_mask(log_prob, 1.0, node["mask"] if origin == "model" else None)',
        "test_programs.py::test_known_programs_are_exact[rows masked, annealed]",
    ),
    _plant(
        "mask ignored in the model",
        "particles.py",
        'scale_and_mask(log_prob, 1.0, node["mask"])',
        'scale_and_mask(log_prob, 1.0, node["mask"] if origin == "guide" else None)',
        "test_programs.py::test_known_programs_are_exact[rows masked, annealed]",
    ),
    _plant(
        "user's scales by site dropped",
        "plates.py",
        "        inside = list(user) if annealed else [1.0] * len(user)",
        "        inside = [1.0] * len(user)",
        "test_programs.py::test_known_programs_are_exact[rows masked, annealed]",
    ),
    _plant(
        "discrete sites missing from the weight",
        "particles.py",
        "            scale = next(scales)\n",
        "            scale = next(scales)\n"
        "            if site.is_leaf and not is_reparameterized(site.node):\n"
        "                continue\n",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
    _plant(
        "N/B dropped",
        "plates.py",
        "    outside: float | Tensor = math.prod(plate_factor(f) for f in subsampled.values())",
        "    outside: float | Tensor = 1.0",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
    _plant(
        "share of the weight left out of a score",
        "gradients/pathwise.py",
        "surrogate = surrogate - (v * ",
        "surrogate = surrogate - 0 * (v * ",
        "test_programs.py::test_known_programs_are_exact[bits below a normal]",
    ),
    _plant(
        "cost of what depends on a site through others left out",
        "dependencies.py",
        "        if up & acting\n",
        "        if leaf in up\n",
        "test_programs.py::test_known_programs_are_exact[an observation outside]",
    ),
    _plant(
        "elements kept apart that a latent outside joins",
        "dependencies.py",
        "        key: frozenset(plate for plate, names in crossed.items() if up & names)",
        "        key: frozenset()",
        "test_programs.py::test_known_programs_are_exact[rows joined by a latent outside]",
    ),
    _plant(
        "wake-sleep's guide trained without N/B",
        "elbo/wake_sleep.py",
        "self.insomnia * (v * particles.log_guide).sum()",
        "self.insomnia * (v / particles.scale * particles.log_guide).sum()",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
    _plant(
        "VR-IWAE doubly reparameterised as IWAE",
        "bounds.py",
        "        return self.alpha * path + (1 - self.alpha) * path.square()",
        "        return path.square()",
        "test_programs.py::test_known_programs_are_exact[two layers]",
    ),
    _plant(
        "DisARM without its sigmoid",
        "gradients/antithetic.py",
        "    coefficient = 0.5 * bits.per_event(f - other) * (b - second) * logits.detach().abs().sigmoid()",
        "    coefficient = 0.5 * bits.per_event(f - other) * (b - second)",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
    _plant(
        "double control variate without its mean",
        "gradients/control_variates.py",
        "        control = bits.per_event(own - rest) * score - others * mu * (1 - mu)",
        "        control = bits.per_event(own - rest) * score",
        "test_programs.py::test_known_programs_are_exact[nested plates, minibatches]",
    ),
)

_HOOKS = """
def _make_inert():
    import torch
    from torch.optim import optimizer

    def keep(optim, args, kwargs):
        optim._kept = [(p, p.detach().clone()) for group in optim.param_groups for p in group["params"]]

    @torch.no_grad()
    def put_back(optim, args, kwargs):
        for p, value in optim.__dict__.pop("_kept"):
            p.copy_(value)

    optimizer.register_optimizer_step_pre_hook(keep)
    optimizer.register_optimizer_step_post_hook(put_back)


_make_inert()
"""

# Every step counts itself, remembers what it would, and leaves the parameters where they are.
INERT = (
    Plant("torch's optimisers, and Pyro's", "__init__.py", "__version__ = ", f"{_HOOKS}__version__ = ", ()),
    Plant("natural gradients", "natural/optim.py", "leaf.copy_(new[name])\n        mem", "pass\n        mem", ()),
    Plant(
        "compiled steps",
        "run/compiled/step.py",
        "        flat, own = update.step(own, carried[0], grad, entries)\n",
        "        flat, own = carried[0], update.step(own, carried[0], grad, entries)[1]\n",
        (),
    ),
    Plant(
        "autofit's Gaussian",
        "autofit/gaussian.py",
        "    return loc + triangle @ moved, triangle @ (axes * precision.rsqrt())\n",
        "    return loc, triangle\n",
        (),
    ),
)  # fmt: skip


def check_plant(plant: Plant, root: Path = ROOT) -> None:
    """Raise a ValueError where a bug's text is no longer there once, or a test that should see it is not there."""
    found = (root / "pyro_elbo_ext" / plant.file).read_text().count(plant.old)
    if found != 1:
        raise ValueError(
            f"plant '{plant.name}': its text stands {found} times in pyro_elbo_ext/{plant.file}, expected once. The "
            f"code has changed: plant the bug there anew.\n{plant.old}"
        )
    for test in plant.tests:
        file, _, name = test.partition("::")
        if not (root / file).is_file() or f"\ndef {name.partition('[')[0]}(" not in (root / file).read_text():
            raise ValueError(f"plant '{plant.name}': there is no test {test}. Name the one that now sees the bug.")


@contextmanager
def copied(root: Path, plants: Iterable[Plant] = ()) -> Iterator[Path]:
    """Copy the package and its tests into a folder of their own, with some bugs planted, which goes with them."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(root, copy, ignore=IGNORED)
        (copy / "witness.py").write_text(WITNESS)
        for plant in plants:
            path = copy / "pyro_elbo_ext" / plant.file
            path.write_text(path.read_text().replace(plant.old, plant.new))
        yield copy


def run_tests(copy: Path, tests: Sequence[str], *options: str) -> Result:
    """Run tests of a copy in a process of their own, which imports the copy's package and no other."""
    reports = copy.parent / f"{abs(hash((*tests, *options)))}.jsonl"
    own = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "PLANTED_REPORTS": str(reports)}
    own["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # which takes a second of every run
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | own
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "witness", "--tb=short"]
    command += [f"--rootdir={copy}", *options, *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=LIMIT)
        status, output = done.returncode, (done.stdout + done.stderr)[-2000:]
    except subprocess.TimeoutExpired:
        status, output = -1, f"not done after {LIMIT} seconds"
    lines = reports.read_text().splitlines() if reports.exists() else []
    return Result(status, [Report(*json.loads(line)) for line in lines], output)


def judge(plant: Plant, root: Path) -> tuple[bool, str]:
    """Plant one bug, and tell whether a test sees it, and which, or what happened instead."""
    with copied(root, [plant]) as copy:
        result = run_tests(copy, plant.tests, "-x")
    if result.failed:
        return True, result.failed[0].test
    why = "all its tests pass" if result.status == 0 else f"pytest ended with {result.status}: {result.output}"
    return False, why


def judge_file(copy: Path, file: str) -> list[tuple[bool, str]]:
    """Run a file's tests of convergence, and tell of each whether its claim failed, not something else."""
    result = run_tests(copy, [file], "-m", "convergence")
    last: dict[str, Report] = {}
    for report in (r for r in result.reports if r.outcome != "skipped"):
        if report.test not in last or report.outcome != "passed":
            last[report.test] = report
    found = []
    for test, report in last.items():
        told = test if report.is_claim or report.outcome == "passed" else f"{test}: {report.error[:200]}"
        found.append((report.is_claim, told))
    return found or [(False, f"{file}: no test was run, pytest ended with {result.status}: {result.output}")]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show_plants(plants: Sequence[Plant], root: Path, jobs: int) -> bool:
    """Plant bugs one by one; True if all were seen."""
    files: dict[str, dict[str, None]] = {}
    for test in (test for plant in plants for test in plant.tests):
        files.setdefault(test.partition("::")[0], {})[test] = None
    width, missed = max(len(plant.name) for plant in plants), 0
    with ThreadPoolExecutor(jobs) as pool:
        with copied(root) as copy:
            for sound in pool.map(lambda tests: run_tests(copy, list(tests)), files.values()):
                if sound.status != 0:
                    _say(f"tests fail without a bug: {sound.output}")
                    return False
        _say(f"without a bug the {sum(map(len, files.values()))} tests pass")
        for plant, (caught, what) in zip(plants, pool.map(lambda p: judge(p, root), plants), strict=True):
            missed += not caught
            _say(f"{'caught' if caught else 'MISSED'}  {plant.name:{width}}  {what}")
    _say(f"{len(plants) - missed} of {len(plants)} bugs were caught")
    return not missed


def show_inert(inert: Sequence[Plant], root: Path, jobs: int) -> bool:
    """Take the steps out; True if every test of convergence fails."""
    files = sorted(str(p.relative_to(root)) for p in (root / "tests").rglob("test_*.py") if _claims(p))
    failed = total = 0
    with copied(root, inert) as copy, ThreadPoolExecutor(jobs) as pool:
        for fails, test in (one for part in pool.map(lambda file: judge_file(copy, file), files) for one in part):
            failed, total = failed + fails, total + 1
            _say(f"{'fails ' if fails else 'MISSED'}  {test}")
    _say(f"without steps {failed} of {total} tests of convergence fail")
    return 0 < total == failed


def _claims(path: Path) -> bool:
    return "mark.convergence" in path.read_text() and path.name != "test_planted.py"


def main(
    arguments: Sequence[str] | None = None,
    root: Path = ROOT,
    plants: Sequence[Plant] = PLANTS,
    inert: Sequence[Plant] = INERT,
) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the bugs, and plant none")
    parser.add_argument("--only", action="append", metavar="NAME", help="bugs to plant; 'inert' for the steps")
    parser.add_argument("--jobs", type=int, default=2, help="runs of pytest at once (default: 2)")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {"inert", *(plant.name for plant in plants)}
    if unknown:
        parser.error(f"there is no bug {', '.join(map(repr, sorted(unknown)))}: see --list")
    for plant in (*plants, *inert):
        check_plant(plant, root)
    if options.list:
        for plant in plants:
            _say(f"{plant.name}  ({plant.file})")
        return 0
    chosen = [plant for plant in plants if not options.only or plant.name in options.only]
    fine = show_plants(chosen, root, options.jobs) if chosen else True
    if not options.only or "inert" in options.only:
        fine = show_inert(inert, root, options.jobs) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
