"""taid against formulas in float64 on full logits, the released schedule of t, and runs that are broken off."""

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from minillm import UserError
from minillm.config.methods.taid_keys import TAID
from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.protocol import Observation, TrainingData
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.methods.conftest import assert_same_run, steps_of
from tests.runs import panels

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))
EXAMPLES = [Example(i, [60 + i, 70][: 1 + i % 2], [90 + i, 91, 256][: 2 + i % 2], "", ()) for i in range(4)]
SEQUENCES = ("default", "slow", "alpha_0.1", "t_end_0.8", "linear_only")
ROOT = Path(__file__).parents[2]


def taid(*, teacher: bool = True, **keys):
    return build_method(
        StageConfig(
            output_dir="unused",
            student={"path": "unused"},
            teacher={"path": "unused"} if teacher else None,
            method={"name": "taid", "steps": 20, **keys},
            train={"max_steps": 1, "per_device_train_batch_size": 4},
        )
    )


def told(method, losses, *, first: int = 1) -> list[dict[str, float]]:
    """What `method` records of steps with these losses."""
    return [method.observe(Observation("step", {"loss": loss}, first + i)) for i, loss in enumerate(losses)]


@pytest.mark.parametrize("t", [0.0, 0.2, 0.75, 1.0])
def test_loss_and_gradient_are_those_of_full_logits_in_float64(t, make_models, tmp_path):
    models = make_models()
    data = TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path)
    method = taid(t_start=t)
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
            z_s, z_t = (model(ids).logits[0, first:-1] for model in (student, teacher))
            weights = torch.exp((1 - t) * z_s + t * z_t).detach()
            target = weights / weights.sum(-1, keepdim=True)
            total = total + (target * (torch.logsumexp(z_s, -1, keepdim=True) - z_s)).sum()
            tokens += len(item.response)
        want = total / tokens
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    scale = max(one.abs().max().item() for one in gradients) or 1.0
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * max(scale, 1e-2))
    if t == 0:  # the student is its own target: the loss is its entropy, and its gradient is 0
        assert loss.item() > 0.1 and max(one.abs().max().item() for one in gradients) < 1e-12
    else:
        assert scale > 1e-3


@pytest.mark.parametrize("name", SEQUENCES)
def test_t_moves_as_in_the_released_code(name):
    if not (GOLDEN / "7_taid.json").is_file():
        pytest.skip("MINILLM_GOLDEN has no 7_taid.json")
    sequence = json.loads((GOLDEN / "7_taid.json").read_text(encoding="utf-8"))["sequences"][name]
    keys = {key: sequence[key] for key in ("t_start", "t_end", "alpha", "beta")}
    method = taid(steps=sequence["total_steps"], adaptive=not sequence["disable_adaptive"], **keys)
    for place, row in enumerate(sequence["rows"]):
        (found,) = told(method, [row["loss"]], first=place + 1)
        assert found["interpolation"] == pytest.approx(row["t_used"], abs=1e-14)
        assert method.t == pytest.approx(row["t_after"], abs=1e-14)
        assert method.momentum == pytest.approx(row["momentum"], abs=1e-14)


def test_t_by_hand():
    """Losses 4, 2, 3: changes 1/2 and -1/2; with momentum 1/2, m is 1/4 and then -1/8."""
    method = taid(t_start=0.2, alpha=0.5, beta=0.5, steps=1000)
    first = 0.2 + 0.5 * 0.8 / (1 + math.exp(-0.25))
    second = first + 0.5 * (1 - first) / (1 + math.exp(0.125))
    assert [one["interpolation"] for one in told(method, [4.0, 2.0, 3.0, 3.0])] == [0.2, 0.2, *map(pytest.approx, (first, second))]  # fmt: skip


def test_t_rises_faster_where_the_loss_falls_and_ends_at_t_end():
    keys = dict(t_start=0.2, t_end=0.9, alpha=0.2, beta=0.0, steps=1000)
    falling, rising = taid(**keys), taid(**keys)
    told(falling, [3.0, 2.0, 1.0]), told(rising, [1.0, 2.0, 3.0])
    assert 0.2 < rising.t < falling.t < 0.9
    straight = taid(t_start=0.2, t_end=0.9, adaptive=False, steps=10)
    used = [one["interpolation"] for one in told(straight, [3.0, 1.0, 9.0, 0.0, 0.0] * 3)]
    assert used == pytest.approx([0.2, *(0.2 + 0.07 * n for n in range(10)), *[0.9] * 4])


def test_an_evaluation_moves_nothing():
    method = taid(alpha=0.5)
    told(method, [3.0, 2.0])
    before = method.state_dict()
    assert method.observe(Observation("evaluation", {"rouge_l": 20.0}, 2)) == {}
    assert method.state_dict() == before


def test_a_restored_schedule_goes_on_bit_for_bit():
    losses = [3.2, 3.1, 3.15, 2.9, 2.7, 2.75, 2.6]
    whole = told(taid(alpha=0.1), losses)
    for cut in range(len(losses)):
        broken, restored = taid(alpha=0.1), taid(alpha=0.1)
        told(broken, losses[:cut])
        restored.load_state_dict(json.loads(json.dumps(broken.state_dict())))
        assert told(restored, losses[cut:], first=cut + 1) == whole[cut:]


def test_keys_that_contradict_each_other_or_do_nothing_are_named():
    assert [key for key, *_ in TAID(name="taid", steps=3, t_start=0.9, t_end=0.5).findings()] == ["t_start"]
    assert not [*TAID(name="taid", steps=3).findings(), *TAID(name="taid", steps=3).idle_keys()]
    assert {key for key, *_ in TAID(name="taid", steps=3, adaptive=False).idle_keys()} == {"alpha", "beta"}
    still = {key for key, *_ in TAID(name="taid", steps=3, t_start=0.5, t_end=0.5).idle_keys()}
    assert still == {"adaptive", "alpha", "beta"}
    for wrong in ({}, {"steps": 0}, {"steps": 3, "beta": 1.0}, {"steps": 3, "t_start": -0.1}):
        with pytest.raises(ValidationError):
            TAID(name="taid", **wrong)


def test_without_a_teacher_it_says_so(make_models, tmp_path):
    models = make_models(teacher=False)
    data = TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path)
    method = taid(teacher=False)
    with pytest.raises(UserError, match="configure `teacher`"):
        method.terms(method.collect(data, models, draw=0), data, models)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("taid")
    document = small_run(folder, layers=1)
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"max_steps": 6, "adam_epsilon": 1e-3}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "distil": {
            "teacher": {"path": "stage:teacher"},
            "method": {"name": "taid", "steps": 60, "t_start": 0.2, "alpha": 0.3, "beta": 0.5},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed, one_thread):
    broken, places = killed(first=60, later=20)
    assert places & {("distil", steps) for steps in (2, 3, 4, 5)}, places
    assert_same_run(broken, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    for ours, theirs in zip(steps_of(two_ranks, "distil"), steps_of(trained, "distil"), strict=True):
        for key in ("loss", "interpolation"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_the_picture_has_t_of_every_step(trained):
    used = [one["interpolation"] for one in steps_of(trained, "distil")]
    assert used[0] == used[1] == 0.2 and sorted(used) == used and used[-1] > 0.5, used
    ((title, _),) = TAID.panels.values()
    assert used in [list(line.get_ydata()) for line in panels(trained)[title]]


def test_its_recipe_is_planned(monkeypatch):
    from minillm.config.loader.run_plan import load_run
    from minillm.planning.planner import plan_run

    monkeypatch.chdir(ROOT)
    stages = plan_run(load_run([Path("configs/taid.yaml")]), gpu="cpu").stages
    assert [(term.name, term.teacher) for term in stages[-1].work.terms] == [("distillation", True)]
    assert [*TAID.panels] == [*told(taid(), [3.0])[0]]
