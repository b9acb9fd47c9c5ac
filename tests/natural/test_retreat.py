"""When a step is taken back: for an overshoot, not for a conjugate step, and never after the opening."""

import math

import torch

from pyro_elbo_ext.natural.retreat import judge, no_trail


def path(factor, steps, opening, noise=0.0):
    """Follow x <- x - step * (x + noise) * factor on x^2 factor / 2; return the last x and how many were taken back."""
    x = torch.tensor([1.0])
    trail, retreats = no_trail({"x": x}, x), 0
    for _ in range(steps):
        gradient = factor * (x + noise * torch.randn(1))
        rise = gradient * (x - trail.natural["x"])
        verdict = judge(trail, rise, opening)
        retreats += int(verdict.retreated)
        step = verdict.trail.limit.clamp(max=1.0)
        if verdict.retreated:
            new = trail.natural["x"] + verdict.kept * (x - trail.natural["x"])
            trail = verdict.trail._replace(fall=verdict.kept * trail.fall)
        else:
            new = x - step * gradient
            trail = verdict.trail._replace(natural={"x": x}, fall=step * gradient**2, step=step, clock=trail.clock + 1)
        x = new
    return float(x), retreats


def test_a_quadratic_loss_is_held_at_any_curvature():
    for factor in (1.0, 1.9, 2.5, 5.0, 50.0):
        end, retreats = path(factor, 50, opening=True)
        assert abs(end) < 1e-2
        assert (retreats > 0) == (factor > 2)


def test_nothing_is_taken_back_after_the_opening():
    """But a rise that has outgrown the fall for long makes steps shorter, until they converge."""
    end, retreats = path(2.2, 300, opening=False)
    assert retreats == 0
    assert abs(end) < 1


def test_noise_does_not_hold_the_step_down():
    torch.manual_seed(0)
    x = torch.tensor([1.0])
    trail = no_trail({"x": x}, x)._replace(limit=torch.tensor([1e-4]), fall=torch.ones(1), step=torch.tensor([1e-4]))
    for _ in range(400):
        after = judge(trail, torch.randn(1) * trail.fall, opening=False).trail
        trail = after._replace(step=after.limit.clamp(max=1.0))
    assert trail.limit > 0.1


def test_the_first_step_is_not_judged():
    trail = no_trail({"x": torch.zeros(2)}, torch.zeros(2))
    verdict = judge(trail, torch.tensor([math.inf, 1.0]), opening=True)
    assert not verdict.retreated.any()
    assert torch.isinf(verdict.trail.limit).all()
