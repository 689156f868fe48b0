"""A folder that is not what it says is one line that names the file, before anything is allocated, trained or judged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm import UserError
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.models.loading import load_student, load_teacher
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer, load_tokenizer
from minillm.storage.manifest import MANIFEST
from minillm.teachers.open import open_named

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(build_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(build_model("llama", vocab_size=257), byte_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A model's folder without checksums, such as other programs leave."""
    return Path(shutil.copytree(whole, tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST)))


def as_student(folder):
    return load_student(StudentConfig(path=str(folder)), output_dir=folder, device=CPU, seed=0)


def as_teacher(folder):
    return load_teacher(TeacherConfig(path=str(folder)), output_dir=folder, device=CPU)


def on_the_command_line(folder):  # minillm eval and generate
    return open_named(str(folder), None, device="cpu")


EVERYONE = pytest.mark.parametrize("load", [as_student, as_teacher, on_the_command_line])
FIRST = "model.layers.0.self_attn.q_proj.weight"


def renamed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


DAMAGES = {
    "compiled": (lambda state: renamed(state, "_orig_mod."), r"missing \(.*names begin with _orig_mod\."),
    "wrapped": (lambda state: renamed(state, "module."), r"missing \(.*names begin with module\."),
    "one is missing": (
        lambda state: {name: one for name, one in state.items() if name != FIRST} | {"more": torch.zeros(24 * 24)},
        rf"1 missing \({FIRST}\); 1 that it does not have \(more\)",
    ),
    "another architecture": (
        lambda state: {
            "transformer.wte.weight": torch.zeros(257, 24),
            "transformer.h.0.ln_1.weight": torch.zeros(99999),
        },
        r"missing \(.*, \.\.\.\); 2 that it does not have \(transformer\.h\.0\.ln_1\.weight, transformer\.wte\.weight\)",
    ),
    "another shape": (
        lambda state: state | {FIRST: torch.zeros(24, 25)},
        rf"1 of another shape \({FIRST} is \(24, 25\), not \(24, 24\)\)",
    ),
    "more layers": (
        lambda state: state | {"model.layers.4.input_layernorm.weight": torch.zeros(24)},
        r"1 that it does not have \(model\.layers\.4\.input_layernorm\.weight\)",
    ),
}


@EVERYONE
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_are_all_of_the_models_and_no_others(folder, load, damage):
    change, said = DAMAGES[damage]
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=said) as found:
        load(folder)
    assert str(found.value).startswith(f"{folder}: its weights are not those of a LlamaForCausalLM")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_weights_need_to_be_there_once(build_model, tmp_path, name):
    model = build_model(name, vocab_size=257, tie_word_embeddings=True)
    save_model(model, byte_tokenizer(), tmp_path / "tied")
    again = as_student(tmp_path / "tied")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@EVERYONE
def test_a_configuration_of_a_larger_model_allocates_nothing(folder, load, monkeypatch):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))  # transformers' own: seven billion weights
    before = Path("/proc/self/statm").read_text().split()[1]
    with pytest.raises(
        UserError, match=r"describes a LlamaForCausalLM of 6,738,415,616 weights, and its files hold at most"
    ):
        load(folder)
    assert (int(Path("/proc/self/statm").read_text().split()[1]) - int(before)) * 4096 < 2**30


@EVERYONE
def test_weights_that_are_too_few_are_named(folder, load):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.norm.weight"] = weights["model.norm.weight"][:3].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"hold at most") as found:
        load(folder)
    assert "model.layers.0.mlp.up_proj.weight is not there, model.norm.weight is (3,), not (" in str(found.value)


WRONG = [("[]", "expected a JSON object, found \\[\\]"), ("null", "expected a JSON object, found null"),
         ('"llama"', 'expected a JSON object, found "llama"'), ("{", "not JSON in UTF-8")]  # fmt: skip


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content, said", WRONG)
def test_a_file_of_another_shape_is_named(folder, file, content, said):
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=said) as found:
        open_named(str(folder), None, device="cpu")
    assert str(folder / file) in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    "file, key, value",
    [("config.json", "model_type", 7), ("config.json", "architectures", "LlamaForCausalLM"),
     ("config.json", "vocab_size", "many"), ("tokenizer_config.json", "tokenizer_class", 5),
     ("tokenizer_config.json", "eos_token", 3), ("generation_config.json", "eos_token_id", "end"),
     ("generation_config.json", "pad_token_id", True)],
)  # fmt: skip
def test_a_value_of_another_kind_is_named(folder, file, key, value):
    content = json.loads((folder / file).read_text()) | {key: value}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError) as found:
        open_named(str(folder), None, device="cpu")
    assert str(found.value).startswith(f"{folder / file}: {key} is {json.dumps(value)}; expected")


@pytest.mark.parametrize("content", [b"", b"no weights at all", bytes(range(256)) * 5000])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_none_are_one_line(folder, file, content):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(UserError) as found:
        as_teacher(folder)
    assert str(found.value).startswith(str(folder)) and "\n" not in str(found.value)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="it holds no weights"):
        as_student(folder)


def test_a_tokenizer_of_another_shape_is_said_before_any_model(folder):
    (folder / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(UserError, match=r"tokenizer\.json: model is 5; expected an object"):
        load_tokenizer(TeacherConfig(path=str(folder)), folder)


@pytest.mark.parametrize("model", [{}, {"type": "BPE", "vocab": 3}])
def test_a_tokenizer_that_its_library_cannot_read_is_one_line(folder, model):
    content = json.loads((folder / "tokenizer.json").read_text()) | {"model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as found:
        load_tokenizer(TeacherConfig(path=str(folder)), folder)
    said = str(found.value)
    assert said.startswith(f"{folder}: its tokenizer.json is no tokenizer (") and "\n" not in said


@EVERYONE
def test_a_signed_folder_that_was_altered_is_not_opened(whole, tmp_path, load):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    load(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        UserError, match=r"model\.safetensors was altered\)\. Put that file back .* delete .*manifest\.json"
    ):
        load(folder)
    (folder / MANIFEST).unlink()
    load(folder)
