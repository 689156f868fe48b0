"""Two ranks of DeepSpeed against one process: the same recipe, the same steps, for every method and stage of ZeRO."""

import importlib.util
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from minillm.storage.manifest import MANIFEST
from tests.runs import TRAIN, TWO_RANKS, every_record

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

# all stages once, and in the other ways some; the first with the teacher always, which evaluates it. One process never packs
HOW = {
    "stage-3": ("train.packing=on",),
    "stage-3-by-layers": ("engine.gather=layers", "stages.seqkd=null", "train.packing=on"),
    "stage-3-replicated-teacher": ("engine.replicate_teacher=true", "stages.gkd=null", "stages.seqkd=null"),
    "stage-2-offloaded": ("engine.stage=2", "engine.offload_optimizer=true", "stages.gkd=null", "stages.seqkd=null"),
}
STAGES = {"teacher", "kd", "gkd", "seqkd", "distil"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("two")
    document = small_run(folder, layers=2)
    document["rollout"]["buffer_size"] = 8
    document["data"]["prompts"]["limit"] = 7  # in steps of four: no pass ends with a step, nor divides over the ranks
    document["train"] |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    document["eval"]["sets"]["held_out"]["limit"] = 3  # not a multiple of the ranks
    taught = {"teacher": {"path": "stage:teacher"}}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "kd": {**taught, "method": {"name": "kd"}},
        "gkd": {**taught, "method": {"name": "gkd"}},
        "seqkd": {**taught, "method": {"name": "seqkd"}},
        "distil": {**taught, "method": {"name": "minillm", "ppo_epochs": 2}, "train": {"max_steps": 4}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize("how", HOW)
def test_two_ranks_take_the_steps_of_one_process(unbroken, how):
    trained = {name for name in STAGES if f"stages.{name}=null" not in HOW[how]}
    ours = every_record(unbroken[how])
    theirs = [record for record in every_record(unbroken["one"]) if record["stage"] in trained]
    assert len(ours) == len(theirs) and {record["stage"] for record in ours} == trained
    for mine, other in zip(ours, theirs, strict=True):
        where = mine["stage"], mine["kind"], mine["stage_step"]
        assert (mine["kind"], mine["stage"], mine["student_tokens"]) == (
            other["kind"], other["stage"], other["student_tokens"])  # fmt: skip
        if mine["kind"] == "eval":
            assert mine["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5), where
            continue
        for name in ("loss", "grad_norm", "learning_rate"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (where, name)
        assert mine["time/communication_s"] > 0 and "time/communication_s" not in other


@pytest.mark.parametrize("how", HOW)
def test_the_final_models_are_whole_and_alike(unbroken, how):
    ours, theirs = (load_file(unbroken[name] / "final" / "model.safetensors") for name in (how, "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


# (rank, method, its n-th call): in a rollout, before a part of a checkpoint is on the disk, and as it is put in place
MOMENTS = [("1", "Decoder.forward", "9"), ("1", "DeepSpeedEngine._state", "3"), ("0", "atomic._put_in_place", "2")]


def test_killed_at_any_moment_the_run_goes_on_to_the_same_end(recipe, start, finish):
    """The others stop within a minute and say who was lost; only the steps since the last checkpoint are redone."""
    document = yaml.safe_load(recipe.read_text())
    document["stages"] = {name: document["stages"][name] for name in ("teacher", "distil")}
    short = recipe.with_name("short.yaml")
    short.write_text(yaml.safe_dump(document, sort_keys=False))
    folders = {name: recipe.parent / f"short-{name}" for name in ("unbroken", "killed")}
    finish(start(2, *TRAIN, str(short), f"output_dir={folders['unbroken']}", *TWO_RANKS))
    arguments = (str(short), f"output_dir={folders['killed']}", *TWO_RANKS, "--resume")
    for moment in MOMENTS:
        ranks = start(2, str(Path(__file__).with_name("dying_rank.py")), *moment, *arguments)
        dead, other = ranks[int(moment[0])], ranks[1 - int(moment[0])]
        dead.communicate(timeout=300)
        assert dead.returncode == -signal.SIGKILL, moment
        output, _ = other.communicate(timeout=60)
        assert other.returncode == 1 and f"rank {moment[0]} (process {dead.pid} on" in output, output[-3000:]
        log = folders["killed"] / "ranks" / f"rank-{1 - int(moment[0])}.log"
        assert f"process {dead.pid}" in log.read_text()
    moved = recipe.parent / "short-moved"
    shutil.copytree(folders["killed"], moved)
    finish(start(2, *TRAIN, *arguments))
    ours, theirs = (load_file(folders[name] / "final" / "model.safetensors") for name in ("killed", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [record["loss"] for record in every_record(folders["killed"]) if record["kind"] == "train"] == [
        record["loss"] for record in every_record(folders["unbroken"]) if record["kind"] == "train"
    ]
    (said,) = finish(start(1, *TRAIN, arguments[0], f"output_dir={moved}", *arguments[2:]))
    assert "was written by 2 ranks, and there are 1: the weights go on" in said
    assert (moved / "final" / "model.safetensors").exists()


def test_a_fault_that_rank_0_alone_can_see_stops_all_with_its_words(recipe, unbroken, tmp_path, start):
    """The other ranks have no weights to look at."""
    broken = tmp_path / "teacher"
    shutil.copytree(unbroken["one"] / "stages" / "teacher", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / MANIFEST).unlink()  # as of a folder that nobody signed
    document = yaml.safe_load(recipe.read_text())
    document["stages"] = {"kd": {"teacher": {"path": str(broken)}, "method": {"name": "kd"}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    ranks = start(2, *TRAIN, str(path), f"output_dir={tmp_path / 'run'}", *TWO_RANKS)
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and "Traceback" not in "".join(outputs)
    assert "a weight is not finite" in outputs[0] and "rank 0: teacher" in outputs[1]
