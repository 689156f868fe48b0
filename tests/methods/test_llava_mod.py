"""LLaVA-MoD (configs/llava_mod/tiny.yaml): its losses against the released values and float64, and its stages in short:
killed and resumed, and on two ranks of ZeRO-3."""

import importlib.util
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from minillm.config.data import JsonlPairs
from minillm.config.loader.run_plan import load_run
from minillm.config.preference_keys import PreferenceKeys
from minillm.data.pairs import load_pairs
from minillm.engine.module import TermLoss
from minillm.losses import LMHead, linear_objective
from minillm.methods import build_method
from minillm.methods.preference import preference_loss, preference_term
from minillm.methods.reference_scores import ReferenceScores
from minillm.models.batch import TokenSequence
from minillm.models.loading import load_student
from minillm.teachers.local import LocalTeacher
from minillm.teachers.preflight import preflight
from minillm.train.trainer import StageTrainer
from tests.methods.conftest import (  # noqa: F401  fixtures
    assert_same_run,
    finish,
    stage_of,
    start,
    steps_of,
    trained,
    two_ranks,
)
from tests.pictures import build_processor, build_seeing, picture
from tests.runs import in_a_child, train

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))
ROOT = Path(__file__).parents[2]
STAGES = ("teacher", "projector", "dense", "sparse", "preference")
BALANCE = 0.5


def released() -> tuple[dict, dict[str, torch.Tensor]]:
    if not (GOLDEN / "4_llavamod_mimic.npz").is_file():
        pytest.skip("MINILLM_GOLDEN has no 4_llavamod_mimic.npz")
    arrays = {name: torch.from_numpy(one) for name, one in numpy.load(GOLDEN / "4_llavamod_mimic.npz").items()}
    return json.loads((GOLDEN / "4_llavamod_mimic.json").read_text(encoding="utf-8")), arrays


@pytest.mark.parametrize("ce_coef", [0.0, 1.0])
def test_the_mimic_loss_is_the_released_one_where_answers_are_predicted(ce_coef):
    """Of both stages: the soft cross-entropy, less the teacher's entropy, and with ce_coef the language loss. The released
    soft cross-entropy is taken a position later, which is another value: see the golden file."""
    said, arrays = released()
    sequences = []
    for row in arrays["labels"].tolist():
        first = next(place for place, label in enumerate(row) if label != -100)
        answer = [label for label in row[first:] if label != -100]
        assert first > 0 and row[first : first + len(answer)] == answer
        sequences.append(TokenSequence([0] * first, answer))
    asked = []

    def rows(batch):
        asked.append(batch)
        return None

    method = build_method(stage_of(2, name="kd", ce_coef=ce_coef))
    (term,) = method.terms(sequences, None, SimpleNamespace(pad_id=0, teacher=SimpleNamespace(rows=rows)))
    width = term.batch.input_ids.shape[1]
    sentence, place = term.batch.rows // width, term.batch.rows % width
    student, teacher = (arrays[f"{who}_logits"][sentence, place] for who in ("student", "teacher"))  # (N, 11), (N, 14)
    loss, _ = linear_objective(
        student, LMHead(torch.eye(11, dtype=torch.float64)), teacher, LMHead(torch.eye(14, dtype=torch.float64)),
        term.batch.labels, term.objective, fields=term.fields, vocab_size=11,
    )  # fmt: skip
    found = (term.weight * loss / term.count).item()
    p = torch.softmax(teacher[:, :11], -1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert found == pytest.approx(said["shifted_soft_ce"] - entropy + ce_coef * said["lm"], rel=1e-9)
    assert said["loss"]["only_kd"] != pytest.approx(said["shifted_soft_ce"], rel=1e-2)


def test_a_pair_is_scored_beside_its_picture_by_student_and_reference(tmp_path):
    """kto_pair on pictured pairs, in float64 with the models' own forward passes; another picture is another loss."""
    processor = build_processor("llava")
    student, teacher = build_seeing("llava", processor), build_seeing("llava", processor, width=48, seed=1)
    tokenizer = processor.tokenizer
    models, _ = preflight(student, LocalTeacher(teacher), tokenizer, tokenizer, torch.device("cpu"))
    keys = PreferenceKeys(preference_loss="kto_pair", length_norm=False, beta=0.3)

    def loss_of(number: int) -> tuple[float, torch.Tensor]:
        picture(number).save(tmp_path / "one.png")
        record = {"prompt": "what?", "chosen": "red", "rejected": "a blue one", "image": "one.png"}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
        read = load_pairs(JsonlPairs(path=str(tmp_path / "pairs.jsonl"), template="chat"), tokenizer)
        assert read.pictured == 1
        (pair,) = read
        reference = ReferenceScores()
        reference.add([pair], models, batch_size=1)
        term = preference_term([pair], models, keys, reference=reference.of([pair]))
        found, _ = TermLoss(student, vocab_size=models.vocab_size, backend="torch")(term)
        scores = []
        for one in (pair.chosen, pair.rejected):
            ids, first = torch.tensor([one.prompt + one.response]), len(one.prompt) - 1
            said = []
            for model in (student, teacher):
                pixels = one.extras["pixel_values"].double()
                logits = model.double()(input_ids=ids, pixel_values=pixels).logits[0, first:-1]
                logits[:, model.config.image_token_id] = -torch.inf  # which has no probability in an answer
                said.append(torch.log_softmax(logits, -1)[torch.arange(len(one.response)), one.response].sum())
                model.float()
            scores.append(said[0] - said[1])
        want, _ = preference_loss(scores[0][None], scores[1][None], keys)
        assert found.item() == pytest.approx(want.item(), rel=1e-4)
        return found.item()

    assert abs(loss_of(1) - loss_of(2)) > 1e-3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The stages of the recipe, two steps each of two records, with a balance loss that shows."""
    folder = tmp_path_factory.mktemp("llava-mod")
    document = yaml.safe_load((ROOT / "configs" / "llava_mod" / "tiny.yaml").read_text())
    document["output_dir"] = str(folder / "run")
    document["student"]["tokenizer"] = str(ROOT / document["student"]["tokenizer"])
    for data in (document["data"]["prompts"], document["stages"]["preference"]["data"]["pairs"]):
        data["path"] = str(ROOT / data["path"])
    document["eval"] = {"sets": {}}
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"per_device_train_batch_size": 2, "adam_epsilon": 1e-3}
    document |= {"save": {"steps": 1, "keep": 9}, "log": {"report_to": []}}
    for stage in document["stages"].values():
        stage.setdefault("train", {})["max_steps"] = 2
        if "router_aux_loss_coef" in stage["train"]:
            stage["train"]["router_aux_loss_coef"] = BALANCE
    document["stages"]["sparse"]["student"]["upcycle"]["router_std"] = 1.0  # no near ties, which rounding would decide
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "stages" / stage / "model.safetensors")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}


def test_each_stage_trains_its_parts_by_its_loss(trained):  # noqa: F811
    models = {stage: weights(trained, stage) for stage in STAGES}
    dense, sparse = changed(models["projector"], models["dense"]), changed(models["dense"], models["sparse"])
    assert any("vision_tower" in name for name in dense) and any("self_attn" in name for name in dense)
    assert sparse and all(".mlp." in name and "vision_tower" not in name for name in sparse)
    assert any("experts" in name for name in sparse) and any("layers.0.mlp" in name for name in sparse)
    preferred = changed(models["sparse"], models["preference"])
    assert preferred and preferred <= {name for name in models["sparse"] if ".mlp." in name}
    for step in steps_of(trained, "dense"):
        assert step["loss"] == pytest.approx(step["forward_kl_nats"], rel=1e-5)
    for step in steps_of(trained, "sparse"):
        parts = step["forward_kl_nats"] + step["cross_entropy_nats"] + BALANCE * step["auxiliary_loss"]
        assert step["loss"] == pytest.approx(parts, rel=1e-5)
        assert len(step["expert_load"]) == 1  # of two layers
    for step in steps_of(trained, "preference"):
        assert 0 < step["loss"] - BALANCE * step["auxiliary_loss"] < 1 and "margin" in step
    model = AutoModelForImageTextToText.from_pretrained(trained / "final")
    assert model.config.text_config.model_type == "qwen2_moe"


def test_the_projector_alone_is_trained_first(recipe, trained):  # noqa: F811
    (config,) = (one.config for one in load_run([recipe]).stages if one.name == "projector")
    options = {"output_dir": trained, "device": torch.device("cpu"), "seed": config.seed}
    begun = load_student(config.student, **options).state_dict()
    end = AutoModelForImageTextToText.from_pretrained(trained / "stages" / "projector").state_dict()
    names = changed(begun, end)
    assert begun.keys() == end.keys() and names and all("projector" in name for name in names), names


def test_a_run_that_was_killed_in_every_later_stage_goes_on_bit_for_bit(trained, recipe, one_thread):  # noqa: F811
    folder = recipe.parent / "killed"

    def killed(stage: str):
        save = StageTrainer.save

        def save_and_die(trainer, *, wait):
            save(trainer, wait=True)
            if (trainer.progress.stage, trainer.progress.stage_step) == (stage, 1):
                os.kill(os.getpid(), signal.SIGKILL)

        StageTrainer.save = save_and_die
        train(recipe, f"output_dir={folder}", resume=folder.is_dir())

    for stage in STAGES[1:]:
        assert os.WIFSIGNALED(in_a_child(lambda stage=stage: killed(stage))), stage
    assert in_a_child(lambda: train(recipe, f"output_dir={folder}", resume=True)) == 0
    assert_same_run(folder, trained, models=("final", *(f"stages/{stage}" for stage in STAGES)))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(recipe, two_ranks):  # noqa: F811
    one = recipe.parent / "one_by_one"  # the balance loss is a mean over a micro-batch, so these must be cut alike
    cut = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2")
    assert in_a_child(lambda: train(recipe, f"output_dir={one}", *cut)) == 0
    for stage in STAGES:
        for ours, theirs in zip(steps_of(two_ranks, stage), steps_of(one, stage), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), stage
            assert ours.get("expert_load") == theirs.get("expert_load")
        for name, tensor in weights(one, stage).items():
            torch.testing.assert_close(
                weights(two_ranks, stage)[name], tensor, rtol=1e-3, atol=2e-5, msg=f"{stage}: {name}"
            )
