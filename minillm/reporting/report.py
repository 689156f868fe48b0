"""report.md and curves.png of a run, from the files in its folder alone: a picture first, then numbers."""

from collections.abc import Sequence
from pathlib import Path

from minillm.config.lora import words as lora_words
from minillm.reporting.context_report import context_sections
from minillm.reporting.curves import draw_comparison, draw_run
from minillm.reporting.evaluation_tables import Row, evaluation_section, metrics_table, seed_rows, trained_stages
from minillm.reporting.expert_report import expert_section
from minillm.reporting.findings import collapses, verdicts
from minillm.reporting.markdown import MISSING, cell, duration, number, table
from minillm.reporting.metric import find_metric
from minillm.reporting.rationale_report import rationale_sections
from minillm.reporting.run_files import PREPARED, RunFiles, StageFiles, read_run, stage_label
from minillm.reporting.selection_report import selection_sections
from minillm.reporting.settings import differing_keys, settings_table
from minillm.storage.atomic import write_text
from minillm.storage.metrics_log import read_numbers
from minillm.storage.timing import PARTS

REPORT, CURVES = "report.md", "curves.png"
SHOWN_SAMPLES = 8


def write_report(output_dir: Path) -> Path:
    """Write report.md and curves.png into a run's folder, however far the run is; returns the path of report.md.

    Raises UserError where the folder is not a run's, or a file in it cannot be read.
    """
    run = read_run(Path(output_dir))
    drawn = draw_run(run, run.folder / CURVES)
    sections = [
        f"# {run.name}",
        f"![Curves of the run]({CURVES})" if drawn else "",
        _status(run),
        *(f"> {paragraph}" for paragraph in collapses(run)),
        *verdicts(run),
        evaluation_section(run) or _unevaluated(run),
        _samples(run),
        *selection_sections(run.folder),
        expert_section(run),
        *rationale_sections(run.folder),
        *context_sections(run),
        _stages(run),
        _times(run),
        _configuration(run),
        _environment(run),
    ]
    path = run.folder / REPORT
    write_text(path, _joined(sections))
    return path


def compare_reports(folders: Sequence[Path], *, figure: Path | None = None) -> str:
    """Compare runs in one Markdown text: their last evaluations, and the keys in which they differ.

    Where that is the seed alone, a table of means and deviations over the runs comes first.

    Args:
        folders: runs' folders.
        figure: where a PNG of their curves goes; the text then shows it by its name.

    Raises UserError where a folder is not a run's, or a file in it cannot be read.
    """
    runs = _labelled([read_run(Path(folder)) for folder in folders])
    drawn = figure is not None and draw_comparison(runs, figure)
    rows = [
        Row(stage_label(label, run, stage), stage.evaluations[-1], stage.evaluations[-1].seconds)
        for label, run in runs.items()
        for stage in trained_stages(run)
    ]
    differences = differing_keys(
        {label: {stage.name: stage.settings for stage in run.stages.values()} for label, run in runs.items()}
    )
    seeds = seed_rows(list(runs.values()))
    over_seeds = (
        f"## Over seeds\n\nMean ± standard deviation of {len(runs)} runs that differ in their seed alone.\n\n"
        f"{metrics_table(seeds)}\n\n## Each run"
    )
    return _joined(
        [
            "# " + " against ".join(runs),
            f"![Curves of the runs]({figure.name})" if drawn else "",
            over_seeds if seeds else "",
            metrics_table(rows) if rows else "None of these runs has been evaluated after training yet.",
            f"## Keys that differ\n\n{differences}" if differences else "",
        ]
    )


def _joined(sections: Sequence[str]) -> str:
    return "\n\n".join(section for section in sections if section) + "\n"


def _labelled(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """The runs by the shortest end of their path that no other path has."""
    labels, paths = {}, [run.folder.resolve().parts for run in runs]
    for run, path in zip(runs, paths, strict=True):
        length = 1
        while length < len(path) and sum(other[-length:] == path[-length:] for other in paths) > 1:
            length += 1
        labels["/".join(path[-length:])] = run
    return labels


def _status(run: RunFiles) -> str:
    if run.finished:
        return "The run is finished: its model is in `final/`."
    current = next((stage for stage in reversed(run.stages.values()) if stage.started), None)
    if current is None:
        return "The run has started; nothing has been measured yet."
    return f"The run is not finished: stage {current.name}, step {_steps(current)}."


def _unevaluated(run: RunFiles) -> str:
    if any(stage.settings.get("eval", {}).get("sets") for stage in run.stages.values()):
        return "Nothing has been evaluated yet."
    return "The run has no `eval.sets`, so nothing is evaluated."


def _steps(stage: StageFiles) -> str:
    planned = stage.settings.get("train", {}).get("max_steps")
    return f"{stage.steps:,}" if planned in (None, stage.steps) else f"{stage.steps:,} of {planned:,}"


def _unstarted(run: RunFiles, stage: StageFiles) -> str:
    prepared = (run.folder / "stages" / stage.name / PREPARED).is_file()
    return "done, without steps" if prepared else "not started"


def _samples(run: RunFiles) -> str:
    """The last answers of every stage to the same prompts, beside the reference and the teacher's answer."""
    prompts: dict[tuple[str, int], dict[str, dict]] = {}
    for sample in run.samples:
        column = sample["stage"] if sample.get("who", "student") == "student" else "teacher"
        prompts.setdefault((sample["set"], sample["index"]), {})[column] = sample
    sets = dict.fromkeys(name for name, _ in prompts)
    parts = []
    for set_name in sets:
        chosen = [key for key in prompts if key[0] == set_name][: max(1, SHOWN_SAMPLES // len(sets))]
        for place, key in enumerate(chosen, 1):
            parts.append(f"### {set_name} {place}\n\n{_sample_table(run, prompts[key])}")
    return "\n\n".join(["## Samples", *parts]) if parts else ""


def _sample_table(run: RunFiles, answers: dict[str, dict]) -> str:
    by_stage = {name: answers[name] for name in run.stages if name in answers}
    latest = list(answers.values())[-1]
    rows = [["prompt", cell(latest["prompt"])]]
    if "teacher_prompt" in latest:
        rows.append(["prompt of the teacher", cell(latest["teacher_prompt"])])
    if "reference" in latest:
        rows.append(["reference", cell(latest["reference"])])
    for name, sample in by_stage.items():
        rows.append([f"**{name}**", _answer(sample["answer"], sample["ended"])])
    beside = [(sample["teacher"], sample["teacher_ended"]) for sample in by_stage.values() if "teacher" in sample]
    if "teacher" in answers:
        beside.append((answers["teacher"]["answer"], answers["teacher"]["ended"]))
    if beside:
        rows.append(["teacher", _answer(*beside[-1])])
    return table(["", "text"], rows, numbers=False)


def _answer(text: str, ended: bool) -> str:
    return cell(text) if ended else f"{cell(text)} *(ends at the token limit)*"


def _stages(run: RunFiles) -> str:
    header = ["stage", "method", "student from", "steps", "training time", "time per step", "student tokens",
              "tokens per second", "peak memory (GiB)", "planned (GiB)", "best evaluation"]  # fmt: skip
    rows = []
    for stage in run.stages.values():
        numbers = [read_numbers(record) for record in stage.train]
        peak, planned = (
            max((one[key] for one in numbers if key in one), default=None)
            for key in ("memory/peak_gib", "memory/planned_peak_gib")
        )
        rows.append(
            [
                stage.name,
                stage.settings.get("method", {}).get("name", MISSING)
                + (f", {lora_words(**stage.lora)}" if stage.lora else ""),
                cell(stage.settings.get("student", {}).get("path") or MISSING, limit=80),
                _steps(stage) if stage.started else _unstarted(run, stage),
                duration(stage.seconds) if stage.steps else MISSING,
                duration(stage.seconds / stage.steps) if stage.steps else MISSING,
                f"{stage.tokens:,}" if stage.steps else MISSING,
                number(stage.tokens / stage.seconds) if stage.seconds else MISSING,
                number(peak),
                number(planned),
                _best(stage),
            ]
        )
    return "## Stages\n\n" + table(header, rows) if rows else ""


def _times(run: RunFiles) -> str:
    """The time of every stage by its parts, on rank 0, without the teacher's evaluations and the last save."""
    rows = []
    for stage in run.stages.values():
        spent = {part: sum(record.get(f"time/{part}_s", 0.0) for record in stage.train) for part in PARTS}
        spent["evaluation"] = sum(one.took_seconds for one in stage.evaluations)
        if any(spent.values()):
            total = sum(spent.values())
            rows.append(
                [stage.name, *(f"{duration(one)} ({one / total:.0%})" if one else MISSING for one in spent.values())]
            )
    return "## Where the time went\n\n" + table(["stage", *PARTS, "evaluation"], rows) if rows else ""


def _best(stage: StageFiles) -> str:
    """The best evaluation by eval.metric, which best/ is chosen by."""
    key = stage.settings.get("eval", {}).get("metric", "rouge_l")
    metric = find_metric(key)
    having = [one for one in stage.evaluations if metric and key in one.mean]
    if not having:
        return MISSING
    best = max(having, key=lambda one: metric.better * one.mean[key])
    return f"{metric.title} {metric.show(best.mean)} at step {best.stage_step:,}"


def _configuration(run: RunFiles) -> str:
    keys = settings_table({name: stage.settings for name, stage in run.stages.items() if stage.settings})
    return (
        f"## Configuration\n\nKeys that differ from their defaults; all of them are in `config.yaml`.\n\n{keys}"
        if keys
        else ""
    )


def _environment(run: RunFiles) -> str:
    environment = run.environment
    lines = []
    if environment.get("versions"):
        lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in environment["versions"].items()))
    machine = [str(environment[key]) for key in ("system", "gpu") if environment.get(key)]
    if environment.get("cpus"):
        machine.append(f"CPUs: {environment['cpus']}, threads used: {environment.get('cpu_threads', '?')}")
    if machine:
        lines.append("Machine: " + "; ".join(machine))
    if environment.get("started"):
        lines.append(f"Started: {environment['started']}")
    return "## Environment\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""
