"""One stage from its configuration: read data, open models, make the evaluator, make the trainer."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from minillm.config.loader.run_plan import Stage
from minillm.config.models import AnyTeacherConfig, StudentConfig, TeacherConfig
from minillm.config.training import shards_student, shards_teacher
from minillm.data.instructions import PromptSet, load_prompts, require_shared_pictures
from minillm.data.judges import judges_of
from minillm.data.stream import RankSlice, Stream
from minillm.data.teacher_context import write_summary
from minillm.distributed import collectives
from minillm.engine.placement import engine_device, loading_device
from minillm.evaluate.evaluator import Evaluator
from minillm.methods import build_method
from minillm.methods.protocol import TrainingData
from minillm.models.adapters import FOLDER, load_adapter
from minillm.models.routers import balance_problem, require_balance
from minillm.models.sharded import is_sharded
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.rollout.local.decoder import check_positions
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Rollouts, Who, require_rollouts
from minillm.storage.atomic import write_folder
from minillm.storage.manifest import sign
from minillm.storage.metrics_log import MetricsLog
from minillm.teachers.cached import CachedTeacher
from minillm.teachers.open import open_models
from minillm.teachers.pair import Models, Role
from minillm.teachers.preflight import Row
from minillm.teachers.several import members
from minillm.teachers.teacher import require_ability
from minillm.train.cached_texts import UNMEASURED, require_cached_texts
from minillm.train.frozen_weights import find_frozen_weights, write_frozen_weights
from minillm.train.model_cache import ModelCache, teacher_identity
from minillm.train.prepared import mark_prepared
from minillm.train.progress import Progress
from minillm.train.served_identity import require_same_served
from minillm.train.served_texts import require_served_lengths
from minillm.train.stage_data import StageData, read_stage_data, require_shared_ids
from minillm.train.trainer import StageTrainer

UNCOMPARED = (
    "the teacher reads its own ids, which no divergence at a token compares with the student's: evaluations leave out "
    "reverse_kl_nats, sequence_reverse_kl_nats and forward_kl_nats, and the teacher's answers"
)


UNTOLD = (
    "{sets}: the divergences are those from the teacher that reads the student's prompt, without the context that it has in "
    "training; teacher_context of the set gives it one"
)


class StageBuilder:
    """Makes the trainers of a run's stages, with models from a cache that several runs may share.

    Args:
        started: when the run was, which chat templates take for the time; default: now.
    """

    def __init__(self, console, output_dir: Path, cache: ModelCache, *, started: datetime | None = None):
        self.console, self.output_dir, self.cache = console, output_dir, cache
        self.started = started or datetime.now()

    def trainer(
        self,
        stage: Stage,
        log: MetricsLog,
        progress: Progress,
        interrupted: Callable[[], bool],
        *,
        checkpoint: Path | None,
        judge_teacher: bool,
        planned_peak_gib: Callable[[torch.device], float | None],
    ) -> StageTrainer:
        """The trainer of a stage, its student from the checkpoint where there is one. All ranks call it together.

        A student that goes on comes from this run's own copies, tokenizer included: the folder that it was first read
        from may hold another one by now.
        """
        saved = self._saved_student(stage, checkpoint)
        read = collectives.together(lambda: read_stage_data(stage, self.output_dir, self.started, saved=saved))
        evaluator = self._make_evaluator(stage, read.tokenizer)
        held_out = {} if evaluator is None else {f"eval.sets.{name}": one for name, one in evaluator.sets.items()}
        require_shared_pictures(
            held_out, read.tokenizer, read.teacher_tokenizers.values(), ranks=collectives.world_size()
        )
        models, rows = self.open_models(stage, read.tokenizer, checkpoint, saved, read.tokenizers)
        self.console.preflight([*rows, *read.rows])
        collectives.together(lambda: require_shared_ids(models, read, held_out))
        needs = stage.config.method.needs()
        cached = [one for one in members(models.teacher).values() if isinstance(one, CachedTeacher)]
        collectives.on_rank_0(lambda: require_cached_texts(models.teacher, stage, read))
        if cached and held_out and stage.config.eval.teacher:
            self.console.note(UNMEASURED)
        if read.tokenizers is not None and held_out and stage.config.eval.teacher:
            self.console.note(UNCOMPARED)
        collectives.together(lambda: self._look_at_context(stage, read, models, held_out))
        collectives.on_rank_0(
            lambda: require_same_served(models.teacher, stage, self.output_dir, resumed=checkpoint is not None)
        )
        collectives.together(lambda: require_served_lengths(models.teacher, stage, read, held_out))
        unbalanced = None
        if "student" in needs.trains:
            weight = stage.config.train.router_aux_loss_coef
            if weight:
                require_balance(models.student)
            unbalanced = balance_problem(models.student, added=needs.auxiliary or weight > 0)
        if unbalanced is not None:
            self.console.note(unbalanced)
        judged = models.controlled() if needs.controls_teacher else models
        rollouts = _rollouts(stage, judged)
        asked = _asked(needs.samples) | ({"student"} if held_out else set())
        if models.teacher is not None and "sample" not in models.teacher.abilities:  # its answers are written
            asked.discard("teacher")
        collectives.together(lambda: rollouts.check(*sorted(asked)))
        unrefilled = rollouts.unrefilled(*sorted(asked))
        if unrefilled is not None:
            self.console.note(
                f"answers are sampled in batches one after the other, and rows that have ended wait: {unrefilled}"
            )
        return StageTrainer(
            stage,
            models,
            self.training_data(stage, read, rollouts),
            output_dir=self.output_dir,
            evaluator=evaluator,
            log=log,
            console=self.console,
            progress=progress,
            judge_teacher=judge_teacher,
            planned_peak_gib=lambda: planned_peak_gib(models.device),
            interrupted=interrupted,
            checkpoint=checkpoint,
        )

    def prepare(self, stage: Stage, interrupted: Callable[[], bool]) -> None:
        """Do the work of a stage that takes no step, and publish its result. All ranks call it together.

        Raises KeyboardInterrupt where `interrupted` says so between two parts of the work that are reported.
        """
        read = collectives.together(lambda: read_stage_data(stage, self.output_dir, self.started))
        models, rows = self.open_models(stage, read.tokenizer)
        reference = stage.config.method.needs().reference
        self.console.preflight([*rows, *read.rows], beside_teacher="student" if reference is None else "reference")
        collectives.together(lambda: require_shared_ids(models, read, {}))
        collectives.together(lambda: self._look_at_context(stage, read, models, {}))
        self.console.prepare(stage.name)
        rollouts = _rollouts(stage, models)

        def report_progress(what: str, done: int, total: int) -> None:
            self.console.working(what, done, total)
            if interrupted():
                raise KeyboardInterrupt

        data = replace(self.training_data(stage, read, rollouts), report_progress=report_progress)
        data.folder.mkdir(parents=True, exist_ok=True)
        method = build_method(stage.config)

        def fill(folder: Path) -> None:
            method.prepare(data, models, folder)
            if collectives.rank() == 0:
                mark_prepared(stage, folder)

        write_folder(self.output_dir / "stages" / stage.name, fill, sign=sign)

    def _look_at_context(
        self, stage: Stage, read: StageData, models: Models, held_out: Mapping[str, PromptSet]
    ) -> None:
        """Keep some of what the teacher alone is told, and say whom evaluations compare the student with.

        Raises UserError where the longest of it with an answer is more than the teacher can read.
        """
        config, needs = stage.config, stage.config.method.needs()
        if read.prompts is None or not read.prompts.told:
            return
        sampled = config.rollout.max_new_tokens if needs.samples else 0
        given = config.data.prompts.max_response_length if needs.references else 0
        for name, teacher in members(models.teacher).items():
            longest = max(map(len, read.prompts.judged_by(name).teacher_ids()), default=0)
            if teacher.model is not None:
                check_positions(teacher.model, longest + max(sampled, given))
        if collectives.rank() == 0:
            both = [(example.prompt, example.teacher_prompt) for example in read.prompts]
            write_summary(self.output_dir / "written" / stage.name, both)
        untold = [name for name, prompts in held_out.items() if not prompts.told]
        if untold and config.eval.teacher and "read" in models.teacher.abilities and not needs.other_tokenizer:
            self.console.note(UNTOLD.format(sets=", ".join(untold)))

    def training_data(self, stage: Stage, read: StageData, rollouts: Rollouts) -> TrainingData:
        """The material as the method takes it, in the order of this stage.

        Raises UserError where `rollouts` cannot sample as the method needs.
        """
        config = stage.config
        require_rollouts(rollouts, config.method.needs().samples, f"stage {stage.name!r}")
        # each stage in an order of its own: one that goes on from another must not see the same records first again
        order = zlib.crc32(f"{config.seed}/{stage.name}".encode())
        return TrainingData(
            prompts=None if read.prompts is None else Stream(read.prompts.examples, seed=order),
            pairs=None if read.pairs is None else Stream(read.pairs, seed=order),
            corpus=None if read.corpus is None else _rank_slice(Stream(read.corpus.blocks, seed=order)),
            rollouts=rollouts,
            folder=self.output_dir / "written" / stage.name,
            report_progress=self.console.working,
            documents=read.documents,
            tokenizer=read.tokenizer,
            forget=None if read.forget is None else Stream(read.forget.examples, seed=order),
        )

    def _saved_student(self, stage: Stage, checkpoint: Path | None) -> Path | None:
        """The folder of this run that the student of a resumed stage is read from: the checkpoint, or the frozen weights
        below its adapters. Raises UserError where those are not whole."""
        needs = stage.config.method.needs()
        if checkpoint is None or "student" not in needs.trains and needs.reference is None:
            return None
        if stage.config.student_side.lora is None:
            return checkpoint
        return Path(collectives.on_rank_0(lambda: str(find_frozen_weights(stage.name, self.output_dir))))

    def open_models(
        self,
        stage: Stage,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint: Path | None = None,
        saved: Path | None = None,
        tokenizers: TokenizerPair | None = None,
    ) -> tuple[Models, list[Row]]:
        """Student and teacher where the engine wants them, and the rows of their preflight table.

        The student is read from the folder `saved` where there is one; adapters are the checkpoint's.

        A stage that takes no step has its models whole on every rank: there is no engine that could shard them.

        Raises UserError for a teacher that cannot do what the method needs.
        """
        config, needs = stage.config, stage.config.method.needs()
        engine, student = config.engine, config.student_side
        adapted = student.lora is not None
        # rank 0 reads what is sharded over the ranks, and hands it out weight by weight
        sharded = needs.takes_steps and shards_student(engine)
        teacher_sharded = needs.takes_steps and shards_teacher(engine, config.teacher_side)
        teacher = self.cache.teacher(
            config.teacher_side,
            self.output_dir,
            loading_device(engine, sharded=teacher_sharded),
            sharded=teacher_sharded,
            trained="teacher" in needs.trains,
        )
        for ability in sorted(needs.required_abilities):
            require_ability(teacher and teacher.teacher, ability, f"stage {stage.name!r}")
        device = engine_device(engine)
        if "student" not in needs.trains and needs.reference is None:
            return open_models(None, teacher, output_dir=self.output_dir, device=device, packing=config.train.packing)
        hollow = sharded and collectives.rank() > 0
        copied = checkpoint is None and not hollow and teacher is not None and not is_sharded(teacher.teacher.model)
        models, rows = open_models(
            student,
            teacher,
            output_dir=self.output_dir,
            device=device,
            loading_device=loading_device(engine, sharded=sharded),
            seed=config.seed,
            trained="student" in needs.trains,
            copy_teacher=copied and _same_weights(student, config.teacher),
            saved=saved,
            hollow=hollow,
            by_layers=sharded and engine.gather == "layers",
            tokenizers=tokenizers,
            packing=config.train.packing,
        )
        if adapted and checkpoint is not None:
            collectives.together(lambda: load_adapter(models.student, checkpoint / FOLDER))
        elif adapted:
            write_frozen_weights(stage.name, models.student, tokenizer, self.output_dir)
        return models, rows

    def _make_evaluator(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> Evaluator | None:
        config = stage.config
        if not config.eval.sets:
            return None

        def make() -> Evaluator:
            sets = {
                name: load_prompts(prompts, tokenizer, name=f"eval.sets.{name}", judges=judges, now=self.started)
                for name, prompts in config.eval.sets.items()
            }
            return Evaluator(
                sets, config.eval, seed=config.seed, report_progress=self.console.working, keeps_teacher=not changes
            )

        judges = judges_of(config.teacher_side) if config.eval.teacher else None
        changes = "teacher" in config.method.needs().trains
        # with one teacher the tokenizer is one, and its answers are worth keeping; without, every stage reads anew
        if config.teacher_side is None or changes or config.method.needs().other_tokenizer:
            return make()
        time = self.started if "strftime_now" in str(tokenizer.chat_template) else None
        evaluator = self.cache.evaluator(
            (config.eval, config.seed, time, teacher_identity(config.teacher_side, self.output_dir)), make
        )
        evaluator.report_progress = self.console.working  # an evaluator may outlive the run it was made for
        return evaluator


def _rollouts(stage: Stage, models: Models) -> LocalRollouts:
    keys = stage.config.rollout
    return LocalRollouts(
        models,
        cuda_graphs=keys.cuda_graphs,
        shared_coins=keys.by_coins and "mixture" in stage.config.method.needs().samples,
        share_prompts=keys.answers_per_prompt > 1,
    )


def _asked(samples: Sequence[Who]) -> set[Role]:
    """The models that answer prompts while a stage runs."""
    return {role for who in samples for role in (("student", "teacher") if who == "mixture" else (who,))}


def _rank_slice(stream: Stream) -> Stream | RankSlice:
    if collectives.world_size() == 1:
        return stream
    return RankSlice(stream, rank=collectives.rank(), world_size=collectives.world_size())


def _same_weights(student: StudentConfig, teacher: AnyTeacherConfig) -> bool:
    """True where the loaded teacher holds exactly what the student would be read from."""
    if not isinstance(teacher, TeacherConfig):
        return False
    return teacher.quantization is None and (student.path, student.revision, student.dtype) == (
        teacher.path,
        teacher.revision,
        teacher.dtype,
    )
