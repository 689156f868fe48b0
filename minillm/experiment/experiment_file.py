"""An experiment's file, read into typed stages; or every problem of it at once, before any model loads.

base + shared + arms are checked as the stages of one configuration, so that every error has the file's line.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm import UserError
from minillm.config.checks.facts import Facts
from minillm.config.checks.place_checks import place_problem
from minillm.config.errors import ConfigErrors, Problem
from minillm.config.evaluation import EvalConfig
from minillm.config.keys import Place
from minillm.config.loader.document import merge, read_file, read_override
from minillm.config.loader.evaluation_plan import checked_evaluation
from minillm.config.loader.run_plan import Stage, checked_stages, raise_problems
from minillm.config.loader.stages import stage_trees
from minillm.config.loader.validation import validate_group
from minillm.config.paths import expand
from minillm.config.root import STAGE_SHAPE, StageConfig
from minillm.config.shape import Group
from minillm.config.tree import COMMAND_LINE, Node, Origin, wrap
from minillm.experiment.config import ExperimentConfig
from minillm.experiment.measures import known_measures

EXPERIMENT = Group(ExperimentConfig)
FOLDER = Path("configs") / "experiments"
STUDENT, TEACHER = "student", "teacher"
OF_BASE = ("student", "teacher", "engine")
OF_THE_EXPERIMENT = ("output_dir", "seed", "stages")


@dataclass(frozen=True)
class Experiment:
    """One experiment, validated."""

    file: Path
    overrides: list[str]
    config: ExperimentConfig
    shared: dict[str, Stage]  # trained once per seed, in order
    trained: dict[str, Stage]  # the arms that are trained, in order
    as_is: dict[str, str]  # the arms that are models, and which
    base: Stage  # what the arms that are models are measured with: the student, teacher and engine of base
    documents: dict[str, dict[str, Any]]  # of every shared stage and trained arm its keys, as they were written
    evaluation: EvalConfig

    @property
    def arms(self) -> list[str]:
        """The arms, in the order of the file."""
        return list(self.config.arms)

    def stage(self, name: str) -> Stage:
        """Find the stage of a shared stage or trained arm; that of the base for any other arm."""
        return self.shared.get(name) or self.trained.get(name) or self.base


def experiment_file(name: str) -> Path:
    """Find the file of an experiment by its name or path. Raises ConfigErrors, which lists those there are."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = known_experiments()
    if name in known:
        file = known[name]
        return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    close = difflib.get_close_matches(name, known, 1, 0.6)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}" if known else "give a .yaml file"
    raise ConfigErrors([Problem(COMMAND_LINE, None, "", f"there is no experiment {name!r} ({hint})")])


def known_experiments() -> dict[str, Path]:
    """List the files in configs/experiments of the current folder and of this program, by name."""
    folders = [Path(__file__).parents[2] / FOLDER, Path.cwd() / FOLDER]
    files = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}  # the current folder's hold
    return dict(sorted(files.items()))


def titles() -> dict[str, str]:
    """Read the titles of the known experiments, by name."""
    documents = {name: _read(file, []).plain() for name, file in known_experiments().items()}
    return {name: str(document.get("title", "")) for name, document in documents.items()}


def load_experiment(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment, with overrides, validated and checked.

    Args:
        name: of a file in configs/experiments, or a path.
        overrides: `base.train.learning_rate=...`, `arms.kd.method.divergence=...`, `evaluation.seeds=...` and the like.

    Raises ConfigErrors with every problem.
    """
    file = experiment_file(name)
    problems: list[Problem] = []
    document = _read(file, problems)
    for override in overrides:
        node = read_override(override, problems)
        document = document if node is None else _merge(document, node)
    raise_problems(problems, [file])
    config, findings = validate_group(EXPERIMENT, document.plain())
    for finding in findings:
        node, depth = document.closest(finding.path)
        problems.append(node.origin.problem(finding.message, (*node.origin.path, *finding.path[depth:])))
    raise_problems(problems, [file])

    whole = _as_stages(document, config, problems)
    stages = {stage.name: stage for stage in checked_stages(whole, problems)}
    trees = stage_trees(whole, [])
    several = [tree.value["teachers"] for tree in trees.values() if "teachers" in tree.value]
    said = "every arm of an experiment is measured beside one teacher; train with several by `minillm train`"
    problems += [node.origin.problem(said) for node in several if node.value]
    evaluation = _evaluation(document, trees, config, problems)
    like_base = _like_base(document, trees)
    problems += _as_is_problems(document, config, trees[like_base])
    problems += _sense(document, config, evaluation.eval if evaluation else None)
    problems += _same_runs(document, {name: stages[name] for name in config.arms if name in stages})
    raise_problems(problems, [file])
    as_is = {arm: keys for arm, keys in config.arms.items() if isinstance(keys, str)}
    return Experiment(
        file,
        list(overrides),
        config,
        {name: stages[name] for name in config.shared},
        {name: stages[name] for name in config.arms if name not in as_is},
        as_is,
        stages[like_base],
        {name: tree.plain() for name, tree in trees.items()},
        evaluation.eval,
    )


def _read(file: Path, problems: list[Problem], before: tuple[Path, ...] = ()) -> Node:
    """The tree of a file, merged over that of the file that it extends."""
    node = read_file(file, problems) or Node({}, Origin(str(file)))
    extended = node.value.get("extends")
    if extended is None or not isinstance(extended.value, str):
        return node
    other = file.parent / extended.value
    if other.resolve() in {one.resolve() for one in (*before, file)}:
        problems.append(extended.origin.problem(f"{other} extends itself"))
        return node
    return _merge(_read(other, problems, (*before, file)), node)


def _merge(under: Node, over: Node) -> Node:
    """Merge two files, base, shared stages, arms and evaluation each by its own shape."""
    merged = dict(under.value)
    for key, node in over.value.items():
        before = merged.get(key)
        if before is None:
            merged[key] = node
        elif key in ("shared", "arms") and isinstance(before.value, dict) and isinstance(node.value, dict):
            entries = dict(before.value)
            for name, entry in node.value.items():
                entries[name] = merge(entries[name], entry, STAGE_SHAPE) if name in entries else entry
            merged[key] = Node(entries, before.origin)
        else:
            shape = {"base": STAGE_SHAPE, "evaluation": STAGE_SHAPE.child("eval")}.get(key)
            merged[key] = merge(before, node, shape)
    return Node(merged, under.origin)


def _as_stages(document: Node, config: ExperimentConfig, problems: list[Problem]) -> Node:
    """The configuration of which the shared stages and the trained arms are the stages."""
    base = document.value["base"]
    for key in OF_THE_EXPERIMENT:
        if key in base.value:
            problems.append(base.value[key].origin.problem("belongs to the experiment: take it out of base"))
    stages = {}
    for group in ("shared", "arms"):
        for name, node in document.value[group].value.items() if group in document.value else ():
            if name in stages or group == "arms" and name in (STUDENT, TEACHER):
                problems.append(
                    node.origin.problem(f"{name} is taken: every arm and shared stage has a name of its own")
                )
            elif not isinstance(node.value, str):
                stages[name] = node
    origin = document.origin
    keys = {key: node for key, node in base.value.items() if key not in OF_THE_EXPERIMENT}
    if not stages:  # every arm is a model: nothing is trained, and base need not say how
        stages["base"] = Node({}, base.origin)
        keys = {**_never_trained(document, config), **keys}
    keys |= {"output_dir": Node(config.output_dir, origin), "seed": Node(config.seeds[0], origin)}
    return Node({**keys, "stages": Node(stages, origin)}, base.origin)


def _never_trained(document: Node, config: ExperimentConfig) -> dict[str, Node]:
    """Placeholders for what a stage must have, in an experiment that trains nothing."""
    model = next((text for text in config.arms.values() if text != STUDENT), None)
    sets = document.value["evaluation"].plain().get("sets") or {}
    filled = {
        "student": {"path": model},
        "method": {"name": "sft"},
        "train": {"max_steps": 1},
        "data": {"prompts": next(iter(sets.values()), None)},
    }
    return {key: wrap(value, document.value["arms"].origin) for key, value in filled.items()}


def _evaluation(document: Node, trees: dict[str, Node], config: ExperimentConfig, problems: list[Problem]):
    """The evaluation that every arm is measured with."""
    base = {key: node for key, node in document.value["base"].value.items() if key == "engine"}
    # every arm is measured beside its own teacher, or that of base where its own cannot be compared with; where base names
    # none, that of the first arm that has one
    having = [tree.value["teacher"] for tree in (document.value["base"], *trees.values()) if "teacher" in tree.value]
    base |= {"teacher": having[0]} if having else {}
    tree = Node({**base, "eval": document.value["evaluation"]}, document.origin)
    return checked_evaluation(tree, problems, name="evaluation", before=list(config.shared))


def _like_base(document: Node, trees: dict[str, Node]) -> str:
    """The first stage that has the student, teacher and engine of base; without any, the first with its teacher and engine,
    which arms that are models are measured by; without any, the first."""
    own = document.value["base"].plain()
    like = [
        [name for name, tree in trees.items() if all(tree.plain().get(key) == own.get(key) for key in keys)]
        for keys in (OF_BASE, OF_BASE[1:])
    ]
    return next(iter([*like[0], *like[1], *trees]))


def _as_is_problems(document: Node, config: ExperimentConfig, like_base: Node) -> Iterator[Problem]:
    """The problems of arms that are models: each names a model that is there."""
    for arm, text in config.arms.items():
        own = document.value["base"].plain().get("student")
        if text == STUDENT and own is not None and like_base.plain().get("student") != own:
            where = document.value["arms"].value[arm].origin
            yield where.problem(
                "is the student of base, but every shared stage and arm has another student, teacher or engine than base: "
                "say these in base, or name a model here"
            )
    jobs = [*config.shared, *(arm for arm, keys in config.arms.items() if not isinstance(keys, str))]
    facts = Facts("", {}, {}, [], {job: Facts.unread(job) for job in jobs}, tuple(jobs))
    for arm, text in config.arms.items():
        if isinstance(text, str) and text != STUDENT:
            problem = place_problem(Place("model"), expand(text), facts)
            if problem is not None:
                yield document.value["arms"].value[arm].origin.problem(problem)


def _sense(document: Node, config: ExperimentConfig, evaluation: EvalConfig | None) -> Iterator[Problem]:
    """The problems of seeds, measures and claims: they are of what the experiment has."""
    repeated = [str(seed) for seed, count in Counter(config.seeds).items() if count > 1]
    if repeated:
        yield document.value["seeds"].origin.problem(f"names {', '.join(repeated)} more than once")
    if evaluation is None:
        return
    known = known_measures(evaluation)
    for place, measure in enumerate(config.measures):
        metric, _, set_name = measure.partition("@")
        where = document.closest(("measures", place))[0].origin
        if metric not in known:
            yield where.problem(f"{metric!r} is not measured{_hint(metric, known)}")
        elif set_name and set_name not in known[metric]:
            yield where.problem(f"{metric} is not measured on {set_name!r}{_hint(set_name, known[metric])}")
    for place, claim in enumerate(config.claims):
        for key, value, names in (
            ("arm", claim.arm, [*config.arms, TEACHER]),
            ("than", claim.than, [*config.arms, TEACHER]),
            ("measure", claim.measure, config.measures),
        ):
            if value not in names:
                where = document.closest(("claims", place, key))[0].origin
                yield where.problem(f"there is no {value!r}{_hint(value, names)}")


def _same_runs(document: Node, arms: Mapping[str, Stage]) -> Iterator[Problem]:
    """An arm that differs in no key from an earlier one: it inherits what it was meant to change, and costs its time."""
    earlier: dict[str, StageConfig] = {}
    for name, stage in arms.items():
        twin = next((other for other, config in earlier.items() if config == stage.config), None)
        if twin is not None:
            node = document.value["arms"].value[name]
            yield node.origin.problem(
                f"is the same run as arm {twin}: give it what it should differ in, or take it out"
            )
        earlier[name] = stage.config


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else f" (there are {', '.join(known) or 'none'})"


def chosen_seeds(experiment: Experiment, count: int | None) -> list[int]:
    """Choose the first so many seeds of the file, counting on from the largest where it has fewer; without a count, all."""
    seeds = experiment.config.seeds
    if count is None:
        return seeds
    return [*seeds, *range(max(seeds) + 1, max(seeds) + 1 + count)][:count]


def chosen_arms(experiment: Experiment, text: str | None) -> list[str]:
    """Choose the arms (and shared stages) that a comma-separated text names; without one, all arms.

    Raises UserError for a name that is none.
    """
    known = [*experiment.shared, *experiment.arms]
    chosen = experiment.arms if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise UserError(f"--arms: {experiment.file} has no arm {name!r}{_hint(name, known)}")
    if not chosen:
        raise UserError(f"--arms names none; {experiment.file} has {', '.join(experiment.arms)}")
    return chosen
