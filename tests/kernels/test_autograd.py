"""How the fused losses sit in autograd: factors, second passes, checkpoints, tied weights, autocast, compiled models."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from minillm.losses import TopK, linear_divergence, linear_objective, linear_token_stats
from tests.kernels.top_k import sparse


@pytest.fixture(params=["hidden states", "top k"])
def make_case(request, kit):
    """Cases with a teacher of either kind."""
    return kit.make_case if request.param == "hidden states" else lambda **options: sparse(kit.make_case(**options), 7)


def losses(case):
    """Every way to a gradient: in the forward pass from one or two passes over the logits, and in the backward pass."""
    return {
        "objective": lambda: linear_objective(*case.arguments, lambda stats: stats.jsd, fields=("jsd",))[0],
        "coupled": lambda: linear_objective(
            *case.arguments, lambda stats: stats.jsd, fields=("jsd",), coupled=True, chunk_bytes=3000
        )[0],
        "token_stats": lambda: linear_token_stats(*case.arguments, fields=("jsd",)).jsd.sum(),
        "mean": lambda: linear_divergence(*case.arguments[:4], labels=case.labels, divergence="jsd"),
    }


KINDS = ["objective", "coupled", "token_stats", "mean"]


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_upstream_factor_and_two_backward_passes(kind, factor, make_case, kit):
    case = make_case(bias=True)
    once = torch.autograd.grad(losses(case)[kind](), list(case.leaves.values()))
    loss = losses(case)[kind]()
    for _ in range(2):  # grads accumulate: nothing saved may be scaled in place
        loss.backward(torch.tensor(factor, device=kit.device), retain_graph=True)
    for leaf, gradient in zip(case.leaves.values(), once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * factor * gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_raises(kind, make_case, kit):
    case = make_case()
    leaves = list(case.leaves.values())
    first = torch.autograd.grad(losses(case)[kind](), leaves, create_graph=True)
    assert all(gradient.requires_grad for gradient in first)
    with pytest.raises(RuntimeError, match="no double backward"):
        sum(gradient.square().sum() for gradient in first).backward()
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(first[0].sum() + leaves[0].sum(), leaves)
    plain = torch.autograd.grad(losses(case)[kind](), leaves)
    for gradient, expected in zip(first, plain, strict=True):
        assert torch.equal(gradient.detach(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(kind, reentrant, make_case, kit):
    case = make_case()
    layer = torch.nn.Linear(16, 16).to(kit.device)

    def step(hidden):
        moved = case.with_(student_hidden=layer(hidden))
        return losses(moved)[kind]()

    runs = []
    for run in (step, lambda hidden: checkpoint(step, hidden, use_reentrant=reentrant)):
        leaves = [case.student_hidden, case.student_weight, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        run(case.student_hidden).backward()
        runs.append([leaf.grad.clone() for leaf in leaves])
    for plain, saved in zip(*runs, strict=True):
        assert torch.equal(plain, saved) and plain.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings_sum_their_gradients(kind, make_case, kit):
    case = make_case()
    ids = torch.randint(0, 113, (13,), device=kit.device)

    def gradient(run):
        weight = case.student_weight.detach().clone().requires_grad_()
        embedded = torch.nn.functional.embedding(ids, weight)
        losses(case.with_(student_hidden=embedded, student_weight=run(weight)))[kind]().backward()
        return weight.grad

    tied, embedding = gradient(lambda weight: weight), gradient(lambda weight: weight.detach())
    embedded = torch.nn.functional.embedding(ids, case.student_weight.detach())
    weight = case.student_weight.detach().clone().requires_grad_()
    losses(case.with_(student_hidden=embedded, student_weight=weight))[kind]().backward()
    torch.testing.assert_close(tied, embedding + weight.grad)


def test_micro_batches_add_up_to_the_batch(kit):
    case = kit.make_case(rows=24, ignored=0.4)
    whole = linear_divergence(*case.arguments[:4], labels=case.labels)
    whole.backward()
    expected = [leaf.grad.clone() for leaf in case.leaves.values()]
    total = int(case.kept.sum())
    for kind, num_items in (("int", total), ("tensor", torch.tensor(total, device=kit.device))):
        for leaf in case.leaves.values():
            leaf.grad = None
        parts = []
        for part in (slice(0, 5), slice(5, 16), slice(16, 24)):
            piece = case.with_(
                student_hidden=case.student_hidden[part],
                teacher_hidden=case.teacher_hidden[part],
                labels=case.labels[part],
            )
            parts.append(linear_divergence(*piece.arguments[:4], labels=piece.labels, num_items=num_items))
            parts[-1].backward()
        torch.testing.assert_close(sum(parts), whole, msg=kind)
        for leaf, gradient in zip(case.leaves.values(), expected, strict=True):
            torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("kind", ["objective", "coupled", "token_stats"])
@pytest.mark.parametrize("weight_grad", ["bf16", "tensor"])
def test_where_the_weight_gradient_goes(kind, weight_grad, make_case, kit):
    case = make_case(dtype=torch.bfloat16, bias=True, vocab_size=100)
    exact = torch.autograd.grad(losses_with(case, kind), list(case.leaves.values()))
    # what a main_grad must get and bf16's 8 bits cannot hold; a GPU's products take dz in bf16
    wide = case.doubled()
    unrounded = torch.autograd.grad(losses_with(wide, kind), wide.student_weight)[0]
    tolerance = 1e-5 if kit.device == "cpu" else 5e-3
    main = torch.full_like(case.student_weight, 2.0, dtype=torch.float32, requires_grad=False)
    loss = losses_with(case, kind, weight_grad="bf16" if weight_grad == "bf16" else main)
    for repeat in (1, 2):
        (3 * loss).backward(retain_graph=True)
        if weight_grad == "bf16":
            assert kit.relative_error(case.student_weight.grad, 3 * repeat * exact[1]) < 2e-2
        else:
            assert case.student_weight.grad is None
            assert kit.relative_error(main - 2, 3 * repeat * unrounded) < tolerance
        assert kit.relative_error(case.student_hidden.grad, 3 * repeat * exact[0]) < 1e-2
        assert kit.relative_error(case.student_bias.grad, 3 * repeat * exact[2]) < 1e-2


def losses_with(case, kind, **options):
    options |= {"fields": ("reverse_kl",), "vocab_size": case.vocab_size}
    if kind == "coupled":
        options |= {"coupled": True, "chunk_bytes": 3000}
    if kind in ("objective", "coupled"):
        return linear_objective(*case.arguments, lambda stats: stats.reverse_kl, **options)[0]
    return linear_token_stats(*case.arguments, **options).reverse_kl.sum()


@pytest.mark.parametrize("kind", ["objective", "coupled", "token_stats"])
def test_under_autocast_as_a_linear_layer_would(kind, kit):
    """bf16 operands, fp32 logits, gradients in the dtypes of the inputs."""
    case = kit.make_case(rows=20, bias=True)
    rounded = case.with_(
        student_hidden=case.student_hidden.detach().bfloat16().requires_grad_(),
        student_weight=case.student_weight.detach().bfloat16().requires_grad_(),
        teacher_hidden=case.teacher_hidden.bfloat16(),
        teacher_weight=case.teacher_weight.bfloat16(),
    )
    mixed = case.with_(student_hidden=rounded.student_hidden)  # bf16 activations on fp32 weights
    expected, leaves = kit.oracle(rounded)
    exact = torch.autograd.grad(expected["reverse_kl"].sum(), list(leaves.values()))
    for inputs in (case, mixed):
        with torch.autocast(kit.device, torch.bfloat16):
            loss = losses_with(inputs, kind)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected["reverse_kl"].sum().item(), rel=1e-5)
        actual = torch.autograd.grad(loss, list(inputs.leaves.values()))
        for leaf, found, wanted in zip(inputs.leaves.values(), actual, exact, strict=True):
            assert found.dtype == leaf.dtype
            assert kit.relative_error(found, wanted) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_compiled_model(kind, make_case, kit):
    case = make_case()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, hidden):
            moved = case.with_(student_hidden=torch.tanh(self.layer(hidden)))
            return losses(moved)[kind]() * 2

    model = Model().to(kit.device)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        loss = run(case.student_hidden)
        results.append((loss, *torch.autograd.grad(loss, [*case.leaves.values(), *model.parameters()])))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize("kind", ["objective", "coupled", "token_stats"])
def test_a_top_k_from_inference_mode(kind, kit):
    case = sparse(kit.make_case(rows=12), 7)
    expected = torch.autograd.grad(losses_with(case, kind), list(case.leaves.values()))
    with torch.inference_mode():
        case.top_k = TopK(case.top_k.ids * 1, case.top_k.logprobs * 1)
    for found, wanted in zip(
        torch.autograd.grad(losses_with(case, kind), list(case.leaves.values())), expected, strict=True
    ):
        assert torch.equal(found, wanted)
    with torch.inference_mode():
        assert losses_with(case, kind).isfinite()


@pytest.mark.parametrize("kind", ["objective", "coupled", "token_stats"])
def test_a_teacher_from_inference_mode(kind, kit):
    case = kit.make_case(rows=12)
    with torch.inference_mode():
        states, weight, labels = case.teacher_hidden * 1, case.teacher_weight * 1, case.labels * 1
    made = case.with_(teacher_hidden=states, teacher_weight=weight, labels=labels)
    expected = torch.autograd.grad(losses_with(case, kind), list(case.leaves.values()))
    for found, wanted in zip(
        torch.autograd.grad(losses_with(made, kind), list(made.leaves.values())), expected, strict=True
    ):
        assert torch.equal(found, wanted)
    with torch.inference_mode():
        assert losses_with(made, kind) == losses_with(case, kind).detach()
