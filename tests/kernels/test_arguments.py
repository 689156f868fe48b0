"""Errors of the shared arguments: each names the argument and says what to do."""

import numpy
import pytest
import torch

from minillm.losses import (
    LMHead,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_objective,
    linear_token_stats,
)

N, V = 6, 20


def base():
    generator = torch.Generator().manual_seed(0)
    return {
        "student_hidden": torch.randn(N, 4, generator=generator),
        "student_head": LMHead(torch.randn(V, 4, generator=generator)),
        "teacher_hidden": torch.randn(N, 5, generator=generator),
        "teacher_head": LMHead(torch.randn(V, 5, generator=generator)),
        "labels": torch.randint(0, V, (N,), generator=generator),
    }


def call(**changes):
    return linear_token_stats(**{**base(), **changes})


class Adapter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = torch.nn.Linear(4, V)


def shard(**attributes):
    weight = torch.nn.Parameter(torch.empty(0))
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


WRONG = {
    "hidden is no tensor": (dict(student_hidden=[1.0]), "student_hidden must be a floating-point tensor"),
    "hidden is integers": (dict(student_hidden=torch.ones(N, 4, dtype=torch.int64)), "student_hidden must be a float"),
    "hidden size": (dict(student_hidden=torch.ones(N, 3)), "student_hidden has hidden size 3, but student_head.w"),
    "hidden dtype": (dict(student_hidden=torch.ones(N, 4).bfloat16()), "student_head.weight is torch.float32, but st"),
    "teacher dtype": (dict(teacher_hidden=torch.ones(N, 5).half()), "teacher_head.weight is torch.float32, but te"),
    "teacher size": (dict(teacher_hidden=torch.ones(N, 4)), "teacher_hidden has hidden size 4"),
    "teacher rows": (dict(teacher_hidden=torch.ones(N + 1, 5)), "teacher_hidden has leading dimensions"),
    "teacher head missing": (dict(teacher_head=None), "teacher_hidden and teacher_head go together"),
    "labels shape": (dict(labels=torch.zeros(N + 1, dtype=torch.int64)), r"labels has shape \(7,\), expected \(6,\)"),
    "labels dtype": (dict(labels=torch.zeros(N)), "labels must be an integer tensor"),
    "labels complex": (dict(labels=torch.zeros(N, dtype=torch.complex128)), "labels must be an integer tensor.*complex"),
    "labels a list": (dict(labels=[0] * N), "labels must be an integer tensor, got list"),
    "ignore_index None": (dict(ignore_index=None), "ignore_index must be an integer.*got None"),
    "ignore_index a string": (dict(ignore_index="-100"), "ignore_index must be an integer.*got '-100'"),
    "ignore_index a fraction": (dict(ignore_index=1.5), "ignore_index must be an integer"),
    "ignore_index beyond 64 bits": (dict(ignore_index=2**63), "ignore_index must fit into 64 bits"),
    "ignore_index a truth": (dict(ignore_index=True), "ignore_index must be an integer"),
    "kept a string": (dict(kept="6"), "kept must be an integer from 0 to 6.*got '6'"),
    "kept too many": (dict(kept=N + 1), "kept must be an integer from 0 to 6"),
    "kept negative": (dict(kept=-1), "kept must be an integer from 0 to 6"),
    "kept without labels": (dict(kept=2, labels=None), "kept is 2, but without labels all 6 tokens count"),
    "fields a number": (dict(fields=5), "fields must be names of statistics, got a int"),
    "fields nested": (dict(fields=[["reverse_kl"]]), r"fields: unknown statistic \['reverse_kl'\]"),
    "labels bool": (dict(labels=torch.zeros(N, dtype=torch.bool)), "labels must be an integer tensor"),
    "labels too large": (dict(labels=torch.full((N,), V)), r"labels: 6 of 6 kept labels are outside \[0, 20\)"),
    "labels negative": (dict(labels=torch.full((N,), -1)), "set them to ignore_index=-100"),
    "labels beyond a cut": (dict(labels=torch.full((N,), 15), vocab_size=15), r"outside \[0, 15\)"),
    "vocabularies": (dict(teacher_head=torch.ones(V + 3, 5)), "student_head has 20 .* has 23.*vocab_size=20"),
    "vocab_size too large": (dict(vocab_size=V + 1), "vocab_size=21 must be an integer between 1 and 20"),
    "vocab_size zero": (dict(vocab_size=0), "vocab_size=0 must be an integer between"),
    "weight shape": (dict(student_head=torch.ones(4)), r"student_head.weight must be \(V, H\)"),
    "bias shape": (dict(student_head=LMHead(torch.ones(V, 4), torch.ones(4))), r"student_head.bias has shape \(4,\)"),
    "bias dtype": (dict(student_head=LMHead(torch.ones(V, 4), torch.ones(V).double())), "student_head.bias is torch"),
    "LoRA module": (dict(student_head=Adapter()), "student_head is wrapped by an adapter.*Adapter; merge it"),
    "module without a weight": (dict(teacher_head=torch.nn.Tanh()), "teacher_head is a Tanh without a weight"),
    "something else": (dict(teacher_head="lm_head"), r"teacher_head is a str.*LMHead.of\(model\)"),
    "LoRA inside": (dict(student_head=LMHead(Adapter())), "student_head.weight is a Adapter, not a tensor"),
    "ZeRO-3": (dict(student_head=LMHead(shard(ds_numel=80))), "student_head.weight is a ZeRO-3 shard.*pass the parameter"),
    "empty weight": (dict(student_head=torch.ones(0, 4)), "not empty"),
    "unknown field": (dict(fields=("kl",)), "fields: unknown statistic 'kl'"),
    "no field": (dict(fields=()), "fields names no statistic"),
    "field without teacher": (
        dict(teacher_hidden=None, teacher_head=None, fields=("reverse_kl",)),
        "fields: reverse_kl needs the teacher",
    ),
    "field without labels": (dict(labels=None, fields=("student_logprob",)), "fields: student_logprob needs labels"),
    "beta": (dict(beta=1.0), "beta must lie strictly between 0 and 1"),
    "alpha": (dict(alpha=0.0), "alpha must lie strictly between 0 and 1"),
    "temperature": (dict(temperature=0.0), "temperature must be a positive finite number"),
    "softcap": (dict(student_head=LMHead(torch.ones(V, 4), softcap=-1.0)), "student_head.softcap must be a positive"),
    "scale": (dict(teacher_head=LMHead(torch.ones(V, 5), logit_scale=0.0)), "teacher_head.logit_scale must be a pos"),
    "backend": (dict(backend="cuda"), "backend must be one of auto, torch, triton"),
    "chunk_bytes no integer": (dict(chunk_bytes=1.5), "chunk_bytes must be a positive integer, got 1.5"),
    "vocab_size no integer": (dict(vocab_size=10.5), "vocab_size=10.5 must be an integer"),
    "temperature no number": (dict(temperature="x"), "temperature must be a positive finite number, got 'x'"),
    "chunk_bytes": (dict(chunk_bytes=0), "chunk_bytes must be a positive integer"),
    "weight_grad": (dict(weight_grad="fp8"), "weight_grad must be 'fp32', 'bf16' or a tensor"),
    "weight_grad shape": (dict(weight_grad=torch.zeros(4, V)), r"weight_grad is a tensor of shape \(4, 20\)"),
    "weight_grad integers": (dict(weight_grad=torch.zeros(V, 4, dtype=torch.int64)), "weight_grad must be a floating"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64])
def test_labels_of_any_integer_type(dtype):
    labels = base()["labels"]
    found = call(labels=labels.to(dtype), ignore_index=int(labels[0]))
    expected = call(labels=labels, ignore_index=numpy.int64(labels[0]))  # a number of numpy's counts as one
    assert torch.equal(found.student_logprob, expected.student_logprob) and found.student_logprob[0] == 0


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    changes, message = WRONG[what]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(**changes)


def test_a_real_dtensor():
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.ones(V, 4), init_device_mesh("cpu", (1,)), [Replicate()])
        sharded, plain = call(student_head=weight), call(student_head=torch.ones(V, 4))
        assert torch.equal(sharded.reverse_kl, plain.reverse_kl)
    finally:
        dist.destroy_process_group()


def test_devices_must_agree():
    with pytest.raises(ValueError, match="labels is on meta"):
        call(labels=base()["labels"].to("meta"))
    with pytest.raises(ValueError, match="student_head.weight is on meta"):
        call(student_head=torch.ones(V, 4, device="meta"))
    with pytest.raises(ValueError, match="teacher_hidden is on meta"):
        call(teacher_hidden=torch.ones(N, 5, device="meta"), teacher_head=torch.ones(V, 5, device="meta"))


def test_names_follow_the_entry_point():
    arguments = base()
    hidden, head, labels = arguments["student_hidden"], arguments["student_head"], arguments["labels"]
    for function in (linear_logprobs, linear_cross_entropy):
        with pytest.raises(ValueError, match="^hidden has hidden size 3, but head.weight"):
            function(hidden[:, :3], head, labels)
    four = [arguments[name] for name in ("student_hidden", "student_head", "teacher_hidden", "teacher_head")]
    with pytest.raises(ValueError, match="divergence must be one of forward_kl, reverse_kl, jsd"):
        linear_divergence(*four, divergence="kl")
    with pytest.raises(ValueError, match="teacher_hidden and teacher_head must be given"):
        linear_divergence(*four[:2], None, None)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none"):
        linear_divergence(*four, reduction="batchmean")
    with pytest.raises(ValueError, match="num_items is the divisor"):
        linear_divergence(*four, reduction="sum", num_items=3)
    with pytest.raises(ValueError, match="num_items must be positive"):
        linear_divergence(*four, num_items=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": torch.ones(N + 1)}, r"inputs\['a'\] must have shape \(6,\)"),
        ({"a": torch.ones(N, 1)}, r"inputs\['a'\] must have shape"),
        ([torch.ones(N)], "inputs must be a mapping of names to tensors, got a list"),
        ({"a": 1.0}, r"inputs\['a'\] must have shape .* got float"),
        ({"a": torch.ones(N, requires_grad=True)}, r"inputs\['a'\] requires grad.*detach"),
    ],
)
def test_wrong_inputs_of_an_objective(inputs, message):
    with pytest.raises(ValueError, match=message):
        linear_objective(*base().values(), lambda stats, a: stats.reverse_kl * a, inputs=inputs)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda stats: stats.reverse_kl.sum(), r"objective must return the loss of each of the 6 tokens.*got \(\)"),
        (None, "objective must be a function of TokenStats, got a NoneType"),
        (lambda stats: None, "objective must return .* got NoneType"),
        (lambda stats: stats.student_argmax, "objective must return .* got .*int64"),
        (lambda stats: (stats.reverse_kl, {"m": stats.reverse_kl.mean()}), r"metric 'm' must have shape \(6,\)"),
        (lambda stats: (stats.reverse_kl, {"m": 1.0}), "metric 'm' must have shape .* got float"),
    ],
)
def test_wrong_results_of_an_objective(objective, message):
    with pytest.raises(ValueError, match=message):
        linear_objective(*base().values(), objective)


def test_an_objective_that_hides_a_trained_tensor():
    arguments = base()
    arguments["student_hidden"].requires_grad_()
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="objective depends on a tensor that requires grad"):
        linear_objective(*arguments.values(), lambda stats: scale * stats.reverse_kl)
    linear_objective(*arguments.values(), lambda stats: scale.detach() * stats.reverse_kl)[0].backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_trained_tensor_that_only_one_chunk_reads(first, backend):
    """Whichever it is: its token is in the first, second or third chunk."""
    if backend == "triton":
        pytest.importorskip("triton")
    arguments = base()
    arguments["student_hidden"].requires_grad_()
    scale, index = torch.ones((), requires_grad=True), torch.arange(N)

    def objective(stats, index):
        reads = bool((index // 2 == first).any())
        return (scale if reads else 1.0) * stats.reverse_kl

    options = dict(inputs={"index": index}, chunk_bytes=2 * 4 * V * 2, backend=backend)
    with pytest.raises(ValueError, match="objective depends on a tensor that requires grad"):
        linear_objective(*arguments.values(), objective, **options)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs CUDA tensors, got cpu"):
        call(backend="triton")
    call(backend="auto")
    doubled = {name: value.double() for name, value in base().items() if isinstance(value, torch.Tensor)}
    doubled |= {name: base()[name].weight.double() for name in ("student_head", "teacher_head")}
    doubled["labels"] = base()["labels"]
    assert call(**doubled, backend="triton").reverse_kl.dtype == torch.float64  # float64 is torch's whatever is asked


def test_tiled_refuses_the_rest_by_name():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="backend='tiled' does not offer jsd, tvd; use backend='triton'"):
        call(backend="tiled", fields=("reverse_kl", "jsd", "tvd"))
    with pytest.raises(ValueError, match="backend='tiled' does not offer linear_objective"):
        linear_objective(*base().values(), lambda stats: stats.reverse_kl, fields=("reverse_kl",), backend="tiled")
