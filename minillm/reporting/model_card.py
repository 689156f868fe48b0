"""README.md of a trained model, from the run's files alone: its making, its measurements, its use."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from minillm import UserError
from minillm.config.lora import words as lora_words
from minillm.config.paths import expand, is_hub_name
from minillm.config.root import described_method
from minillm.data.teacher_context import SUMMARY
from minillm.data.templates import alpaca
from minillm.reporting.evaluation_tables import evaluation_section
from minillm.reporting.markdown import duration
from minillm.reporting.run_files import RunFiles, StageFiles, read_run
from minillm.storage.atomic import write_text

CITATION = """\
@inproceedings{gu2024minillm,
  title = {{MiniLLM}: Knowledge Distillation of Large Language Models},
  author = {Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie},
  booktitle = {The Twelfth International Conference on Learning Representations},
  year = {2024},
  url = {https://arxiv.org/abs/2306.08543}
}"""

QUESTION = "What is a list in Python?"


def write_model_card(output_dir: Path, folder: Path) -> Path:
    """Write README.md into `folder`, a Hugging Face folder of the run in `output_dir`; returns its path.

    The card describes the last stage's model and the stages it went through. Places on the machine that trained it
    are named by their last part alone. Raises UserError where `output_dir` is not a run's folder.
    """
    run = read_run(Path(output_dir))
    if not run.stages:
        raise UserError(f"{output_dir} has no stages to describe: config.yaml and metrics.jsonl are empty")
    last = list(run.stages.values())[-1]
    stages = [*run.lineage(last), last]
    sections = [
        "---\n" + yaml.safe_dump(_front_matter(stages), sort_keys=False, allow_unicode=True) + "---",
        f"# {run.name}",
        f"A language model trained with [minillm](https://arxiv.org/abs/2306.08543): {_origin(stages[0])}.",
        "## How it was made\n\n" + "\n".join(f"{place}. {_step(run, stage)}" for place, stage in enumerate(stages, 1)),
        _adapter(last),
        evaluation_section(replace(run, stages={stage.name: stage for stage in stages})),
        "## Quick start\n\n```python\n" + _quick_start(run, last) + "\n```",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
        _versions(run),
    ]
    path = Path(folder) / "README.md"
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _front_matter(stages: list[StageFiles]) -> dict:
    names = list(dict.fromkeys(stage.settings.get("method", {}).get("name") for stage in stages))
    card: dict = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = stages[0].settings.get("student", {}).get("path")
    if base and is_hub_name(expand(base)):
        card["base_model"] = base
    datasets = [
        prompts["path"]
        for stage in stages
        if (prompts := stage.settings.get("data", {}).get("prompts") or {}).get("type") == "hf"
        and is_hub_name(expand(prompts["path"]))
    ]
    if datasets:
        card["datasets"] = list(dict.fromkeys(datasets))
    adapted = ["lora"] if any(stage.lora for stage in stages) else []
    card["tags"] = [
        "knowledge-distillation",
        "minillm",
        *(name for name in names if name and name != "minillm"),
        *adapted,
    ]
    return card


def _named(path: str | None) -> str:
    """The name of a model or data set without its place on this machine."""
    if not path:
        return "no weights"
    if path.startswith("stage:"):
        return f"the model of stage {path.removeprefix('stage:')}"
    return f"`{path}`" if is_hub_name(expand(path)) else f"`{path.rstrip('/').rsplit('/', 1)[-1]}`"


def _origin(first: StageFiles) -> str:
    student = first.settings.get("student", {})
    start = {
        "pretrained": "the student started from the weights of {}",
        "prune": "the student started from some of the layers of {}",
        "upcycle": "the student started from {}, with its feed-forward layers copied into experts",
        "random": "the student started from random weights, with the architecture of {}",
    }[student.get("init", "pretrained")]
    if student.get("init") == "random" and not student.get("path"):
        return "the student started from random weights"
    return start.format(_named(student.get("path")))


def _step(run: RunFiles, stage: StageFiles) -> str:
    settings = stage.settings
    summary, taught = described_method(settings.get("method", {}))
    words = f"**{stage.name}**: {summary}"
    if stage.lora:
        words += f", through {lora_words(**stage.lora)}, merged into the weights"
    if settings.get("teachers") and taught:
        words += f", with several teachers: {_teachers(settings)}"
    elif settings.get("teacher") and taught:
        words += f", with {_teacher(settings['teacher'])} as the teacher"
    prompts = settings.get("data", {}).get("prompts") or {}
    if prompts:
        words += f", on prompts of {_named(prompts.get('path')) if prompts.get('path') else prompts['type']}"
    if (run.folder / "written" / stage.name / SUMMARY).is_file():
        words += (
            f", to which the teacher alone was told `{' '.join(prompts['teacher_context'].split())}` of each record"
        )
    return f"{words}. {stage.steps:,} steps, {stage.tokens:,} student tokens, {duration(stage.seconds)} of training."


def _teacher(settings: Mapping[str, Any]) -> str:
    if settings.get("type") == "served":
        return f"{_named(settings['model']) if settings.get('model') else 'a model'}, served elsewhere,"
    cached = "what is cached in " if settings.get("type") == "cached" else ""
    bits = settings.get("quantization")
    return f"{cached}{_named(settings.get('path'))}{f' in {bits}' if bits else ''}"


def _teachers(settings: Mapping[str, Any]) -> str:
    """Several teachers with the way in which they divide the records."""
    by = settings.get("teachers_by") or {}
    weights = by.get("weights")
    parts = [
        f"{name} ({_teacher(one).rstrip(',')}{f', weight {weights[name]:g}' if weights else ''})"
        for name, one in settings["teachers"].items()
    ]
    return ", ".join(parts) + ("" if weights else f", each for the records whose {by.get('field')} names it")


def _adapter(last: StageFiles) -> str:
    """The section about adapter/, empty where the last stage trained none."""
    if not last.lora:
        return ""
    student = last.settings["student"]
    path = student.get("path") or ""
    if student.get("init", "pretrained") == "pretrained" and is_hub_name(expand(path)):
        base = f"`{path}`"
    else:
        base = f"the model that stage {last.name} started from (`bases/{last.name}` in the run's folder)"
    return (
        "## The adapter\n\nThe adapter is merged into the weights here, which need nothing else. `adapter/` holds the last stage's "
        f"LoRA adapter by itself, in peft's format, for {base}."
    )


def _quick_start(run: RunFiles, stage: StageFiles) -> str:
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "path/to/this/folder"',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            *_prompt_lines(run, stage.settings.get("data", {}).get("prompts") or {}),
            "output = model.generate(**inputs, max_new_tokens=256, do_sample=True, top_k=0)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _prompt_lines(run: RunFiles, prompts: dict) -> list[str]:
    """A prompt in the template that the model was trained with."""
    defaults = {"pydoc": "chat", "easy_vqa": "chat", "text": "none", "arithmetic": "none"}
    template = prompts.get("template", defaults.get(prompts.get("type"), "alpaca"))
    if template == "chat":
        system = [{"role": "system", "content": prompts["system"]}] if prompts.get("system") else []
        return [
            f"messages = {[*system, {'role': 'user', 'content': QUESTION}]!r}",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    if template == "alpaca":
        prompt = alpaca(QUESTION, "")
    else:
        prompt = min((sample["prompt"] for sample in run.samples), key=len, default=QUESTION)
    return [f"prompt = {prompt!r}", 'inputs = tokenizer(prompt, return_tensors="pt")']


def _versions(run: RunFiles) -> str:
    versions = run.environment.get("versions")
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else ""
