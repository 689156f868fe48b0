"""okd against formulas in float64 on full logits, what each side's loss may move, and runs broken off or on two ranks."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import kl_div

from minillm.config.models import TeacherConfig
from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.okd import OKD
from minillm.methods.protocol import TrainingData
from minillm.models.adapters import plain_state, without_adapters
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.methods.conftest import steps_of
from tests.runs import in_a_child, train

pytest.importorskip("peft")
EXAMPLES = [Example(i, [60 + i, 70][: 1 + i % 2], [90 + i, 91, 256][: 2 + i % 2], "", ()) for i in range(4)]


def okd(**keys):
    return build_method(
        StageConfig(
            output_dir="unused",
            student={"path": "unused"},
            teacher={"path": "unused"},
            method={"name": "okd", "lora": {"r": 2, "alpha": 4}, **keys},
            train={"max_steps": 1, "per_device_train_batch_size": 4},
        )
    )


def log_probs(model, item):
    ids, first = torch.tensor([item.prompt + item.response]), len(item.prompt) - 1
    return model(ids).logits[0, first:-1].log_softmax(-1)


def kl(p, q):  # (T, V) log-probabilities -> (T,)
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)


def divergence(name, constant, own, beta):
    if name == "jsd":
        mixed = (beta * constant.exp() + (1 - beta) * own.exp()).log()
        return beta * kl(constant, mixed) + (1 - beta) * kl(own, mixed)
    return kl(constant, own) if name == "forward_kl" else kl(own, constant)


@pytest.mark.parametrize(
    "student, teacher, ratios, anchor",
    [
        ("forward_kl", "reverse_kl", (0.3, 0.8), 0.7),
        ("jsd", "forward_kl", (1.0, 1.0), 0.0),
        ("reverse_kl", "jsd", (0.0, 0.4), 0.0),  # the student's term needs no teacher
        ("forward_kl", "forward_kl", (0.5, 0.0), 0.2),
    ],
)
def test_each_side_has_its_loss_and_moves_itself_alone(student, teacher, ratios, anchor, make_models, tmp_path):
    models = make_models()
    data = TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path)
    method = okd(student_divergence=student, teacher_divergence=teacher, student_kd_ratio=ratios[0],
                 teacher_kd_ratio=ratios[1], student_beta=0.3, teacher_beta=0.6, anchor=anchor)  # fmt: skip
    modules = method.modules(models)
    with torch.no_grad():  # at their beginning adapters change nothing, and the gradient of A is 0
        generator = torch.Generator().manual_seed(3)
        for name, one in modules["teacher"].named_parameters():
            if "lora_B" in name:
                one.copy_(0.3 * torch.randn(one.shape, generator=generator))
    both = {"student": models.student, "teacher": models.teacher.model}
    weights = {f"{side}.{name}": one for side, model in both.items() for name, one in model.named_parameters()}
    weights = {name: one for name, one in weights.items() if one.requires_grad}
    assert all("lora" in name for name in weights if name.startswith("teacher."))
    items = method.collect(data, models, draw=0)
    module = TermLoss(models.student, modules, vocab_size=models.vocab_size, backend="torch")
    found = {}
    for term in method.terms(items, data, models):
        loss, metrics = module(term)
        loss = term.weight * loss / term.count
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        drift = metrics.get("teacher_drift_nats")
        found[term.name] = loss.item(), dict(zip(weights, gradients, strict=True)), drift, term.count
    assert list(found) == ["student", "teacher", "anchor"][: 2 + (anchor > 0)]

    for model in both.values():
        model.double()
    wanted = dict.fromkeys(found, 0.0)
    far, tokens = 0.0, sum(len(item.response) for item in items)
    for item in items:
        q, p = (log_probs(model, item) for model in both.values())
        with torch.no_grad(), without_adapters(both["teacher"]):
            p_0 = log_probs(both["teacher"], item)
        y = torch.tensor(item.response)[:, None]
        sides = {"student": (student, p.detach(), q, 0.3), "teacher": (teacher, q.detach(), p, 0.6)}
        for ratio, (side, (name, constant, own, beta)) in zip(ratios, sides.items(), strict=True):
            loss = ratio * divergence(name, constant, own, beta) - (1 - ratio) * own.gather(-1, y)[:, 0]
            wanted[side] = wanted[side] + loss.sum() / tokens
        far = far + kl(p_0, p).sum() / tokens
    if anchor:
        wanted["anchor"] = anchor * far
    gradients = {}
    for name, loss in wanted.items():
        grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
        gradients[name] = dict(zip(weights, grads, strict=True))
    for model in both.values():
        model.float()
    for name, (loss, ours, drift, count) in found.items():
        assert loss == pytest.approx(wanted[name].item(), rel=1e-5), name
        if drift is not None:
            assert drift.item() / count == pytest.approx(far.item(), rel=1e-4) and far.item() > 1e-3
        scale = max(one.abs().max().item() for one in gradients[name].values() if one is not None)
        assert scale > 1e-4
        side = "student" if name == "student" else "teacher"
        for key, gradient in ours.items():
            assert (gradient is not None) == key.startswith(side), f"{name} moves {key}"
            if gradient is not None:
                torch.testing.assert_close(gradient.double(), gradients[name][key], rtol=1e-3, atol=1e-5 * scale,
                                           msg=lambda text, key=key: f"{key}: {text}")  # fmt: skip
    assert sum(drift is not None for _, _, drift, _ in found.values()) == 1


def test_each_side_may_have_its_own_learning_rate():
    assert okd(teacher_learning_rate=5e-2).learning_rates() == {"teacher": 5e-2}
    assert okd().learning_rates() == {}  # train.learning_rate


def test_a_quantised_teacher_is_not_trained():
    assert "train" in TeacherConfig(path="x").abilities
    assert "train" not in TeacherConfig(path="x", quantization="nf4").abilities


def test_keys_without_effect_are_named():
    method = okd(student_divergence="jsd", teacher_kd_ratio=0.0).config.method
    assert {key for key, *_ in method.idle_keys()} == {"teacher_divergence", "teacher_beta"}
    assert {key for key, *_ in okd().config.method.idle_keys()} == {"student_beta", "teacher_beta"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("okd")
    document = small_run(folder, layers=1)
    del document["eval"]
    document["train"] |= {"max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}, "train": {"max_steps": 1}},
        "distil": {
            "teacher": {"path": "stage:teacher"},
            "method": {"name": "okd", "lora": {"r": 2, "alpha": 4}, "teacher_learning_rate": 5e-2},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / "recipe.yaml"


def test_the_adapters_are_those_of_peft(trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(trained / "stages" / "teacher")
    loaded = PeftModel.from_pretrained(base, trained / "final" / "teacher_adapter")
    saved = load_file(trained / "final" / "modules" / "teacher.safetensors")
    theirs = {name.removeprefix("base_model.model."): one for name, one in loaded.named_parameters() if "lora" in name}
    assert saved.keys() == theirs.keys() and all(torch.equal(saved[name], theirs[name]) for name in saved)
    assert any(one.any() for name, one in saved.items() if "lora_B" in name)
    records = steps_of(trained, "distil")
    assert records[0]["teacher_drift_nats"] == 0 and records[-1]["teacher_drift_nats"] > 0


@pytest.mark.parametrize(
    "path, named", [("org/name", "org/name"), ("$TEACHERS/one", "/kept/one"), ("stage:teacher", None)]
)
def test_the_adapters_name_the_teacher_that_they_are_of(path, named, make_models, monkeypatch):
    monkeypatch.setenv("TEACHERS", "/kept")
    method = okd()
    method.config = method.config.model_copy(update={"teacher": TeacherConfig(path=path)})
    adapted = method.modules(make_models())["teacher"]
    assert adapted.peft_config["default"].base_model_name_or_path == named


def test_training_leaves_the_teacher_below_the_adapters_as_it_was(recipe):
    def work():
        make, seen = OKD.modules, {}

        def modules(self, models):
            seen["before"] = {name: one.clone() for name, one in models.teacher.model.state_dict().items()}
            seen["teacher"] = make(self, models)["teacher"]
            return {"teacher": seen["teacher"]}

        OKD.modules = modules
        train(recipe, f"output_dir={recipe.parent / 'watched'}", "stages.distil.train.max_steps=2")
        state = seen["teacher"].state_dict()
        assert any(one.any() for name, one in state.items() if "lora_B" in name)
        base = plain_state(seen["teacher"], state, merged=False)
        assert base.keys() == seen["before"].keys()
        assert all(torch.equal(base[name], one) for name, one in seen["before"].items())

    assert in_a_child(work) == 0


def test_a_killed_run_goes_on_bit_for_bit(trained, killed):
    folder, places = killed(first=14, later=9)
    assert any(stage == "distil" for stage, _ in places)
    assert steps_of(folder, "distil") == steps_of(trained, "distil")
    for name in ("model.safetensors", "modules/teacher.safetensors", "teacher_adapter/adapter_model.safetensors"):
        ours, theirs = load_file(folder / "final" / name), load_file(trained / "final" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_equal_one_process(trained, two_ranks):
    for ours, theirs in zip(steps_of(two_ranks, "distil"), steps_of(trained, "distil"), strict=True):
        for key in ("loss/student", "loss/teacher", "teacher_drift_nats"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
    name = "teacher_adapter/adapter_model.safetensors"
    ours, theirs = load_file(two_ranks / "final" / name), load_file(trained / "final" / name)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)
