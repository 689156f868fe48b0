"""The attention kernel of models that lack the one that was asked for."""

import pytest
import torch

from minillm import UserError
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.models.loading import load_student, load_teacher
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from tests.sweep.tiny_models import tiny_architecture, tiny_model

CPU = torch.device("cpu")
NEO = {
    "model_type": "gpt_neo",
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global"], 2]],
}


@pytest.fixture
def folder(tmp_path):
    """A GPT-Neo, which has no sdpa."""
    save_model(tiny_model(tiny_architecture("gpt_neo")), byte_tokenizer(), tmp_path / "model")
    return str(tmp_path / "model")


def test_an_architecture_without_sdpa_gets_eager_however_it_is_made(folder, tmp_path):
    places = {"output_dir": tmp_path, "device": CPU}
    teacher = load_teacher(TeacherConfig(path=folder), **places)
    copied = load_student(StudentConfig(path=folder), seed=0, source=teacher, **places)
    read = load_student(StudentConfig(path=folder), seed=0, **places)
    fresh = load_student(StudentConfig(init="random", tokenizer="byte", config=NEO), seed=0, **places)
    hollow = load_teacher(TeacherConfig(path=folder), hollow=True, **places)
    for model in (teacher, copied, read, fresh, hollow):
        assert model.config._attn_implementation == "eager"
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, copied.state_dict()[name]) and torch.equal(tensor, read.state_dict()[name]), name


def test_another_kernel_that_it_lacks_is_refused_by_our_key(folder, tmp_path):
    config = TeacherConfig(path=folder, attn_implementation="flex_attention")
    with pytest.raises(UserError, match="attn_implementation: flex_attention: GPTNeoForCausalLM has no such attention"):
        load_teacher(config, output_dir=tmp_path, device=CPU)
