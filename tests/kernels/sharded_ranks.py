"""A rank of tests/kernels/test_sharded_heads.py: runs every case in its group and saves losses and gradients, whole, by name.

Started as a program: python sharded_ranks.py FILE, with the environment of torch.distributed.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.losses import LMHead, linear_divergence, linear_objective, linear_token_stats

VOCAB, HIDDEN, BATCH, LENGTH = 46, 8, 8, 5
TEACHER = torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(1))  # its head
# Where the weights lie, and where the loss is called: by the owner of the model, or inside of its forward pass
DATA_PARALLEL = (
    *(f"fsdp {what} {place} {kept}" for what in ("head", "root") for place in ("outside", "inside") for kept in (True, False)),
    "fsdp compiled",
    "ddp outside",
    "fsdp mixed",
)  # fmt: skip
ZERO3 = ("zero3 outside", "zero3 inside")
# Ways to a gradient, in one pass, in two, and with an objective; every statistic; bans, a softcap, padding at the end
VOCABULARY_PARALLEL = ("mean", "statistics", "objective", "coupled", "banned", "padded")


class Student(nn.Module):
    """Hidden states, or the loss on them, of a model with a head of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = (
            nn.Embedding(VOCAB, HIDDEN),
            nn.Linear(HIDDEN, HIDDEN),
            nn.Linear(HIDDEN, VOCAB),
        )

    def forward(self, ids: Tensor, *loss_on: Tensor) -> Tensor:  # (B, L)
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        return loss_of(self, hidden, *loss_on) if loss_on else hidden


def loss_of(model: Student, hidden: Tensor, teacher_hidden: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
    head, teacher = LMHead(model.head.weight, model.head.bias), TEACHER.to(hidden.dtype)
    return linear_divergence(hidden, head, teacher_hidden.to(hidden.dtype), teacher, labels=labels, num_items=num_items)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, the teacher's hidden states and labels of all ranks, a row of the batch each."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(BATCH, LENGTH, generator=generator) < 0.4] = -100
    return ids, torch.randn(BATCH, LENGTH, 6, generator=generator), labels


def mine() -> tuple[Tensor, ...]:
    """The rows of this rank, and the divisor with which the ranks' mean is that of the whole batch."""
    ids, teacher, labels = batch()
    rows = slice(dist.get_rank(), None, dist.get_world_size())
    return ids[rows], teacher[rows], labels[rows], (labels != -100).sum() / dist.get_world_size()


def data_parallel_alone(name: str, ranks: int) -> dict[str, Tensor]:
    ids, teacher, labels = batch()
    model, kept = Student(), (labels != -100).sum()
    if name == "fsdp mixed":  # every rank rounds its part of the gradient
        return {}
    loss_of(model, model(ids), teacher, labels, kept).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def fsdp(name: str) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    _, what, place, reshard = name.split()
    model, options = Student(), {"reshard_after_forward": reshard == "True"}
    if what == "head":
        fully_shard(model.head, **options)
    fully_shard(model, **options)
    ids, *rest = mine()
    for _ in range(2):  # what a first step leaves behind must not change the second
        model.zero_grad()
        loss = model(ids, *rest) if place == "inside" else loss_of(model, model(ids), *rest)
        loss.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def fsdp_mixed() -> dict[str, Tensor]:
    """bf16 activations on a head whose shards are fp32: gathered in bf16, its gradient in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = Student()
    fully_shard(model.head)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    ids, *rest = mine()
    hidden = model(ids)
    assert hidden.dtype == torch.bfloat16
    loss_of(model, hidden, *rest).backward()
    assert model.head.weight.grad.dtype == torch.float32
    return {}


def fsdp_compiled() -> dict[str, Tensor]:
    """The loss outside, in one graph with the gathering of the head."""
    from torch.distributed.fsdp import fully_shard

    model = Student()
    fully_shard(model.head)
    fully_shard(model)
    ids, *rest = mine()
    torch.compile(loss_of, backend="aot_eager", fullgraph=True)(model, model(ids), *rest).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def fsdp_traffic() -> dict[str, dict[str, int]]:
    """Collectives that the loss outside calls for its head: in the forward pass, and in the backward pass."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    model = Student()
    fully_shard(model.head)
    ids, *rest = mine()
    hidden = model(ids).detach()
    with CommDebugMode() as forward:
        loss = loss_of(model, hidden, *rest)
    with CommDebugMode() as backward:
        loss.backward()
    counts = {"forward": forward.get_comm_counts(), "backward": backward.get_comm_counts()}
    return {when: {str(what).split(".")[-1]: n for what, n in found.items()} for when, found in counts.items()}


def ddp() -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(Student())
    ids, *rest = mine()
    loss_of(model.module, model(ids), *rest).backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def zero3(name: str) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, for nothing here
    model = Student()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config, dist_init_required=False
    )
    ids, *rest = mine()
    loss = engine(ids, *rest) if name.endswith("inside") else loss_of(model, engine(ids), *rest)
    engine.backward(loss)
    found = {name: safe_get_full_grad(parameter).clone() for name, parameter in model.named_parameters()}
    engine.destroy()
    return found


def vocabulary_parallel_inputs(name: str) -> dict:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 7, HIDDEN, generator=generator)
    weight, bias = torch.randn(VOCAB, HIDDEN, generator=generator), torch.randn(VOCAB, generator=generator)
    teacher, other = hidden + 0.3 * torch.randn(hidden.shape, generator=generator), weight.clone()
    labels = torch.randint(0, VOCAB - 5, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.3] = -100
    if name == "banned":  # the whole share of rank 0 of both models, and an id of another of the teacher alone
        bias = bias.index_fill(0, torch.arange(VOCAB // 2), -torch.inf)
        labels = labels.masked_fill((labels >= 0) & (labels < VOCAB // 2), VOCAB // 2 + 1)
    return dict(hidden=hidden, weight=weight, bias=bias, teacher=teacher, other=other, labels=labels)


def vocabulary_parallel_loss(name: str, inputs: dict, **options) -> Tensor:
    head = LMHead(inputs["weight"], inputs["bias"], logit_scale=0.7, softcap=None if name == "banned" else 4.0)
    other_bias = inputs["bias"].detach() if name == "banned" else None
    five = inputs["hidden"], head, inputs["teacher"], LMHead(inputs["other"], other_bias), inputs["labels"]
    options |= {"chunk_bytes": 2000, "temperature": 1.3}  # many chunks
    if name in ("mean", "padded"):
        cut = {"vocab_size": VOCAB - 3} if name == "padded" else {}
        return linear_divergence(*five[:4], labels=five[4], divergence="reverse_kl", **cut, **options)
    if name in ("statistics", "banned"):
        names = ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")
        more = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "interpolated_cross_entropy")
        stats = linear_token_stats(*five, fields=(*names, *more, "student_argmax", "teacher_argmax"), **options)
        extra = (stats.student_argmax.sum() + 2 * stats.teacher_argmax.sum()).item()
        floats = [getattr(stats, one) for one in (*names, *more)]
        return sum((index + 1) * one.square().mean() for index, one in enumerate(floats)) + extra
    if name == "objective":
        return linear_objective(*five, lambda stats: stats.jsd - stats.student_logprob + stats.tvd, fields=("jsd", "student_logprob", "tvd"), **options)[0]  # fmt: skip
    return linear_objective(
        *five, lambda stats: stats.reverse_kl.sum(-1).square(), fields=("reverse_kl",), coupled=True, **options
    )[0]


def loss_and_gradients(name: str, inputs: dict, **options) -> dict[str, Tensor]:
    leaves = {one: inputs[one].clone().requires_grad_() for one in ("hidden", "weight", "bias")}
    loss = vocabulary_parallel_loss(name, {**inputs, **leaves}, **options)
    loss.backward()
    return {"loss": loss.detach(), **{one: leaf.grad for one, leaf in leaves.items()}}


def vocabulary_parallel_alone(name: str) -> dict[str, Tensor]:
    return loss_and_gradients(name, vocabulary_parallel_inputs(name))


def vocabulary_parallel(name: str) -> dict[str, Tensor]:
    """Each rank with its rows, of which torch.chunk leaves the last rank fewer."""
    inputs = vocabulary_parallel_inputs(name)
    for what in ("weight", "bias", "other"):
        inputs[what] = inputs[what].chunk(dist.get_world_size())[dist.get_rank()]
    return loss_and_gradients(name, inputs, process_group=dist.group.WORLD)


def refused() -> dict[str, str]:
    """The answers to what cannot be, by what they should hold."""
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor, init_device_mesh

    inputs = vocabulary_parallel_inputs("mean")
    ids = torch.randint(0, VOCAB, (3, 7))
    found, group = {}, {"process_group": dist.group.WORLD}

    def attempt(message: str, hidden: Tensor, weight, **options) -> None:
        try:
            linear_token_stats(hidden, weight, None, None, ids, fields=("student_entropy",), **options)
            found[message] = "nothing"
        except ValueError as error:
            found[message] = str(error)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    grid = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    weight = inputs["weight"]
    attempt(
        "sharded over 2 dimensions of its mesh", inputs["hidden"], distribute_tensor(weight, grid, [Shard(0), Shard(1)])
    )
    attempt("DTensor of partial sums", inputs["hidden"], DTensor.from_local(weight, mesh, [Partial()]))
    attempt("pass this rank's tokens", distribute_tensor(inputs["hidden"], mesh, [Shard(0)]), weight)
    attempt("goes with backend='auto' or 'torch'", inputs["hidden"], weight, backend="tiled", **group)
    attempt("does not go with LMHead.sum_of", (inputs["hidden"],) * 2, LMHead.sum_of(weight, weight), **group)
    tokens = inputs["hidden"][: 3 - dist.get_rank() % 2]
    ids = ids[: len(tokens)]
    attempt("pass the same tokens on all of them", tokens, weight, **group)
    return found


def main(file: str) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo")
    found = {name: fsdp(name) for name in DATA_PARALLEL if len(name.split()) == 4}
    found |= {"fsdp compiled": fsdp_compiled(), "fsdp mixed": fsdp_mixed(), "ddp outside": ddp()}
    found["traffic"] = fsdp_traffic()
    found |= {name: vocabulary_parallel(name) for name in VOCABULARY_PARALLEL}
    found["refused"] = refused()
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        pass
    else:
        found |= {name: zero3(name) for name in ZERO3}
    torch.save(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
