"""The losses where something records their calls: torch.compile without a break, torch.export, make_fx, selective checkpoints."""

import functools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minillm.kernels import operators, traced
from minillm.losses import (
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_objective,
    linear_token_stats,
)


def objective(stats, advantage):
    return advantage * stats.reward.detach() * stats.student_logprob + stats.jsd, {"kl": stats.reverse_kl}


def coupled(stats, advantage):
    return (advantage * stats.student_logprob).sum(-1).square()


def head_of(case):
    return case.arguments[1]


def advantages(hidden):
    return torch.linspace(-1.0, 2.0, hidden.shape[0] * hidden.shape[1], device=hidden.device).view(hidden.shape[:2])


# Every function, each way to a gradient, and what changes the operator's arguments; `close`: sums over all tokens at once
CALLS = {
    "mean": lambda h, c: linear_divergence(h, head_of(c), *c.arguments[2:4], labels=c.labels, divergence="jsd"),
    "sum": lambda h, c: linear_divergence(h, head_of(c), *c.arguments[2:4], divergence="tvd", reduction="sum"),
    "none": lambda h, c: linear_divergence(h, head_of(c), *c.arguments[2:4], labels=c.labels, reduction="none").mean(),
    "num_items": lambda h, c: linear_cross_entropy(h, head_of(c), c.labels, num_items=torch.tensor(7)),
    "logprobs": lambda h, c: linear_logprobs(h, head_of(c), c.labels, temperature=0.7).square().sum(),
    "statistics": lambda h, c: linear_token_stats(h, *c.arguments[1:], fields=("skew_reverse_kl",)).skew_reverse_kl.sum(),
    "reward": lambda h, c: linear_token_stats(h, *c.arguments[1:]).reward.square().sum(),
    "top k": lambda h, c: linear_divergence(
        h, head_of(c), TopK(c.labels.clamp(0)[..., None], c.teacher_hidden[..., :1].sigmoid().log()), None
    ),
    "sum of heads": lambda h, c: linear_cross_entropy((h, h * 2), LMHead.sum_of(head_of(c), head_of(c)), c.labels),
    "autocast": lambda h, c: under_autocast(h, c),
    "tiled": lambda h, c: linear_divergence(h, head_of(c), *c.arguments[2:4], labels=c.labels, backend="tiled"),
    "objective": lambda h, c: linear_objective(
        h, *c.arguments[1:], objective, inputs={"advantage": advantages(h)},
        fields=("student_logprob", "teacher_logprob", "reverse_kl", "jsd"),
    )[0],
    "coupled": lambda h, c: linear_objective(
        h, *c.arguments[1:], coupled, inputs={"advantage": advantages(h)}, fields=("student_logprob",), coupled=True
    )[0],
}  # fmt: skip


def under_autocast(hidden, case):
    with torch.autocast(hidden.device.type, torch.bfloat16):
        return linear_divergence(
            hidden, head_of(case), *case.arguments[2:4], labels=case.labels, divergence="forward_kl"
        )


@pytest.fixture
def case(kit):
    return kit.make_case(rows=(3, 5), bias=True, student_options={"softcap": 5.0, "logit_scale": 0.5})


def loss_and_gradients(function, case):
    loss = function(case.student_hidden)
    return (loss, *torch.autograd.grad(loss, list(case.leaves.values())))


@pytest.mark.parametrize("name", CALLS)
def test_a_full_graph_gives_the_same_bits(name, case, kit):
    """aot_eager runs the operators as the graph has them; what inductor makes of a graph is not the losses'."""
    if name == "tiled" and "triton" not in kit.backends:
        pytest.skip("triton is not installed")

    def step(hidden):
        return CALLS[name](torch.tanh(hidden), case)

    expected = loss_and_gradients(step, case)
    torch._dynamo.reset()
    found = loss_and_gradients(torch.compile(step, backend="aot_eager", fullgraph=True), case)
    for one, other in zip(found, expected, strict=True):
        if name in ("objective", "coupled"):  # sums over all tokens instead of chunks
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)


def test_inductor_compiles_a_model_with_its_loss_and_takes_its_steps():
    class Distilled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.layer = torch.nn.Embedding(71, 16), torch.nn.Linear(16, 16)
            self.register_buffer("teacher", torch.randn(71, 16))

        def forward(self, ids, labels):
            embedded = self.embedding(ids)
            student = LMHead(self.embedding.weight, softcap=5.0)  # tied
            return linear_divergence(torch.tanh(self.layer(embedded)), student, embedded, self.teacher, labels=labels)

    def train(compiled: bool) -> list[float]:
        model, losses = Distilled(), []
        run = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            ids = torch.randint(0, 71, (2, 6), generator=torch.Generator().manual_seed(seed))
            loss = run(ids, torch.where(ids % 3 == 0, -100, ids))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    torch._dynamo.reset()
    torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=1e-7)


def test_another_number_of_tokens_or_of_ignored_ones_compiles_nothing_new(kit):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=count, fullgraph=True, dynamic=True)
    for rows, ignored in ((6, 0), (9, 2), (9, 9), (17, 3)):
        hidden, weight = torch.randn(rows, 8), torch.randn(19, 8)
        labels = torch.arange(rows).masked_fill(torch.arange(rows) < ignored, -100)
        assert torch.equal(compiled(hidden, weight, labels), step(hidden, weight, labels))
    assert len(graphs) == 1


def test_errors_are_those_of_the_eager_functions(case):
    def step(hidden, labels):
        return linear_cross_entropy(hidden, head_of(case), labels)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"labels has shape \(3, 4\), expected \(3, 5\)"):  # while shapes are traced
        compiled(case.student_hidden, case.labels[:, :4])
    with pytest.raises(ValueError, match=r"1 of \d+ kept labels are outside \[0, 113\)"):  # when it runs
        compiled(case.student_hidden, case.labels.index_fill(1, torch.tensor([0]), -100).index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(113)))  # fmt: skip


def test_a_tensor_to_add_into_breaks_the_graph_and_says_why(case):
    main = torch.zeros_like(case.student_weight, requires_grad=False)

    def step(hidden):
        return linear_cross_entropy(hidden * 1, head_of(case), case.labels, weight_grad=main)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="weight_grad is a tensor that the backward pass adds to"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(case.student_hidden)
    torch.compile(step, backend="aot_eager")(case.student_hidden).backward()
    expected = torch.autograd.grad(
        linear_cross_entropy(case.student_hidden, head_of(case), case.labels), case.student_weight
    )
    assert torch.equal(main, expected[0])


class Scored(torch.nn.Module):
    """A layer, a head and their losses, for an export."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 113)

    def forward(self, hidden, labels):
        states = self.layer(hidden)
        stats = linear_token_stats(states, self.head, None, None, labels)
        return linear_cross_entropy(states, self.head, labels), stats.student_logprob, stats.student_argmax


@pytest.mark.parametrize("strict", [False, True])
def test_a_forward_pass_is_exported_for_any_number_of_tokens(strict, kit):
    case = kit.make_case(rows=12, device="cpu")
    model, inputs = Scored(), (case.student_hidden.detach(), case.labels)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    assert {"minillm.statistic_sum.default", "minillm.statistics.default"} <= {
        str(node.target) for node in program.graph.nodes
    }
    fewer = tuple(tensor[:5] for tensor in inputs)
    for given in (inputs, fewer):
        for found, expected in zip(program.module()(*given), model(*given), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_forward_and_backward_pass(mode, case):
    def step(hidden, weight, teacher_hidden, teacher_weight, labels):
        stats = linear_token_stats(hidden, weight, teacher_hidden, teacher_weight, labels, fields=("reverse_kl",))
        loss = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels=labels) + stats.reverse_kl.sum()
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    inputs = case.student_hidden, case.student_weight, case.teacher_hidden, case.teacher_weight, case.labels
    graph = make_fx(step, tracing_mode=mode)(*inputs)
    names = [str(node.target) for node in graph.graph.nodes if "minillm" in str(node.target)]
    assert names == [f"minillm.{name}.default" for name in ("statistics", "statistic_sum", "statistics_gradient")]
    for found, expected in zip(graph(*inputs), step(*inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
def test_a_selective_checkpoint_saves_the_loss_or_computes_it_again(policy, case):
    runs = []

    def choose(context, operator, *arguments, **options):
        if operator is torch.ops.minillm.statistic_sum.default:
            runs.append(context.is_recompute)
            return policy
        return CheckpointPolicy.PREFER_RECOMPUTE

    def step(hidden):
        return CALLS["mean"](torch.tanh(hidden), case).square()

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    found = loss_and_gradients(lambda h: checkpoint(step, h, use_reentrant=False, context_fn=contexts), case)
    for one, other in zip(found, loss_and_gradients(step, case), strict=True):
        assert torch.equal(one, other)
    assert False in runs  # the policy was asked about it as one operator


@pytest.mark.parametrize("name", ["statistics", "statistic_sum"])
def test_the_operators_are_what_they_say(name, case):
    """torch's own checks: schema, autograd, shapes without numbers, and dynamic shapes through the compiler's autograd."""
    fields = ("reverse_kl", "student_logprob", "student_argmax") if name == "statistics" else ("jsd",)
    options = {"ignore_index": -100, "temperature": 1.0, "weight_grad": "fp32", "backend": "auto"}
    options |= {"vocab_size": None, "kept": None, "chunk_bytes": None}
    arguments = traced._arguments(*case.arguments, fields, options)
    after = (1.0,) if name == "statistic_sum" else ()
    torch.library.opcheck(getattr(operators, name), (*arguments, *after))


def test_cuda_graphs_leave_the_operators_out():
    """Without `kept` they wait for the device, which nothing may do while a graph is captured."""
    for name in ("statistics", "statistics_gradient", "statistic_sum"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.minillm, name).default.tags
