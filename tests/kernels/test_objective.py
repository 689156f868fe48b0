"""linear_objective: inputs, metrics, the number of GEMMs, and how it sits in autograd."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from minillm.losses import linear_cross_entropy, linear_divergence, linear_objective, linear_token_stats

FIELDS = ("student_logprob", "reverse_kl")


def policy(stats, advantage, old):
    ratio = (stats.student_logprob - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped) + stats.reverse_kl
    return loss, {"ratio": ratio, "clipped": (ratio != clipped)}


def policy_inputs(case):
    with torch.no_grad():
        old = linear_token_stats(*case.arguments, fields=("student_logprob",)).student_logprob
    generator = torch.Generator().manual_seed(1)
    noise, advantage = torch.randn(2, *case.labels.shape, generator=generator).to(old.device)
    return {"advantage": advantage, "old": old + 0.3 * noise}


def test_minillms_loss_matches_float64(backend, kit):
    """The clipped policy gradient with the exact single-step reverse KL: MiniLLM's loss in one pass."""
    case = kit.make_case(rows=(3, 7))
    inputs = policy_inputs(case)
    loss, metrics = linear_objective(
        *case.arguments, policy, inputs=inputs, fields=FIELDS, backend=backend, chunk_bytes=5000
    )
    expected, leaves = kit.oracle(case)

    class Stats:
        student_logprob, reverse_kl = expected["student_logprob"], expected["reverse_kl"]

    kept = {name: value.flatten()[case.kept].double() for name, value in inputs.items()}
    loss64, metrics64 = policy(Stats, **kept)
    assert loss.item() == pytest.approx(loss64.sum().item(), rel=1e-6)
    assert set(metrics) == {"ratio", "clipped"}
    for name, value in metrics.items():
        assert value.shape == () and not value.requires_grad
        assert value.item() == pytest.approx(metrics64[name].double().sum().item(), rel=1e-5)
    assert 0 < metrics["clipped"] < case.kept.sum()
    exact = torch.autograd.grad(loss64.sum(), list(leaves.values()))
    for found, wanted in zip(torch.autograd.grad(loss, list(case.leaves.values())), exact, strict=True):
        assert kit.relative_error(found, wanted) < 1e-5


def test_inputs_of_any_dtype_are_cut_along(kit):
    case = kit.make_case(rows=(2, 6))
    rows = case.labels.numel()
    inputs = {"index": torch.arange(rows).view(2, 6), "even": torch.arange(rows) % 2 == 0}
    seen = []

    def objective(stats, index, even):
        seen.append((index, even, stats.student_argmax))
        return torch.where(even, stats.reverse_kl, 0.0) * index

    loss, metrics = linear_objective(*case.arguments, objective, inputs=inputs, chunk_bytes=2 * 4 * 113 * 2)
    assert metrics == {} and len(seen) > 2
    index = torch.cat([chunk[0] for chunk in seen])
    assert torch.equal(index, case.kept.nonzero()[:, 0])
    assert torch.equal(torch.cat([chunk[1] for chunk in seen]), index % 2 == 0)
    stats = linear_token_stats(*case.arguments)
    assert torch.equal(torch.cat([chunk[2] for chunk in seen]), stats.student_argmax.flatten()[index])
    expected = (stats.reverse_kl.flatten() * torch.arange(rows) * (torch.arange(rows) % 2 == 0)).sum()
    torch.testing.assert_close(loss, expected)


def test_without_a_teacher_and_without_labels(kit):
    case = kit.make_case(ignored=0.0)
    hidden, head, labels = case.arguments[0], case.arguments[1], case.labels
    fields = []

    def objective(stats):
        fields.append(stats.fields)
        return -stats.student_logprob

    loss, _ = linear_objective(hidden, head, None, None, labels, objective)
    assert fields[0] == ("student_logprob", "student_entropy", "student_argmax")
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(hidden @ head.weight.t(), labels, reduction="sum")
    )
    entropy, _ = linear_objective(hidden, head, None, None, None, lambda stats: stats.student_entropy)
    expected = torch.distributions.Categorical(logits=hidden @ head.weight.t()).entropy().sum()
    torch.testing.assert_close(entropy, expected)
    entropy.backward()
    assert case.student_hidden.grad.abs().sum() > 0


def test_a_constant_objective_is_connected(kit):
    case = kit.make_case()
    loss, _ = linear_objective(*case.arguments, lambda stats: torch.ones_like(stats.reverse_kl))
    loss.backward()
    assert loss.item() == case.kept.sum() and (case.student_weight.grad == 0).all()


def test_metrics_keep_their_names_without_rows(kit):
    case = kit.make_case(ignored=1.0)
    _, metrics = linear_objective(*case.arguments, policy, inputs=policy_inputs(case), fields=FIELDS)
    assert {name: value.item() for name, value in metrics.items()} == {"ratio": 0.0, "clipped": 0.0}


class CountGemms(TorchDispatchMode):
    """Multiply-adds in units of rows x vocabulary, apart for each hidden size."""

    def __init__(self):
        super().__init__()
        self.products = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name.rstrip("_") in ("mm", "addmm"):
            a, b = [value for value in arguments if isinstance(value, torch.Tensor) and value.dim() == 2][-2:]
            size = a.shape[0] * a.shape[1] * b.shape[1]
            hidden = min(a.shape[0] * a.shape[1], a.shape[1] * b.shape[1])
            self.products.setdefault(hidden, 0)
            self.products[hidden] += size
            self.total = getattr(self, "total", 0) + size
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("frozen", "student", "teacher"),
    [((), 3, 1), (("weight",), 2, 1), (("hidden",), 2, 1), (("hidden", "weight"), 1, 1)],
)
def test_three_student_gemms_and_one_teacher_gemm(frozen, student, teacher, kit):
    """And none for what is frozen; rows that are ignored count for nothing."""
    case = kit.make_case(rows=40, hidden=16, teacher_hidden=24, ignored=0.5)
    for name in frozen:
        case.leaves[name].requires_grad_(False)
    with CountGemms() as count:
        loss, _ = linear_objective(*case.arguments, lambda stats: stats.reverse_kl, fields=("reverse_kl",))
        if loss.requires_grad:
            loss.backward()
    rows = int(case.kept.sum())
    assert count.total == rows * 113 * (16 * student + 24 * teacher)
    assert loss.requires_grad == (len(frozen) < 2)
    for name, leaf in case.leaves.items():
        assert (leaf.grad is None) == (name in frozen)


def test_no_gemm_for_gradients_under_no_grad(kit):
    case = kit.make_case(rows=40, ignored=0.0)
    with CountGemms() as count, torch.no_grad():
        loss, _ = linear_objective(*case.arguments, lambda stats: stats.reverse_kl)
        linear_token_stats(*case.arguments)
    assert count.total == 2 * 40 * 113 * (16 + 24) and not loss.requires_grad


def test_token_stats_recompute(kit):
    case = kit.make_case(rows=40, ignored=0.0)
    with CountGemms() as count:
        linear_token_stats(*case.arguments).reverse_kl.sum().backward()
    assert count.total == 40 * 113 * (16 * 4 + 24 * 2)


# -- autograd --------------------------------------------------------------------------------------


def losses(case):
    """Both kinds of gradient: computed in the forward pass, and recomputed."""
    return {
        "objective": lambda: linear_objective(*case.arguments, lambda stats: stats.jsd, fields=("jsd",))[0],
        "token_stats": lambda: linear_token_stats(*case.arguments, fields=("jsd",)).jsd.sum(),
        "mean": lambda: linear_divergence(*case.arguments[:4], labels=case.labels, divergence="jsd"),
    }


KINDS = ["objective", "token_stats", "mean"]


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_upstream_factor_and_two_backward_passes(kind, factor, kit):
    case = kit.make_case(bias=True)
    once = torch.autograd.grad(losses(case)[kind](), list(case.leaves.values()))
    loss = losses(case)[kind]()
    for _ in range(2):  # grads accumulate: nothing saved may be scaled in place
        loss.backward(torch.tensor(factor, device=kit.device), retain_graph=True)
    for leaf, gradient in zip(case.leaves.values(), once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * factor * gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_raises(kind, kit):
    case = kit.make_case()
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
def test_under_activation_checkpointing(kind, reentrant, kit):
    case = kit.make_case()
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
def test_tied_embeddings_sum_their_gradients(kind, kit):
    case = kit.make_case()
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


@pytest.mark.parametrize("kind", ["objective", "token_stats"])
@pytest.mark.parametrize("weight_grad", ["bf16", "tensor"])
def test_where_the_weight_gradient_goes(kind, weight_grad, kit):
    case = kit.make_case(dtype=torch.bfloat16, bias=True, vocab_size=100)
    exact = torch.autograd.grad(losses_with(case, kind), list(case.leaves.values()))
    main = torch.full_like(case.student_weight, 2.0, dtype=torch.float32, requires_grad=False)
    loss = losses_with(case, kind, weight_grad="bf16" if weight_grad == "bf16" else main)
    for repeat in (1, 2):
        (3 * loss).backward(retain_graph=True)
        if weight_grad == "bf16":
            assert kit.relative_error(case.student_weight.grad, 3 * repeat * exact[1]) < 2e-2
        else:
            assert case.student_weight.grad is None
            assert kit.relative_error(main - 2, 3 * repeat * exact[1]) < 5e-3
        assert kit.relative_error(case.student_hidden.grad, 3 * repeat * exact[0]) < 1e-2
        assert kit.relative_error(case.student_bias.grad, 3 * repeat * exact[2]) < 1e-2


def losses_with(case, kind, **options):
    options |= {"fields": ("reverse_kl",), "vocab_size": case.vocab_size}
    if kind == "objective":
        return linear_objective(*case.arguments, lambda stats: stats.reverse_kl, **options)[0]
    return linear_token_stats(*case.arguments, **options).reverse_kl.sum()


@pytest.mark.parametrize("kind", ["objective", "token_stats"])
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
def test_inside_a_compiled_model(kind, kit):
    case = kit.make_case()

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


def test_cross_entropy_rides_along(kit):
    case = kit.make_case(rows=20)
    mixed, _ = linear_objective(*case.arguments, lambda stats: 0.3 * stats.forward_kl - 0.7 * stats.student_logprob)
    parts = 0.3 * linear_divergence(
        *case.arguments[:4], labels=case.labels, divergence="forward_kl", reduction="sum"
    ) + 0.7 * linear_cross_entropy(*case.arguments[:2], case.labels, reduction="sum")
    torch.testing.assert_close(mixed, parts)
    for left, right in zip(*(torch.autograd.grad(x, list(case.leaves.values())) for x in (mixed, parts)), strict=True):
        assert kit.relative_error(left, right) < 1e-5
