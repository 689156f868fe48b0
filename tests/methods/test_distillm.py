"""distillm against formulas in float64 on full logits, the released threshold and choice of data, and broken-off runs."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm import UserError
from minillm.config.method import DistiLLM
from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.protocol import Observation, TrainingData
from minillm.rollout.buffer import Rollout
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.runs import die_after, in_a_child, records, train

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))
EXAMPLES = [Example(i, [60 + i, 70][: 1 + i % 2], [90 + i, 91, 256][: 2 + i % 2], "", ()) for i in range(4)]


def distillm(**keys):
    return build_method(
        StageConfig(
            output_dir="unused",
            student={"path": "unused"},
            teacher={"path": "unused"},
            method={"name": "distillm", "steps": 60, "lm_coef": 0.0, **keys},
            rollout={"max_new_tokens": 6},
            train={"max_steps": 1, "per_device_train_batch_size": 4},
        )
    )


def golden() -> dict:
    if not (GOLDEN / "7_distillm.json").is_file():
        pytest.skip("MINILLM_GOLDEN has no 7_distillm.json")
    return json.loads((GOLDEN / "7_distillm.json").read_text(encoding="utf-8"))


def evaluated(method, loss: float) -> None:
    method.observe(Observation("evaluation", {"loss_nats": loss}, 1, None))


@pytest.mark.parametrize("source", ["references", "fresh"])
@pytest.mark.parametrize("divergence", ["skew_forward_kl", "skew_reverse_kl"])
def test_loss_and_gradient_are_those_of_full_logits_in_float64(divergence, source, make_models, tmp_path):
    models = make_models()
    data = TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path)
    method = distillm(divergence=divergence, skew=0.3, threshold_start=float(source == "fresh"))
    items = method.collect(data, models, draw=0)
    (term,) = method.terms(items, data, models)
    loss, _ = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    loss = loss / term.count
    found = torch.autograd.grad(loss, list(models.student.parameters()))

    student, teacher = models.student.double(), models.teacher.model.double()
    try:
        total, tokens = 0.0, 0
        for item in items:
            ids, first = torch.tensor([item.prompt + item.response]), len(item.prompt) - 1
            log_q, log_p = (model(ids).logits[0, first:-1].log_softmax(-1) for model in (student, teacher))
            if divergence == "skew_forward_kl":
                log_p = log_p.detach()
                total = total + (log_p.exp() * (log_p - (0.3 * log_p.exp() + 0.7 * log_q.exp()).log())).sum()
            else:
                log_p = log_p.detach()
                total = total + (log_q.exp() * (log_q - (0.7 * log_p.exp() + 0.3 * log_q.exp()).log())).sum()
            tokens += len(item.response)
        want = total / tokens
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    scale = max(one.abs().max().item() for one in gradients)
    assert scale > 1e-3
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * max(scale, 1e-2))


def test_the_threshold_moves_as_in_the_released_code():
    released = golden()["adaptive_threshold"]
    method = distillm(threshold_start=released["init"], tolerance=released["eps"])
    evaluated(method, released["first"])
    for loss, threshold, reference in released["rows"]:
        evaluated(method, loss)
        assert method.threshold == pytest.approx(threshold, abs=1e-12)
        if threshold < 1:
            assert method.reference_loss == reference


def test_data_are_chosen_as_in_the_released_code():
    for row in golden()["choice"]:
        method = distillm(threshold_start=row["thr"], replay_size=row["capacity"])
        method.replay = [Rollout(0, [1], [2], True)] * row["buffer"]
        method.taken = round(60 * (1 - row["samp"] / row["thr"])) if row["thr"] else 0
        expected = {"data": "references"}.get(row["choice"], row["choice"])
        assert method.choose(row["r"]) == expected, row


def test_the_buffer_drops_the_oldest_and_survives_a_resume(make_models, tmp_path):
    models = make_models()
    data = TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path)
    method = distillm(threshold_start=1.0, replay_size=6)
    first = method.collect(data, models, draw=0)
    second = method.collect(data, models, draw=1)
    kept = [item.response for item in method.replay]
    assert kept == [item.response for item in [*first, *second]][-6:]
    method.taken = 60  # nothing new any more
    restored = distillm(threshold_start=1.0, replay_size=6)
    restored.load_state_dict(method.state_dict())
    ours, theirs = (one.collect(data, models, draw=2) for one in (restored, method))
    assert ours == theirs and all(item.response in kept for item in ours)
    assert restored.source == {"fresh": 0.0, "replayed": 1.0}


def test_an_evaluation_without_a_loss_is_refused():
    with pytest.raises(UserError, match="no set of eval.sets has references"):
        distillm().observe(Observation("evaluation", {"rouge_l": 1.0}, 1, None))


def test_keys_without_effect_are_named():
    idle = {key for key, *_ in DistiLLM(name="distillm", steps=3, threshold_step=0.0).idle_keys()}
    assert idle == {"tolerance", "steps", "replay_size"}
    assert {key for key, *_ in DistiLLM(name="distillm", steps=3, threshold_start=1.0).idle_keys()} == {
        "threshold_step",
        "tolerance",
    }
    assert not [*DistiLLM(name="distillm", steps=3).idle_keys()]


@pytest.fixture
def recipe(tmp_path, small_run) -> Path:
    document = small_run(tmp_path, layers=1)
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"max_steps": 6, "adam_epsilon": 1e-3}
    keys = {"steps": 6, "threshold_start": 0.8, "threshold_step": 0.0, "replay_size": 4, "lm_coef": 0.0}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "distil": {"teacher": {"path": "stage:teacher"}, "method": {"name": "distillm", **keys}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def steps(folder: Path) -> list[dict]:
    return [one for one in records(folder) if one["stage"] == "distil" and one["kind"] == "train"]


def test_a_run_that_was_killed_goes_on_bit_for_bit(recipe, one_thread):
    def work(name: str, *, events: int = 0, resume: bool = False):
        def child():
            if events:
                die_after(events)
            train(recipe, f"output_dir={recipe.parent / name}", resume=resume)

        return in_a_child(child)

    whole, broken = recipe.parent / "whole", recipe.parent / "broken"
    assert work("whole") == 0
    killed_at, events = set(), 60
    while os.WIFSIGNALED(status := work("broken", events=events, resume=broken.is_dir())):
        events += 20  # later each time: there is always progress
        killed_at.add(len(steps(broken)) if (broken / "metrics.jsonl").is_file() else 0)
        assert events < 600
    assert status == 0
    assert killed_at & {2, 3, 4, 5}, killed_at
    assert records(broken) == records(whole)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {1.0} <= {one["replayed"] for one in steps(whole)} and {1.0} <= {one["fresh"] for one in steps(whole)}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(recipe):
    from tests.distributed.conftest import finish, start

    start, finish = start.__wrapped__(), finish.__wrapped__()
    one, two = recipe.parent / "one", recipe.parent / "two"
    arguments = ("-m", "minillm", "train", str(recipe))
    finish(start(1, *arguments, f"output_dir={one}"))
    ranks = ("engine.type=deepspeed", "engine.stage=3", "train.per_device_train_batch_size=1")
    finish(start(2, *arguments, f"output_dir={two}", *ranks), timeout=400)
    for ours, theirs in zip(steps(two), steps(one), strict=True):
        for key in ("loss", "fresh", "replayed"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
