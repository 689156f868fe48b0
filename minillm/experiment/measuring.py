"""A finished arm measured: the same held-out prompts and random numbers for all arms and seeds, beside its teacher."""

import json
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from minillm import UserError
from minillm.config.models import (
    AnyTeacherConfig,
    CachedTeacherConfig,
    ServedTeacherConfig,
    StudentConfig,
    TeacherConfig,
    named_teacher,
)
from minillm.config.paths import STAGE
from minillm.data.instructions import load_prompts
from minillm.data.labels import load_labels
from minillm.data.pairs import load_pairs
from minillm.engine.placement import engine_device
from minillm.evaluate.analyses import Analyses
from minillm.evaluate.evaluator import Evaluator, Who
from minillm.evaluate.held_out import require_shared_data
from minillm.experiment.experiment_file import STUDENT, Experiment
from minillm.experiment.jobs import Job, result_folder
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.storage.atomic import write_text
from minillm.storage.environment import read_start
from minillm.storage.manifest import published_damage
from minillm.storage.metrics_log import plain
from minillm.teachers.open import open_models
from minillm.teachers.pair import Models
from minillm.train.model_cache import ModelCache
from minillm.train.trainer import TrainingError

EVALUATION, TEACHERS, STARTED = "evaluation.json", "teachers", "started.txt"
SEED = 0  # of the evaluation's samples
Evaluators = tuple[Evaluator, Analyses]
Config = TypeVar("Config", StudentConfig, TeacherConfig, CachedTeacherConfig, ServedTeacherConfig)


class Measuring:
    """The measuring of arm after arm; the teacher, its answers and its hidden states are kept from one to the next.

    Chat templates that print the date print that of the experiment's first run, for all arms and on all days.
    """

    def __init__(self, experiment: Experiment, output: Path, cache: ModelCache):
        self.experiment, self.output, self.cache = experiment, output, cache
        self._evaluators: tuple[Any, Evaluators | None] = (None, None)

    def is_done(self, job: Job) -> bool:
        """True where nothing of a job is left to do."""
        trained = not job.trained or job.result.is_dir()
        return trained and (not job.measured or self._is_measured(job.folder))

    def measure(self, job: Job, console) -> None:
        """Write evaluation.json into the job's folder, and that of its teacher where there is none yet.

        Raises TrainingError where a model that it needs is not there.
        """
        student, teacher = self._configs(job)
        folder = self.output / TEACHERS / f"{zlib.crc32(repr(teacher).encode()):08x}"
        if self._is_measured(job.folder):
            return
        models, theirs = self._open(job, student, teacher)
        rollouts = LocalRollouts(models, cuda_graphs=self.experiment.stage(job.name).config.rollout.cuda_graphs)
        evaluators = self._load_evaluators(models, teacher, console)
        _, analyses = evaluators
        require_shared_data("evaluation", analyses.sets, analyses.labels, analyses.pairs, models, theirs)
        itself = teacher is not None and "evaluate" in teacher.abilities
        if itself and not self._is_measured(folder):
            self._write(folder, "teacher", evaluators, rollouts, console, model=named_teacher(teacher))
        name = folder.name if itself else None
        self._write(
            job.folder, "student", evaluators, rollouts, console, model=student.path, arm=job.name, teacher=name
        )

    def _write(self, folder: Path, who: Who, evaluators: Evaluators, rollouts: LocalRollouts, console, **about) -> None:
        evaluator, analyses = evaluators
        models = rollouts.models
        evaluation = analyses.add_to(evaluator.evaluate(models, rollouts, who), models, rollouts, who)
        console.measurement(
            f"Evaluation of {about.get('arm', 'the teacher')}", evaluation.sets, evaluation.mean, [], who=who
        )
        result = {
            **about,
            "who": who,
            "asked": self._asked(),
            "sets": evaluation.sets,
            "mean": evaluation.mean,
            "samples": evaluation.samples,
            "curves": evaluation.curves,
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / EVALUATION, json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False))

    def _asked(self) -> dict:
        return self.experiment.evaluation.model_dump(mode="json")

    def _is_measured(self, folder: Path) -> bool:
        found = read_evaluation(folder)
        return found is not None and found.get("asked") == self._asked()

    def _configs(self, job: Job) -> tuple[StudentConfig, AnyTeacherConfig | None]:
        """The finished student of a job and its teacher, with folders for stage:NAME.

        A teacher that cannot read the student's answers leaves its place to that of base; so does one that may have
        another tokenizer, with which nothing is compared token by token.
        """
        base = self.experiment.stage(job.name).config
        teacher, of_base = base.teacher, self.experiment.base.config.teacher
        if teacher is not None and base.method.needs().other_tokenizer:
            teacher = None if of_base == teacher else of_base
        elif teacher is not None and "read" not in teacher.abilities:
            teacher = of_base or teacher
        teacher = teacher and self._found(teacher, job)
        common = {key: getattr(base.student, key) for key in ("dtype", "attn_implementation", "trust_remote_code")}
        if job.trained:
            return StudentConfig(path=str(require_whole(job.result)), **common), teacher
        path = self.experiment.as_is[job.name]
        student = base.student if path == STUDENT else StudentConfig(path=path, **common)
        return self._found(student, job), teacher

    def _found(self, config: Config, job: Job) -> Config:
        """A model's configuration with the folder of what stage:NAME means."""
        found = {}
        for key in ("path", "tokenizer"):
            text = getattr(config, key, None) or ""  # a cached teacher has its tokenizer with it
            if text.startswith(STAGE):
                name = text.removeprefix(STAGE)
                folder = result_folder(self.experiment, self.output, job.seed, name)
                if not folder.is_dir():
                    raise TrainingError(f"{name} with seed {job.seed} has left no model")
                found[key] = str(require_whole(folder))
        return config.model_copy(update=found)

    def _open(
        self, job: Job, student: StudentConfig, teacher: AnyTeacherConfig | None
    ) -> tuple[Models, list[PreTrainedTokenizerBase]]:
        """The pair, and the teacher's tokenizer where there is one."""
        device = engine_device(self.experiment.stage(job.name).config.engine)
        opened = self.cache.teacher(teacher, job.folder, device)
        models, _ = open_models(student, opened, output_dir=job.folder, device=device, seed=job.seed)
        controls = job.trained and self.experiment.stage(job.name).config.method.needs().controls_teacher
        return models.controlled() if controls else models, [] if opened is None else [opened.tokenizer]

    def _load_evaluators(self, models: Models, teacher: AnyTeacherConfig | None, console) -> Evaluators:
        # with one teacher the tokenizer is one; without, every arm reads the sets with its own
        if teacher is None or self._evaluators[0] != teacher:
            config, tokenizer, now = self.experiment.evaluation, models.tokenizer, kept_start(self.output)
            sets = {
                name: load_prompts(prompts, tokenizer, name=f"evaluation.sets.{name}", now=now)
                for name, prompts in config.sets.items()
            }
            labels = {
                name: load_labels(source, tokenizer, name=f"evaluation.calibration.{name}", now=now)
                for name, source in config.calibration.items()
            }
            pairs = {
                name: load_pairs(source, tokenizer, name=f"evaluation.preference.pairs.{name}", now=now)
                for name, source in config.held_out_pairs.items()
            }
            evaluator = Evaluator(sets, config, seed=SEED)
            self._evaluators = (teacher, (evaluator, Analyses(sets, labels, config, pairs, seed=SEED)))
        for one in self._evaluators[1]:
            one.report_progress = console.working  # an evaluator may outlive the run it was made for
        return self._evaluators[1]


def kept_start(output: Path) -> datetime:
    """When an experiment began: its first run, or where there is none its first measurement. Written down once."""
    path = output / STARTED
    if not path.is_file():
        runs = [start for run in output.glob("seed-*/*") if (start := read_start(run)) is not None]
        start = min(runs, key=datetime.timestamp, default=datetime.now().astimezone())
        write_text(path, f"{start.isoformat(timespec='seconds')}\n")
    try:
        return datetime.fromisoformat(path.read_text().strip())
    except ValueError as error:
        raise UserError(f"{path} holds no time ({error}); delete it to have it written again") from None


def require_whole(folder: Path) -> Path:
    """Return the folder of a finished run's result. Raises TrainingError where that is damaged."""
    damage = published_damage(folder)
    if damage is not None:
        raise TrainingError(f"{folder} is not whole ({damage}); delete it to have it published again")
    return folder


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Read the evaluation that `measure` wrote into a folder, None where there is none.

    Raises UserError where the file cannot be read.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}; delete it to have the arm measured again") from error
