"""The frozen weights below a LoRA stage's adapters: written once, signed, and refused when they are damaged."""

from types import SimpleNamespace

import pytest

from minillm import UserError
from minillm.storage.manifest import find_damage
from minillm.train import frozen_weights
from minillm.train.frozen_weights import find_frozen_weights, write_frozen_weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of stage "distil" as it was written."""

    def write(model, tokenizer, partial):
        (partial / "model.safetensors").write_text(f"{model.name} {tokenizer}")

    monkeypatch.setattr(frozen_weights, "write_frozen", write)
    write_frozen_weights("distil", SimpleNamespace(name="student"), "tokenizer", tmp_path)
    return tmp_path / "bases" / "distil"


def test_they_are_found_where_they_were_written(folder, tmp_path):
    assert find_frozen_weights("distil", tmp_path) == folder and find_damage(folder) is None
    assert (folder / "model.safetensors").read_text() == "student tokenizer"


@pytest.mark.parametrize("damage", ["altered", "deleted", "never written"])
def test_other_weights_are_refused_with_what_to_do(damage, folder, tmp_path):
    stage = "distil"
    if damage == "altered":
        (folder / "model.safetensors").write_text("student Tokenizer")
    elif damage == "deleted":
        (folder / "model.safetensors").unlink()
    else:
        stage = "another"
    with pytest.raises(UserError, match=rf"bases/{stage} is not whole .*start a new run in another output_dir"):
        find_frozen_weights(stage, tmp_path)
