"""The parts of the protocol that no built method uses, end to end."""

import json
import signal
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

PROGRAM = str(Path(__file__).with_name("probes.py"))
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "head_dim": 8,
    "output_router_logits": False,
}


def test_a_methods_own_balance_loss_is_trained_and_measured(small_run, start, finish, tmp_path):
    document = small_run(tmp_path, layers=2)
    document["student"]["config"] |= MOE
    document["train"]["max_steps"] = 4
    document["method"] = {"name": "probe_balance"}
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    finish(start(1, PROGRAM, "train", str(recipe)))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["auxiliary_loss" in one for one in records if one["kind"] == "train"] == [True] * 4
    before, after = (load_file(run / name / "model.safetensors") for name in ("checkpoint-3", "final"))
    assert any(not torch.equal(before[key], after[key]) for key in before)


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
