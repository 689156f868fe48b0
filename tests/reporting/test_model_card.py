"""The card of a trained model: valid for the hub, true to the run's files, silent about the machine."""

import json
import re
from pathlib import Path

import pytest
import yaml

from minillm.reporting.model_card import write_model_card
from minillm.storage.metrics_log import MetricsLog

STUDENT, TEACHER = "openai-community/gpt2", "/home/someone/models/teacher-xl"
DOCUMENT = {
    "output_dir": "runs/x",
    "student": {"path": STUDENT},
    "teacher": {"path": TEACHER},
    "method": {"name": "minillm"},
    "train": {"max_steps": 4},
    "data": {"prompts": {"type": "hf", "path": "databricks/dolly"}},
    "stages": {
        "warmup": {"method": {"name": "sft"}},
        "other": {"method": {"name": "kd"}},
        "distil": {"student": {"path": "stage:warmup"}},
    },
}


def card(folder: Path, document: dict = DOCUMENT) -> str:
    """The card of a run with one record of each kind a stage."""
    (folder / "final").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (folder / "env.json").write_text(json.dumps({"versions": {"torch": "2.13"}, "system": "Linux-secret-host"}))
    with MetricsLog(folder) as log:
        for place, stage in enumerate(document.get("stages") or ["main"], 1):
            common = {
                "stage": stage,
                "step": place,
                "stage_step": 1,
                "seconds": 60.0 * place,
                "student_tokens": 1000 * place,
            }
            log.write({"kind": "train", **common, "loss": 1.0})
            metrics = {"rouge_l": 10.0 * place}
            log.write({"kind": "eval", "who": "student", **common, "sets": {"dolly": metrics}, "mean": metrics})
            sample = {"set": "dolly", "index": 0, "prompt": 'Say "hi":\n', "answer": "hi"}
            log.sample({"stage": stage, "step": place, **sample})
    path = write_model_card(folder, folder / "final")
    assert path == folder / "final" / "README.md"
    return path.read_text()


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))


def test_front_matter(tmp_path):
    assert front_matter(card(tmp_path)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": STUDENT,
        "datasets": ["databricks/dolly"],
        "tags": ["knowledge-distillation", "minillm", "sft"],
    }


def test_the_stages_that_the_model_went_through_and_no_other(tmp_path):
    text = card(tmp_path)
    steps = re.findall(r"^\d\. (.*)$", text, re.MULTILINE)
    assert [re.match(r"\*\*(\w+)\*\*", step)[1] for step in steps] == ["warmup", "distil"]
    assert "teacher" not in steps[0] and "`teacher-xl` as the teacher" in steps[1]
    assert steps[1].endswith("1 steps, 3,000 student tokens, 3 min 00 s of training.")
    assert "| after distil | 30.0 |" in text and "after other" not in text


@pytest.mark.parametrize(("model", "name"), [("org/big", "`org/big`"), (None, "a model"), ("/home/big", "`big`")])
def test_a_served_teacher_is_named_without_its_address(tmp_path, model, name):
    served = {"type": "served", "url": ["http://secret-host:8311"], **({} if model is None else {"model": model})}
    text = card(tmp_path, {**DOCUMENT, "teacher": served})
    assert f", with {name}, served elsewhere, as the teacher" in text and "secret-host" not in text


def test_places_and_names_of_the_machine_stay_out(tmp_path):
    text = card(tmp_path)
    assert not re.search("home|someone|secret-host", text)
    assert str(tmp_path) not in text


@pytest.mark.parametrize("local", [True, False])
def test_a_folder_of_this_machine_is_no_base_model(tmp_path, monkeypatch, local):
    monkeypatch.chdir(tmp_path)
    if local:
        (tmp_path / "models" / "small").mkdir(parents=True)
    text = card(tmp_path / "run", {**DOCUMENT, "student": {"path": "models/small"}, "stages": {}})
    assert ("base_model" in front_matter(text)) == (not local)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("alpaca", "### Instruction:\\nWhat is a list in Python?\\n\\n### Response:\\n"),
        ("chat", "inputs = tokenizer.apply_chat_template("),
        ("none", """prompt = 'Say "hi":\\n'"""),
    ],
)
def test_the_quick_start_is_python_that_uses_the_template(tmp_path, template, line):
    prompts = {**DOCUMENT["data"]["prompts"], "template": template}
    text = card(tmp_path, {**DOCUMENT, "data": {"prompts": prompts}})
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    compile(code, "quick start", "exec")
    assert line in code


def test_citation_and_versions(tmp_path):
    text = card(tmp_path)
    assert "2306.08543" in text and "torch 2.13" in text


def test_a_random_student_has_no_base_model(tmp_path):
    student = {"init": "random", "config": {"model_type": "llama"}}
    text = card(tmp_path, {**DOCUMENT, "student": student, "stages": {}})
    assert "base_model" not in front_matter(text) and "from random weights" in text


def test_without_a_run_there_is_no_card(tmp_path):
    with pytest.raises(ValueError, match="not a run's folder"):
        write_model_card(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("student", "base"),
    [({}, f"for `{STUDENT}`"), ({"init": "prune", "layers": 2}, "`bases/main` in the run's folder")],
)
def test_a_lora_run_says_so_and_where_the_adapter_belongs(tmp_path, student, base):
    lora = {"r": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    text = card(tmp_path, {**DOCUMENT, "student": {"path": STUDENT, "lora": lora, **student}, "stages": {}})
    assert "lora" in front_matter(text)["tags"]
    assert "through LoRA (r 8, alpha 32, q_proj, v_proj), merged into the weights" in text
    assert "`adapter/` holds the last stage's LoRA adapter" in text and base in text


def test_a_run_of_all_weights_has_no_word_of_adapters(tmp_path):
    text = card(tmp_path / "run")
    assert "LoRA" not in text and "adapter" not in text and "lora" not in front_matter(text)["tags"]
