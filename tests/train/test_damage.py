"""Runs beside another one in the same folder, and runs that go on over files that were damaged or changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minillm.cli.main import main
from minillm.storage.folder_lock import LOCK, FolderInUseError
from minillm.storage.manifest import MANIFEST, find_damage, sign
from tests.runs import in_a_child, records, train

pytestmark = pytest.mark.usefixtures("one_thread")


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, and what is in it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def running(two_stages, tmp_path):
    """The id of a process that trains two_stages, and stands before its fifth step until it is told to go on."""
    ready, go_on = os.pipe(), os.pipe()

    def wait_at_the_fifth() -> None:
        from minillm.engine.torch import TorchEngine

        original, steps = TorchEngine.step, [0]

        def step(self, micro_batches):
            steps[0] += 1
            if steps[0] == 5:
                os.write(ready[1], b"x")
                os.read(go_on[0], 1)
            return original(self, micro_batches)

        TorchEngine.step = step
        train(two_stages, "save.in_background=false")  # nothing is written while it stands

    pid = os.fork()
    if pid == 0:
        os.close(go_on[1])
        try:
            torch.set_num_threads(1)
            wait_at_the_fifth()
            os._exit(0)
        finally:
            os._exit(1)
    os.close(ready[1])
    os.close(go_on[0])
    assert os.read(ready[0], 1) == b"x"

    def finish() -> int:
        os.close(go_on[1])
        return os.waitpid(pid, 0)[1]

    yield pid, finish
    os.close(ready[0])


def test_a_second_run_in_the_same_folder_stops_before_it_touches_anything(two_stages, tmp_path, running, capsys):
    pid, finish = running
    before = files(tmp_path / "run")
    assert main(["train", str(two_stages), "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"run is in use: process {pid} on" in error and len(error.splitlines()) == 1
    with pytest.raises(FolderInUseError):
        train(two_stages)
    assert files(tmp_path / "run") == before
    train(two_stages, f"output_dir={tmp_path / 'elsewhere'}")
    assert finish() == 0
    assert records(tmp_path / "run") == records(tmp_path / "elsewhere")


def test_a_run_that_was_killed_before_its_first_step_leaves_a_folder_to_begin_in(two_stages, tmp_path):
    def killed() -> None:
        from minillm.train.trainer import StageTrainer

        StageTrainer.run = lambda self, **options: os.kill(os.getpid(), 9)
        train(two_stages)

    assert os.WTERMSIG(in_a_child(killed)) == 9
    assert {path.name for path in (tmp_path / "run").iterdir()} > {LOCK, "config.yaml"}
    assert main(["train", str(two_stages)]) == 0


def test_every_published_model_carries_its_checksums(two_stages, tmp_path):
    train(two_stages)
    for name in ("stages/teacher", "stages/distil", "best", "final"):
        folder = tmp_path / "run" / name
        assert find_damage(folder, requires=("model.safetensors", "tokenizer.json", "config.json")) is None, name


def test_a_stage_does_not_read_a_damaged_model(two_stages, tmp_path, capsys):
    train(two_stages)
    taught = tmp_path / "run" / "stages" / "teacher"
    flip(taught / "model.safetensors")
    flip(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    assert main(["train", str(two_stages), "--resume"]) == 2
    printed = capsys.readouterr()
    assert f"stage:teacher: {taught} is not whole (model.safetensors was altered)" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert "stages/teacher is not whole" in printed.out and "checkpoint-8 is not whole" in printed.out


def test_a_damaged_model_that_its_checkpoint_still_holds_is_published_again(two_stages, tmp_path):
    final, _ = train(two_stages)
    before = (final / "model.safetensors").read_bytes()
    flip(final / "model.safetensors")
    _, console = train(two_stages, resume=True)
    assert "final is not whole (model.safetensors was altered)" in console.notes
    assert "final is written again, from checkpoint-8" in console.notes
    assert (final / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "damage", [lambda best: flip(best / "model.safetensors"), shutil.rmtree], ids=["altered", "deleted"]
)
def test_a_lost_best_model_is_replaced_at_the_next_evaluation(two_stages, tmp_path, damage):
    train(two_stages, "stages.distil.train.max_steps=4")
    best = tmp_path / "run" / "best"
    damage(best)
    _, console = train(two_stages, "stages.distil.train.max_steps=5", resume=True)
    assert any("it is replaced at the next evaluation" in note for note in console.notes)
    assert find_damage(best) is None
    assert (best / "model.safetensors").read_bytes() == (tmp_path / "run/final/model.safetensors").read_bytes()


def test_models_that_an_earlier_version_published_without_checksums_are_read(two_stages, tmp_path):
    expected, _ = train(two_stages, "stages.distil.train.max_steps=9", f"output_dir={tmp_path / 'unbroken'}")
    train(two_stages)
    for name in ("stages/teacher", "stages/distil", "best", "final"):
        (tmp_path / "run" / name / MANIFEST).unlink()
    final, console = train(two_stages, "stages.distil.train.max_steps=9", resume=True)
    assert not any("not whole" in note for note in console.notes)
    assert (final / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def change_json(name: str):
    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        content["progress"][name] = "many"
        path.write_text(json.dumps(content))

    return change


def change_moment(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, path)


def change_generator(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({**state, "cpu_rng": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("trainer.json", change_json("position"), "progress.position: Input should be a valid integer"),
        ("trainer.json", lambda path: path.write_text("[]"), "it is not a JSON object"),
        ("engine.pt", change_moment, "exp_avg of weight 0 is (3,), the weight (257, 16)"),
        ("engine.pt", change_generator, "TypeError: RNG state must be a torch.ByteTensor"),
        ("engine.pt", lambda path: torch.save({"optimizer": {}}, path), "it has no 'state'"),
        ("engine.pt", lambda path: path.write_text("no archive"), "UnpicklingError"),
        ("buffer.safetensors", lambda path: save_file({"keys": torch.zeros(3)}, path), "not the state of a rollout buffer"),
    ],
)  # fmt: skip
def test_state_that_was_changed_and_signed_again_is_one_line_about_its_file(
    two_stages, tmp_path, capsys, name, change, words
):
    train(two_stages)
    checkpoint = tmp_path / "run" / "checkpoint-8"
    change(checkpoint / "state" / name)
    sign(checkpoint)
    assert main(["train", str(two_stages), "stages.distil.train.max_steps=9", "--resume"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{checkpoint / 'state' / name}: {words}" in error and "remove checkpoint-8" in error


def test_checkpoints_on_another_disk_behind_links_do_not_end_a_run(two_stages, tmp_path):
    expected, _ = train(two_stages, "stages.distil.train.max_steps=9", f"output_dir={tmp_path / 'unbroken'}")
    train(two_stages)
    for step in (7, 8):
        shutil.move(tmp_path / "run" / f"checkpoint-{step}", tmp_path / "disk" / f"checkpoint-{step}")
        (tmp_path / "run" / f"checkpoint-{step}").symlink_to(tmp_path / "disk" / f"checkpoint-{step}")
    final, _ = train(two_stages, "stages.distil.train.max_steps=9", "save.keep=1", resume=True)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-11"]
    assert len(list((tmp_path / "disk").iterdir())) == 2
    assert (final / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
