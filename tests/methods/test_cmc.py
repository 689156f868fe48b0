"""cmc against the cross-entropy of summed logits in float64, what its stage evaluates, and runs broken off or on two ranks."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from minillm import UserError
from minillm.config.errors import ConfigErrors
from minillm.config.loader.run_plan import load_run
from minillm.config.methods.cmc_keys import CMC
from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.protocol import TrainingData
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.methods.conftest import assert_same_run, steps_of
from tests.runs import panels

ROOT = Path(__file__).parents[2]
EXAMPLES = [Example(i, [60 + i, 70][: 1 + i % 2], [90 + i, 91, 256][: 2 + i % 2], "", ()) for i in range(4)]
FORGOTTEN = [Example(i, [50, 51 + i], [100 + i, 101][: 1 + i % 2], "", ()) for i in range(3)]


def cmc(**keys):
    return build_method(
        StageConfig(
            output_dir="unused",
            student={"path": "unused"},
            teacher={"path": "unused"},
            method={"name": "cmc", **keys},
            train={"max_steps": 1, "per_device_train_batch_size": 4},
        )
    )


def mean_cross_entropy(models, sequences):
    """The mean over tokens of -log softmax(log_softmax(z_T) + z_D), as the paper writes it."""
    total, tokens = 0.0, 0
    for one in sequences:
        ids, first = torch.tensor([one.prompt + one.response]), len(one.prompt) - 1
        template, delta = (model(ids).logits[0, first:-1] for model in (models.teacher.model, models.student))
        summed = template.log_softmax(-1) + delta
        total = total + cross_entropy(summed, torch.tensor(one.response), reduction="sum")
        tokens += len(one.response)
    return total / tokens


@pytest.mark.parametrize("forget, dtype", [(0.0, torch.float32), (0.7, torch.float32), (0.0, torch.bfloat16)])
def test_loss_and_gradient_are_those_of_summed_logits_in_float64(forget, dtype, make_models, tmp_path):
    models = make_models()
    models.teacher.model.to(dtype)
    data = TrainingData(
        Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path, forget=Stream(FORGOTTEN, seed=2)
    )
    method = cmc(forget_coef=forget)
    items = method.collect(data, models, draw=0)
    assert [item.forget is None for item in items] == [forget == 0] * 4
    terms = method.terms(items, data, models)
    module = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")
    loss = sum(module(term)[0] * term.weight / term.count for term in terms)
    found = torch.autograd.grad(loss, list(models.student.parameters()))

    student, template = models.student.double(), models.teacher.model.double()
    try:
        want = mean_cross_entropy(models, [item.sequence for item in items])
        if forget:
            want = want - forget * mean_cross_entropy(models, [item.forget for item in items])
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), template.float()
    rough = 1 if dtype == torch.float32 else 3e3  # the template's hidden states are rounded to 8 bits
    assert loss.item() == pytest.approx(want.item(), rel=1e-5 * rough)
    scale = max(one.abs().max().item() for one in gradients)
    assert scale > 1e-3
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * scale * rough)
    assert not any(parameter.grad is not None for parameter in template.parameters())


def test_without_a_teacher_it_says_so(make_models, tmp_path):
    models = make_models(teacher=False)
    data = TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path)
    method = cmc()
    with pytest.raises(UserError, match="configure `teacher`"):
        method.terms(method.collect(data, models, draw=0), data, models)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("cmc")
    document = small_run(folder, layers=1)
    lines = [json.dumps({"prompt": f"{word}?", "completion": f"{word} no"}) for word in ("one", "two", "six")]
    (folder / "forget.jsonl").write_text("\n".join(lines) + "\n")
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"max_steps": 5, "adam_epsilon": 1e-3}
    document["data"]["forget"] = {**document["data"]["prompts"], "path": str(folder / "forget.jsonl")}
    document["stages"] = {
        "template": {"student": {"config": {"hidden_size": 24}}},
        "control": {"teacher": {"path": "stage:template"}, "method": {"name": "cmc", "forget_coef": 0.5}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed, one_thread):
    broken, places = killed(first=60, later=20)
    assert places & {("control", steps) for steps in (2, 3, 4)}, places
    assert_same_run(broken, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    for ours, theirs in zip(steps_of(two_ranks, "control"), steps_of(trained, "control"), strict=True):
        for key in ("loss", "loss/control", "loss/forget", "forget_cross_entropy_nats"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    ours, theirs = (
        next(one for one in reversed(evaluations(folder)) if one["stage"] == "control")["mean"]
        for folder in (two_ranks, trained)
    )
    assert ours["loss_nats"] == pytest.approx(theirs["loss_nats"], rel=1e-4)
    assert ours["reverse_kl_nats"] == pytest.approx(theirs["reverse_kl_nats"], rel=1e-2)


def evaluations(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["kind"] == "eval" and one["who"] == "student"]


def test_what_is_evaluated_is_the_template_with_the_delta(trained):
    """The held-out sets are records of the training set, so that both losses are to be had from the models that are left."""
    from transformers import AutoModelForCausalLM

    from minillm.data.instructions import load_prompts
    from minillm.models.tokenizers import byte_tokenizer

    (stage,) = load_run([trained / "config.yaml"], []).stages[-1:]
    examples = load_prompts(stage.config.eval.sets["held_out"], byte_tokenizer()).examples
    delta, template = (
        AutoModelForCausalLM.from_pretrained(trained / "stages" / one).double() for one in ("control", "template")
    )

    class Pair:
        student = delta
        teacher = type("Template", (), {"model": template})

    with torch.no_grad():
        want = mean_cross_entropy(Pair, [example.sequence for example in examples]).item()
    last = evaluations(trained)[-1]
    assert last["stage"] == "control"
    assert last["mean"]["loss_nats"] == pytest.approx(want, rel=1e-4)


def test_the_picture_has_both_losses(trained):
    steps, shown = steps_of(trained, "control"), panels(trained)
    for key, (title, _) in CMC.panels_of({"forget_coef": 0.5}).items():
        assert [one[key] for one in steps] in [list(line.get_ydata()) for line in shown[title]], key
    assert steps[-1]["loss/forget"] < 0 < steps[-1]["loss/control"]


def test_a_set_to_forget_is_asked_for_and_used_by_this_method_alone(recipe):
    def messages(*overrides):
        try:
            load_run([recipe], list(overrides))
        except ConfigErrors as error:
            return str(error)
        return ""

    assert not messages()
    assert "data.forget" in messages("stages.control.data.forget=null")
    assert "method.forget_coef to 0" in messages("stages.control.data.forget=null")
    assert "forgets nothing" in messages("stages.control.method.forget_coef=0", "stages.control.data.forget.limit=2")
    long = messages(
        "stages.control.data.forget.max_response_length=90", "stages.control.student.config.max_position_embeddings=64"
    )
    assert "data.forget.max_response_length" in long


def test_its_recipe_is_planned(recipe, monkeypatch):
    from minillm.planning.planner import plan_run
    from minillm.planning.work import work_of

    monkeypatch.chdir(ROOT)
    planned = plan_run(load_run([Path("configs/cmc.yaml")]), gpu="cpu").stages[-1].work
    forgets = work_of(load_run([recipe]).stages[-1].config, 1)
    for work, names in ((planned, ["control"]), (forgets, ["control", "forget"])):
        assert [(term.name, term.teacher, term.summed) for term in work.terms] == [(name, True, True) for name in names]
        assert len(work.scorings) == len(names)
        assert [part.models for part in work.evaluation] == [
            ("student", "teacher"),
            ("teacher",),
            ("teacher", "student"),
        ]
