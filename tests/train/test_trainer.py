"""The loop of a stage on tiny models: what each step takes, when a stage ends, and what its records count."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.config.loader.run_plan import Stage
from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.methods.minillm import MiniLLMMethod
from minillm.methods.protocol import TrainingData
from minillm.methods.sft import SupervisedFineTuning
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.storage.metrics_log import MetricsLog
from minillm.train import saver as saver_module
from minillm.train import trainer as trainer_module
from minillm.train.progress import Progress
from minillm.train.trainer import StageTrainer, TrainingError

EXAMPLES = [Example(index, [60 + index], [90, 91, 92][: 1 + index % 3], "", ()) for index in range(6)]


class Console:
    """Remembers what it is told."""

    def __init__(self):
        self.notes, self.records, self.evaluations = [], [], []
        self.note, self.step = self.notes.append, self.records.append

    def start(self, stage, limits, step):
        self.limits = limits

    def evaluation(self, record, samples):
        self.evaluations.append(record["stage_step"])


class Evaluator:
    """Measures nothing, and counts how often and whom."""

    sets = {"held_out": ()}

    def __init__(self):
        self.asked = []

    def evaluate(self, models, rollouts, who):
        self.asked.append(who)
        return SimpleNamespace(sets={}, mean={"rouge_l": 1.0}, samples=[{"answer": "so"}])


@pytest.fixture
def trainer(make_models, tmp_path):
    """A function that makes the trainer of a stage over EXAMPLES; its groups are those of the configuration."""

    def make(*, method={"name": "sft"}, train=None, **groups) -> StageTrainer:  # noqa: B006
        config = StageConfig(
            output_dir=str(tmp_path), seed=3, student={"path": "unused"}, teacher={"path": "unused"}, method=method,
            train={"max_steps": 3, "per_device_train_batch_size": 2, **(train or {})}, engine={"device": "cpu"},
            rollout={"buffer_size": 6, "batch_size": 6, "max_new_tokens": 3}, **groups,
        )  # fmt: skip
        models = make_models()
        data = TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path / "written")
        return StageTrainer(
            Stage("distil", config), models, data, output_dir=tmp_path, evaluator=Evaluator(),
            log=MetricsLog(tmp_path), console=Console(), progress=Progress("distil"),
        )  # fmt: skip

    return make


def records(folder: Path, kind: str) -> list[dict]:
    return [one for one in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if one["kind"] == kind]


def test_records_count_steps_tokens_and_passes(trainer, tmp_path):
    built = trainer(train={"gradient_accumulation_steps": 2}, log={"steps": 1})
    built.progress.step = 10  # of the stages before
    built.run(evaluate_first=False)
    found = records(tmp_path, "train")
    taken = [example for example in Stream(EXAMPLES, seed=1).take(12)]
    tokens = [sum(len(one.response_ids) for one in taken[: 4 * step]) for step in (1, 2, 3)]
    assert [one["step"] for one in found] == [11, 12, 13] and [one["stage_step"] for one in found] == [1, 2, 3]
    assert [one["student_tokens"] for one in found] == tokens
    assert [one["passes"] for one in found] == pytest.approx([4 / 6, 8 / 6, 2.0])
    seconds = [0.0, *(one["seconds"] for one in found)]
    for place, one in enumerate(found):
        rows = tokens[place] - ([0, *tokens][place])
        assert one["tokens_per_s"] == pytest.approx(rows / (seconds[place + 1] - seconds[place]), rel=1e-6)
        assert one["stage"] == "distil" and one["loss"] > 0 and one["memory/peak_gib"] > 0.01
    assert built.progress.stage_seconds == {"distil": seconds[-1]} and built.progress.finished


def test_peak_memory_is_in_gib_of_what_the_device_counts(monkeypatch):
    monkeypatch.setattr(trainer_module.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**19))  # KiB
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**29)  # bytes
    assert trainer_module.peak_memory_gib(torch.device("cpu")) == 1.5
    assert trainer_module.peak_memory_gib(torch.device("cuda:0")) == 2.5


def test_modules_beside_the_student_are_trained_at_their_own_rates(trainer, monkeypatch):
    projector = torch.nn.Linear(2, 2, bias=False)
    monkeypatch.setattr(SupervisedFineTuning, "modules", lambda self, models: {"projector": projector})
    monkeypatch.setattr(SupervisedFineTuning, "learning_rates", lambda self: {"projector": 0.125})
    *_, group = trainer().engine.optimizer.param_groups
    assert group["params"] == [projector.weight] and group["initial_lr"] == 0.125


def test_every_item_of_a_buffer_is_taken_once_in_each_inner_epoch(trainer, monkeypatch):
    seen, terms = [], MiniLLMMethod.terms

    def remember(self, items, data, models):
        seen.append([item.key for item in items])
        return terms(self, items, data, models)

    monkeypatch.setattr(MiniLLMMethod, "terms", remember)
    draws, collect = [], MiniLLMMethod.collect
    monkeypatch.setattr(
        MiniLLMMethod,
        "collect",
        lambda self, data, models, draw: draws.append(draw) or collect(self, data, models, draw),
    )
    built = trainer(method={"name": "minillm", "ppo_epochs": 2, "lm_coef": 0.0}, train={"max_steps": 9})
    built.run(evaluate_first=False)
    epochs = [[key for step in seen[start : start + 3] for key in step] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert draws == [0, 1] and built.progress.draw == 2


@pytest.mark.parametrize(
    "train, steps",
    [
        ({"max_steps": 2}, 2),
        ({"max_steps": None, "num_train_epochs": 1.0}, 3),
        ({"max_steps": None, "num_train_epochs": 1.1}, 4),  # 6.6 items of 2 a step
        ({"max_steps": None, "num_train_epochs": 0.01}, 1),
        ({"max_steps": 2, "num_train_epochs": 5.0}, 2),
        ({"max_steps": 9, "num_train_epochs": 1.0}, 3),
    ],
)
def test_steps_known_beforehand_end_a_stage(train, steps, trainer):
    built = trainer(train=train)
    assert built.total_steps == steps
    built.run(evaluate_first=False)
    assert built.progress.stage_step == steps and built.console.limits.steps == steps


def test_epochs_count_the_prompts_and_each_of_them_its_inner_epochs(trainer):
    method = {"name": "minillm", "ppo_epochs": 2, "lm_coef": 0.0}
    assert trainer(method=method, train={"max_steps": None, "num_train_epochs": 2.0}).total_steps == 12


def test_a_stage_ends_with_the_step_that_reaches_its_tokens(trainer):
    counts = [len(example.response_ids) for example in Stream(EXAMPLES, seed=1).take(6)]
    first, both = sum(counts[:2]), sum(counts[:4])
    for limit, steps in ((first, 1), (first + 1, 2), (both, 2)):
        built = trainer(train={"max_steps": None, "max_student_tokens": limit})
        built.run(evaluate_first=False)
        assert built.progress.stage_step == steps


def test_the_step_that_would_overrun_the_seconds_is_not_begun(trainer):
    built = trainer(train={"max_steps": None, "max_seconds": 10.0})
    built._slowest = {True: 3.0, False: 1.0}  # with and without a collection
    for spent, done in ((6.9, False), (7.1, True)):
        built.progress.seconds = spent
        assert built.done() is done
    built.items, built.progress.position = EXAMPLES[:2], 1  # half of what was collected is left
    for spent, done in ((8.9, False), (9.1, True)):
        built.progress.seconds = spent
        assert built.done() is done
    built.progress.position = 2  # used up: the next step collects
    assert built.done() and built._max_seconds() == 10.0


def test_a_stage_may_take_as_long_as_an_earlier_one_took(trainer):
    built = trainer(train={"max_steps": None, "max_seconds": "stage:warmup"})
    built.progress.stage_seconds = {"warmup": 4.5}
    assert built._max_seconds() == 4.5


def test_evaluations_records_and_checkpoints_come_at_their_intervals(trainer, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        saver_module, "write_checkpoint", lambda folder, step, fill, *, keep: saved.append((step, keep))
    )
    built = trainer(
        train={"max_steps": 7}, log={"steps": 3}, save={"steps": 2, "keep": 4}, eval={"steps": 3, "metric": "rouge_l"}
    )
    built.judge_teacher = True
    monkeypatch.setattr(built.best, "keep", lambda mean, progress: None)
    built.run(evaluate_first=True)
    assert [one["stage_step"] for one in records(tmp_path, "train")] == [3, 6, 7]
    assert built.evaluator.asked == ["teacher", "student", "student", "student", "student"]
    assert built.console.evaluations == [0, 0, 3, 6, 7]
    assert saved == [(2, 4), (4, 4), (6, 4), (7, 4)]
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [
        0,
        0,
        3,
        6,
        7,
    ]


def test_an_interrupted_stage_saves_and_is_not_finished(trainer, monkeypatch):
    saved = []
    monkeypatch.setattr(saver_module, "write_checkpoint", lambda folder, step, fill, *, keep: saved.append(step))
    built = trainer(save={"steps": 2})
    built.interrupted = lambda: True
    with pytest.raises(KeyboardInterrupt):
        built.run(evaluate_first=False)
    assert saved == [1] and not built.progress.finished and built.progress.stage_step == 1


def test_the_prompts_of_a_step_that_failed_are_named(trainer, monkeypatch):
    built = trainer()
    with torch.no_grad():
        built.models.student.lm_head.weight.fill_(math.nan)
    expected = [example.index for example in Stream(EXAMPLES, seed=1).take(2)]
    with pytest.raises(TrainingError, match="step 1 of stage 'distil'") as raised:
        built.run(evaluate_first=False)
    named = str(raised.value).partition("(by index): ")[2].partition(".")[0]
    assert Counter(json.loads(named)) == Counter(expected)


def test_rollouts_hear_of_every_step(trainer, monkeypatch):
    heard = []
    monkeypatch.setattr(LocalRollouts, "weights_changed", lambda self: heard.append(1))
    trainer().run(evaluate_first=False)
    assert len(heard) == 3


def test_a_method_observes_steps_and_evaluations_and_adds_to_the_records(trainer, tmp_path, monkeypatch):
    heard = []

    def observe(self, observation):
        heard.append((observation.kind, observation.step))
        return {"threshold": 0.5}

    monkeypatch.setattr(SupervisedFineTuning, "observe", observe)
    trainer(train={"max_steps": 2}, log={"steps": 1}).run(evaluate_first=True)
    assert heard == [("evaluation", 0), ("step", 1), ("step", 2), ("evaluation", 2)]
    assert [one["threshold"] for one in records(tmp_path, "train")] == [0.5, 0.5]


@pytest.mark.parametrize(
    "train, said",
    [
        ({"warmup_steps": 4}, "has 3 steps: the learning rate ends at 50% of train.learning_rate"),
        ({"warmup_steps": 3}, None),
        ({"warmup_steps": 4, "lr_scheduler_type": "constant"}, None),
    ],
)
def test_a_warmup_longer_than_the_stage_is_said(train, said, trainer):
    built = trainer(train=train)
    built.run(evaluate_first=False)
    assert [said in note for note in built.console.notes if "warmup" in note] == ([True] if said else [])
