"""Teachers in 8 and 4 bits: how near they stay, what they keep plain, and what is said where they cannot be had."""

import importlib.util

import pytest
import torch

from minillm.config.models import StudentConfig, TeacherConfig
from minillm.models.adapter_targets import target_names
from minillm.models.loading import load_student, load_teacher
from minillm.models.quantization import check_quantized, element_count
from minillm.models.saving import save_model
from minillm.models.tokenizers import load_tokenizer
from minillm.rollout.local.graph_preconditions import require_static_shapes
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.rollout.scoring import score
from minillm.teachers.local import LocalTeacher
from minillm.teachers.preflight import preflight

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

CPU = torch.device("cpu")
ARCHITECTURES = {
    "llama": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
             "initializer_range": 0.1},
}  # fmt: skip
NEAR = {"int8": 1e-3, "nf4": 0.1}  # nats a token
BITS = {"int8": 8, "nf4": 4}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    """(model, tokenizer, folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    config = StudentConfig(init="random", tokenizer="byte", config=ARCHITECTURES[request.param])
    model, tokenizer = load_student(config, output_dir=folder, device=CPU, seed=0), load_tokenizer(config, folder)
    save_model(model, tokenizer, folder)
    return model, tokenizer, folder


def teacher_in(kind: str | None, folder, dtype: str = "float32"):
    config = TeacherConfig(path=str(folder), quantization=kind, dtype=dtype)
    return load_teacher(config, output_dir=folder, device=CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_smaller_teacher_judges_nearly_the_same(saved, kind, dtype):
    model, tokenizer, folder = saved
    whole, teacher = teacher_in(None, folder, dtype), teacher_in(kind, folder, dtype)
    head = teacher.get_output_embeddings().weight
    assert head.dtype == teacher.dtype == getattr(torch, dtype) and not any(
        p.requires_grad for p in teacher.parameters()
    )
    for name in target_names(whole, "all-linear"):
        packed, count = teacher.get_submodule(name).weight, whole.get_submodule(name).weight.numel()
        assert (8 * packed.nbytes, element_count(packed)) == (BITS[kind] * count, count)
    models, rows = preflight(model, LocalTeacher(teacher), tokenizer, tokenizer, CPU)
    table = {name: (ours, theirs) for name, ours, theirs in rows}
    assert table["parameters"][0] == table["parameters"][1]
    assert table["dtype, attention"][1] == f"{dtype} around {kind}, sdpa"
    ids = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        near, exact = (one(ids).logits.double().log_softmax(-1) for one in (teacher, whole))
    divergence = (exact.exp() * (exact - near)).sum(-1).mean()
    assert 0 < divergence < NEAR[kind]
    # what it says as it samples is what it says when it is asked again
    answers = LocalRollouts(models).sample(
        [[1, 2, 3], [4]], Sampling(8, alpha=1.0), keys=[0, 1], seed=0, who="mixture", batch_size=2
    )
    for rollout in score(models, answers, keys=[0, 1], batch_size=2):
        limits = {"rtol": 0, "atol": 1e-4 if dtype == "float32" and kind == "nf4" else 0.1}
        torch.testing.assert_close(rollout.vectors["teacher_logprob"], rollout.vectors["mixture_logprob"], **limits)


def test_cuda_graphs_are_refused(saved):
    with pytest.raises(ValueError, match="the teacher .* is quantised"):
        require_static_shapes("teacher", teacher_in("nf4", saved[2]))


def test_a_head_that_is_no_plain_tensor_is_refused(saved):
    teacher = teacher_in("int8", saved[2])
    teacher.get_output_embeddings().weight = torch.nn.Parameter(
        torch.zeros(3, 3, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"the head of \w+ would be quantised too"):
        check_quantized(teacher)


def test_layers_that_this_cpu_cannot_pack_are_named(saved):
    teacher = teacher_in("nf4", saved[2])
    for module in teacher.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu, module.out_features = True, 40
    with pytest.raises(
        ValueError,
        match=r"of 64 to one of 32, which 14 of .* \(64 to 40\) the first; use int8|which 8 of .* the first; use int8",
    ):
        check_quantized(teacher)


def test_weights_that_are_quantised_already_are_refused(saved, tmp_path):
    folder = tmp_path / "packed"
    teacher_in("nf4", saved[2]).save_pretrained(folder)
    for kind in (None, "int8"):
        with pytest.raises(ValueError, match="its weights are quantised already"):
            teacher_in(kind, folder)
