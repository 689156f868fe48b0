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
