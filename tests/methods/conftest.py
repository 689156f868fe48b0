"""Rollouts that remember what they were asked, and small runs of a method: unbroken, killed, and on two ranks."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.methods.protocol import TrainingData
from minillm.rollout.rollouts import Answer
from minillm.storage.checkpoint import newest_whole
from minillm.train.trainer_state import read_trainer_state
from tests.distributed.conftest import finish, start  # noqa: F401  fixtures of `two_ranks`
from tests.runs import TRAIN, die_after, in_a_child, records, train

SHOWN = {"pixel_values": torch.zeros(1, 2)}


@dataclass
class RecordingRollouts:
    """Answers every prompt with its key and an EOS, and keeps the arguments of each call."""

    asked: list[dict] = field(default_factory=list)
    exact_noise: bool = True
    mixtures: bool = True

    def sample(self, prompts, sampling, *, keys, progress=None, **arguments) -> list[Answer]:
        self.asked.append({"prompts": prompts, "sampling": sampling, "keys": keys, **arguments})
        extras = arguments.get("extras") or [{}] * len(prompts)
        answers = []
        for place, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            answers.append(Answer(prompt, [key % 200, 256], True, torch.tensor([-1.0, -0.5]), extras[place]))
            if progress is not None:
                progress(place + 1)
        return answers

    def weights_changed(self) -> None:
        pass


def stage_of(size: int, *, rollout: dict | None = None, **method) -> StageConfig:
    """A stage of a method whose steps are of `size` items, for models that a test makes itself."""
    return StageConfig(
        output_dir="unused",
        seed=3,
        student={"path": "unused"},
        teacher={"path": "unused"},
        method=method,
        rollout=rollout or {},
        train={"max_steps": 1, "per_device_train_batch_size": size},
    )


@pytest.fixture
def models(make_models):
    """A tiny student and its teacher."""
    return make_models()


@dataclass
class Asked:
    """What a method collected through RecordingRollouts."""

    data: TrainingData
    config: StageConfig
    told: list[tuple[str, int, int]]

    @property
    def calls(self) -> list[dict]:
        return self.data.rollouts.asked


@pytest.fixture
def asked(tmp_path):
    """A function that makes the data and configuration of a method; every setting is far from its default."""

    def make(**method) -> Asked:
        config = StageConfig(
            output_dir="unused", seed=7, student={"path": "unused"}, teacher={"path": "somewhere"}, method=method,
            rollout={"buffer_size": 5, "batch_size": 2, "max_new_tokens": 9, **method.pop("rollout", {})},
            train={"max_steps": 1, "per_device_train_batch_size": 5},
        )  # fmt: skip
        # three prompts for a buffer of five: two of them come twice
        examples = [Example(40 + index, [60 + index, 61], [90, 91], "", (), SHOWN) for index in range(3)]
        told: list[tuple[str, int, int]] = []
        data = TrainingData(
            Stream(examples, seed=1), None, RecordingRollouts(), Path(tmp_path) / "written",
            report_progress=lambda *news: told.append(news),
        )  # fmt: skip
        return Asked(data, config, told)

    return make


@pytest.fixture(scope="module")
def trained(recipe) -> Path:
    """The folder of the module's `recipe`, trained in one go."""
    folder = recipe.parent / "unbroken"
    assert in_a_child(lambda: train(recipe, f"output_dir={folder}")) == 0
    return folder


@pytest.fixture
def killed(recipe) -> Callable[..., tuple[Path, set[tuple[str, int]]]]:
    """A function that trains the module's `recipe`, killed over and over: `first` events after it began or went on from a
    new checkpoint, and `later` events later every time that it reached no other.

    It returns the folder of the run, and the checkpoints that it was gone on from: (stage, steps of it).
    """

    def kill(*, first: int, later: int) -> tuple[Path, set[tuple[str, int]]]:
        folder, events, places, kills = recipe.parent / "killed", first, set(), 0

        def child():
            die_after(events)
            train(recipe, f"output_dir={folder}", resume=folder.is_dir())

        while os.WIFSIGNALED(status := in_a_child(child)):
            kills += 1
            assert kills < 50, "it never ends"
            checkpoint, events = newest_whole(folder, lambda note: None), events + later
            if checkpoint is not None:
                progress = read_trainer_state(checkpoint).progress
                place = (progress.stage, progress.stage_step)
                events = events if place in places else first
                places.add(place)
        assert status == 0
        return folder, places

    return kill


@pytest.fixture(scope="module")
def two_ranks(recipe, start, finish) -> Path:  # noqa: F811
    """The folder of the module's `recipe`, trained on two ranks of ZeRO-3 with micro-batches of one."""
    folder = recipe.parent / "two_ranks"
    ranks = ("engine.type=deepspeed", "engine.stage=3", "train.per_device_train_batch_size=1", "save.steps=100")
    finish(start(2, *TRAIN, str(recipe), f"output_dir={folder}", *ranks))
    return folder


def assert_same_run(folder: Path, other: Path, models: tuple[str, ...] = ("final",)) -> None:
    """Two runs have the same records but for the clock, and the same weights in the folders `models`, bit for bit."""
    assert records(folder) == records(other)
    for model in models:
        ours, theirs = (load_file(one / model / "model.safetensors") for one in (folder, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs), model


def steps_of(folder: Path, stage: str) -> list[dict]:
    """The records of a stage's steps, without what depends on the clock."""
    return [one for one in records(folder) if one["stage"] == stage and one["kind"] == "train"]
