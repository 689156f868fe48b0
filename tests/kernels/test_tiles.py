"""The recomputed gradient of the no-logits engine: several tiles of ids and rows, against float64, and what it holds."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")

from minillm.kernels.chunks import TILE_IDS  # noqa: E402
from minillm.losses import linear_cross_entropy, linear_divergence  # noqa: E402
from tests.kernels.contract import (  # noqa: E402
    GRADIENT,
    assert_close,
    coefficients,
    expected_gradients,
    gradients,
    stats_of,
)
from tests.kernels.live import Live  # noqa: E402

OFFERED = ("student_logprob", "reverse_kl", "forward_kl", "student_entropy")
VOCAB = TILE_IDS + 300  # a whole tile and a remnant
SMALL = 2 * 4 * TILE_IDS * 4  # bytes of logits: four rows a tile
OPTIONS = {
    "plain": {},
    "everything": {
        "bias": True,
        "temperature": 0.7,
        "student_options": {"logit_scale": 0.6, "softcap": 6.0},
        "teacher_options": {"logit_scale": 1.2},
    },
    "vocab_size": {"teacher_vocab": VOCAB + 9, "vocab_size": TILE_IDS + 1, "bias": True},
    "less than a tile": {"vocab": 50},
    "one id": {"vocab": 1},
}


def make(kit, **options):
    return kit.make_case(**{"rows": 11, "vocab": VOCAB, **options})


def loss_of(case, weights, **options):
    stats = stats_of(case, "tiled", fields=tuple(weights), **options)
    return sum((weight * getattr(stats, name).flatten()).sum() for name, weight in weights.items())


def weights_of(case, names=OFFERED):
    chosen = coefficients(case)
    return {name: chosen[name] for name in names}


@pytest.mark.parametrize("chunk_bytes", [None, SMALL])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_of_all_statistics_at_once(options, chunk_bytes, kit):
    case = make(kit, **OPTIONS[options])
    weights = weights_of(case)
    loss = loss_of(case, weights, chunk_bytes=chunk_bytes)
    loss64, expected = expected_gradients(case, weights, kit)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    actual = gradients(loss, case)
    if case.student_weight.shape[0] == 1:  # nothing to choose from
        assert all(gradient.abs().max() < 1e-5 for gradient in actual.values())
    else:
        assert_close(actual, expected, GRADIENT, kit)


@pytest.mark.parametrize("name", OFFERED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_gradient(name, dtype, kit):
    case = make(kit, dtype=dtype, bias=True)
    weights = weights_of(case, (name,))
    actual = gradients(loss_of(case, weights, chunk_bytes=SMALL), case)
    assert all(gradient.dtype == dtype for gradient in actual.values())
    assert_close(actual, expected_gradients(case, weights, kit)[1], GRADIENT if dtype == torch.float32 else 5e-3, kit)


def test_the_losses_that_go_through_it(kit):
    case = make(kit)
    for loss, name, sign in (
        (linear_cross_entropy(*case.arguments[:2], case.labels, backend="tiled"), "student_logprob", -1.0),
        (linear_divergence(*case.arguments[:4], labels=case.labels, backend="tiled"), "reverse_kl", 1.0),
    ):
        weights = {name: torch.full((11,), sign / int(case.kept.sum()), device=kit.device)}
        loss64, expected = expected_gradients(case, weights, kit)
        assert loss.item() == pytest.approx(loss64.item(), rel=1e-5)
        assert_close(gradients(loss, case), expected, GRADIENT, kit)


def test_ids_that_both_ban(kit):
    """A whole tile of them, and a label in the other one."""
    case = make(kit, bias=True, ignored=0.0)
    for bias in (case.student_bias, case.teacher_bias):
        bias.data[:TILE_IDS] = -torch.inf
    case.labels[:] = TILE_IDS + case.labels % 300
    weights = weights_of(case)
    actual = gradients(loss_of(case, weights), case)
    assert (actual["weight"][:TILE_IDS] == 0).all() and (actual["bias"][:TILE_IDS] == 0).all()
    allowed = case.with_(
        student_weight=case.student_weight.detach()[TILE_IDS:].requires_grad_(),
        student_bias=case.student_bias.detach()[TILE_IDS:].requires_grad_(),
        teacher_weight=case.teacher_weight[TILE_IDS:],
        teacher_bias=case.teacher_bias[TILE_IDS:],
        labels=case.labels - TILE_IDS,
    )
    expected = expected_gradients(allowed, weights, kit)[1]
    assert kit.relative_error(actual["hidden"], expected["hidden"]) < GRADIENT
    assert kit.relative_error(actual["weight"][TILE_IDS:], expected["weight"]) < GRADIENT


@pytest.mark.parametrize("options", OPTIONS)
def test_the_statistics_are_those_of_the_engine_without_a_gradient(options, kit):
    """And of the reference: sums of a tile of ids each, from logits that another product made."""
    case = make(kit, **OPTIONS[options])
    fields = (*OFFERED, "teacher_logprob", "teacher_entropy", "student_argmax", "teacher_argmax")
    expected, _ = kit.oracle(case)
    found = stats_of(case, "tiled", fields=fields, chunk_bytes=SMALL)
    with torch.no_grad():
        other = stats_of(case, "tiled", fields=fields)
    for name in fields:
        value = getattr(found, name)
        torch.testing.assert_close(value[case.kept], expected[name].to(value.dtype), rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(value, getattr(other, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("banned", [slice(0, TILE_IDS), 5, TILE_IDS + 7])
def test_ids_that_one_model_bans(who, banned, kit):
    """A whole tile or one id of it: one KL is infinite, and it alone."""
    case = make(kit, bias=True, ignored=0.0)
    (case.student_bias if who == "student" else case.teacher_bias).data[banned] = -torch.inf
    case.labels[:] = TILE_IDS + 9
    found = stats_of(case, "tiled", fields=OFFERED)
    infinite = "forward_kl" if who == "student" else "reverse_kl"
    assert (getattr(found, infinite) == torch.inf).all()
    expected, leaves = kit.oracle(case)
    finite = [name for name in OFFERED if name != infinite]
    for name in finite:
        torch.testing.assert_close(getattr(found, name), expected[name].float(), rtol=3e-6, atol=3e-6)
    loss = sum(getattr(found, name).sum() for name in finite)
    exact = torch.autograd.grad(sum(expected[name].sum() for name in finite), list(leaves.values()))
    assert_close(gradients(loss, case), dict(zip(leaves, exact, strict=True)), GRADIENT, kit)


def test_nan_stays_in_its_row(kit):
    case = make(kit, ignored=0.0)
    case.student_hidden.data[3, 2] = torch.nan
    found = stats_of(case, "tiled", fields=OFFERED)
    for name in OFFERED:
        assert getattr(found, name).isnan().nonzero().tolist() == [[3]], name
    assert gradients(found.reverse_kl.sum(), case)["hidden"].isnan().all(1).nonzero().tolist() == [[3]]


def test_peaked_rows_keep_the_digits_of_their_small_gradients(kit):
    """Logits in the hundreds and a teacher that is close: statistics of other roundings would be off by 3%."""
    case = make(kit, rows=16, hidden=256, teacher_hidden=256, spread=100.0, noise=1e-3, ignored=0.0)
    weights = {"reverse_kl": torch.ones(16, device=kit.device)}
    expected = expected_gradients(case, weights, kit)[1]["hidden"]
    errors = {}
    for backend in ("triton", "tiled"):
        loss = stats_of(case, backend, fields=("reverse_kl",)).reverse_kl.sum()
        errors[backend] = kit.relative_error(gradients(loss, case)["hidden"], expected)
    assert errors["tiled"] < 3 * errors["triton"] < 3e-3, errors


@pytest.mark.parametrize("rows", [0, 7])
def test_nothing_kept_is_a_connected_zero(rows, kit):
    case = make(kit, rows=rows, ignored=1.0, bias=True)
    loss = loss_of(case, weights_of(case))
    assert loss.item() == 0
    for name, gradient in gradients(loss, case).items():
        assert gradient.shape == case.leaves[name].shape and (gradient == 0).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant, kit):
    """The gradient of the loss itself is the same to the last bit. What is made of it afterwards is so only where the
    forward pass knows of the gradient: a reentrant checkpoint's does not, and takes the engine that has none.
    """
    case = make(kit)
    weights = weights_of(case)

    def gradient(further, through_checkpoint):
        def step(hidden):
            return loss_of(case.with_(student_hidden=hidden), weights)

        run = (lambda hidden: checkpoint(step, hidden, use_reentrant=reentrant)) if through_checkpoint else step
        case.student_hidden.grad = None
        further(run(case.student_hidden * 1.0)).backward()
        return case.student_hidden.grad

    assert torch.equal(gradient(lambda loss: loss, True), gradient(lambda loss: loss, False))
    squared = [gradient(torch.square, through) for through in (True, False)]
    assert kit.relative_error(*squared) < 1e-5 if reentrant else torch.equal(*squared)


def test_only_what_requires_grad_gets_one(kit):
    case = make(kit)
    weights = weights_of(case)
    expected = gradients(loss_of(case, weights), case)
    for name in ("hidden", "weight"):
        frozen = case.with_(
            student_hidden=case.student_hidden.detach().requires_grad_(name == "hidden"),
            student_weight=case.student_weight.detach().requires_grad_(name == "weight"),
        )
        loss_of(frozen, weights).backward()
        assert torch.equal(frozen.leaves[name].grad, expected[name])
        other = frozen.leaves["weight" if name == "hidden" else "hidden"]
        assert other.grad is None


def test_two_passes_and_no_double_backward(kit):
    case = make(kit, bias=True)
    weights = weights_of(case)
    once = gradients(loss_of(case, weights), case)
    loss = loss_of(case, weights)
    for _ in range(2):
        (-2.5 * loss).backward(retain_graph=True)
    for name, leaf in case.leaves.items():
        assert kit.relative_error(leaf.grad, -5 * once[name]) < GRADIENT
    first = torch.autograd.grad(loss, case.student_hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no double backward"):
        first.sum().backward()


@pytest.mark.parametrize(("dtype", "start"), [(torch.float32, 2.0), (torch.bfloat16, 0.0)])
def test_into_a_tensor_of_the_caller(dtype, start, kit):
    """In fp32, unrounded: what a main_grad is for."""
    case = make(kit, dtype=torch.bfloat16, vocab_size=TILE_IDS + 5)
    weights = weights_of(case, ("reverse_kl",))
    main = torch.full_like(case.student_weight, start, dtype=dtype, requires_grad=False)
    loss_of(case, weights, weight_grad=main).backward()
    assert case.student_weight.grad is None and (main[TILE_IDS + 5 :] == start).all()
    exact = expected_gradients(case, weights, kit)[1]
    # a GPU's products take the logits' gradient in bf16
    tolerance = 1e-5 if dtype == torch.float32 and kit.device == "cpu" else 5e-3
    assert kit.relative_error(main - start, exact["weight"]) < tolerance
    assert kit.relative_error(case.student_hidden.grad, exact["hidden"]) < 5e-3


def test_under_autocast(kit):
    case = make(kit)
    rounded = case.with_(
        student_hidden=case.student_hidden.detach().bfloat16().requires_grad_(),
        student_weight=case.student_weight.detach().bfloat16().requires_grad_(),
        teacher_hidden=case.teacher_hidden.bfloat16(),
        teacher_weight=case.teacher_weight.bfloat16(),
    )
    weights = weights_of(case, ("reverse_kl",))
    with torch.autocast(kit.device, torch.bfloat16):
        loss = loss_of(case, weights)
    actual = gradients(loss, case)
    assert all(gradient.dtype == torch.float32 for gradient in actual.values())
    # a GPU's products take the logits' gradient in bf16
    tolerance = 1e-5 if kit.device == "cpu" else 5e-3
    assert_close(actual, expected_gradients(rounded, weights, kit)[1], tolerance, kit)


def test_tiles_change_only_rounding_and_runs_change_nothing(kit):
    case = make(kit, rows=19)
    weights = weights_of(case)
    whole = gradients(loss_of(case, weights), case)
    assert_close(gradients(loss_of(case, weights, chunk_bytes=SMALL), case), whole, 2e-6, kit)
    again = gradients(loss_of(case, weights), case)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("weight_grad", ["fp32", "bf16"])
def test_what_it_holds_beside_the_gradients(weight_grad, kit):
    """A tile of logits, the sum of a slice of the weight, the sum of the hidden states: nothing of the vocabulary's size."""
    case = make(kit, rows=64, vocab=4 * TILE_IDS, hidden=24, ignored=0.0)
    loss = loss_of(case, weights_of(case, ("reverse_kl",)), chunk_bytes=SMALL, weight_grad=weight_grad)
    with Live() as live:
        loss.backward()
    returned = sum(leaf.grad.nbytes for leaf in case.leaves.values())
    expected = SMALL + TILE_IDS * 24 * 4 + 64 * 24 * 4
    assert case.student_weight.grad.nbytes > SMALL + TILE_IDS * 24 * 4  # or the test would show nothing
    assert returned < live.peak < returned + 1.1 * expected
