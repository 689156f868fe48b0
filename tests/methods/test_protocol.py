"""What every method and term has: the size of a step, tensors that move together, and states that are refused."""

import pytest
import torch

from minillm.config.root import StageConfig
from minillm.distributed import collectives
from minillm.methods import build_method
from minillm.methods.protocol import HiddenLoss, Term, sequences_of
from minillm.models.batch import TokenSequence, collate
from minillm.rollout.buffer import Rollout
from minillm.teachers.teacher import HiddenRows

META = torch.device("meta")


def method():
    config = StageConfig(
        output_dir="unused", student={"path": "unused"}, method={"name": "sft"},
        train={"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 5},
    )  # fmt: skip
    return build_method(config)


def test_a_step_is_all_micro_batches_of_all_ranks(monkeypatch):
    assert method().step_size == 15
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    assert method().step_size == 30


def test_needs_are_those_of_the_configuration():
    built = method()
    assert built.needs == built.config.method.needs()


def test_a_term_moves_with_all_its_tensors():
    teacher = HiddenRows(torch.zeros(2, 4), None)
    hidden = HiddenLoss((1,), lambda *_: None, {"target": torch.zeros(2)})
    batch = collate([TokenSequence([1], [2, 3])], 0)
    term = Term("one", batch, lambda stats: stats.student_logprob, (), 2.0, inputs={"advantage": torch.zeros(2)},
                teacher=teacher, hidden=hidden)  # fmt: skip
    moved = term.to(META)
    tensors = [moved.batch.input_ids, moved.batch.labels, moved.inputs["advantage"], moved.hidden.inputs["target"]]
    assert {one.device.type for one in [*tensors, *moved.teacher.parts().values()]} == {"meta"}
    assert moved.hidden.layers == (1,) and (moved.name, moved.count) == ("one", 2.0)
    bare = Term("one", batch, term.objective, (), 2.0).to(META)
    assert bare.teacher is None and bare.hidden is None


def test_a_method_that_keeps_nothing_refuses_a_state():
    built = method()
    assert built.state_dict() == {}
    built.load_state_dict({})
    with pytest.raises(ValueError, match="SupervisedFineTuning keeps no state, but a checkpoint holds .'threshold'."):
        built.load_state_dict({"threshold": 1.0})


def test_a_stage_without_steps_needs_work_to_do(tmp_path):
    with pytest.raises(NotImplementedError, match="SupervisedFineTuning declares no terms"):
        method().prepare(None, None, tmp_path)


def test_sequences_are_items_or_lie_in_them():
    plain = TokenSequence([1], [2])
    rollout = Rollout(4, [5], [6], True, extras={})
    assert sequences_of([plain, rollout]) == [plain, TokenSequence([5], [6], 4, {})]
