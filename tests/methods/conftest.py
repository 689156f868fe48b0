"""Rollouts that remember what they were asked, for the methods that sample."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.methods.protocol import TrainingData
from minillm.rollout.rollouts import Answer

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
