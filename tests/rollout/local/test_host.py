"""A decode step of fixed shapes asks nothing of the host: what a capture would refuse, found without a GPU.

The models and the loop lie on the meta device, which stands for the GPU: it holds no values, so that whatever needs one
fails, and a tensor on the CPU is one that the host would have to send or fetch.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from minillm.kernels import head
from minillm.rollout.local.static_loop import StaticLoop
from minillm.rollout.rollouts import Sampling

ROLES = {"student": 0.7, "teacher": 0.3}
GPU = torch.device("meta")
NEEDS_THE_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class NoHost(TorchDispatchMode):
    """Raises for an operation whose result the host must see, and for a tensor that is not on the GPU."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in INDEXING:  # by a mask: how many entries it has must be known
            needs_the_host = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        else:
            needs_the_host = bool(NEEDS_THE_HOST & set(func.tags))
        if needs_the_host:
            raise AssertionError(f"{func} waits for the GPU")
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != GPU.type:
                raise AssertionError(f"{func} reads or writes a tensor on the {leaf.device}")
        self.operations += 1
        return result


@pytest.fixture
def make_loop(make_models, monkeypatch):
    """A loop that has read its prompts, on the meta device unless another one is named."""

    def make(architecture: str, sampling: Sampling, *, eos_ids=(0, 5), dtype=torch.float32, device=GPU) -> StaticLoop:
        models = replace(make_models(architecture, eos_ids=eos_ids), device=device)
        for model in (models.student, models.teacher.model):
            model.to(device, dtype)
        loop = StaticLoop(models, sampling, ROLES, batch=3, longest=6, capture=lambda step: step() or step)
        with monkeypatch.context() as patch:
            # reading the prompts is not captured: transformers looks at whether there is padding
            patch.setattr(masking_utils, "fast_all", lambda mask: False)
            loop.begin([[1, 2, 3, 4, 5, 6], [7, 8]], torch.full((2, sampling.max_new_tokens), 0.5, dtype=torch.float64))
        return loop

    return make


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    """The branch of the LM head that half precision takes on a GPU."""
    monkeypatch.setattr(head, "_on_tensor_cores", lambda dtype, logits, device: dtype == torch.bfloat16)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}],
    ids=["neutral", "greedy", "cut"],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "qwen2", "cohere"])
def test_a_step_asks_nothing_of_the_host(make_loop, architecture, options, dtype):
    loop = make_loop(architecture, Sampling(200, alpha=0.3, **options), eos_ids=tuple(range(40)), dtype=dtype)
    with NoHost() as watch:
        for columns in (128, 128, 256):
            loop._run(columns)
    assert watch.operations > 300


@pytest.mark.parametrize(
    "ask",
    [
        lambda loop: loop.column.max().item(),
        lambda loop: loop.writing.ended.any() and None,
        lambda loop: loop.writing.ended.nonzero(),
        lambda loop: loop.noise[loop.writing.ended],
        lambda loop: loop.writing.lengths.__setitem__(loop.writing.ended, 1),
        lambda loop: loop.writing.tokens.unique(),
        lambda loop: loop.fed.copy_(torch.ones(3, 1, dtype=torch.int64)),
        lambda loop: torch.tensor([1, 2]),
        lambda loop: loop.writing.look(0, 1),
    ],
)
def test_the_watch_sees_what_a_capture_would_refuse(make_loop, ask: Callable):
    loop = make_loop("llama", Sampling(4, alpha=0.3))
    refused = "waits for the GPU|reads or writes a tensor on|[Mm]eta tensor"  # ours, or torch's own
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=refused), NoHost():
        ask(loop)


def test_the_memory_of_a_step_stays_where_it_is(make_loop):
    """On the CPU, where addresses are real."""
    loop = make_loop("llama", Sampling(9, alpha=0.3), device=torch.device("cpu"))
    before = addresses(loop)
    assert len(before) > 20
    for prompts in ([[5, 6]], [[1, 2, 3], [4], [9]]):
        loop._run(128)
        assert addresses(loop) == before
        loop.begin(prompts, torch.full((len(prompts), 9), 0.25, dtype=torch.float64))
        assert addresses(loop) == before


def addresses(loop: StaticLoop) -> dict[str, int]:
    held = {name: value for name, value in [*vars(loop).items(), *vars(loop.writing).items()]}
    held |= {f"mask {dtype}": mask for dtype, mask in loop.masks.items()}
    held |= {f"logits {place}": decoder._logits for place, decoder in enumerate(loop.decoders)}
    for place, layer in enumerate(loop.layers):
        held |= {f"{name} {place}": stored for name, stored in zip(("keys", "values"), layer._stored, strict=True)}
    return {name: value.data_ptr() for name, value in held.items() if isinstance(value, torch.Tensor)}
