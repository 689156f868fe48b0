"""llavadi against the released code's values and float64 formulas on full logits and hidden states; its projector in a run
that is killed, on two ranks, and in a plan."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional

from minillm import UserError
from minillm.config.methods.llavadi_keys import LLAVADI
from minillm.data.images import Picture, PictureReader
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.losses import LMHead, linear_objective
from minillm.methods import build_method
from minillm.methods.features import DISTANCES, affinities, mean_in_sequences
from minillm.methods.protocol import TrainingData
from minillm.methods.standardized import standardized_divergence
from minillm.models.families import answer_beside_pictures
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from tests.methods.conftest import assert_same_run, stage_of, steps_of
from tests.methods.test_standardized import standardized
from tests.pictures import build_processor, build_seeing, picture, save_seeing
from tests.runs import panels

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))
ROOT = Path(__file__).parents[2]
ONLY = {"ce_coef": 0.0, "logits_coef": 0.0, "features_coef": 0.0}


@pytest.fixture(scope="module")
def golden():
    """The released code's values, and its arrays."""
    import numpy

    if not (GOLDEN / "5_llavadi.npz").is_file():
        pytest.skip("MINILLM_GOLDEN has no 5_llavadi.npz")
    said = json.loads((GOLDEN / "5_llavadi.json").read_text(encoding="utf-8"))
    arrays = {name: torch.tensor(array) for name, array in numpy.load(GOLDEN / "5_llavadi.npz").items()}
    return said["values"] | said["own"], arrays


def places(mask):  # (B, L) bool -> (P,)
    return mask.flatten().nonzero().flatten()


@pytest.mark.parametrize(
    "value, gradient, distance, mask",
    [
        ("hidden_mse_answers", "grad_hidden_mse_answers", "mse", "answers"),
        ("hidden_mse_all", "grad_hidden_mse_all", "mse", "attention_mask"),
        ("cosine_answers_mean_of_means", "grad_cosine_answers", "cosine", "answers"),
    ],
)
def test_features_are_those_of_the_released_code(golden, value, gradient, distance, mask):
    values, arrays = golden
    arrays = {**arrays, "answers": arrays["labels"] != -100}
    hidden, at = arrays["student_hidden"].clone().requires_grad_(), places(arrays[mask])
    inner = functional.gelu(functional.linear(hidden, arrays["W1"], arrays["b1"]))
    projected = functional.linear(inner, arrays["W2"], arrays["b2"]).flatten(0, 1)[at]
    found = DISTANCES[distance](projected, arrays["teacher_hidden"].flatten(0, 1)[at])
    loss = (mean_in_sequences(at, hidden.shape[1]) * found).sum() / len(hidden)
    assert loss.item() == pytest.approx(values[value], rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], arrays[gradient], rtol=1e-5, atol=1e-7)


def test_affinities_are_those_of_the_released_code(golden):
    values, arrays = golden
    answers, attended = arrays["labels"] != -100, places(arrays["attention_mask"])
    rows = [places(mask) + number * answers.shape[1] for number, mask in enumerate(answers)]
    student, found = arrays["student_hidden"].clone().requires_grad_(), []
    for hidden in (student, arrays["teacher_hidden"]):
        found.append(affinities(hidden.flatten(0, 1)[attended], attended, rows, arrays["image_mask"]))
    loss = (found[0] - found[1]).square().mean()
    assert loss.item() == pytest.approx(values["affinity"], rel=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], arrays["grad_affinity"], rtol=1e-5, atol=1e-7
    )  # the released code adds 1e-6 to the number of pairs


def test_standardised_logits_have_the_released_divergence_and_gradient(golden):
    values, arrays = golden
    at = places(arrays["attention_mask"])
    student, eye = arrays["student_logits"].clone().requires_grad_(), LMHead(torch.eye(11, dtype=torch.float64))
    total, _ = standardized_divergence(
        student.flatten(0, 1)[at], eye, arrays["teacher_logits"].flatten(0, 1)[at], eye,
        weights=mean_in_sequences(at, student.shape[1]), answers=torch.ones(len(at), dtype=torch.bool),
        divergence="forward_kl", vocab_size=11, options={},
    )  # fmt: skip
    loss = total / len(student)
    assert loss.item() == pytest.approx(values["logits_fkl_all_norm"], rel=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], arrays["grad_logits_fkl_all_norm"], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    "value, divergence, mask",
    [
        ("logits_fkl", "forward_kl", "answers"),
        ("logits_rkl", "reverse_kl", "answers"),
        ("logits_jsd", "jsd", "answers"),
        ("logits_fkl_all", "forward_kl", "attention_mask"),
    ],
)
def test_divergences_weighted_by_sequence_are_those_of_the_released_code(golden, value, divergence, mask):
    values, arrays = golden
    at = places({**arrays, "answers": arrays["labels"] != -100}[mask])
    student, eye = arrays["student_logits"].clone().requires_grad_(), torch.eye(11, dtype=torch.float64)
    total, _ = linear_objective(
        student.flatten(0, 1)[at],
        eye,
        arrays["teacher_logits"].flatten(0, 1)[at],
        eye,
        None,
        lambda stats, weight: weight * getattr(stats, divergence),
        inputs={"weight": mean_in_sequences(at, student.shape[1])},
        fields=(divergence,),
    )
    loss = total / len(student)
    assert loss.item() == pytest.approx(values[value], rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], arrays[f"grad_{value}"], rtol=1e-5, atol=1e-7)


def png(number: int, **size) -> Picture:
    import io

    file = io.BytesIO()
    picture(number, **size).save(file, "png")
    return Picture("test", "a picture", file.getvalue)


@pytest.fixture(scope="module")
def seeing():
    """A student and a wider, deeper teacher that see, and four examples with one picture or two."""
    processor = build_processor("llava")
    student, teacher = build_seeing("llava", processor), build_seeing("llava", processor, width=48, seed=1)
    teacher.requires_grad_(False)
    for model in (student, teacher):
        answer_beside_pictures(model, True)
    tokenizer = processor.tokenizer
    models = Models(student, LocalTeacher(teacher), tokenizer, len(tokenizer), (256,), 256, torch.device("cpu"))
    reader, examples = PictureReader(processor, max_pixels=10**6), []
    for number, (text, answer) in enumerate(
        (("a<image>?", "red"), ("<image>two<image>", "it is"), ("<image>", "b"), ("why <image>", "no one"))
    ):
        ids, extras = reader.read(
            "test", text, [png(10 * number + i) for i in range(text.count("<image>"))], special=True
        )
        examples.append(Example(number, ids, [*tokenizer(answer).input_ids, 256], text, (), extras))
    return models, examples


def collected(models, examples, tmp_path, *, size: int = 4, **keys):
    method = build_method(stage_of(size, name="llavadi", **keys))
    data = TrainingData(Stream(examples, seed=1), None, LocalRollouts(models), tmp_path)
    modules = method.modules(models)
    return method, method.collect(data, models, draw=0), data, modules


def total_loss(method, items, data, models, modules):
    """The loss of a step of one micro-batch, its gradients, and the metrics as the engine divides them."""
    (term,) = method.terms(items, data, models)
    loss, metrics = TermLoss(models.student, modules, vocab_size=models.vocab_size, backend="torch")(term)
    parameters = [one for module in (models.student, *modules.values()) for one in module.parameters()]
    loss = loss / term.count
    return loss.item(), torch.autograd.grad(loss, parameters, allow_unused=True), {
        name: value.item() / term.batch.tokens for name, value in metrics.items()
    }  # fmt: skip


def oracle(items, models, modules, keys: LLAVADI):
    """The same from full logits and all hidden states in float64, sequence by sequence and without padding."""
    student, teacher = models.student.double(), models.teacher.model.double()
    projectors = modules["projector"].double() if modules else None
    image = getattr(student.config, "image_token_id", None)
    parts = {"ce": 0.0, "logits": 0.0, "features": 0.0, "affinity": 0.0}
    try:
        sequences = [item.sequence for item in items]
        tokens = sum(len(one.response) for one in sequences)
        pairs = sum(one.prompt.count(image) * len(one.response) for one in sequences)
        for one in sequences:
            ids = torch.tensor([one.prompt + one.response[:-1]])
            extras = {name: tensor.double() for name, tensor in one.extras.items()}
            outputs = [model(input_ids=ids, output_hidden_states=True, **extras) for model in (student, teacher)]
            logs = []
            for output in outputs:
                logits = output.logits[0]
                if image is not None:
                    logits = logits.masked_fill(torch.arange(logits.shape[1]) == image, -torch.inf)
                logs.append(logits.log_softmax(-1))
            states = [[state[0] for state in output.hidden_states] for output in outputs]
            pictures, first = ids[0] == (-1 if image is None else image), len(one.prompt) - 1
            chosen = {
                "answers": torch.arange(ids.shape[1]) >= first,
                "text": ~pictures | (torch.arange(ids.shape[1]) >= first),
                "all": torch.ones_like(pictures),
            }
            predicted = logs[0][first:].gather(1, torch.tensor(one.response)[:, None])
            parts["ce"] = parts["ce"] - predicted.sum() / tokens
            q, p = logs
            kept = p.isfinite()
            if keys.standardize:
                q, p = (
                    standardized(output.logits[0].masked_fill(~kept, -torch.inf)).log_softmax(-1) for output in outputs
                )
            kl = torch.where(kept, p.exp() * (p.masked_fill(~kept, 0.0) - q.masked_fill(~kept, 0.0)), 0.0).sum(-1)
            parts["logits"] = parts["logits"] + kl[chosen[keys.logits_tokens]].mean() / len(items)
            for place, (ours, theirs) in enumerate(keys.layers if modules else ()):
                at = chosen[keys.features_tokens]
                projected, target = projectors[place](states[0][ours][at]), states[1][theirs][at]
                if keys.features_loss == "mse":
                    distance = (projected - target).square().mean()
                else:
                    distance = (
                        1 - (functional.normalize(projected, dim=-1) * functional.normalize(target, dim=-1)).sum(-1)
                    ).mean()
                parts["features"] = parts["features"] + distance / len(keys.layers) / len(items)
            unit = [functional.normalize(state[-1], dim=-1) for state in states]
            cosines = [one_model[pictures] @ one_model[chosen["answers"]].T for one_model in unit]
            parts["affinity"] = parts["affinity"] + (cosines[0] - cosines[1]).square().sum() / max(pairs, 1)
        coefficients = {
            "ce": keys.ce_coef,
            "logits": keys.logits_coef,
            "features": keys.features_coef,
            "affinity": keys.affinity_coef,
        }
        loss = sum(weight * parts[name] for name, weight in coefficients.items())
        parameters = [one for module in (student, *modules.values()) for one in module.parameters()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        student.float(), teacher.float()
        for module in modules.values():
            module.float()
    return loss.item(), gradients, {name: part.item() for name, part in parts.items() if isinstance(part, torch.Tensor)}


CASES = {
    "the default": {},
    "answers, an inner layer and the last": {"features_tokens": "answers", "layers": [[1, 2], [-1, -1]], "affinity_coef": 2.0},
    "everything at every place": {"logits_tokens": "all", "features_loss": "cosine", "affinity_coef": 0.5, "ce_coef": 0.25},
    "text, what the first layer reads": {"logits_tokens": "text", "features_tokens": "text", "layers": [[0, 1]]},
    "features alone": {**ONLY, "features_coef": 3.0, "features_loss": "cosine", "features_tokens": "answers"},
    "affinities alone": {**ONLY, "affinity_coef": 1.5},
    "logits alone": {**ONLY, "logits_coef": 0.7},
    "standardised logits alone": {**ONLY, "logits_coef": 0.7, "standardize": True},
    "standardised logits at every place": {"logits_tokens": "all", "standardize": True, "divergence": "forward_kl"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_full_logits_and_hidden_states(case, seeing, tmp_path):
    models, examples = seeing
    method, items, data, modules = collected(models, examples, tmp_path, **CASES[case])
    loss, gradients, metrics = total_loss(method, items, data, models, modules)
    expected, wanted, parts = oracle(items, models, modules, method.config.method)
    assert loss == pytest.approx(expected, rel=1e-5)
    scale = max(one.abs().max().item() for one in wanted if one is not None)
    for ours, theirs in zip(gradients, wanted, strict=True):
        ours, theirs = (None if one is None or not one.any() else one.double() for one in (ours, theirs))
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * scale)
    keys = method.config.method
    assert metrics["cross_entropy_nats"] == pytest.approx(parts["ce"], rel=1e-5)
    if keys.features_coef:
        assert metrics["features_loss"] == pytest.approx(parts["features"], rel=1e-5)
    if keys.affinity_coef:
        assert metrics["affinity_loss"] == pytest.approx(parts["affinity"], rel=1e-4)
    name = "standardized_forward_kl_nats" if keys.standardize else "forward_kl_nats"
    assert {one for one in metrics if "forward_kl" in one} == ({name} if keys.logits_coef else set())
    if keys.logits_coef and keys.logits_tokens == "all":  # the metric is of the answers, as in other methods
        assert metrics[name] != pytest.approx(parts["logits"], rel=1e-2)


def test_text_models_are_distilled_like_those_that_see(make_models, tmp_path):
    models = make_models()
    examples = [Example(i, [60 + i, 70, 71][: 1 + i], [90 + i, 91, 256][: 2 + i % 2], "", ()) for i in range(3)]
    method, items, data, modules = collected(models, examples, tmp_path, size=3, logits_tokens="text")
    loss, _, _ = total_loss(method, items, data, models, modules)
    assert loss == pytest.approx(oracle(items, models, modules, method.config.method)[0], rel=1e-5)


def test_micro_batches_add_up_to_the_step(seeing, tmp_path):
    """Whatever is averaged, over sequences, tokens or pairs, is of the whole step."""
    models, examples = seeing
    keys = {"affinity_coef": 1.0, "logits_tokens": "text", "layers": [[1, 1], [-1, -1]]}
    method, items, data, modules = collected(models, examples, tmp_path, **keys)
    whole, gradients, metrics = total_loss(method, items, data, models, modules)
    of_parts, sums, tokens = 0.0, {}, 0
    for part in (items[:1], items[1:]):
        (term,) = method.terms(part, data, models)
        loss, measured = TermLoss(models.student, modules, vocab_size=models.vocab_size, backend="torch")(term)
        of_parts += loss.item() / len(items)
        tokens += term.batch.tokens
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in measured.items()}
    assert of_parts == pytest.approx(whole, rel=1e-5)
    assert {name: value / tokens for name, value in sums.items()} == pytest.approx(metrics, rel=1e-4)


def test_each_model_is_run_once_and_keeps_no_layers_that_nobody_reads(seeing, tmp_path):
    models, examples = seeing
    method, items, data, modules = collected(models, examples, tmp_path, affinity_coef=1.0, logits_tokens="all")
    asked = []

    def seen(module, args, kwargs):
        asked.append((module, bool(kwargs.get("output_hidden_states"))))

    bodies = [model.model for model in (models.student, models.teacher.model)]
    hooks = [body.register_forward_pre_hook(seen, with_kwargs=True) for body in bodies]
    try:
        total_loss(method, items, data, models, modules)
    finally:
        for hook in hooks:
            hook.remove()
    assert asked == [(bodies[1], False), (bodies[0], False)]


def test_a_layer_that_is_not_there_is_named(seeing, tmp_path):
    models, examples = seeing
    for layers, said in (
        ([[3, 1]], "student has 2 layers, and there is no layer 3"),
        ([[1, -2]], "teacher .* no layer -2"),
    ):
        with pytest.raises(UserError, match=f"method.layers: the {said}"):
            collected(models, examples, tmp_path, layers=layers)


def test_keys_that_contradict_each_other_or_do_nothing_are_named():
    def idle(**keys):
        return {key for key, *_ in LLAVADI(name="llavadi", **keys).idle_keys()}

    assert [key for key, *_ in LLAVADI(name="llavadi", logits_coef=0, features_coef=0).findings()] == ["logits_coef"]
    assert [key for key, *_ in LLAVADI(name="llavadi", layers=[[1, 2], [1, 2]]).findings()] == ["layers"]
    assert not [*LLAVADI(name="llavadi").findings()] and idle() == {"beta", "skew"}
    assert idle(divergence="jsd") == {"skew"}
    assert idle(logits_coef=0) == {"divergence", "beta", "skew", "logits_tokens", "standardize"}
    assert idle(divergence="jsd", features_coef=0) == {"skew", "features_loss", "features_tokens", "layers"}


def test_what_it_needs_follows_from_its_keys():
    def needs(**keys):
        return LLAVADI(name="llavadi", **keys).needs()

    assert needs().required_abilities == {"layers", "single"} and needs().trains == ("student", "projector")
    assert needs(features_coef=0).required_abilities == {"single"} and needs(features_coef=0).trains == ("student",)
    assert needs(features_coef=0, logits_tokens="text").required_abilities == {"layers", "single"}
    assert needs(affinity_coef=1).images and not needs().images


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llavadi")
    lines = []
    for number, answer in enumerate(("red", "a blue one", "two", "dots", "green", "it is a cat")):
        picture(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"prompt": "what?", "completion": answer, "image": f"{number}.png"}))
    (folder / "seen.jsonl").write_text("\n".join(lines) + "\n")
    prompts = {"type": "jsonl", "path": str(folder / "seen.jsonl"), "template": "chat",
               "max_prompt_length": 64, "max_response_length": 12}  # fmt: skip
    document = {
        "output_dir": str(folder / "run"),
        "seed": 5,
        "student": {"path": str(save_seeing("llava", folder / "student"))},
        "teacher": {"path": str(save_seeing("llava", folder / "teacher", width=48, seed=1))},
        "data": {"prompts": prompts},
        "method": {
            "name": "llavadi",
            "layers": [[1, 1], [-1, -1]],
            "affinity_coef": 1.0,
            "logits_tokens": "text",
            "standardize": True,
        },
        # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
        "train": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "adam_epsilon": 1e-3},
        "save": {"steps": 1, "keep": 9},
        "log": {"report_to": []},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def projector(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "modules" / "projector.safetensors")


def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed, one_thread):
    broken, places = killed(first=12, later=12)
    assert {steps for _, steps in places} & {1, 2, 3}, places
    assert_same_run(broken, trained)
    for name, tensor in projector(trained / "final").items():
        assert torch.equal(projector(broken / "final")[name], tensor), name
        assert not torch.equal(projector(trained / "checkpoint-1")[name], tensor), f"{name} was never trained"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    for mine, other in zip(steps_of(two_ranks, "main"), steps_of(trained, "main"), strict=True):
        for key in ("loss", "standardized_forward_kl_nats", "features_loss", "affinity_loss"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4), key
    for name, tensor in projector(trained / "final").items():
        torch.testing.assert_close(projector(two_ranks / "final")[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_picture_has_the_distances_of_every_step(trained):
    drawn = panels(trained)
    for key, (title, _) in LLAVADI.panels.items():
        assert [one[key] for one in steps_of(trained, "main")] in [list(line.get_ydata()) for line in drawn[title]]


def test_its_recipe_is_planned_with_its_projectors(monkeypatch):
    from minillm.config.loader.run_plan import load_run
    from minillm.planning.planner import plan_run

    monkeypatch.chdir(ROOT)
    kinds = ("student weights", "optimizer states")

    def planned(*overrides: str):
        *_, stage = plan_run(load_run([ROOT / "configs/llavadi.yaml"], list(overrides)), gpu="cpu").stages
        update = next(phase for phase in stage.memory if phase.phase == "update")
        return stage, [update.device[kind] for kind in kinds], update.device["teacher hidden states"]

    stage, with_projectors, held = planned()
    _, without, held_without = planned("stages.distil.method.features_coef=0")
    # two of them, from 64 to 128 wide, in fp32
    weights = 4 * 2 * (64 * 128 + 128 + 128 * 128 + 128)
    assert [ours - theirs for ours, theirs in zip(with_projectors, without, strict=True)] == [weights, 2 * weights]
    assert held - held_without == 2 * 8 * (48 + 24 - 1) * 128 * 4
    assert not any("projector" in what for what in stage.not_counted)
    deep = "stages.teacher.student.config.text_config.num_hidden_layers=6"  # all of which keep what they give
    _, _, inner = planned(deep, "stages.distil.method.layers=[[1,5],[-1,-1]]")
    assert inner == held
