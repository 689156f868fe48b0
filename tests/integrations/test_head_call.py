"""The loss inside the student's forward pass, behind the wrappers that look at what goes into it and comes out."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm.integrations import distillation_loss
from tests.integrations.conftest import packed, reverse_kl

DIVISOR = 100


@pytest.fixture(scope="module")
def exact_gradients(setting) -> dict[str, Tensor]:
    """Of the sum over all texts, divided: full logits in float64, in one process."""
    student = AutoModelForCausalLM.from_pretrained(setting.student, dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(setting.teacher, dtype=torch.float64)
    for ids, labels in setting.lines:
        log_q, log_p = (one(ids[None]).logits[0, :-1].log_softmax(-1) for one in (student, teacher))
        (reverse_kl(log_q, log_p.detach(), labels[1:]).sum() / DIVISOR).backward()
    return {name: one.grad for name, one in student.named_parameters()}


def half_loss(setting, student, rank: int) -> Tensor:
    """The loss on this rank's half of the texts, to be averaged over both ranks."""
    teacher = AutoModelForCausalLM.from_pretrained(setting.teacher)
    mine = [{"input_ids": ids} for ids, _ in setting.lines][rank::2]
    return 2 * distillation_loss(student, teacher, packed(mine), num_items=DIVISOR)


def worst(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient, all of which are there."""
    assert gradients.keys() == exact.keys()
    norm = torch.linalg.vector_norm
    return max((norm(gradients[name] - one) / norm(one)).item() for name, one in exact.items())


@pytest.mark.parametrize("how", [{"find_unused_parameters": True}, {"static_graph": True}], ids=["unused", "static"])
def test_distributed_data_parallel_finds_the_loss_behind_the_output(setting, exact_gradients, on_two_ranks, how):
    """Looking for unused parameters it walks the graph of the output, and a static graph waits for its backward pass."""

    def train(rank: int) -> float:
        student = AutoModelForCausalLM.from_pretrained(setting.student)
        wrapped = torch.nn.parallel.DistributedDataParallel(student, **how)
        for _ in range(2):  # a static graph is learnt by the first
            student.zero_grad()
            half_loss(setting, wrapped, rank).backward()
        return worst({name: one.grad for name, one in student.named_parameters()}, exact_gradients)

    assert max(on_two_ranks(train)) < 2e-5


@pytest.mark.parametrize("of_its_own", [False, True], ids=["root", "head"])
def test_fsdp2_gathers_the_head_for_its_call(setting, exact_gradients, on_two_ranks, of_its_own):
    """With the root, or by itself and given back after the call."""
    from torch.distributed.fsdp import fully_shard

    def train(rank: int) -> float:
        student = AutoModelForCausalLM.from_pretrained(setting.student)
        for part in [*student.model.layers, *([student.lm_head] if of_its_own else []), student]:
            fully_shard(part, reshard_after_forward=True)
        half_loss(setting, student, rank).backward()
        return worst({name: one.grad.full_tensor() for name, one in student.named_parameters()}, exact_gradients)

    assert max(on_two_ranks(train)) < 2e-5


def test_zero_3_gathers_the_head_for_its_call(setting, exact_gradients, on_two_ranks):
    deepspeed = pytest.importorskip("deepspeed")

    def train(rank: int) -> float:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, for nothing here
        student = AutoModelForCausalLM.from_pretrained(setting.student)
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        config = {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
        before = whole(student)
        engine.backward(half_loss(setting, engine, rank))
        engine.step()
        after = whole(student)
        return worst({name: before[name] - after[name] for name in before}, exact_gradients)

    def whole(student) -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(list(student.parameters())):
            return {name: one.detach().clone() for name, one in student.named_parameters()}

    assert max(on_two_ranks(train)) < 2e-5


def test_a_compiled_student_is_compiled_once(setting):
    """The layers are one graph; the loss runs after it, and is another function in every step."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    student = AutoModelForCausalLM.from_pretrained(setting.student)
    teacher = AutoModelForCausalLM.from_pretrained(setting.teacher)
    batch = packed([{"input_ids": ids} for ids, _ in setting.lines])
    expected = distillation_loss(student, teacher, batch)
    compiled = torch.compile(student, backend=counter)
    graphs = []
    for _ in range(3):
        loss = distillation_loss(compiled, teacher, batch)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs[-1] == graphs[0]
    assert all(one.grad is not None for one in student.parameters())
