"""dpkd in both forms: against float64 formulas and the released values, what it samples, and whole runs."""

import importlib.util
import json
import math
import os
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from minillm.config.methods.dpkd_keys import DPKD
from minillm.data.instructions import Example
from minillm.data.pairs import AnswerPair
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.losses import LMHead, linear_objective, linear_token_stats
from minillm.methods import build_method
from minillm.methods.dpkd import token_objective
from minillm.methods.protocol import TrainingData
from minillm.methods.reference_scores import ReferenceScores
from minillm.models.batch import TokenSequence
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from tests.methods.conftest import SHOWN, assert_same_run, stage_of, steps_of
from tests.runs import panels

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))
ROOT = Path(__file__).parents[2]
PAIRS = ("sequence", "token_argmax", "data")
# answers of one to three tokens, of which the last is cut off or an end
EXAMPLES = [Example(i, [60 + i, 70][: 1 + i % 2], [90 + i, 91, 256][: 1 + i % 3], "", ()) for i in range(6)]
FORMS = {
    "default": {},
    "label_smoothing_0.1": {"label_smoothing": 0.1},
    "ipo": {"preference_loss": "ipo"},
    "reference_free": {"reference_free": True},
    "beta_0.5": {"beta": 0.5},
}


def keys_of(**keys) -> DPKD:
    return DPKD(name="dpkd", **{"lm_coef": 0.0, **keys})


def dpkd(**keys):
    return build_method(stage_of(6, rollout={"max_new_tokens": 5}, name="dpkd", **{"lm_coef": 0.0, **keys}))


def released() -> tuple[dict, dict[str, torch.Tensor]]:
    if not (GOLDEN / "1_dpkd_token.npz").is_file():
        pytest.skip("MINILLM_GOLDEN has no 1_dpkd_token.npz")
    arrays = {name: torch.from_numpy(one) for name, one in numpy.load(GOLDEN / "1_dpkd_token.npz").items()}
    return json.loads((GOLDEN / "1_dpkd_token.json").read_text(encoding="utf-8")), arrays


def token_form(
    student: torch.Tensor,  # (N, V) logits, float64
    teacher: torch.Tensor,  # (N, V)
    labels: torch.Tensor,  # (N,)
    keys: DPKD,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean loss, its gradient (N, V), the ids that are compared (2, N)) of the method's objective on these logits."""
    same = LMHead(torch.eye(student.shape[-1], dtype=student.dtype))
    found = linear_token_stats(student, same, teacher, same, labels, fields=("teacher_argmax", "student_argmax"))
    compared = torch.stack([found.teacher_argmax, found.student_argmax])
    every = torch.cat([*compared, *[labels] * (keys.ce_coef > 0)])
    times = len(every) // len(labels)
    student = student.clone().requires_grad_()
    loss, _ = linear_objective(
        student.repeat(times, 1), same, teacher.repeat(times, 1), same, every, token_objective(keys), coupled=True
    )
    loss = loss / len(labels)
    return loss.detach(), torch.autograd.grad(loss, student)[0], compared


@pytest.mark.parametrize("form", FORMS)
def test_the_token_form_has_the_released_losses_and_gradients(form):
    said, arrays = released()
    counted = arrays["labels"] != -100
    student, teacher, labels = (arrays[name][counted] for name in ("student_logits", "teacher_logits", "labels"))
    loss, gradient, compared = token_form(
        student, teacher, labels, keys_of(pairs="token_argmax", ce_coef=0.0, **FORMS[form])
    )
    want = said["loss_float64"] if form == "default" else said["flags"][form]
    assert loss.item() == pytest.approx(want, rel=1e-12)
    theirs = arrays["grad" if form == "default" else f"grad_{form}"][counted]
    torch.testing.assert_close(gradient, theirs, rtol=1e-9, atol=1e-12)
    assert torch.equal(compared, torch.stack([arrays[f"argmax_{who}"][counted] for who in ("teacher", "student")]))
    assert (compared[0] == compared[1]).any() and not gradient[compared[0] == compared[1]].any()


def test_the_token_form_with_cross_entropy_is_twice_the_released_parts():
    said, arrays = released()
    counted = arrays["labels"] != -100
    student, teacher, labels = (arrays[name][counted] for name in ("student_logits", "teacher_logits", "labels"))
    loss, gradient, _ = token_form(student, teacher, labels, keys_of(pairs="token_argmax"))
    assert loss.item() == pytest.approx(said["total_step"]["ce"] + said["total_step"]["dpkd"], rel=1e-12)
    torch.testing.assert_close(gradient, 2 * arrays["total_grad_student"][counted], rtol=1e-9, atol=1e-12)


def test_near_ties_are_decided_in_full_precision():
    """The released bf16 log-softmaxes take other ids there, and another loss."""
    said, arrays = released()
    student, teacher = (arrays[name].flatten(0, 1) for name in ("near_student", "near_teacher"))
    labels = torch.zeros(len(student), dtype=torch.int64)
    keys = keys_of(pairs="token_argmax", ce_coef=0.0)
    _, _, compared = token_form(student, teacher, labels, keys)
    counted = (arrays["labels"] != -100).flatten()
    loss, _, _ = token_form(student[counted], teacher[counted], labels[counted], keys)
    assert loss.item() == pytest.approx(said["near_ties"]["loss_float64"], rel=1e-12)
    theirs = torch.stack([arrays[f"near_argmax_{who}_bf16"].flatten() for who in ("teacher", "student")])
    assert (compared != theirs).sum(1).tolist() == [
        said["near_ties"]["differs_teacher"],
        said["near_ties"]["differs_student"],
    ]


@pytest.mark.parametrize("ce_coef", [0.0, 0.5])
def test_the_token_form_is_that_of_full_logits_in_float64(ce_coef, make_models, tmp_path):
    models = make_models()
    data = TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path)
    method = dpkd(pairs="token_argmax", beta=0.7, ce_coef=ce_coef)
    items = method.collect(data, models, draw=0)
    (term,) = method.terms(items, data, models)
    tokens = sum(len(item.response) for item in items)
    assert term.count == term.batch.tokens == tokens and len(term.batch.labels) == (2 + (ce_coef > 0)) * tokens
    loss, metrics = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    found = torch.autograd.grad(loss / term.count, list(models.student.parameters()))

    student, teacher = models.student.double(), models.teacher.model.double()
    try:
        total, margins = torch.zeros((), dtype=torch.float64), []
        for item in items:
            ids, first = torch.tensor([item.prompt + item.response]), len(item.prompt) - 1
            q, p = (torch.log_softmax(model(ids).logits[0, first:-1], -1) for model in (student, teacher))
            for place, token in enumerate(item.response):
                a, b = p[place].argmax(), q[place].argmax()
                margin = 0.7 * (q[place, a] - q[place, b] - p[place, a] + p[place, b])
                total = total + torch.log(1 + torch.exp(-margin)) - ce_coef * q[place, token]
                margins.append(margin.item())
        want = total / tokens
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert loss.item() / tokens == pytest.approx(want.item(), rel=1e-5)
    assert metrics["margin"].item() / tokens == pytest.approx(sum(margins) / tokens, rel=1e-4)
    scale = max(one.abs().max().item() for one in gradients)
    assert scale > 1e-3
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * scale)


def test_both_models_answer_every_prompt_with_noise_of_their_own(asked):
    settings = {"temperature": 0.5, "top_k": 4, "top_p": 0.75}
    one = asked(name="dpkd", rollout=settings)
    items = build_method(one.config).collect(one.data, None, draw=3)
    teacher, student = one.calls
    assert (teacher["who"], student["who"]) == ("teacher", "student")
    assert (teacher["draw"], student["draw"]) == (6, 7)
    for call in one.calls:
        assert call["sampling"] == Sampling(9, 0.5, 4, 0.75)
        assert (call["seed"], call["batch_size"], call["extras"]) == (7, 2, [SHOWN] * 5)
    assert teacher["prompts"] == student["prompts"] and teacher["keys"] == student["keys"]
    assert [item.key for item in items] == [prompt[0] - 20 for prompt in teacher["prompts"]]
    assert all(item.chosen.prompt == item.rejected.prompt and item.chosen.response for item in items)


def test_the_teachers_answer_is_the_chosen_one(make_models, tmp_path):
    models = make_models()
    rollouts = LocalRollouts(models)
    data = TrainingData(Stream(EXAMPLES, seed=1), None, rollouts, tmp_path)
    method = dpkd()
    items = method.collect(data, models, draw=2)
    prompts = [item.chosen.prompt for item in items]
    for who, draw, name in (("teacher", 4, "chosen"), ("student", 5, "rejected")):
        keys = [item.key for item in items]
        answers = rollouts.sample(
            prompts, Sampling(5), keys=keys, seed=method.config.seed, draw=draw, who=who, batch_size=8
        )
        assert [getattr(item, name).response for item in items] == [answer.response for answer in answers], who
    assert any(item.chosen.response != item.rejected.response for item in items)


def test_keys_that_contradict_each_other_or_do_nothing_are_named():
    def idle(**keys):
        return {key for key, *_ in keys_of(**keys).idle_keys()}

    assert idle(lm_coef=1.0) == {"ce_coef"}
    assert idle(pairs="token_argmax") == {"length_norm", "pt_kd_ratio"}
    assert idle(preference_loss="ipo", lm_coef=1.0) == {"label_smoothing", "target_margin", "ce_coef"}
    assert idle(preference_loss="kto_pair") == {"label_smoothing", "target_margin", "dpop", "ce_coef", "pt_kd_ratio"}
    assert [key for key, *_ in keys_of(dpop=1.0, reference_free=True).findings()] == ["dpop"]
    assert [key for key, *_ in keys_of(preference_loss="kto_pair", reference_free=True).findings()] == [
        "preference_loss"
    ]
    assert not [*keys_of(dpop=1.0).findings()]


def test_each_form_needs_what_it_reads():
    sequence, token = keys_of().needs(), keys_of(pairs="token_argmax", lm_coef=1.0).needs()
    assert sequence.samples == ("teacher", "student") and not sequence.references and not sequence.corpus
    assert sequence.teacher_abilities == {"sample"} and sequence.terms[0].sequences == 2
    assert not token.samples and token.references and token.corpus and not token.teacher_abilities
    assert (token.terms[0].labels, token.terms[0].scored) == (3, True)
    assert not keys_of(reference_free=True).needs().terms[0].teacher and keys_of(reference_free=True).needs().teacher


GIVEN = [
    AnswerPair(0, TokenSequence([60, 61], [90, 91, 92, 256]), TokenSequence([60, 61], [70, 256])),
    AnswerPair(1, TokenSequence([62], [93]), TokenSequence([62], [94, 95, 96])),
    AnswerPair(2, TokenSequence([63, 64, 65], [97, 98]), TokenSequence([63, 64, 65], [99, 97])),
]


def given(tmp_path, models) -> TrainingData:
    return TrainingData(None, None, LocalRollouts(models), tmp_path, pairs=Stream(GIVEN, seed=1))


@pytest.mark.parametrize("form", [{}, {"length_norm": False, "preference_loss": "ipo"}, {"dpop": 5.0}])
def test_given_pairs_are_compared_with_a_reference_in_float64(form, make_models, tmp_path):
    """A student that moves away from its reference, over two passes of the data: the reference is asked in the first alone."""
    models = make_models()
    data, method = given(tmp_path, models), dpkd(pairs="data", beta=0.7, **form)
    loss_of, read = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch"), []
    rows = models.teacher.rows
    models.teacher.rows = lambda batch: read.append(len(batch.lengths)) or rows(batch)
    for _ in range(2):  # six of three pairs each
        items = method.collect(data, models, draw=0)
        assert sorted(item.key for item in items) == [0, 0, 1, 1, 2, 2]
        (term,) = method.terms(items, data, models)
        assert term.teacher is None and read == [6]
        loss, metrics = loss_of(term)
        student, teacher = models.student.double(), models.teacher.model.double()
        try:
            total = margins = 0.0
            for item in items:
                scores = []
                for one in (item.chosen, item.rejected):
                    ids, first = torch.tensor([one.prompt + one.response]), len(one.prompt) - 1
                    places = torch.arange(len(one.response))
                    q, p = (model(ids).logits[0, first:-1].log_softmax(-1) for model in (student, teacher))
                    ratio = (q - p)[places, torch.tensor(one.response)].sum()
                    scores.append((ratio / (len(one.response) if method.config.method.length_norm else 1)).item())
                chosen, rejected = scores
                difference = chosen - rejected - form.get("dpop", 0.0) * max(0.0, -chosen)
                ipo = (difference - 1 / (2 * 0.7)) ** 2
                total += ipo if "preference_loss" in form else math.log1p(math.exp(-0.7 * difference))
                margins += 0.7 * (chosen - rejected)
        finally:
            student.float(), teacher.float()
        assert loss.item() == pytest.approx(total, rel=1e-5)
        assert metrics["margin"].item() == pytest.approx(margins, rel=1e-4)
        with torch.no_grad():
            for weight in models.student.parameters():
                weight.add_(0.1 * torch.randn_like(weight))


def test_ranks_share_the_reading_of_the_reference(make_models, in_ranks):
    models, alone = [make_models(), make_models()], ReferenceScores()
    alone.add(GIVEN, models[0], batch_size=2)

    def work(rank):
        scores = ReferenceScores()
        scores.add(GIVEN, models[rank], batch_size=2)
        return scores.of(GIVEN)

    for found in in_ranks(2, work):
        torch.testing.assert_close(found, alone.of(GIVEN), rtol=1e-6, atol=1e-6)
    again = ReferenceScores()
    again.load_state_dict(alone.state_dict())
    again.add(GIVEN, None, batch_size=2)  # nothing is left to read
    assert torch.equal(again.of(GIVEN), alone.of(GIVEN))


def test_without_a_reference_nothing_reads_the_pairs(make_models, tmp_path):
    models, method = make_models(teacher=False), dpkd(pairs="data", reference_free=True)
    data = given(tmp_path, models)
    (term,) = method.terms(method.collect(data, models, draw=0), data, models)
    assert term.teacher is None and term.fields == ("student_logprob",) and method.state_dict() == {}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    """All forms, one after the other, with the same teacher."""
    folder = tmp_path_factory.mktemp("dpkd")
    document = small_run(folder, layers=1)
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"max_steps": 3, "adam_epsilon": 1e-3}
    document["eval"] = {}
    keys = {"teacher": {"path": "stage:teacher"}, "method": {"name": "dpkd", "beta": 0.5, "pt_kd_ratio": 0.5}}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}, "train": {"max_steps": 1}},
        "sequence": keys,
        "token_argmax": {**keys, "method": {**keys["method"], "pairs": "token_argmax"}},
        "data": {**keys, "method": {**keys["method"], "pairs": "data", "pt_kd_ratio": 0.0}},
    }
    # three steps of two are twice through three pairs
    answers = [("the cat sat", "yes"), ("go", "a dog ran off"), ("it", "we saw it")]
    lines = [json.dumps({"question": f"{n}?", "good": good, "rejected": bad}) for n, (good, bad) in enumerate(answers)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    document["data"]["pairs"] = {"path": str(folder / "pairs.jsonl"), "template": "none", "chosen": "good",
                                 "max_prompt_length": 8, "max_response_length": 6}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_runs_that_are_killed_go_on_bit_for_bit(trained, killed):
    for form in PAIRS:
        found = steps_of(trained, form)
        assert all({"margin", "loss/preference", "loss/pretraining"} <= one.keys() for one in found)
        assert len({one["margin"] for one in found}) == 3
    broken, places = killed(first=40, later=8)
    assert {stage for stage, steps in places if steps < 3} >= set(PAIRS), places
    assert_same_run(broken, trained, tuple(f"stages/{form}" for form in PAIRS))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    for form in PAIRS:
        for ours, theirs in zip(steps_of(two_ranks, form), steps_of(trained, form), strict=True):
            for key in ("loss", "loss/preference", "margin", "student_tokens"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (form, key)


def test_the_picture_has_the_margin_of_every_step(trained):
    lines = panels(trained)["Margin of the teacher's choice over the student's"]
    drawn = [list(line.get_ydata()) for line in lines]
    assert all([one["margin"] for one in steps_of(trained, form)] in drawn for form in PAIRS)


def test_its_recipe_is_planned(monkeypatch):
    from minillm.config.loader.run_plan import load_run
    from minillm.planning.planner import plan_run

    monkeypatch.chdir(ROOT)
    work = plan_run(load_run([Path("configs/dpkd.yaml")]), gpu="cpu").stages[-1].work
    first, second = work.terms
    assert (first.name, first.batch, first.rows, first.teacher) == ("preference", 16, 16 * 32, True)
    assert (second.name, second.batch, second.teacher) == ("pretraining", 8, False)
    assert [one.models for one in work.decodings] == [("teacher",), ("student",)]
    token = ["stages.distil.method.pairs=token_argmax"]
    work = plan_run(load_run([Path("configs/dpkd.yaml")], token), gpu="cpu").stages[-1].work
    assert (work.terms[0].batch, work.terms[0].rows) == (8, 3 * 8 * 64) and not work.decodings
    assert work.scorings[0].models == ("teacher", "student") and work.scorings[0].rows == 8 * 64
