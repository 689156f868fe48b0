"""lm against formulas in float64 on full logits, its configuration, and runs that are broken off or on two ranks."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.protocol import TrainingData
from minillm.planning.planner import plan_run
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.methods.conftest import assert_same_run, stage_of, steps_of
from tests.runs import panels

ROOT = Path(__file__).parents[2]
BLOCKS = [[60 + i, 70, 256, 90 + i, 91, 40] for i in range(6)]


def lm(**keys):
    return build_method(stage_of(4, name="lm", **keys))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_full_logits_in_float64(ratio, make_models, tmp_path):
    models = make_models()
    data = TrainingData(None, Stream(BLOCKS, seed=1), LocalRollouts(models), tmp_path)
    method = lm(kd_ratio=ratio)
    items = method.collect(data, models, draw=0)
    blocks = [item.prompt + item.response for item in items]
    assert len(blocks) == 4 and blocks == [BLOCKS[item.key] for item in items] and data.corpus.taken == 4
    (term,) = method.terms(items, data, models)
    assert term.count == 4 * 5  # every token but the first of a block
    loss, _ = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    loss = loss / term.count
    found = torch.autograd.grad(loss, list(models.student.parameters()))

    ids = torch.tensor(blocks)
    student, teacher = models.student.double(), models.teacher.model.double()
    try:
        log_q = student(ids).logits[:, :-1].log_softmax(-1)
        log_p = teacher(ids).logits[:, :-1].log_softmax(-1).detach()
        nll = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        want = (ratio * kl + (1 - ratio) * nll).mean()
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    scale = max(one.abs().max().item() for one in gradients)
    assert scale > 1e-3
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    document = small_run(folder, layers=1)
    del document["data"]["prompts"]
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"max_steps": 4, "adam_epsilon": 1e-3}
    document["eval"] = {}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}, "method": {"name": "lm"}},
        "distil": {"teacher": {"path": "stage:teacher"}, "method": {"name": "lm", "kd_ratio": 0.5}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_teacher_and_a_corpus_are_asked_for(recipe):
    load_run([recipe])
    with pytest.raises(UserError, match="method.kd_ratio is 0.5; give it here, or set method.kd_ratio to 0"):
        load_run([recipe], ["stages.teacher.method.kd_ratio=0.5"])
    with pytest.raises(UserError, match="data.corpus: missing: method lm reads plain text"):
        load_run([recipe], ["data.corpus=null"])


def test_a_run_that_is_killed_goes_on_bit_for_bit(trained, killed):
    broken, places = killed(first=20, later=11)
    assert {stage for stage, steps in places if steps < 4} == {"teacher", "distil"}, places
    assert_same_run(broken, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    for stage in ("teacher", "distil"):
        for ours, theirs in zip(steps_of(two_ranks, stage), steps_of(trained, stage), strict=True):
            for key in ("loss", "passes", "student_tokens"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (stage, key)


def test_the_picture_has_the_parts_of_the_loss(trained):
    drawn = panels(trained)
    for title, key, stages in (
        ("Cross-entropy on the text", "cross_entropy_nats", ("teacher", "distil")),
        ("Forward KL", "forward_kl_nats", ("distil",)),
    ):
        lines = [list(line.get_ydata()) for line in drawn[title]]
        assert all([one[key] for one in steps_of(trained, stage)] in lines for stage in stages), title


def test_its_recipe_is_planned(monkeypatch):
    monkeypatch.chdir(ROOT)
    teacher, plain, distil = plan_run(load_run([Path("configs/lm.yaml")]), gpu="cpu").stages
    for stage, judged in ((teacher, False), (plain, False), (distil, True)):
        (term,) = stage.work.terms
        assert (term.name, term.batch, term.rows, term.teacher) == ("pretraining", 8, 8 * 63, judged)
        assert not stage.work.decodings
        assert bool(stage.work.scorings) == judged
