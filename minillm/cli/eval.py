"""`minillm eval`: a model measured apart from any training, on the sets of a configuration or of data files."""

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from minillm import UserError
from minillm.cli.arguments import split
from minillm.cli.controlled import add_delta
from minillm.cli.outputs import require_file, require_folder
from minillm.config.errors import ConfigErrors, Problem
from minillm.config.loader.evaluation_plan import EvaluationPlan, load_evaluation
from minillm.config.models import named_teacher
from minillm.config.paths import expand
from minillm.config.tree import COMMAND_LINE
from minillm.data.instructions import PromptSet, load_prompts
from minillm.data.judges import judges_of
from minillm.data.labels import load_labels
from minillm.data.pairs import load_pairs
from minillm.data.sources import read_jsonl
from minillm.evaluate.analyses import Analyses
from minillm.evaluate.evaluator import Evaluator
from minillm.evaluate.held_out import require_shared_data
from minillm.models.delta import Delta, DeltaPrompt
from minillm.models.locations import resolve_path
from minillm.models.open import model_path, run_folder
from minillm.reporting.analysis_figures import draw_analyses
from minillm.reporting.console import Console
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.storage.atomic import write_text
from minillm.storage.environment import read_start
from minillm.storage.metrics_log import plain
from minillm.teachers.open import open_named, teacher_tokenizers
from minillm.train.cached_texts import UNMEASURED

# The type of prompts in a data file, by the end of its name. Any other file is a configuration.
DATA_FILES = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet", ".txt": "text", ".txt.gz": "text"}
TEACHER = "teacher"
DRAWN = ("exposure_bias", "calibration", "distinct", "length_buckets")  # keys of `eval` whose results have a figure
DTYPE = "float32"  # of a model's weights where --dtype does not say


def run(arguments: argparse.Namespace) -> int:
    """Measure the model that the arguments name. The places for results are looked at before anything is measured."""
    require_file("--output", arguments.output)
    require_folder("--figures", arguments.figures)
    if arguments.model == TEACHER and arguments.dtype is not None:
        raise UserError("--dtype has no effect on the teacher, whose dtype is teacher.dtype: write teacher.dtype=...")
    files, overrides = split(arguments.words)
    plan = evaluation_plan(files, overrides, seeds=arguments.seeds, max_prompts=arguments.max_prompts)
    if arguments.figures is not None and not any(getattr(plan.eval, key) for key in DRAWN):
        keys = ", ".join(f"eval.{key}" for key in DRAWN)
        raise UserError(f"--figures: there is nothing to draw; set one of {keys}")
    with Console() as console:
        evaluate_model(
            arguments.model,
            plan,
            console,
            dtype=arguments.dtype or DTYPE,
            delta=arguments.delta,
            alpha=arguments.alpha,
            output=arguments.output,
            figures=arguments.figures,
        )
    return 0


def evaluation_plan(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] | None = None,
    max_prompts: int | None = None,
) -> EvaluationPlan:
    """The sets to measure on, and the settings of the measurements.

    Args:
        files: configurations, and data files, each of which becomes a set.
        overrides: `eval.key=value` and the like.
        seeds: used instead of eval.seeds.
        max_prompts: the most usable prompts that are taken from a set.

    Raises ConfigErrors with every problem.
    """
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise _refusal(f"--seeds {' '.join(map(str, seeds))} would measure the same twice: name every seed once")
    kinds = {file: _kind(file) for file in files}
    configurations = [file for file in files if kinds[file] is None]
    data = [file for file in files if kinds[file] is not None]
    named = {_set_name(file): file for file in data}
    sets = {name: {"type": kinds[file], "path": str(file)} for name, file in named.items()}
    plan = load_evaluation(configurations, overrides, base={"eval": {"sets": sets}} if sets else {})
    for file in data:
        name = _set_name(file)
        other = getattr(plan.eval.sets.get(name), "path", None)
        if named[name] is not file or other != expand(str(file)):
            raise _refusal(f"{file} and {other or 'another'} would both be the set {name!r}: measure them one by one")
    changed: dict[str, Any] = {} if seeds is None else {"seeds": list(seeds)}
    if max_prompts is not None:
        limits = {
            name: max_prompts if prompts.limit is None else min(prompts.limit, max_prompts)
            for name, prompts in plan.eval.sets.items()
        }
        sets = plan.eval.sets.items()
        changed["sets"] = {name: prompts.model_copy(update={"limit": limits[name]}) for name, prompts in sets}
    return EvaluationPlan(**{**vars(plan), "eval": plan.eval.model_copy(update=changed)})


def _set_name(file: Path) -> str:
    return file.name.partition(".")[0]


def _refusal(message: str) -> ConfigErrors:
    return ConfigErrors([Problem(COMMAND_LINE, None, "", message)])


def _kind(file: Path) -> str | None:
    """The type of the prompts in a data file, None for a configuration."""
    kind = next((kind for end, kind in DATA_FILES.items() if file.name.endswith(end)), None)
    if kind == "jsonl" and file.is_file():
        _, first = next(read_jsonl(str(file)), (None, {}))
        return "text" if list(first) == ["text"] else kind
    return kind


def evaluate_model(
    model: str,
    plan: EvaluationPlan,
    console: Console,
    *,
    dtype: str = DTYPE,
    delta: str | None = None,
    alpha: float | None = None,
    output: Path | None = None,
    figures: Path | None = None,
) -> dict[str, Any]:
    """Measure a model, show the tables, and return the result, which is written too where `output` is given.

    Args:
        model: a path as model_path takes it, or "teacher" for the plan's.
        plan: the sets and how they are measured.
        console: shows the tables.
        dtype: the dtype of the model's weights, and the delta's; the teacher's is the plan's.
        delta: a path likewise: its logits, times alpha, are added to the model's.
        alpha: 1 where it is None; only with a delta.
        output: the JSON file of the result, samples included.
        figures: the folder for a figure of every analysis.

    Raises UserError where the plan has no teacher that is asked for, and whatever loading raises.
    """
    who = "teacher" if model == TEACHER else "student"
    if who == "teacher" and plan.teacher is None:
        raise UserError("there is no teacher to evaluate: the configuration has no `teacher`")
    if who == "teacher" and "evaluate" not in plan.teacher.abilities:
        raise UserError(
            f"a teacher cannot be evaluated itself where it is {plan.teacher.called}: name the folder of a model in the place of "
            "`teacher`"
        )
    if who == "teacher" and delta is not None:
        raise UserError("--delta: the teacher is measured alone; name its folder in the place of `teacher`")
    path = named_teacher(plan.teacher) if who == "teacher" else model_path(model)
    models, rows = open_named(
        None if who == "teacher" else path,
        plan.teacher if who == "teacher" or plan.eval.teacher else None,
        device=plan.engine.device if plan.engine.type == "torch" else "auto",
        dtype=dtype,
        output_dir=plan.output_dir,
    )
    if models.teacher is not None and "read" not in models.teacher.abilities:
        console.note(UNMEASURED)
    models = add_delta(models, delta, alpha, console, dtype=dtype)
    rollouts = LocalRollouts(models, cuda_graphs=plan.rollout.cuda_graphs)
    # a model of a run is asked on the day of the run, as it was trained, whatever day it is
    run = run_folder(Path(resolve_path(path, plan.output_dir, verify=False)))
    began = None if run is None else read_start(run)
    now = began or datetime.now()
    if "strftime_now" in str(models.tokenizer.chat_template):
        rows.append(("date in prompts", f"{now:%Y-%m-%d}, {'today' if began is None else 'when its run began'}", ""))
    judges = judges_of(plan.teacher) if plan.eval.teacher else None
    sets = {
        name: load_prompts(prompts, models.tokenizer, name=f"eval.sets.{name}", judges=judges, now=now)
        for name, prompts in plan.eval.sets.items()
    }
    if models.delta is not None and models.delta.translation is not None:
        _read_for_delta(plan, sets, models.delta, now)
    labels = {
        name: load_labels(source, models.tokenizer, name=f"eval.calibration.{name}", now=now)
        for name, source in plan.eval.calibration.items()
    }
    pairs = {
        name: load_pairs(source, models.tokenizer, name=f"eval.preference.pairs.{name}", now=now)
        for name, source in plan.eval.held_out_pairs.items()
    }
    theirs = teacher_tokenizers(plan.teacher, plan.output_dir)
    require_shared_data("eval", sets, labels, pairs, models, theirs.values())
    rows += [(name, f"{len(prompts)} prompts, {prompts.dropped_long} too long", "") for name, prompts in sets.items()]
    rows += [(name, f"{len(one)} questions, {one.dropped_long} too long", "") for name, one in labels.items()]
    rows += [(name, f"{len(one)} pairs, {one.dropped_long} too long", "") for name, one in pairs.items()]
    console.preflight(rows)
    tell = console.working
    evaluation = Evaluator(sets, plan.eval, seed=plan.seed, report_progress=tell).evaluate(models, rollouts, who)
    evaluation = Analyses(sets, labels, plan.eval, pairs, seed=plan.seed, report_progress=tell).add_to(
        evaluation, models, rollouts, who
    )
    title = f"Evaluation of {path if who == 'teacher' else model}"
    title += "" if delta is None else f" with {models.delta.alpha:g} x {delta}"
    console.measurement(title, evaluation.sets, evaluation.mean, evaluation.samples, who=who)
    result = {
        "model": model,
        "who": who,
        **({} if delta is None else _said_of(models.delta, delta)),
        "teacher": None if plan.teacher is None else named_teacher(plan.teacher),
        "seeds": list(plan.eval.seeds),
        "prompts": {name: len(prompts) for name, prompts in sets.items()},
        "sets": evaluation.sets,
        "mean": evaluation.mean,
        "samples": evaluation.samples,
        "curves": evaluation.curves,
    }
    if figures is not None:
        for path in draw_analyses({Path(model).name: [result]}, figures):
            console.note(f"drawn: {path}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def _said_of(delta: Delta, name: str) -> dict[str, Any]:
    said = {"delta": name, "alpha": delta.alpha}
    return said if delta.translation is None else said | {"vocabulary_map": delta.translation.map.counts()}


def _read_for_delta(plan: EvaluationPlan, sets: Mapping[str, PromptSet], delta: Delta, now: datetime) -> None:
    """Render chats by the delta's own template too; in other prompts a delta reads the very text that the model does.

    Raises DataError as load_prompts does.
    """
    for name, prompts in plan.eval.sets.items():
        if prompts.template != "chat":
            continue
        last = max(example.index for example in sets[name].examples)
        anything = {
            "limit": last + 1,
            "max_prompt_length": prompts.max_characters,
            "teacher_context": None,
        }  # what is dropped is the model's to say
        read = load_prompts(prompts.model_copy(update=anything), delta.tokenizer, name=f"eval.sets.{name}", now=now)
        theirs = {example.index: example for example in read.examples}
        for example in sets[name].examples:
            other = theirs[example.index]
            delta.translation.read(example.prompt_ids, DeltaPrompt(other.prompt, other.prompt_ids, special=False))
