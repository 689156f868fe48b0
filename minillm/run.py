"""A whole run: its stages in order, what they share, where it picks up again, and what it leaves behind."""

import json
import os
import platform
import shutil
import signal
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
import yaml

from minillm import distributed
from minillm.atomic import clean, write_folder, write_text
from minillm.checkpoint import newest_whole
from minillm.config.loading import RunPlan, Stage
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.data.corpus import load_corpus
from minillm.data.instructions import load_prompts
from minillm.data.stream import Share, Stream
from minillm.engine.device import engine_device, loading_device
from minillm.evaluate.evaluator import Evaluator
from minillm.methods.base import Sources
from minillm.metrics import MetricsLog, SilentLog
from minillm.model_card import write_model_card
from minillm.models.loading import load_student, load_teacher
from minillm.models.preflight import preflight
from minillm.models.sharded import is_sharded, readable
from minillm.models.tokenizers import load_tokenizer
from minillm.report import write_report
from minillm.trainer import Progress, StageTrainer, TrainingError

MODEL_ONLY = shutil.ignore_patterns("state", "manifest.json")
# Keys that may differ between the run that wrote a checkpoint and the one that goes on from it.
FREE_ON_RESUME = {"output_dir", "save", "log", "eval"}


def run(plan: RunPlan, *, resume: bool, console, shared: "Shared | None" = None) -> Path:
    """Train every stage of the plan; returns the folder final/.

    `shared` holds what an earlier run of this process loaded, for runs that have it in common.

    Raises TrainingError where the run cannot go on, KeyboardInterrupt after saving on Ctrl-C or SIGTERM.
    """
    output_dir = plan.output_dir
    if all(stage.config.engine.type == "torch" for stage in plan.stages):
        return _run(plan, resume=resume, console=console, shared=shared)
    distributed.join(output_dir)
    try:
        final = _run(plan, resume=resume, console=console, shared=shared)
        distributed.leave()
        return final
    except TrainingError:
        raise
    except Exception as error:
        time.sleep(2.0)  # a rank that was killed is only known to be gone when its parent has noticed
        lost = distributed.lost_ranks()
        message = "" if lost is None else distributed.stopped_message(lost)
        distributed.record_failure(output_dir, f"{message}\n{traceback.format_exc()}".lstrip())
        if lost is None:
            raise
        raise TrainingError(message) from error


def _run(plan: RunPlan, *, resume: bool, console, shared: "Shared | None") -> Path:
    output_dir = plan.output_dir
    checkpoint = distributed.on_rank_0(lambda: _prepare(output_dir, resume, console))
    checkpoint = None if checkpoint is None else Path(checkpoint)
    progress = None
    if checkpoint is not None:
        saved = json.loads((checkpoint / "state" / "trainer.json").read_text())
        progress = Progress(**saved["progress"])
        _check_same_recipe(plan, progress.stage, saved["config"])
        console.note(f"going on from {checkpoint.name}: stage {progress.stage}, step {progress.stage_step}")
    if distributed.rank() == 0:
        write_text(output_dir / "config.yaml", yaml.safe_dump(plan.document, sort_keys=False, allow_unicode=True))
        write_text(output_dir / "env.json", json.dumps(describe_environment(), indent=1))

    transformers.utils.logging.disable_progress_bar()  # one bar at a time: the run's own
    log = SilentLog() if distributed.rank() else MetricsLog(output_dir, plan.stages[0].config.log.report_to)
    log.truncate(progress.log if progress else {})
    shared = shared or Shared()
    shared.begin(console, output_dir)
    names = [stage.name for stage in plan.stages]
    with log, _interruption(console.note) as interrupted:
        for stage in plan.stages:
            if progress and names.index(stage.name) < names.index(progress.stage):
                continue
            resumed = progress is not None and progress.stage == stage.name
            if not resumed:
                progress = _next_progress(progress, stage.name)
            if not progress.finished:
                trainer = shared.trainer(
                    stage,
                    log,
                    progress,
                    interrupted,
                    checkpoint=checkpoint if resumed else None,
                    judge_teacher=_first_with_its_teacher(plan, stage),
                )
                if resumed:
                    trainer.load(checkpoint)
                # where this student comes straight from an earlier stage, that stage's last evaluation is this one's first
                trainer.run(evaluate_first=not _measured_before(plan, stage))
                checkpoint = output_dir / f"checkpoint-{progress.step}"
            if len(plan.stages) > 1 or stage.name != "main":
                _publish(checkpoint, output_dir / "stages" / stage.name)
            distributed.on_rank_0(lambda: str(write_report(output_dir)))
    final = output_dir / "final"
    _publish(checkpoint, final)
    distributed.on_rank_0(lambda: _describe(output_dir, final))
    console.finish(output_dir)
    return final


def _prepare(output_dir: Path, resume: bool, console) -> str | None:
    """A folder without what a kill left; the checkpoint to go on from."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for folder in (output_dir, output_dir / "stages"):
        clean(folder)
    checkpoint = newest_whole(output_dir, console.note) if resume else None
    return None if checkpoint is None else str(checkpoint)


def _describe(output_dir: Path, final: Path) -> None:
    write_model_card(output_dir, final)
    write_report(output_dir)


class Shared:
    """What is loaded once and used by several stages or runs: teachers, the weights students start from, evaluators."""

    def __init__(self):
        self.console, self.output_dir = None, Path(".")
        self._teacher = (None, None)  # (configuration, model): the last one alone, so that two never fill the memory
        self._evaluator = (None, None)

    def begin(self, console, output_dir: Path) -> None:
        """A run begins: where it writes, which is where the models of its stages are, and who is told."""
        self.console, self.output_dir = console, output_dir

    def trainer(
        self,
        stage: Stage,
        log: MetricsLog,
        progress: Progress,
        interrupted: Callable[[], bool],
        *,
        checkpoint: Path | None,
        judge_teacher: bool,
    ) -> StageTrainer:
        config = stage.config
        device = engine_device(config.engine)
        first = loading_device(config.engine)
        teacher, teacher_tokenizer = self.teacher(config.teacher, first)
        tokenizer = load_tokenizer(config.student, self.output_dir)
        if checkpoint is None:
            student_config, source = config.student, None
            if teacher is not None and not is_sharded(teacher) and _same_weights(config.student, config.teacher):
                source = teacher
        else:  # the architecture and the weights are the checkpoint's
            student_config = config.student.model_copy(update={"path": str(checkpoint), "init": "pretrained"})
            source = None
        student = load_student(
            student_config, output_dir=self.output_dir, device=first, seed=config.seed, source=source
        )
        by_layers = config.engine.type == "deepspeed" and config.engine.gather == "layers"
        with readable(teacher, by_layers=by_layers):  # an earlier stage may have sharded it
            models, rows = preflight(student, teacher, tokenizer, teacher_tokenizer, device)
        prompts = load_prompts(config.data.prompts, tokenizer)
        rows.append(("prompts", f"{len(prompts)} used, {prompts.dropped_long} too long", prompts.source))
        corpus = None
        if config.data.corpus is not None:
            corpus = load_corpus(config.data.corpus, tokenizer)
            rows.append(("corpus", f"{len(corpus.blocks)} blocks", f"{corpus.documents} documents"))
        self.console.preflight(rows)
        # each stage in an order of its own: one that goes on from another must not see the same records first again
        order = zlib.crc32(f"{config.seed}/{stage.name}".encode())
        return StageTrainer(
            stage,
            models,
            Sources(
                prompts=Stream(prompts.examples, seed=order),
                corpus=None if corpus is None else _corpus_share(Stream(corpus.blocks, seed=order)),
                written=self.output_dir / "written" / stage.name,
                watch=self.console.working,
            ),
            output_dir=self.output_dir,
            evaluator=self._load_evaluator(stage, tokenizer),
            log=log,
            console=self.console,
            progress=progress,
            judge_teacher=judge_teacher,
            interrupted=interrupted,
        )

    def teacher(self, config: TeacherConfig | None, device: torch.device):
        """(model, tokenizer); the model that was loaded last is kept."""
        if config is None:
            return None, None
        key = self._of_this_run(config)
        if self._teacher[0] != key:
            self._teacher = (None, None)
            model = load_teacher(config, output_dir=self.output_dir, device=device)
            self._teacher = (key, (model, load_tokenizer(config, self.output_dir)))
        return self._teacher[1]

    def _of_this_run(self, config: TeacherConfig | None) -> tuple:
        """A teacher that a stage left is another one in another run."""
        names = () if config is None else (config.path, config.tokenizer or "")
        return config, self.output_dir if any(name.startswith("stage:") for name in names) else None

    def _load_evaluator(self, stage: Stage, tokenizer) -> Evaluator | None:
        config = stage.config
        if not config.eval.sets:
            return None
        key = (config.eval, config.seed, self._of_this_run(config.teacher))
        # with one teacher the tokenizer is one, and its answers are worth keeping; without, every stage reads anew
        if config.teacher is None or self._evaluator[0] != key:
            sets = {
                name: load_prompts(prompts, tokenizer, name=f"eval.sets.{name}")
                for name, prompts in config.eval.sets.items()
            }

            def watch(*progress) -> None:  # the console of the moment: an evaluator may outlive the run it was made for
                self.console.working(*progress)

            self._evaluator = (key, Evaluator(sets, config.eval, seed=config.seed, watch=watch))
        return self._evaluator[1]


def _corpus_share(stream: Stream) -> Stream | Share:
    if distributed.world_size() == 1:
        return stream
    return Share(stream, rank=distributed.rank(), world_size=distributed.world_size())


def _same_weights(student: StudentConfig, teacher: TeacherConfig) -> bool:
    """Whether the loaded teacher holds exactly what the student would be read from."""
    return (student.path, student.revision, student.dtype) == (teacher.path, teacher.revision, teacher.dtype)


def _next_progress(before: Progress | None, stage: str) -> Progress:
    if before is None:
        return Progress(stage)
    return Progress(stage, step=before.step, stage_seconds=before.stage_seconds)


def _first_with_its_teacher(plan: RunPlan, stage: Stage) -> bool:
    """Whether the teacher's own answers are evaluated in this stage: once a teacher and evaluation."""
    if stage.config.teacher is None or not stage.config.eval.teacher:
        return False

    def key(other: Stage):
        return other.config.teacher, other.config.eval

    return next(other for other in plan.stages if key(other) == key(stage)).name == stage.name


def _measured_before(plan: RunPlan, stage: Stage) -> bool:
    path, config = stage.config.student.path or "", stage.config
    if not path.startswith("stage:") or config.student.init != "pretrained":
        return False
    source = next(other.config for other in plan.stages if other.name == path.removeprefix("stage:"))
    return source.eval == config.eval and source.teacher == config.teacher


def _check_same_recipe(plan: RunPlan, stage_name: str, saved: dict) -> None:
    stage = next((stage for stage in plan.stages if stage.name == stage_name), None)
    if stage is None:
        raise TrainingError(f"the checkpoint is in stage {stage_name!r}, which this configuration does not have")
    now = stage.config.model_dump(mode="json")
    changed = sorted(key for key in {*now, *saved} - FREE_ON_RESUME if now.get(key) != saved.get(key))
    if changed:
        raise TrainingError(
            f"the configuration differs from the checkpoint's in {', '.join(changed)}: a resumed run must take the steps "
            "the unbroken one would have taken. Undo the change, or start a new run in another output_dir with "
            "student.path at the checkpoint"
        )


def _publish(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint's model to `folder`, whole or not at all; what is there already stays."""
    if distributed.on_rank_0(folder.exists):
        return

    def fill(partial: Path) -> None:
        if distributed.rank() == 0:
            shutil.copytree(checkpoint, partial, ignore=MODEL_ONLY, dirs_exist_ok=True)

    write_folder(folder, fill)


@contextmanager
def _interruption(note: Callable[[str], None]):
    """Turn the first Ctrl-C or SIGTERM into a wish that the loop grants after its step; the second one is immediate."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        note("stopping after this step, with a checkpoint; once more to stop at once without one")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_environment() -> dict:
    """Versions and machine, for env.json, reports and benchmarks."""
    versions = {"python": platform.python_version(), "minillm": version("minillm")}
    for name in ("torch", "transformers", "triton", "datasets", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "system": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
