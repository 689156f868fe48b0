"""What is written by a thread is what a run that waits would have written, and none of its errors is lost."""

import errno
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM

from minillm.config.lora import LoraConfig
from minillm.config.training import SaveConfig
from minillm.models.adapters import add_adapters, without_adapters
from minillm.models.tokenizers import byte_tokenizer
from minillm.storage.background import is_at_work
from minillm.storage.checkpoint import newest_whole
from minillm.storage.manifest import find_damage
from minillm.storage.snapshot import SavedPart
from minillm.train import saver as saver_module
from minillm.train.saver import Saver
from tests.conftest import tiny_llama
from tests.runs import in_a_child, records, train
from tests.train.test_trainer import trainer  # noqa: F401


@pytest.fixture
def gate(monkeypatch):
    """Checkpoints are written when this event is set."""
    opened, write = threading.Event(), saver_module.write_checkpoint

    def gated(*args, **keys):
        assert opened.wait(60)
        return write(*args, **keys)

    monkeypatch.setattr(saver_module, "write_checkpoint", gated)
    yield opened
    opened.set()


def full(*args, **keys):
    raise OSError(errno.ENOSPC, "no space left; what was saved before is whole")


def content(folder: Path) -> dict[str, object]:
    """The files by their names; a pickle of the same state may be of other bytes, and is what it says."""
    names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    del names["manifest.json"]
    return {
        name: plain(torch.load(path)) if path.suffix == ".pt" else path.read_bytes() for name, path in names.items()
    }


def plain(state: object) -> tuple:
    leaves, shape = tree_flatten(state)
    return shape, [one.tolist() if isinstance(one, torch.Tensor) else one for one in leaves]


def trained(trainer, **groups):  # noqa: F811
    """A trainer in the middle of a buffer, with moments in its optimiser."""
    built = trainer(method={"name": "minillm", "ppo_epochs": 2, "lm_coef": 0.0}, **groups)
    for _ in range(2):
        built._step()
    return built


def test_it_is_the_checkpoint_of_the_moment_that_it_was_asked_in(trainer, gate, tmp_path):  # noqa: F811
    built = trained(trainer)
    gate.set()
    built.save(wait=True)
    expected = content(tmp_path / "checkpoint-2")
    gate.clear()
    built.save(wait=False)
    for _ in range(4):  # the next buffer is collected too
        built._step()
    gate.set()
    built.saver.finish()
    assert content(tmp_path / "checkpoint-2") == expected and find_damage(tmp_path / "checkpoint-2") is None
    assert {"state/engine.pt", "state/trainer.json", "state/buffer.safetensors", "tokenizer.json"} <= set(expected)
    built.save(wait=True)
    after = content(tmp_path / "checkpoint-6")
    assert all(after[name] != expected[name] for name in ("model.safetensors", "state/engine.pt"))


def test_adapters_are_merged_as_they_were(gate, tmp_path):
    """Also where their product counts for nothing meanwhile, as while the model below them is read."""
    pytest.importorskip("peft")
    model = add_adapters(tiny_llama(vocab_size=257), LoraConfig(r=2, alpha=8), seed=1)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name:
                one.fill_(0.1)
    saver = Saver(SaveConfig(), SimpleNamespace(student=model, tokenizer=byte_tokenizer()), tmp_path, pytest.fail)
    saver.checkpoint(1, [], [], wait=False)
    with without_adapters(model):
        gate.set()
        saver.finish()
    saver.checkpoint(2, [], [], wait=True)
    ours, theirs = (content(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    assert ours == theirs and "adapter/adapter_model.safetensors" in ours


def test_a_second_checkpoint_waits_for_the_first(trainer, gate, tmp_path):  # noqa: F811
    built = trained(trainer)
    built.save(wait=False)
    built._step()
    threading.Timer(0.2, gate.set).start()
    built.save(wait=False)
    assert newest_whole(tmp_path, pytest.fail).name == "checkpoint-2"
    built.saver.finish()
    assert newest_whole(tmp_path, pytest.fail).name == "checkpoint-3"


def test_best_is_on_the_disk_before_the_checkpoint_that_speaks_of_it(trainer, gate, tmp_path, monkeypatch):  # noqa: F811
    written, write = [], saver_module.write_folder
    monkeypatch.setattr(
        saver_module,
        "write_folder",
        lambda folder, *args, **keys: (write(folder, *args, **keys), written.append(folder)),
    )
    gate.set()
    built = trained(trainer)
    built.evaluate()
    built.save(wait=False)
    assert written == [tmp_path / "best"]
    built.saver.finish()


def test_a_failed_write_ends_the_run_with_its_error(trainer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(saver_module, "write_checkpoint", full)
    built = trainer(train={"max_steps": 1000}, save={"steps": 1}, eval={"steps": None})
    with pytest.raises(OSError, match="no space left") as caught:
        built.run(evaluate_first=False)
    assert caught.value.errno == errno.ENOSPC and built.progress.stage_step == 2


def test_the_last_checkpoint_of_a_stage_is_waited_for(trainer, tmp_path):  # noqa: F811
    trainer(save={"steps": 1}).run(evaluate_first=False)
    assert newest_whole(tmp_path, pytest.fail).name == "checkpoint-3" and not is_at_work()


def test_where_another_error_ends_the_run_a_failed_write_is_said(tmp_path):
    notes = []
    with pytest.raises(ValueError, match="another"), Saver(SaveConfig(), None, tmp_path, notes.append) as saver:
        saver._work.start(full)
        raise ValueError("another")
    (note,) = notes
    assert "is not on the disk: OSError" in note and "no space left" in note


def test_another_error_waits_for_the_write_and_an_interruption_does_not(gate, tmp_path):
    done, saver = [], Saver(SaveConfig(), None, tmp_path, pytest.fail)
    with pytest.raises(KeyboardInterrupt), saver:
        saver._work.start(lambda: (gate.wait(60), done.append(1)))
        raise KeyboardInterrupt
    assert not done and is_at_work()
    gate.set()
    with pytest.raises(ValueError), saver:
        raise ValueError
    assert done


@pytest.mark.parametrize("asked", [True, False])
def test_a_thread_writes_where_it_is_wanted(asked, tmp_path, monkeypatch):
    by = []
    part = SavedPart(lambda: None, lambda state, folder: by.append(threading.current_thread()))
    saver = Saver(SaveConfig(in_background=asked), None, tmp_path, pytest.fail)
    monkeypatch.setattr(saver, "_student", lambda: [part])
    monkeypatch.setattr(saver_module, "write_folder", lambda folder, fill, *, sign: fill(folder))
    saver.model(tmp_path)
    saver.finish()
    assert (by != [threading.current_thread()]) == asked


@pytest.mark.usefixtures("one_thread")
def test_killed_steps_after_a_checkpoint_that_is_half_written_the_run_ends_as_an_unbroken_one(two_stages, tmp_path):
    """The steps since the checkpoint before it are taken again."""
    final, _ = train(two_stages, f"output_dir={tmp_path / 'unbroken'}")
    saving = "stages.distil.save.steps=2"

    def killed():
        from minillm.engine.torch import TorchEngine
        from minillm.models import saving as models_saving

        step, write, half = TorchEngine.step, models_saving._write, threading.Event()
        taken = [0]

        def stalls(model, collected, folder):
            write(model, collected, folder)
            if folder.name == ".checkpoint-6.partial":  # the weights are there, the optimiser is not
                half.set()
                threading.Event().wait()

        def counted(self, micro_batches):
            taken[0] += 1
            if taken[0] == 8:  # the second step after it
                assert half.wait(60)
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, micro_batches)

        TorchEngine.step, models_saving._write = counted, stalls
        train(two_stages, saving, "save.best=false")

    assert os.WTERMSIG(in_a_child(killed)) == signal.SIGKILL
    run = tmp_path / "run"
    assert (run / ".checkpoint-6.partial" / "model.safetensors").exists() and not (run / "checkpoint-6").exists()
    resumed, console = train(two_stages, saving, "save.best=false", resume=True)
    assert any("going on from checkpoint-4" in note for note in console.notes)
    assert records(run) == records(tmp_path / "unbroken")
    assert (resumed / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    assert not list(run.glob(".checkpoint*"))


@pytest.mark.usefixtures("one_thread")
def test_a_second_ctrl_c_ends_the_process_at_once(two_stages):
    """While a checkpoint is being written, with the exit status of an interruption."""

    def interrupted():
        from minillm.cli.main import program
        from minillm.engine.torch import TorchEngine

        step, taken = TorchEngine.step, [0]

        def counted(self, micro_batches):
            taken[0] += 1
            if taken[0] == 3:
                assert is_at_work()
                raise KeyboardInterrupt
            return step(self, micro_batches)

        TorchEngine.step = counted
        saver_module.write_checkpoint = lambda *_, **__: threading.Event().wait()
        program(["train", str(two_stages), "train.max_steps=4", "save.steps=2", "save.best=false"])

    assert os.WEXITSTATUS(in_a_child(interrupted)) == 130


def test_tied_weights_are_written_once(tmp_path):
    model = tiny_llama(vocab_size=257, tie=True)
    saver = Saver(SaveConfig(), SimpleNamespace(student=model, tokenizer=byte_tokenizer()), tmp_path, pytest.fail)
    saver.model(tmp_path / "best")
    saver.finish()
    assert "lm_head.weight" not in load_file(tmp_path / "best" / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())
