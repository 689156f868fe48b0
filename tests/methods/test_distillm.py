"""distillm against formulas in float64 and the released values, its buffer and threshold, and whole runs."""

import importlib.util
import itertools
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.config.methods.distillm_keys import DistiLLM
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.losses import LMHead, linear_divergence
from minillm.methods import build_method
from minillm.methods.protocol import Observation, TrainingData
from minillm.planning.planner import plan_run
from minillm.rollout.buffer import Rollout
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.methods.conftest import assert_same_run, stage_of, steps_of
from tests.runs import panels

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))
ROOT = Path(__file__).parents[2]
EXAMPLES = [Example(i, [60 + i, 70][: 1 + i % 2], [90 + i, 91, 256][: 2 + i % 2], "", ()) for i in range(4)]
BLOCKS = [[60 + i, 70, 256, 90 + i, 91, 40] for i in range(6)]


def distillm(**keys):
    keys = {"steps": 60, "lm_coef": 0.0, **keys}
    return build_method(stage_of(4, rollout={"max_new_tokens": 6}, name="distillm", **keys))


@pytest.fixture
def data(models, tmp_path):
    return TrainingData(Stream(EXAMPLES, seed=1), Stream(BLOCKS, seed=1), LocalRollouts(models), tmp_path)


@pytest.fixture(scope="module")
def released() -> tuple[dict, dict[str, torch.Tensor]]:
    if not (GOLDEN / "7_distillm.npz").is_file():
        pytest.skip("MINILLM_GOLDEN has no 7_distillm.npz")
    arrays = {name: torch.from_numpy(one) for name, one in numpy.load(GOLDEN / "7_distillm.npz").items()}
    return json.loads((GOLDEN / "7_distillm.json").read_text(encoding="utf-8")), arrays


def evaluated(method, loss: float) -> None:
    assert method.observe(Observation("evaluation", {"loss_nats": loss}, 1)) == {}


def stepped(method, data, models, draw: int) -> tuple[list, dict[str, float]]:
    """The items of a step and what the method records of it."""
    items = method.collect(data, models, draw=draw)
    return items, method.observe(Observation("step", {"loss": 1.0}, draw + 1))


@pytest.mark.parametrize("lm_coef", [0.0, 0.5])
@pytest.mark.parametrize("source", ["references", "fresh"])
@pytest.mark.parametrize("divergence", ["skew_forward_kl", "skew_reverse_kl"])
def test_loss_and_gradient_are_those_of_full_logits_in_float64(divergence, source, lm_coef, models, data):
    method = distillm(divergence=divergence, skew=0.3, threshold_start=float(source == "fresh"), lm_coef=lm_coef)
    items = method.collect(data, models, draw=0)
    assert method.source == source and len(items) == 4
    if source == "references":
        assert {tuple(item.response) for item in items} == {tuple(one.response_ids) for one in EXAMPLES}
    terms = method.terms(items, data, models)
    module = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")
    loss = sum(term.weight * module(term)[0] / term.count for term in terms)
    found = torch.autograd.grad(loss, list(models.student.parameters()))
    blocks = [BLOCKS[place] for place, _ in Stream(BLOCKS, seed=1).take_numbered(4)]

    student, teacher = models.student.double(), models.teacher.model.double()
    try:

        def log_probs(model, ids: list[int], first: int) -> torch.Tensor:  # of what follows ids[first]
            return torch.log_softmax(model(torch.tensor([ids])).logits[0, first:-1], -1)

        total, tokens, text = torch.zeros((), dtype=torch.float64), 0, torch.zeros((), dtype=torch.float64)
        for item in items:
            q, p = (
                log_probs(one, item.prompt + item.response, len(item.prompt) - 1).exp() for one in (student, teacher)
            )
            p = p.detach()
            if divergence == "skew_forward_kl":
                total = total + (p * torch.log(p / (0.3 * p + 0.7 * q))).sum()
            else:
                total = total + (q * torch.log(q / (0.7 * p + 0.3 * q))).sum()
            tokens += len(item.response)
        for block in blocks:
            rows = log_probs(student, block, 0)
            text = text - sum(rows[place, token] for place, token in enumerate(block[1:]))
        want = total / tokens + lm_coef * text / (4 * 5)
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    scale = max(one.abs().max().item() for one in gradients)
    assert scale > 1e-3
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("skew", [0.1, 0.5])
@pytest.mark.parametrize("divergence, theirs", [("skew_forward_kl", "skewed_forward_kl"), ("skew_reverse_kl", "skewed_reverse_kl")])  # fmt: skip
def test_the_divergences_have_the_released_values_and_gradients(divergence, theirs, skew, released):
    """But for the teacher's entropy, which the released forward form adds to the divergence."""
    said, arrays = released
    student, teacher = arrays["student_logits"].clone().requires_grad_(), arrays["teacher_logits"]
    same = LMHead(torch.eye(student.shape[-1], dtype=student.dtype))
    loss = linear_divergence(student, same, teacher, same, divergence=divergence, alpha=skew, labels=arrays["labels"])
    entropy = said["true_divergences"]["teacher_entropy"] if divergence == "skew_forward_kl" else 0.0
    assert loss.item() == pytest.approx(said["values"][f"{theirs}_{skew}"]["value"] - entropy, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, arrays[f"grad_{theirs}_{skew}"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rows, keys", [("rows", {}), ("also_eps_0", {"tolerance": 0.0}), ("init_0_95", {"threshold_start": 0.95})])  # fmt: skip
def test_the_threshold_moves_as_in_the_released_code(rows, keys, released):
    said = released[0]["adaptive_threshold"]
    keys = {"threshold_start": said["init"], "tolerance": said["eps"], **keys}
    method = distillm(**keys)
    first = {"init_0_95": 1.0}.get(rows, said["first"])
    evaluated(method, first)
    assert (method.threshold, method.reference_loss) == (keys["threshold_start"], first)
    for loss, threshold, reference in said[rows]:
        state, method = method.state_dict(), distillm(**keys)  # a run that is resumed before every evaluation
        method.load_state_dict(state)
        evaluated(method, loss)
        assert (method.threshold, method.reference_loss) == (threshold, reference), loss


def test_data_are_chosen_as_in_the_released_code(released):
    for row in released[0]["sampling_threshold"]:
        if row["replay_ratio"] == "decreasing":  # the published one
            method = distillm(threshold_start=row["adaptive_threshold"], steps=row["total"])
            method.steps["references"] = row["step"] - 1
            assert method.fresh_threshold == pytest.approx(row["samp_threshold"], abs=1e-15)
    for row in released[0]["choice"]:
        method = distillm(threshold_start=row["thr"], replay_size=row["capacity"], steps=10**6)
        method.replay = [Rollout(0, [1], [2], True)] * row["buffer"]
        method.steps["fresh"] = round(10**6 * (1 - row["samp"] / row["thr"])) - 1
        assert method.fresh_threshold == pytest.approx(row["samp"], abs=1e-6)
        choice = {"data": "references", "replay": "replayed"}.get(row["choice"], row["choice"])
        assert method.choose(row["r"]) == choice, row


def test_the_shares_of_steps_are_those_of_the_coins(models, data, monkeypatch):
    numbers = itertools.count()

    def sample_answers(prompts, *arguments, **keys):
        return [Rollout(one.key, one.prompt, [90, next(numbers)], True) for one in prompts]

    monkeypatch.setattr("minillm.methods.distillm.sample_answers", sample_answers)
    method, drawn, replayed = distillm(threshold_start=0.6, steps=600, replay_size=8), [], []
    for draw in range(600):
        items, record = stepped(method, data, models, draw)
        drawn.append(record)
        replayed += [tuple(one.response[1] for one in items)] * (method.source == "replayed")
    assert all(one["threshold"] == 0.6 for one in drawn)
    last = drawn[-1]
    # three standard deviations of 600 coins; new answers are 0.6 * (1 - n / 600) of the steps: half of 0.6 on the whole
    assert last["fresh_share"] == pytest.approx(0.3, abs=0.06) and last["replayed_share"] == pytest.approx(
        0.3, abs=0.06
    )
    assert len(set(replayed)) > 100  # of about 180 steps: every one has a choice of its own
    early = drawn[99]
    assert early["fresh_share"] == pytest.approx(0.55, abs=0.15) and early["replayed_share"] < 0.15


def test_the_buffer_drops_the_oldest_and_goes_on_after_a_resume(models, data):
    keys = {"threshold_start": 1.0, "replay_size": 6, "steps": 2}
    method = distillm(**keys)
    first, record = stepped(method, data, models, 0)
    assert record == {"threshold": 1.0, "fresh_share": 1.0, "replayed_share": 0.0}
    second, _ = stepped(method, data, models, 1)
    kept = [one.sequence for one in method.replay]
    assert kept == [*first, *second][-6:] and any(one.response for one in kept)
    restored = distillm(**keys)
    restored.load_state_dict(method.state_dict())
    for draw in (2, 3):
        ours, theirs = stepped(restored, data, models, draw), stepped(method, data, models, draw)
        assert ours == theirs and restored.source == "replayed"
        items, record = ours
        assert record["replayed_share"] == pytest.approx((draw - 1) / (draw + 1))
        assert len(items) == 4 and all(item in kept for item in items) and len({kept.index(one) for one in items}) == 4
    assert restored.state_dict()["steps"] == {"references": 0, "fresh": 2, "replayed": 2}


def test_a_buffer_smaller_than_a_step_is_drawn_from_with_repetition(models, data):
    method = distillm(threshold_start=1.0, replay_size=2, steps=1)
    method.replay = [Rollout(key, [60], [90 + key], True) for key in range(2)]
    items, _ = stepped(method, data, models, 0)
    assert method.source == "replayed" and len(items) == 4 and {item.key for item in items} <= {0, 1}


def test_an_evaluation_without_a_loss_is_refused_where_the_threshold_adapts():
    words = Observation("evaluation", {"rouge_l": 1.0}, 1)
    with pytest.raises(UserError, match="method.threshold_step.*none of these sets has any"):
        distillm().observe(words)
    assert distillm(threshold_step=0.0).observe(words) == distillm(threshold_start=1.0).observe(words) == {}


def test_keys_without_effect_are_named():
    def idle(**keys):
        return {key for key, *_ in DistiLLM(name="distillm", steps=3, **keys).idle_keys()}

    assert idle(threshold_step=0.0) == {"tolerance", "replay_size"}  # steps cannot be left out
    assert idle(threshold_step=0.0, threshold_start=0.5) == {"tolerance"}
    assert idle(threshold_start=1.0) == {"threshold_step", "tolerance"}
    assert idle() == set()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("distillm")
    document = small_run(folder, layers=1)
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step; with a high learning rate
    # the loss of some evaluation rises, and the threshold with it
    document["train"] |= {"max_steps": 5, "adam_epsilon": 1e-3}
    document["eval"] = {**document["eval"], "steps": 2, "teacher": False}
    keys = {
        "steps": 6,
        "threshold_start": 0.75,
        "threshold_step": 0.25,
        "replay_size": 2,
        "lm_coef": 0.5,
        "tolerance": 0.0,
    }
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}, "train": {"max_steps": 1}, "eval": {"sets": None}},
        "distil": {
            "teacher": {"path": "stage:teacher"},
            "train": {"learning_rate": 0.3},
            "method": {"name": "distillm", **keys},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_what_it_needs_is_asked_for(recipe):
    load_run([recipe])
    for key in ("sets", "steps"):
        with pytest.raises(
            UserError, match=f"eval.{key}: .*adapts to its evaluations.* set method.threshold_step to 0"
        ):
            load_run([recipe], [f"stages.distil.eval.{key}=null"])
    load_run([recipe], ["stages.distil.eval.steps=null", "stages.distil.method.threshold_step=0"])
    with pytest.raises(UserError, match="data.corpus: .*missing: .*lm_coef to 0"):
        load_run([recipe], ["data.corpus=null"])
    with pytest.raises(UserError, match="teacher: .*missing: method distillm needs one"):
        load_run([recipe], ["stages.distil.teacher=null"])


def test_a_run_that_is_killed_goes_on_bit_for_bit(trained, killed):
    found = steps_of(trained, "distil")
    assert [one["threshold"] for one in found] == [0.75] * 4 + [1.0]
    assert (found[-1]["fresh_share"], found[-1]["replayed_share"]) == (1 / 5, 2 / 5)
    broken, places = killed(first=40, later=3)
    # the steps after these are taken on answers of a buffer that was filled before
    assert places & {("distil", 3), ("distil", 4)}, places
    assert_same_run(broken, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    for ours, theirs in zip(steps_of(two_ranks, "distil"), steps_of(trained, "distil"), strict=True):
        for key in ("loss", "loss/distillation", "threshold", "fresh_share", "replayed_share"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_the_picture_has_the_threshold_and_the_shares_of_the_steps(trained):
    drawn, found = panels(trained), steps_of(trained, "distil")
    for key, (title, unit) in DistiLLM.panels.items():
        scale = 100 if unit == "%" else 1
        assert [list(line.get_ydata()) for line in drawn[title]] == [[scale * one[key] for one in found]], title


def test_its_recipe_is_planned(monkeypatch):
    monkeypatch.chdir(ROOT)
    work = plan_run(load_run([Path("configs/distillm.yaml")]), gpu="cpu").stages[-1].work
    first, second = work.terms
    assert (first.name, first.batch, first.rows, first.teacher) == ("distillation", 8, 8 * 64, True)
    assert (second.name, second.batch, second.teacher) == ("pretraining", 8, False)
    assert [one.models for one in work.decodings] == [("student",)]
    fixed = ["stages.distil.method.threshold_step=0", "stages.distil.method.threshold_start=0"]
    assert not plan_run(load_run([Path("configs/distillm.yaml")], fixed), gpu="cpu").stages[-1].work.decodings
