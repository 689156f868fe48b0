"""What the tests of the fused losses' contract share: tolerances, losses of all statistics at once, and their gradients.

Tolerances are the project's correctness protocol; the oracle is reference.py on full logits with autograd.
"""

import torch

from minillm.losses import linear_objective, linear_token_stats

STATS, GRADIENT = 1e-6, 1e-5  # relative L2, fp32 inputs
FIELDS = (
    "student_logprob",
    "teacher_logprob",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "interpolated_cross_entropy",
)
ENTRIES = ["objective", "token_stats"]  # the ways to a loss of several statistics; "coupled" is a third
DIFFERENTIABLE = tuple(name for name in FIELDS if not name.startswith("teacher"))


def coefficients(case, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(case.labels.numel(), generator=generator).to(case.labels.device) for name in DIFFERENTIABLE
    }


def stats_of(case, backend, **options):
    return linear_token_stats(*case.arguments, backend=backend, **{**case.options, **options})


def objective_of(case, backend, weights, **options):
    def objective(stats, **weights):
        return sum(weight * getattr(stats, name) for name, weight in weights.items())

    options = {**case.options, "fields": tuple(weights), **options}
    return linear_objective(*case.arguments, objective, inputs=weights, backend=backend, **options)[0]


def loss_by(entry, case, backend, weights, **options):
    if entry != "token_stats":
        return objective_of(case, backend, weights, coupled=entry == "coupled", **options)
    stats = stats_of(case, backend, fields=tuple(weights), **options)
    return sum((weight * getattr(stats, name).flatten()).sum() for name, weight in weights.items())


def gradients(loss, case):
    leaves = case.leaves
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def expected_gradients(case, weights, kit):
    expected, leaves = kit.oracle(case)
    loss = sum((weights[name][case.kept].double() * expected[name]).sum() for name in weights)
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_close(actual, expected, tolerance, kit):
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert kit.relative_error(actual[name], value) < tolerance, name


def assert_statistics(stats, expected, kept, fields, kit):
    """`fields` and both argmaxes are the oracle's in kept rows, 0 or -1 elsewhere."""
    for name in fields:
        value = getattr(stats, name)
        assert value.dtype == torch.float32 and (value[~kept] == 0).all(), name
        assert kit.relative_error(value[kept], expected[name]) < STATS, name
    for name in ("student_argmax", "teacher_argmax"):
        value = getattr(stats, name)
        assert value.dtype == torch.int64 and (value[~kept] == -1).all(), name
        assert torch.equal(value[kept], expected[name]), name


def central_differences(value, at):
    """d value(x) / d x at `at` in float64, element by element."""
    at = at.detach().double()
    result = torch.zeros_like(at)
    for index in range(result.numel()):
        shift = torch.zeros_like(result)
        shift.view(-1)[index] = 1e-5
        result.view(-1)[index] = (value(at + shift) - value(at - shift)) / 2e-5
    return result
