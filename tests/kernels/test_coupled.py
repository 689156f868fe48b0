"""linear_objective(..., coupled=True): sums over answers, pairs and groups, over one chunk and over many."""

import pytest
import torch
import torch.nn.functional as F

from minillm.losses import linear_objective, linear_token_stats
from tests.kernels.contract import assert_close, coefficients, expected_gradients, gradients, objective_of
from tests.kernels.gemms import CountGemms

MANY = 2 * 4 * 113 * 5  # bytes of logits: five rows a chunk
FIELDS = ("student_logprob", "teacher_logprob", "reverse_kl")


def preference(stats, beta=0.3):
    """DPO's loss of the first half of the answers over the second, the teacher being the reference; one value a pair."""
    margin = beta * (stats.student_logprob - stats.teacher_logprob).sum(-1)
    half = margin.shape[0] // 2
    wins = margin[:half] - margin[half:]
    return -F.logsigmoid(wins) + 0.1 * stats.reverse_kl.mean(), {
        "wins": wins > 0,
        "margin": wins,
        "kl": stats.reverse_kl,
    }


class Namespace:
    def __init__(self, values):
        self.__dict__.update(values)


def every_row(case, expected):
    """The oracle's statistics of kept rows in the layout of the labels, 0 elsewhere."""
    kept = case.kept.nonzero()[:, 0]
    flat = {name: torch.zeros(case.labels.numel(), dtype=torch.float64, device=kept.device) for name in FIELDS}
    return Namespace(
        {name: zero.index_copy(0, kept, expected[name]).view_as(case.labels) for name, zero in flat.items()}
    )


@pytest.mark.parametrize("chunk_bytes", [None, MANY])
@pytest.mark.parametrize("options", [{}, {"bias": True, "temperature": 0.7, "student_options": {"softcap": 6.0}}])
def test_a_loss_of_pairs_matches_float64(options, chunk_bytes, backend, kit):
    case = kit.make_case(rows=(4, 6), **options)
    case.labels[2] = -100  # an answer of which nothing is kept
    loss, metrics = linear_objective(
        *case.arguments,
        preference,
        fields=FIELDS,
        coupled=True,
        backend=backend,
        chunk_bytes=chunk_bytes,
        **case.options,
    )
    expected, leaves = kit.oracle(case)
    loss64, metrics64 = preference(every_row(case, expected))
    assert loss.shape == () and loss.item() == pytest.approx(loss64.sum().item(), rel=1e-6)
    assert set(metrics) == set(metrics64)
    for name, value in metrics.items():
        assert (
            value.item() == pytest.approx(metrics64[name].double().sum().item(), rel=1e-5) and not value.requires_grad
        )
    exact = torch.autograd.grad(loss64.sum(), list(leaves.values()))
    assert_close(gradients(loss, case), dict(zip(leaves, exact, strict=True)), 1e-5, kit)


def test_groups_by_an_input(backend, kit):
    """Flat tokens, the answer of each as an input; ignored tokens have 0 in every input."""
    case = kit.make_case(rows=20, ignored=0.4)
    answer = torch.arange(20, device=kit.device) // 5
    seen = {}

    def objective(stats, answer, one):
        seen.update(answer=answer, one=one, argmax=stats.student_argmax, kl=stats.reverse_kl)
        length = torch.zeros(4, device=one.device).index_add(0, answer, one)
        mean = torch.zeros(4, device=one.device).index_add(0, answer, stats.student_logprob) / length.clamp(min=1)
        return mean.square()

    loss, _ = linear_objective(
        *case.arguments,
        objective,
        inputs={"answer": answer, "one": torch.ones(20, device=kit.device)},
        fields=(*FIELDS, "student_argmax"),
        coupled=True,
        backend=backend,
        chunk_bytes=MANY,
    )
    kept = case.kept
    assert torch.equal(seen["one"].bool(), kept) and torch.equal(seen["answer"], torch.where(kept, answer, 0))
    assert (seen["argmax"] == -1).tolist() == (seen["kl"] == 0).tolist() == (~kept).tolist()
    expected, leaves = kit.oracle(case)
    groups = answer[kept]
    mean = torch.stack([expected["student_logprob"][groups == group].mean() for group in groups.unique()])
    assert loss.item() == pytest.approx(mean.square().sum().item(), rel=1e-6)
    exact = torch.autograd.grad(mean.square().sum(), list(leaves.values()))
    assert_close(gradients(loss, case), dict(zip(leaves, exact, strict=True)), 1e-5, kit)


@pytest.mark.parametrize("chunk_bytes", [None, MANY])
def test_independent_tokens_are_the_sum_over_kept_ones(chunk_bytes, backend, kit):
    """What a row by row objective returns of ignored tokens counts for nothing, be it 1, infinite or NaN."""
    case = kit.make_case(rows=(3, 5), ignored=0.5)
    old = torch.where(case.labels == -100, -torch.inf, -3.0)

    def objective(stats, old):
        ratio = (stats.student_logprob - old).exp()
        return ratio + stats.reverse_kl.log(), {"ratio": ratio}

    options = dict(inputs={"old": old}, fields=FIELDS, backend=backend, chunk_bytes=chunk_bytes)
    (one, metrics), (many, by_row) = (
        linear_objective(*case.arguments, objective, coupled=coupled, **options) for coupled in (True, False)
    )
    torch.testing.assert_close(one, many)
    torch.testing.assert_close(metrics, by_row)
    assert_close(gradients(one, case), gradients(many, case), 1e-6, kit)


@pytest.mark.parametrize("chunk_bytes", [None, MANY])
def test_the_gradient_of_all_statistics_at_once(chunk_bytes, backend, kit):
    case = kit.make_case(bias=True)
    weights = coefficients(case)
    loss = objective_of(case, backend, weights, coupled=True, chunk_bytes=chunk_bytes)
    assert_close(gradients(loss, case), expected_gradients(case, weights, kit)[1], 1e-5, kit)


@pytest.mark.parametrize(
    ("reads", "chunk_bytes", "student", "teacher"),
    [
        (("reverse_kl",), MANY, 4, 2),
        (("student_logprob",), MANY, 4, 1),  # its gradient reads nothing of the teacher
        (("reverse_kl",), None, 3, 1),  # a chunk holds all rows
    ],
)
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden", "weight")])
def test_one_product_more(frozen, reads, chunk_bytes, student, teacher, kit):
    case = kit.make_case(rows=40, hidden=16, teacher_hidden=24, ignored=0.5)
    for name in frozen:
        case.leaves[name].requires_grad_(False)
    with CountGemms() as count:
        loss, _ = linear_objective(
            *case.arguments,
            lambda stats: sum(getattr(stats, name) for name in reads).sum(),
            fields=FIELDS,
            coupled=True,
            chunk_bytes=chunk_bytes,
        )
        if loss.requires_grad:
            loss.backward()
    student, teacher = (1, 1) if len(frozen) == 2 else (student - len(frozen), teacher)
    assert count.total == int(case.kept.sum()) * 113 * (16 * student + 24 * teacher)
    assert loss.requires_grad == (len(frozen) < 2)


@pytest.mark.parametrize("rows", [0, 7])
def test_nothing_kept_is_a_connected_zero(rows, backend, kit):
    case = kit.make_case(rows=rows, ignored=1.0, bias=True)
    loss, metrics = linear_objective(
        *case.arguments,
        lambda stats: (-F.logsigmoid(stats.reverse_kl.sum()), {"kl": stats.reverse_kl, "one": torch.ones(())}),
        fields=FIELDS,
        coupled=True,
        backend=backend,
    )
    assert loss.item() == metrics["kl"].item() == metrics["one"].item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, case).values())


def test_fp16_coefficients_of_any_size(backend, kit):
    """A mean over many tokens, which fp16 products would lose, as the gradient of a scaled loss would overflow."""
    case = kit.make_case(dtype=torch.float16, ignored=0.0)
    expected, leaves = kit.oracle(case)
    for factor in (1e-6, 1e4):
        loss, _ = linear_objective(
            *case.arguments,
            lambda stats, factor=factor: factor * stats.reverse_kl.mean(),
            fields=FIELDS,
            coupled=True,
            backend=backend,
            chunk_bytes=MANY,
        )
        # unscaled by what scaled the objective, as a gradient scaler would
        found = gradients(loss / factor, case)
        exact = torch.autograd.grad(expected["reverse_kl"].mean(), list(leaves.values()), retain_graph=True)
        assert_close(found, dict(zip(leaves, exact, strict=True)), 1e-3, kit)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda stats: None, "objective must return a floating-point tensor.*got NoneType"),
        (lambda stats: stats.student_argmax, "objective must return a floating-point tensor.*int64"),
        (lambda stats: (stats.reverse_kl.sum(), {"m": 1.0}), "metric 'm' must be a tensor.*float"),
    ],
)
def test_wrong_results(objective, message, kit):
    with pytest.raises(ValueError, match=message):
        linear_objective(*kit.make_case(rows=4).arguments, objective, coupled=True)


def test_a_trained_tensor_from_elsewhere_is_refused(kit):
    scale = torch.ones((), requires_grad=True, device=kit.device)
    with pytest.raises(ValueError, match="objective depends on a tensor that requires grad"):
        linear_objective(*kit.make_case(rows=4).arguments, lambda s: scale * s.reverse_kl.sum(), coupled=True)


def test_it_is_what_statistics_with_a_graph_give(backend, kit):
    case = kit.make_case(rows=(4, 5), bias=True)
    loss, _ = linear_objective(*case.arguments, preference, fields=FIELDS, coupled=True, backend=backend)
    stats = linear_token_stats(*case.arguments, fields=FIELDS, backend=backend)
    other = preference(stats)[0].sum()
    torch.testing.assert_close(loss, other)
    assert_close(gradients(loss, case), gradients(other, case), 1e-6, kit)
