"""A step of a student with adapters: their gradients against those of the merged model, and nothing else moves."""

import importlib.util

import pytest
import torch

from minillm.config.lora import LoraConfig
from minillm.config.training import TorchEngine as TorchEngineConfig
from minillm.config.training import TrainConfig
from minillm.engine.torch import TorchEngine
from minillm.methods.protocol import Term
from minillm.models.adapters import add_adapters
from minillm.models.batch import TokenSequence, collate
from minillm.models.loading import without_dropout
from minillm.models.tokenizers import byte_tokenizer
from minillm.teachers.pair import Models
from tests.models.conftest import build

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")

SEQUENCES = [TokenSequence([5], [6, 7, 8, 9]), TokenSequence([1, 2], [3]), TokenSequence([9, 9], [8, 7])]
# the tied head of gpt2 is frozen as well; its linear layers lie the other way
CASES = [("llama", "all-linear"), ("gpt2", "all-linear"), ("llama", ["q_proj", "down_proj"])]


def engine_of(student, **train) -> TorchEngine:
    models = Models(student, None, byte_tokenizer(), 71, (0,), 0, torch.device("cpu"))
    keys = {"max_steps": 4, "max_grad_norm": None, **train}
    return TorchEngine(models, TrainConfig(**keys), TorchEngineConfig(device="cpu"), total_steps=4)


def term() -> Term:
    batch = collate(SEQUENCES, pad_id=0)
    fields = ("student_logprob", "student_entropy")

    def objective(stats):
        return stats.student_entropy - stats.student_logprob.exp()

    return Term("policy", batch, objective, fields, float(len(batch.labels)))


def step(student, **train) -> dict[str, torch.Tensor]:
    """Gradients by name, as the optimiser sees them."""
    built, found = engine_of(student, **train), {}
    named = student.named_parameters
    built.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: one.grad.clone() for name, one in named() if one.grad is not None})
    )
    built.step([[term()]])
    return found


def adapted(name: str, targets):
    lora = LoraConfig(r=3, alpha=6, target_modules=targets)
    model = add_adapters(without_dropout(build(name)), lora, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_gradients_are_those_of_the_merged_model(name, targets, checkpointing):
    """With G the gradient of W + s B A: s B^T G for A, and s G A^T for B. Float64, by name."""
    model, merged = adapted(name, targets), without_dropout(build(name)).double()
    layers = {key: module for key, module in model.named_modules() if hasattr(module, "lora_A")}
    factors = {}
    for key, layer in layers.items():
        down, up = layer.lora_A.default.weight.detach().clone(), layer.lora_B.default.weight.detach().clone()
        factors[key] = down, up
        change = 2.0 * up @ down
        merged.get_submodule(key).weight.data += change.T if name == "gpt2" else change
    dense = step(merged, learning_rate=1e-12)
    ours = step(model, learning_rate=1e-12, gradient_checkpointing=checkpointing)
    expected = {}
    for key, (down, up) in factors.items():
        gradient = dense[f"{key}.weight"].T if name == "gpt2" else dense[f"{key}.weight"]
        expected[f"{key}.lora_A.default.weight"] = 2.0 * up.T @ gradient
        expected[f"{key}.lora_B.default.weight"] = 2.0 * gradient @ down.T
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.norm() > 1e-8, key
        torch.testing.assert_close(ours[key], gradient, rtol=1e-9, atol=1e-12, msg=key)


def test_a_step_moves_the_adapters_and_nothing_else():
    model = adapted("gpt2", "all-linear").float()
    before = {name: one.clone() for name, one in model.named_parameters()}
    built = engine_of(model, learning_rate=1e-2)
    built.step([[term()]])
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert moved == adapters
    states = built.optimizer.state
    assert {id(one) for one in states} == {id(one) for name, one in model.named_parameters() if name in adapters}


def test_bf16_weights_below_fp32_adapters():
    model = add_adapters(build("llama").bfloat16(), LoraConfig(r=3, alpha=6), seed=0)
    found = step(model, bf16=True)
    assert found and all(one.dtype == torch.float32 and one.isfinite().all() for one in found.values())
    assert sum(one.norm() for name, one in found.items() if "lora_B" in name) > 0
