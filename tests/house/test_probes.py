"""The parts of the protocol that no built method uses, end to end: on one process and on two ranks of ZeRO-3, and resumed bit for bit."""

import importlib.util
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.runs import without_clock

PROGRAM = str(Path(__file__).with_name("probes.py"))
TWO = ("engine.type=deepspeed", "train.per_device_train_batch_size=1")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "head_dim": 8,
    "output_router_logits": False,
}
PROBES = {
    "probe_projector": {"metric": "features", "modules": ["projector"]},
    "probe_balance": {"metric": "auxiliary_loss", "modules": []},
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, small_run) -> dict[str, Path]:
    found = {}
    for name in PROBES:
        folder = tmp_path_factory.mktemp(name)
        document = small_run(folder, layers=2)
        # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
        document["train"] |= {"max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
        document["save"] = {"steps": 1, "keep": 9}
        last: dict = {"method": {"name": name}, "teacher": {"path": "stage:teacher"}}
        if name == "probe_balance":
            last["student"] = {"config": MOE}
        document["stages"] = {
            "teacher": {"student": {"config": {"hidden_size": 24}}, "train": {"max_steps": 1}},
            "probe": last,
        }
        found[name] = folder / "recipe.yaml"
        found[name].write_text(yaml.safe_dump(document, sort_keys=False))
    return found


def steps(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [one for one in map(without_clock, lines) if one["stage"] == "probe" and one["kind"] == "train"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    for path in sorted((folder / "modules").glob("*.safetensors")):
        found |= {f"{path.stem}.{key}": tensor for key, tensor in load_file(path).items()}
    return found


@pytest.fixture(scope="module", params=PROBES)
def trained(request, recipes, start, finish) -> tuple[str, Path]:
    recipe = recipes[request.param]
    finish(start(1, PROGRAM, "train", str(recipe), f"output_dir={recipe.parent / 'one'}"))
    return request.param, recipe.parent / "one"


def test_it_trains_and_says_what_it_measures(trained):
    name, folder = trained
    records = steps(folder)
    assert len(records) == 4
    assert all(PROBES[name]["metric"] in record for record in records)
    before, after = tensors(folder / "checkpoint-2"), tensors(folder / "final")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    written = sorted(path.stem for path in (folder / "final" / "modules").glob("*"))
    assert written == PROBES[name]["modules"]
    for key in (key for key in after if key.partition(".")[0] in PROBES[name]["modules"]):
        assert not torch.equal(before[key], after[key]), f"{key} was never trained"


# of the balance loss tests/methods/test_balance.py and tests/train/test_upcycled_run.py have both
@pytest.mark.parametrize("trained", ["probe_projector"], indirect=True)
def test_it_goes_on_bit_for_bit(trained, recipes, start, finish, tmp_path):
    name, folder = trained
    arguments = (str(recipes[name]), f"output_dir={tmp_path / 'run'}")
    finish(start(1, PROGRAM, "train", *arguments, "stages.probe.train.max_steps=2"))
    finish(start(1, PROGRAM, "train", *arguments, "--resume"))
    assert steps(tmp_path / "run") == steps(folder)
    ours, theirs = tensors(tmp_path / "run" / "final"), tensors(folder / "final")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@needs_deepspeed
@pytest.mark.parametrize("trained", ["probe_projector"], indirect=True)
def test_two_ranks_take_the_same_steps(trained, recipes, start, finish, tmp_path):
    name, folder = trained
    finish(start(2, PROGRAM, "train", str(recipes[name]), f"output_dir={tmp_path / 'two'}", *TWO), timeout=400)
    for ours, theirs in zip(steps(tmp_path / "two"), steps(folder), strict=True):
        for key in ("loss", PROBES[name]["metric"]):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    assert tensors(tmp_path / "two" / "final").keys() == tensors(folder / "final").keys()


def test_a_stage_without_steps_leaves_texts_that_a_later_stage_reads(small_run, start, finish, tmp_path):
    document = small_run(tmp_path, layers=1)
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "select": {"teacher": {"path": "stage:teacher"}, "method": {"name": "probe_select"}},
        "distil": {
            "teacher": {"path": "stage:teacher"},
            "data": {"corpus": {"path": "stage:select"}},
            "method": {"name": "minillm"},
        },
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    finish(start(1, PROGRAM, "train", str(recipe)))
    run = tmp_path / "run"
    assert len((run / "stages" / "select" / "kept.jsonl").read_text().splitlines()) == 4
    assert (run / "final" / "model.safetensors").is_file()
    assert (run / "written" / "select" / "visits.txt").read_text() == "visited\n"
    finish(start(1, PROGRAM, "train", str(recipe), "--resume"))  # nothing is left to do
    assert (run / "written" / "select" / "visits.txt").read_text() == "visited\n"
    (document["stages"]["select"]["method"]).update(keep=2)
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    for name in ("checkpoint-4", "final"):
        assert (run / name).exists()
    process = start(1, PROGRAM, "train", str(recipe), "--resume")[0]
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 2 and "select" in output and "method" in output, output


def test_a_stage_without_steps_is_begun_again_after_a_kill(small_run, start, finish, tmp_path):
    document = small_run(tmp_path, layers=1)
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "select": {"teacher": {"path": "stage:teacher"}, "method": {"name": "probe_select", "dies": True}},
    }
    recipe, left = tmp_path / "recipe.yaml", tmp_path / "run" / "stages" / "select"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    process = start(1, PROGRAM, "train", str(recipe))[0]
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL and not left.exists()
    finish(start(1, PROGRAM, "train", str(recipe), "--resume"))
    assert sorted(path.name for path in left.iterdir()) == ["kept.jsonl", "manifest.json", "prepared.json"]
