"""Steps are cut into micro-batches of like lengths, which changes their padding and nothing else."""

import json
from dataclasses import replace

import pytest

from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.pairs import AnswerPair
from minillm.data.stream import Stream
from minillm.engine.torch import TorchEngine
from minillm.methods import build_method
from minillm.methods.cmc import ControlItem
from minillm.methods.protocol import TrainingData
from minillm.methods.sft import SupervisedFineTuning
from minillm.methods.step_by_step import TaskRecord
from minillm.methods.text_pairs import PairedText
from minillm.models.batch import TokenSequence
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.train.micro_batches import cut_step
from minillm.train.progress import Progress
from minillm.train.trainer_state import TrainerState, read_trainer_state, trainer_state_part
from tests.engine.test_torch import seen_by_the_optimizer
from tests.train.test_trainer import trainer  # noqa: F401  a fixture

METHODS = {
    "sft": {},
    "kd": {"ce_ratio": 0.3},
    "minillm": {"alpha": 0.2, "lm_coef": 0.5},
    "opd": {},
    "gkd": {"on_policy": 1.0},
    "distillm2": {},
    "taid": {"steps": 4},
    "dpkd-sequence": {"pairs": "sequence", "lm_coef": 0.0},
    "dpkd-tokens": {"pairs": "token_argmax", "lm_coef": 0.0},
    "llavadi": {"features_coef": 0.5, "layers": [[1, 1]]},
    "cmc": {},
}
LENGTHS = (2, 19, 3, 11, 1, 9)


def of_length(tokens: int, key: int = 0) -> TokenSequence:
    return TokenSequence([1], [2] * (tokens - 1), key)


def test_items_of_like_lengths_share_a_micro_batch_and_the_longest_come_first():
    items = [of_length(length, key) for key, length in enumerate([3, 9, 2, 8, 3])]
    cut = cut_step(items, 2, by_length=True)
    assert [[one.key for one in part] for part in cut] == [[1, 3], [0, 4], [2]]
    assert [[one.key for one in part] for part in cut_step(items, 2, by_length=False)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("size", [1, 5, 8])
def test_where_nothing_is_padded_less_a_step_stays_as_it_is(size):
    items = [of_length(length, key) for key, length in enumerate([3, 9, 2, 8, 3])]
    assert sum(cut_step(items, size, by_length=True), []) == items


def test_the_width_of_an_item_is_that_of_its_longest_text():
    short, long = of_length(3), of_length(7)
    assert AnswerPair(0, short, long).width == AnswerPair(0, long, short).width == 7
    assert PairedText(0, short, long).width == PairedText(0, long, short).width == 7
    assert ControlItem(0, short, None).width == 3 and ControlItem(0, short, long).width == 7
    assert TaskRecord(0, {"label": short, "rationale": long}).width == 7


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_step_is_the_same_however_it_is_cut(method, make_models, tmp_path):
    """In float64. It is a method's own affair to say so where this does not hold (Needs.couples_items)."""
    config = StageConfig(
        output_dir=str(tmp_path), seed=3, student={"path": "unused"}, teacher={"path": "unused"},
        method={"name": method.partition("-")[0], **METHODS[method]},
        train={"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": None,
               "learning_rate": 1e-30},
        rollout={"buffer_size": 6, "batch_size": 6, "max_new_tokens": 9},
    )  # fmt: skip
    models = make_models()
    models.student.double()
    models.teacher.model.double()
    examples = [
        Example(key, [60 + key] * (1 + length // 2), [90, 91, 92, 93][: 1 + key % 4] * length, "", ())
        for key, length in enumerate(LENGTHS)
    ]
    corpus = Stream([list(range(start, start + 5)) for start in range(40)], seed=1)
    data = TrainingData(Stream(examples, seed=1), corpus, LocalRollouts(models), tmp_path)
    built = build_method(config)
    modules = built.modules(models)
    for module in modules.values():
        module.double()
    items, before = built.collect(data, models, 0), corpus.state_dict()
    found, cuts = [], []
    for by_length in (True, False):
        corpus.load_state_dict(before)
        engine = TorchEngine(models, config.train, config.engine, total_steps=1, modules=modules)
        found.append(seen_by_the_optimizer(engine))
        cuts.append(cut_step(list(items), 2, by_length=by_length))
        engine.step([built.terms(part, data, models) for part in cuts[-1]])
    assert [[one.key for one in part] for part in cuts[0]] != [[one.key for one in part] for part in cuts[1]]
    for name, ours in found[0].items():
        assert ours.norm() > 0 and (ours - found[1][name]).norm() < 1e-9 * ours.norm(), name


def cut_by(built, monkeypatch) -> list[list[int]]:
    """The lengths of the items of each micro-batch of the next step."""
    seen, terms = [], SupervisedFineTuning.terms

    def noted(self, items, data, models):
        seen.append([one.width for one in items])
        return terms(self, items, data, models)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedFineTuning, "terms", noted)
        built._step()
    return seen


FOUR = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def test_a_step_is_cut_by_length(trainer, monkeypatch):  # noqa: F811
    in_order = trainer(train=FOUR)
    in_order.progress.by_length = False
    (first, second), (third, fourth) = cut_by(in_order, monkeypatch)
    lengths = sorted((first, second, third, fourth), reverse=True)
    assert lengths != [first, second, third, fourth]
    assert cut_by(trainer(train=FOUR), monkeypatch) == [lengths[:2], lengths[2:]]


@pytest.mark.parametrize("need", ["couples_items", "auxiliary"])
def test_a_method_that_couples_its_items_has_them_as_they_come(need, trainer, monkeypatch):  # noqa: F811
    in_order, coupled = trainer(train=FOUR), trainer(train=FOUR)
    in_order.progress.by_length = False
    coupled.method.needs = replace(coupled.method.needs, **{need: True})
    assert cut_by(coupled, monkeypatch) == cut_by(in_order, monkeypatch)


def test_a_balance_loss_has_the_items_as_they_come(trainer):  # noqa: F811
    items = [of_length(length) for length in (2, 5, 3, 4)]
    plain, balanced = trainer(train=FOUR), trainer(train=FOUR | {"router_aux_loss_coef": 0.1})
    assert [one.width for part in plain._cut(items) for one in part] == [5, 4, 3, 2]
    assert [one.width for part in balanced._cut(items) for one in part] == [2, 5, 3, 4]


def test_a_run_of_before_goes_on_in_the_old_order(tmp_path):
    (tmp_path / "state").mkdir()
    config = {"train": {"max_steps": 6}, "eval": {}}
    trainer_state_part(TrainerState(Progress("distil"), config, 1)).save(tmp_path / "state")
    assert read_trainer_state(tmp_path).progress.by_length
    path = tmp_path / "state" / "trainer.json"
    content = json.loads(path.read_text())
    del content["progress"]["by_length"]
    path.write_text(json.dumps(content))
    assert not read_trainer_state(tmp_path).progress.by_length
