"""Whole runs through LoRA: every method and init, what they leave behind, killed and resumed on weights that moved."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.storage.manifest import MANIFEST
from minillm.train.run import run
from tests.runs import Silent, die_after, in_a_child, records

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.usefixtures("one_thread"),
]

LORA = {"r": 2, "alpha": 8}


def train(document: dict, folder: Path, *, resume: bool = False) -> Path:
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump({**document, "output_dir": str(folder)}, sort_keys=False))
    return run(load_run([path]), resume=resume, console=Silent())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def every_method(tmp_path_factory, small_run) -> Path:
    """A stage a method, which between them begin in every way: of a folder, an earlier stage, some layers, nothing."""
    folder = tmp_path_factory.mktemp("methods")
    document = small_run(folder, layers=2)
    document["eval"] = {"sets": {}}
    taught, plain = {"teacher": {"path": "stage:teacher"}}, {"config": None, "lora": LORA}
    document["stages"] = {
        "teacher": {},
        "sft": {"student": {**plain, "path": "stage:teacher", "init": "prune", "layers": [0]}},
        "kd": {**taught, "student": {"lora": LORA}, "method": {"name": "kd"}},
        "seqkd": {**taught, "student": {**plain, "path": "stage:sft", "init": "pretrained"}, "method": {"name": "seqkd"}},
        "gkd": {
            **taught,
            "student": {**plain, "path": "stage:teacher", "init": "pretrained", "dtype": "bfloat16"},
            "method": {"name": "gkd"},
            "train": {"gradient_checkpointing": True},
        },
        "minillm": {
            **taught,
            "student": {**plain, "path": "stage:sft", "init": "pretrained",
                        "lora": {**LORA, "target_modules": ["q_proj", "down_proj"]}},
            "method": {"name": "minillm"},
        },
    }  # fmt: skip
    train(document, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("stage", ["sft", "kd", "seqkd", "gkd", "minillm"])
@torch.no_grad()
def test_every_method_trains_the_adapters_and_leaves_a_plain_model(every_method, stage):
    import peft

    ids = torch.arange(12)[None]
    merged, base = every_method / "stages" / stage, every_method / "bases" / stage
    before, after = weights(base), weights(merged)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    kinds = ("q_proj", "down_proj") if stage == "minillm" else ("_proj",)
    assert before.keys() == after.keys()
    assert changed == {name for name in after if any(f"{kind}.weight" in name for kind in kinds)}
    plain = AutoModelForCausalLM.from_pretrained(merged)
    served = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), merged / "adapter")
    near = {"rtol": 0.05, "atol": 0.02} if stage == "gkd" else {"rtol": 1e-4, "atol": 1e-5}  # in bfloat16
    torch.testing.assert_close(plain(ids).logits, served(input_ids=ids).logits, **near)


def test_a_stage_begins_with_the_merged_model_of_another(every_method):
    for stage in ("seqkd", "minillm"):
        before, after = weights(every_method / "stages" / "sft"), weights(every_method / "bases" / stage)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (every_method / "bases" / "teacher").exists() and not (every_method / "stages/teacher/adapter").exists()


def test_final_is_the_last_stage_with_its_adapter_and_a_card(every_method):
    final = every_method / "final"
    assert {"adapter_config.json", "adapter_model.safetensors"} == {path.name for path in (final / "adapter").iterdir()}
    assert "LoRA (r 2, alpha 8, q_proj, down_proj)" in (final / "README.md").read_text()
    assert "LoRA (r 2, alpha 8, all linear layers)" in (every_method / "report.md").read_text()


@pytest.fixture
def document(tmp_path, small_run) -> dict:
    """MiniLLM through LoRA, of a folder's bfloat16 weights: merged and rounded they are not those below the adapters."""
    document = small_run(tmp_path, layers=1)
    document["stages"] = {"teacher": {}}
    # a folder of elsewhere, which may change: nobody signed it
    shutil.copytree(train(document, tmp_path / "before"), tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST))
    student = {"path": str(tmp_path / "model"), "dtype": "bfloat16", "lora": LORA}
    document["teacher"] = {"path": str(tmp_path / "before" / "final")}
    document["method"] = {"name": "minillm", "ppo_epochs": 2}
    document["train"]["max_steps"] = 5
    del document["stages"]
    return {**document, "student": student}


def test_killed_it_ends_as_an_unbroken_run_though_the_first_folder_has_changed(document, tmp_path):
    final = train(document, tmp_path / "unbroken")
    killed, kills, moved, patience = tmp_path / "run", 0, 0, 40

    def go_on():
        die_after(patience)
        train(document, killed, resume=True)

    while in_a_child(go_on):
        kills += 1
        patience += 10
        assert kills < 20
        if list(killed.glob("checkpoint-*/manifest.json")):
            path, moved = tmp_path / "model" / "model.safetensors", moved + 1
            save_file({name: one + 1 for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    assert kills >= 3 and moved >= 2
    for part in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (killed / "final" / part).read_bytes() == (final / part).read_bytes(), part
    assert records(killed) == records(tmp_path / "unbroken")


@pytest.mark.parametrize("lora", [LORA, None])
def test_it_goes_on_from_its_own_copies_though_the_signed_folder_has_changed(document, lora, tmp_path):
    first = tmp_path / "signed"
    shutil.copytree(tmp_path / "before" / "final", first)
    document["student"] = {"path": str(first)} if lora is None else {**document["student"], "path": str(first)}
    document["train"]["max_steps"] = 2
    final = train(document, tmp_path / "unbroken")
    resumed = tmp_path / "run"
    train(document, resumed)
    shutil.rmtree(resumed / "final")
    shutil.rmtree(resumed / "checkpoint-2")
    path = first / "model.safetensors"
    save_file({name: one + 1 for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    (first / "tokenizer.json").write_text("{}")
    train(document, resumed, resume=True)
    assert (resumed / "final" / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="signed: it is not the model that was saved there"):
        train(document, tmp_path / "anew")


def test_weights_below_the_adapters_that_are_not_those_are_refused(document, tmp_path):
    document["train"]["max_steps"] = 2
    train(document, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    path = tmp_path / "run" / "bases" / "main" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"00")
    with pytest.raises(ValueError, match="bases/main is not whole .model.safetensors was altered.: the adapters"):
        train(document, tmp_path / "run", resume=True)
