"""report.md, table.csv, values.csv and the pictures of an experiment, finished or not."""

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from minillm.evaluate.seeds import over_seeds
from minillm.experiment.experiment_file import TEACHER, Experiment
from minillm.experiment.figures import draw_curves, draw_ends
from minillm.experiment.jobs import command_of, references
from minillm.experiment.measures import metric_of
from minillm.experiment.results import Result, Results, read_results
from minillm.experiment.verdicts import OPEN, WORDS, Verdict, judge, name_of
from minillm.reporting.analysis_figures import draw_analyses
from minillm.reporting.markdown import MISSING, cell, duration, number, percentage, table, with_deviation
from minillm.reporting.settings import differing_keys
from minillm.storage.atomic import write_text

REPORT, TABLE, VALUES = "report.md", "table.csv", "values.csv"
SHOWN_SAMPLES = 2
PICTURES = {
    "arms": "The arms, with one dot per seed",
    "curves": "While training, by tokens",
    "curves-time": "While training, by time",
    "exposure-bias": "Excess accumulated error by length",
    "calibration": "Accuracy by confidence",
    "diversity": "Distinct n-grams by loss",
    "length-buckets": "Rouge-L by the length of the reference",
}


def write_experiment_report(
    experiment: Experiment, output: Path, seeds: Sequence[int], *, pictures: bool = True
) -> Path:
    """Write all files anew from the folders of the runs; returns the path of report.md.

    Without `pictures`, which take some seconds, those that are there stay. Raises UserError where a file of the runs
    cannot be read.
    """
    results, config = read_results(experiment, output, list(seeds)), experiment.config
    if pictures:
        _draw(results, config.measures, output)
    rows = _rows(results)
    sections = [
        f"# {config.title}",
        config.description.strip(),
        _state(experiment, results, seeds),
        _verdicts([judge(claim, results) for claim in config.claims]),
        _table(rows, config.measures),
        *(f"![{title}]({name}.png)" for name, title in PICTURES.items() if (output / f"{name}.png").is_file()),
        _failures(results),
        _samples(results),
        _settings(experiment),
        _commands(experiment, output, seeds),
    ]
    write_text(output / TABLE, _table_csv(rows, config.measures))
    write_text(output / VALUES, _values_csv(results, config.measures))
    path = output / REPORT
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _draw(results: Results, measures: Sequence[str], output: Path) -> None:
    draw_ends(results, measures, output / "arms.png")
    draw_curves(results, measures, output / "curves.png")
    draw_curves(results, measures, output / "curves-time.png", along="seconds")
    draw_analyses({arm: [one.found for one in row.values()] for arm, row in results.arms.items()}, output)


def _rows(results: Results) -> dict[str, dict[int, Result]]:
    """The lines of the table: the arms, then every teacher; a teacher of all seeds counts once."""
    teachers: dict[tuple, list[str]] = {}
    for arm, by_seed in results.teachers.items():
        teachers.setdefault(tuple(dict.fromkeys(one.source for one in by_seed.values())), []).append(arm)
    rows = dict(results.arms)
    for arms in teachers.values():
        by_seed = {}
        for seed, one in results.teachers[arms[0]].items():
            if one.source not in {other.source for other in by_seed.values()}:
                by_seed[seed] = one
        rows[TEACHER if len(teachers) == 1 else f"{TEACHER} of {', '.join(arms)}"] = by_seed
    return rows


def _values(row: dict[int, Result], measure: str) -> dict[int, float]:
    found = {seed: result.value(measure) for seed, result in row.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _state(experiment: Experiment, results: Results, seeds: Sequence[int]) -> str:
    expected = {arm: _expected(experiment, results, arm, seeds) for arm in experiment.arms}
    missing = [f"{arm} (seed {', '.join(map(str, absent))})" for arm, absent in expected.items() if absent]
    said = f"Seeds: {', '.join(map(str, seeds))}."
    return said + (f" **Not there yet:** {'; '.join(missing)}." if missing else "")


def _expected(experiment: Experiment, results: Results, arm: str, seeds: Sequence[int]) -> list[int]:
    """The seeds that an arm still lacks; a model that does not depend on the seed is measured once."""
    found = results.arms.get(arm, {})
    if arm in experiment.as_is and not references(experiment, arm):
        return [] if found else list(seeds[:1])
    return [seed for seed in seeds if seed not in found]


def _table(rows: dict[str, dict[int, Result]], measures: Sequence[str]) -> str:
    if not rows:
        return "Nothing has been measured yet."
    lines = []
    for name, row in rows.items():
        shown = [_shown(measure, *over_seeds(_values(row, measure).values())) for measure in measures]
        lines.append([name, *shown, str(len(row))])
    headings = [metric_of(measure).heading for measure in measures]
    several = any(len(row) > 1 for row in rows.values())
    note = "Mean ± standard deviation over the seeds." if several else "One seed."
    return f"## Results\n\n{table(['', *headings, 'Seeds'], lines)}\n\n{note} Each run's values are in `{VALUES}`."


def _shown(measure: str, mean: float | None, deviation: float | None) -> str:
    metric = metric_of(measure)
    if mean is None:
        return MISSING
    if metric.key.endswith("_share"):
        return percentage(mean)
    if metric.unit == "s":
        return duration(mean)
    return f"{mean:,.0f}" if metric.unit in ("student tokens", "steps") else with_deviation(mean, deviation)


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    rows = []
    for one in verdicts:
        claim, metric = one.claim, metric_of(one.claim.measure)
        margin = f" by {100 * claim.margin:g}%" if claim.margin and claim.relation in ("below", "above") else ""
        margin = f", give or take {100 * claim.margin:g}%" if claim.margin and not margin else margin
        tested = f"{metric.title}: {name_of(claim.arm)} {WORDS[claim.relation]} {name_of(claim.than)}{margin}"
        if one.word == OPEN:
            rows.append([cell(claim.says), tested, MISSING, MISSING, one.word])
            continue
        values = f"{number(metric.scale * one.left)} to {number(metric.scale * one.right)}"
        scaled = None if one.deviation is None else metric.scale * one.deviation
        sign = "+" if one.difference > 0 else ""
        change = f"{sign}{with_deviation(metric.scale * one.difference, scaled)}"
        rows.append([cell(claim.says), tested, values, change, f"**{one.word}** ({one.holds} of {one.seeds} seeds)"])
    header = ["claim", "tested as", "means", "difference", "verdict"]
    note = "A claim holds if it does for every seed, and is undecided if the seeds disagree."
    return f"## Claims\n\n{table(header, rows, numbers=False)}\n\n{note}"


def _failures(results: Results) -> str:
    lines = [f"- {name}, seed {seed}: {cell(text)}" for (name, seed), text in results.failures.items()]
    return "## Runs that stopped\n\n" + "\n".join(lines) if lines else ""


def _samples(results: Results) -> str:
    """The answers of the arms to the same first prompts, with the first seed that each of them has."""
    by_prompt: dict[tuple[str, int], list[list[str]]] = {}
    prompts: dict[tuple[str, int], dict] = {}
    rows = {**results.arms, **_rows(results)}
    for name, row in rows.items():
        for sample in row[min(row)].samples if row else ():
            key = (sample["set"], sample["index"])
            prompts.setdefault(key, sample)
            by_prompt.setdefault(key, []).append([name, cell(sample["answer"])])
    parts = []
    for key, lines in list(by_prompt.items())[:SHOWN_SAMPLES]:
        sample = prompts[key]
        head = [["**prompt**", cell(sample["prompt"])]]
        if "reference" in sample:
            head.append(["**reference**", cell(sample["reference"])])
        parts.append(f"### {key[0]}, prompt {key[1]}\n\n{table(['', 'text'], head + lines, numbers=False)}")
    return "\n\n".join(["## Samples", *parts]) if parts else ""


def _settings(experiment: Experiment) -> str:
    names = [*experiment.shared, *experiment.trained]
    if len(names) < 2:
        return ""
    differences = differing_keys({name: {"main": experiment.documents[name]} for name in names})
    return f"## Keys in which the runs differ\n\n{differences}" if differences else ""


def _commands(experiment: Experiment, output: Path, seeds: Sequence[int]) -> str:
    return f"## Again\n\n```\n{shlex.join(command_of(experiment, output, seeds))}\n```"


def _table_csv(rows: dict[str, dict[int, Result]], measures: Sequence[str]) -> str:
    lines = [["arm", "seeds", *(name for measure in measures for name in (measure, f"{measure}_std"))]]
    for arm, row in rows.items():
        numbers = [value for measure in measures for value in over_seeds(_values(row, measure).values())]
        lines.append([arm, len(row), *("" if value is None else repr(value) for value in numbers)])
    return _csv(lines)


def _values_csv(results: Results, measures: Sequence[str]) -> str:
    lines: list[list] = [["arm", "seed", "measure", "value"]]
    for arm, row in _rows(results).items():
        for measure in measures:
            lines += [[arm, seed, measure, repr(value)] for seed, value in _values(row, measure).items()]
    return _csv(lines)


def _csv(lines: Sequence[Sequence]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
