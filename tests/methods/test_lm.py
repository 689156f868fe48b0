"""lm against formulas in float64 on full logits, its configuration, and runs that are broken off or on two ranks."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.config.root import StageConfig
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.protocol import TrainingData
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.runs import die_after, in_a_child, records, train

BLOCKS = [[60 + i, 70, 256, 90 + i, 91, 40] for i in range(6)]


def lm(**keys):
    return build_method(
        StageConfig(
            output_dir="unused",
            student={"path": "unused"},
            teacher={"path": "unused"},
            method={"name": "lm", **keys},
            train={"max_steps": 1, "per_device_train_batch_size": 4},
        )
    )


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_full_logits_in_float64(ratio, make_models, tmp_path):
    models = make_models()
    data = TrainingData(None, Stream(BLOCKS, seed=1), LocalRollouts(models), tmp_path)
    method = lm(kd_ratio=ratio)
    items = method.collect(data, models, draw=0)
    blocks = [item.prompt + item.response for item in items]
    assert len(blocks) == 4 and all(block in BLOCKS for block in blocks) and data.corpus.taken == 4
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


@pytest.fixture
def recipe(tmp_path, small_run) -> Path:
    document = small_run(tmp_path, layers=1)
    corpus = tmp_path / "plain.txt"
    corpus.write_text("A mouse sat on a small red house and sang. " * 40, encoding="utf-8")
    document["data"] = {"corpus": {"path": str(corpus), "block_size": 24}}
    document["eval"] = {}
    document["train"] |= {"max_steps": 6, "adam_epsilon": 1e-3}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}, "method": {"name": "lm"}},
        "distil": {"teacher": {"path": "stage:teacher"}, "method": {"name": "lm", "kd_ratio": 0.5}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_teacher_and_a_corpus_are_asked_for(recipe):
    load_run([recipe])
    with pytest.raises(UserError, match="method.kd_ratio is 0.5; give it here, or set method.kd_ratio to 0"):
        load_run([recipe], ["stages.teacher.method.kd_ratio=0.5"])
    with pytest.raises(UserError, match="data.corpus: missing: method lm reads plain text"):
        load_run([recipe], ["data.corpus=null"])


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
    kills, events = 0, 40
    while os.WIFSIGNALED(status := work("broken", events=events, resume=broken.is_dir())):
        events += 20  # later each time: there is always progress
        kills += 1
        assert events < 600
    assert status == 0 and kills > 1
    assert records(broken) == records(whole)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(recipe):
    from tests.distributed.conftest import finish, start

    start, finish = start.__wrapped__(), finish.__wrapped__()
    one, two = recipe.parent / "one", recipe.parent / "two"
    arguments = ("-m", "minillm", "train", str(recipe))
    finish(start(1, *arguments, f"output_dir={one}"))
    ranks = ("engine.type=deepspeed", "engine.stage=3", "train.per_device_train_batch_size=1")
    finish(start(2, *arguments, f"output_dir={two}", *ranks), timeout=400)
    found = [record["loss"] for record in steps(two)]
    assert found == pytest.approx([record["loss"] for record in steps(one)], rel=1e-4) and len(found) == 6
