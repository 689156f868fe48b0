"""distillm2: the loss and gradients of full logits in float64, and whole runs."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from minillm.config.loader.run_plan import load_run
from minillm.data.pairs import AnswerPair
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.models.batch import TokenSequence
from minillm.planning.planner import plan_run
from minillm.rollout.rollouts import Sampling
from tests.methods.conftest import assert_same_run, stage_of, steps_of
from tests.runs import panels

ROOT = Path(__file__).parents[2]
PANELS = {
    "Skew KL on the teacher's answers": "skew_forward_kl_nats",
    "Skew reverse KL on the student's answers": "skew_reverse_kl_nats",
}
# answers of one to four tokens: a mean over all tokens would be another number
PAIRS = [
    AnswerPair(
        i, TokenSequence([60 + i, 70], [90 + i] * (1 + i)), TokenSequence([60 + i, 70], [80, 81 + i][: 1 + i % 2])
    )
    for i in range(4)
]


def distillm2(**keys):
    return build_method(stage_of(4, name="distillm2", **keys))


@pytest.mark.parametrize("keys", [{}, {"skew": 0.4, "student_weight": 0.3}])
def test_loss_and_gradients_are_those_of_full_logits_in_float64(keys, make_models):
    models = make_models()
    terms = distillm2(**keys).terms(PAIRS, None, models)
    side = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")
    loss, measured = torch.zeros(()), {}
    for term in terms:
        one, metrics = side(term)
        loss = loss + term.weight * one / term.count
        measured |= {name: value.item() / term.batch.tokens for name, value in metrics.items()}
    found = torch.autograd.grad(loss, list(models.student.parameters()))

    skew, weight = keys.get("skew", 0.1), keys.get("student_weight", 1.0)
    student, teacher = models.student.double(), models.teacher.model.double()
    try:
        want, sums, tokens = torch.zeros((), dtype=torch.float64), [0.0, 0.0], [0, 0]
        for pair in PAIRS:
            for own, item in enumerate((pair.chosen, pair.rejected)):
                ids, first = torch.tensor([item.prompt + item.response]), len(item.prompt) - 1
                q, p = (model(ids).logits[0, first:-1].softmax(-1) for model in (student, teacher))
                near, far = (q, p) if own else (p, q)
                distance = (near * (near / (skew * near + (1 - skew) * far)).log()).sum(-1)
                want = want + (weight if own else 1.0) * distance.mean() / len(PAIRS)
                sums[own] += distance.sum().item()
                tokens[own] += len(distance)
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert measured["skew_forward_kl_nats"] == pytest.approx(sums[0] / tokens[0], rel=1e-5)
    assert measured["skew_reverse_kl_nats"] == pytest.approx(sums[1] / tokens[1], rel=1e-5)
    scale = max(one.abs().max().item() for one in gradients)
    assert scale > 1e-3
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * scale)


def test_the_teachers_answers_are_the_first_and_sampled_as_rollout_says(asked):
    one = asked(name="distillm2", rollout={"temperature": 0.8})
    items = build_method(one.config).collect(one.data, None, draw=3)
    assert [(call["who"], call["draw"], call["sampling"]) for call in one.calls] == [
        ("teacher", 6, Sampling(9, 0.8)),
        ("student", 7, Sampling(9, 0.8)),
    ]
    assert len(items) == 5 and all(item.chosen.prompt == item.rejected.prompt for item in items)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("distillm2")
    document = small_run(folder, layers=1)
    document["eval"] = {"sets": {}}
    document["train"] |= {"max_steps": 3, "learning_rate": 1e-3}
    document["rollout"] |= {"temperature": 0.8}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}, "train": {"max_steps": 1}},
        "distil": {"teacher": {"path": "stage:teacher"}, "method": {"name": "distillm2", "student_weight": 0.5}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed, one_thread):
    broken, places = killed(first=25, later=15)
    assert any(stage == "distil" and 0 < steps < 3 for stage, steps in places), places
    assert_same_run(broken, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    for ours, theirs in zip(steps_of(two_ranks, "distil"), steps_of(trained, "distil"), strict=True):
        for key in ("loss", "loss/teacher_answers", "loss/student_answers", *PANELS.values()):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


def test_the_picture_has_both_divergences(trained):
    drawn = panels(trained)
    for title, name in PANELS.items():
        assert [one[name] for one in steps_of(trained, "distil")] in [list(line.get_ydata()) for line in drawn[title]]


def test_its_recipe_is_planned(monkeypatch):
    monkeypatch.chdir(ROOT)
    work = plan_run(load_run([Path("configs/distillm2.yaml")]), gpu="cpu").stages[-1].work
    assert [(one.name, one.batch, one.rows, one.teacher) for one in work.terms] == [
        ("teacher_answers", 8, 8 * 32, True),
        ("student_answers", 8, 8 * 32, True),
    ]
    assert [one.models for one in work.decodings] == [("teacher",), ("student",)]
