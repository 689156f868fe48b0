"""An evaluation apart from training: which sets, which models, the table and the file."""

import io
import json
import math
from dataclasses import replace
from datetime import datetime

import pytest
import torch
import yaml

from minillm.cli import eval as standalone
from minillm.cli.eval import evaluate_model, evaluation_plan
from minillm.config.errors import ConfigErrors
from minillm.config.models import StudentConfig
from minillm.evaluate.evaluator import Evaluation
from minillm.models import tokenizers
from minillm.models.loading import load_student
from minillm.models.saving import save_model
from minillm.models.tokenizers import load_tokenizer
from minillm.reporting.console import Console

RECORDS = [{"prompt": f"{word}?", "completion": word} for word in ("yes", "no", "maybe", "never", "why")]


LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
}


def save_random_model(folder, *, seed: int) -> None:
    config = StudentConfig(init="random", tokenizer="byte", config=LLAMA)
    model = load_student(config, output_dir=folder, device=torch.device("cpu"), seed=seed)
    save_model(model, load_tokenizer(config, folder), folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "stories.jsonl").write_text('{"text": "Once upon a time there was a cat."}\n')
    save_random_model(tmp_path / "student", seed=0)
    save_random_model(tmp_path / "teacher", seed=1)
    document = {
        "teacher": {"path": "teacher"},
        "engine": {"device": "cpu"},
        "eval": {"sets": {"own": {"path": "test.jsonl", "template": "none", "limit": 4}}, "max_new_tokens": 5},
        "train": {"not": "looked at"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


def test_sets_of_configurations_and_data_files(folder):
    plan = evaluation_plan([folder / "run.yaml"], ["eval.top_k=3"], seeds=[1, 2])
    assert (list(plan.eval.sets), plan.eval.top_k, plan.eval.seeds) == (["own"], 3, [1, 2])
    files = [folder / "run.yaml", folder / "stories.jsonl"]
    plan = evaluation_plan(files, ["eval.sets.stories.prompt_length=4"])
    assert {name: prompts.type for name, prompts in plan.eval.sets.items()} == {"stories": "text", "own": "jsonl"}
    plan = evaluation_plan([folder / "test.jsonl"], ["eval.sets.test.template=none"])
    assert (plan.eval.sets["test"].path, plan.teacher) == (str(folder / "test.jsonl"), None)


def test_max_prompts_never_raises_a_limit(folder):
    limits = [evaluation_plan([folder / "run.yaml"], max_prompts=most).eval.sets["own"].limit for most in (2, 9)]
    assert limits == [2, 4]
    assert evaluation_plan([folder / "test.jsonl"], max_prompts=3).eval.sets["test"].limit == 3


def test_sets_of_one_name_are_refused(folder):
    (folder / "other").mkdir()
    (folder / "other" / "test.jsonl").write_text((folder / "test.jsonl").read_text())
    with pytest.raises(ConfigErrors, match=r"other/test\.jsonl would both be the set 'test'"):
        evaluation_plan([folder / "test.jsonl", folder / "other" / "test.jsonl"])
    (folder / "named.yaml").write_text(f"eval: {{sets: {{test: {{path: {folder / 'other' / 'test.jsonl'}}}}}}}")
    with pytest.raises(ConfigErrors, match="would both be the set 'test'"):
        evaluation_plan([folder / "named.yaml", folder / "test.jsonl"])


def test_seeds_are_named_once(folder):
    with pytest.raises(ConfigErrors, match="--seeds 1 2 1 would measure the same twice"):
        evaluation_plan([folder / "run.yaml"], seeds=[1, 2, 1])


def test_a_data_file_that_is_not_there_is_a_problem_of_the_configuration(folder):
    with pytest.raises(ConfigErrors, match=r"eval.sets.gone.path: no such file"):
        evaluation_plan([folder / "gone.jsonl"])


def test_a_student_beside_its_teacher(folder):
    file = io.StringIO()
    plan = evaluation_plan([folder / "run.yaml"], seeds=[1, 2], max_prompts=3)
    result = evaluate_model("student", plan, Console(rank=0, file=file), output=folder / "out" / "result.json")
    assert result["prompts"] == {"own": 3}
    assert {"rouge_l", "rouge_l_std", "reverse_kl_nats", "forward_kl_nats"} <= set(result["mean"])
    assert json.loads((folder / "out" / "result.json").read_text()) == result
    text = file.getvalue()
    assert "Evaluation of student\n" in text and "Reverse KL" in text and "  teacher: " in text
    assert "own: 3 prompts" in text


def test_a_model_of_a_run_is_asked_on_the_day_of_the_run(folder, monkeypatch):
    """On whatever day; another model on the day that it is."""
    dated = "{{ strftime_now('%d %b %Y') }}\n" + tokenizers.BYTE_TEMPLATE
    monkeypatch.setattr(tokenizers, "BYTE_TEMPLATE", dated)
    for run in ("run/stages/first", "run/final", "elsewhere"):
        save_random_model(folder / run, seed=0)
    (folder / "run" / "metrics.jsonl").write_text("")
    (folder / "run" / "env.json").write_text('{"started": "2026-02-03T12:00:00+0000"}')
    plan = evaluation_plan([folder / "run.yaml"], ["eval.sets.own.template=chat"], max_prompts=1)
    asked, real = [], standalone.load_prompts

    def spy(*arguments, **options):
        asked.append(real(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr(standalone, "load_prompts", spy)
    for day, model, printed in (
        (7, "run", "03 Feb 2026"),
        (8, "run/stages/first", "03 Feb 2026"),
        (8, "elsewhere", "08 Mar 2026"),
    ):
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None, day=day: datetime(2026, 3, day))})
        monkeypatch.setattr(standalone, "datetime", clock)
        file = io.StringIO()
        evaluate_model(model, plan, Console(rank=0, file=file))
        assert asked[-1].examples[0].prompt.startswith(printed)
        assert f"{datetime.strptime(printed, '%d %b %Y'):%Y-%m-%d}, " in file.getvalue()
    teacher = plan.teacher.model_copy(update={"path": "stage:first"})
    changed = replace(plan, teacher=teacher, output_dir=folder / "run")
    evaluate_model("teacher", changed, Console(rank=1))
    assert asked[-1].examples[0].prompt.startswith("03 Feb 2026")


def test_the_teacher_itself(folder):
    plan = evaluation_plan([folder / "run.yaml"], max_prompts=2)
    result = evaluate_model("teacher", plan, Console(rank=1))
    assert result["who"] == "teacher"
    assert "reverse_kl_nats" not in result["mean"] and "entropy_nats" in result["mean"]
    # the teacher as a model of its own answers the same
    as_student = evaluate_model("teacher/", plan, Console(rank=1))
    assert as_student["mean"]["rouge_l"] == result["mean"]["rouge_l"]
    assert as_student["mean"]["reverse_kl_nats"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="no teacher to evaluate"):
        evaluate_model("teacher", evaluation_plan([folder / "test.jsonl"]), Console(rank=1))


def test_sampling_with_cuda_graphs_needs_a_gpu(folder):
    with pytest.raises(ConfigErrors, match="rollout.cuda_graphs: needs a GPU, but engine.device is cpu"):
        evaluation_plan([folder / "run.yaml"], ["rollout.cuda_graphs=true"])
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    plan = evaluation_plan([folder / "run.yaml"], ["rollout.cuda_graphs=true", "engine.device=auto"])
    with pytest.raises(ValueError, match="the models are on the cpu"):
        evaluate_model("student", plan, Console(rank=1))


def test_without_a_teacher_there_are_no_distances(folder):
    plan = evaluation_plan([folder / "run.yaml"], ["eval.teacher=false"], max_prompts=2)
    result = evaluate_model("student", plan, Console(rank=1))
    assert "reverse_kl_nats" not in result["mean"] and "loss_nats" in result["mean"]


def test_calibration_needs_no_prompts(folder):
    words = {"path": "labels.jsonl", "label": "label", "words": ["yes", "no"], "question": "{text}", "template": "none"}
    document = {
        "teacher": {"path": "teacher"},
        "engine": {"device": "cpu"},
        "eval": {"calibration": {"answers": words}},
    }
    (folder / "labels.jsonl").write_text('{"text": "Is it?", "label": "yes"}\n{"text": "Or not?", "label": "no"}\n')
    (folder / "calibration.yaml").write_text(yaml.safe_dump(document))
    result = evaluate_model("student", evaluation_plan([folder / "calibration.yaml"]), Console(rank=1))
    assert list(result["mean"]) == list(result["sets"]["answers"]) == ["accuracy", "ece"]
    with pytest.raises(ConfigErrors, match="eval.sets: missing"):  # what exposure bias is measured on
        evaluation_plan([folder / "calibration.yaml"], ["eval.exposure_bias.samples=1"])


def test_pairs_need_no_prompts(folder):
    document = {
        "teacher": {"path": "teacher"},
        "engine": {"device": "cpu"},
        "eval": {"preference": {"pairs": {"answers": {"path": "pairs.jsonl", "template": "none"}}}},
    }
    (folder / "pairs.jsonl").write_text('{"prompt": "Is it?", "chosen": "yes", "rejected": "no"}\n')
    (folder / "pairs.yaml").write_text(yaml.safe_dump(document))
    result = evaluate_model("student", evaluation_plan([folder / "pairs.yaml"]), Console(rank=1))
    assert result["mean"] == result["sets"]["answers"] and result["mean"]["margin_nats"] != 0
    assert result["mean"]["preferred_share"] == (result["mean"]["margin_nats"] > 0)


def test_what_is_not_finite_is_still_json(folder, monkeypatch):
    class Infinite:
        def __init__(self, *arguments, **options):
            pass

        def evaluate(self, models, rollouts, who):
            mean = {"forward_kl_nats": math.inf, "rouge_l": math.nan, "loss_nats": -math.inf}
            return Evaluation({"own": mean}, mean, [])

    monkeypatch.setattr(standalone, "Evaluator", Infinite)
    plan = evaluation_plan([folder / "run.yaml"])
    evaluate_model("student", plan, Console(rank=1), output=folder / "result.json")
    written = (folder / "result.json").read_text()
    mean = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["mean"]
    assert mean == {"forward_kl_nats": "Infinity", "rouge_l": "NaN", "loss_nats": "-Infinity"}
