"""The loop of one stage: collect, step through what was collected, evaluate, save; and how it goes on after a kill."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from minillm import UserError
from minillm.config.loader.run_plan import Stage
from minillm.data.stream import RankSlice, Stream
from minillm.distributed import collectives
from minillm.engine import build_engine
from minillm.engine.engine import NonFiniteError
from minillm.evaluate.evaluator import Evaluator
from minillm.methods import build_method
from minillm.methods.balance import add_balance
from minillm.methods.protocol import Item, Observation, TrainingData
from minillm.models.routers import load_metrics
from minillm.models.saving import module_part, read_modules
from minillm.reporting.time_left import Limits
from minillm.rollout.buffer import RolloutBuffer, buffer_file
from minillm.rollout.rank_items import rank_items
from minillm.storage.metrics_log import MetricsLog
from minillm.storage.snapshot import SavedPart
from minillm.storage.state_file import reading_state, torch_file
from minillm.teachers.pair import Models
from minillm.teachers.server_pool import TeacherAway
from minillm.train.best_model import BestModel
from minillm.train.micro_batches import cut_step
from minillm.train.progress import Progress
from minillm.train.saver import Saver
from minillm.train.served_steps import Moment, ask_ahead, is_served, made_together
from minillm.train.teacher_turns import TeacherTurns
from minillm.train.trainer_state import TrainerState, read_trainer_state, trainer_state_part

METHOD_STATE = "method.pt"  # in a checkpoint's state/: what the method keeps, alike on every rank


class TrainingError(UserError):
    """A run that had to stop, with what to look at."""

    exit_status = 1


def peak_memory_gib(device: torch.device) -> float:
    """The most memory so far: of the GPU's allocator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB


def counts_allocations(device: torch.device) -> bool:
    """True where `peak_memory_gib` is of what torch allocated there, which is what a plan counts."""
    return device.type == "cuda"


class StageTrainer:
    """Trains one stage's student; `run` returns when the stage is done or `interrupted` turns true."""

    def __init__(
        self,
        stage: Stage,
        models: Models,
        data: TrainingData,
        *,
        output_dir: Path,
        evaluator: Evaluator | None,
        log: MetricsLog,
        console,
        progress: Progress,
        judge_teacher: bool = False,
        planned_peak_gib: Callable[[], float | None] = lambda: None,
        interrupted=lambda: False,
        checkpoint: Path | None = None,
    ):
        """`checkpoint` has the weights of what is trained beside the student; the student's own are in `models`."""
        self.name, self.config, self.models, self.data = stage.name, stage.config, models, data
        self.output_dir, self.evaluator, self.log, self.console = output_dir, evaluator, log, console
        self.progress, self.judge_teacher, self.interrupted = progress, judge_teacher, interrupted
        self.planned_peak_gib, self.saver = planned_peak_gib, Saver(stage.config.save, models, output_dir, console.note)
        self.best = BestModel(stage, output_dir, console.note, self.saver.model)
        if models.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(models.device)  # of the stage before
        self.method = build_method(stage.config)
        self.modules = self.method.modules(models)
        if checkpoint is not None:  # before an engine shards them
            read_modules(self.modules, checkpoint)
        self.total_steps = self._total_steps()
        self.engine = build_engine(
            stage.config,
            models,
            total_steps=self.total_steps or 1,
            modules=self.modules,
            learning_rates=self.method.learning_rates(),
        )
        self.items: Sequence[Item] | RolloutBuffer = []
        self._served = is_served(models.teacher)
        by = stage.config.teachers_by
        self._turns = TeacherTurns(
            self.method,
            data,
            models,
            steps=1 if by is None else by.turn_steps,
            order=self._order_of_step,
            cut=self._cut,
        )
        self._slowest = {True: 0.0, False: 0.0}  # seconds of a step, by whether it began with a collection

    def run(self, *, evaluate_first: bool) -> None:
        """Take the steps. Returns, or raises, once what was to be saved is on the disk; on a second Ctrl-C at once."""
        with self.saver:
            self._run(evaluate_first)

    def _run(self, evaluate_first: bool) -> None:
        config, progress = self.config, self.progress
        limits = Limits(self.total_steps, self._max_seconds(), config.train.max_student_tokens)
        self.console.start(self.name, limits, progress.stage_step)
        self._say_if_never_warm()
        if progress.stage_step == 0:
            if self.judge_teacher:
                self.evaluate("teacher")
            if evaluate_first:
                self.evaluate()
        elif progress.evaluation_due and not self.done():
            self.evaluate()
        while not self.done():
            record = self._step()
            self.saver.check()
            if progress.stage_step % config.log.steps == 0 or self.done():
                # the times of all steps since the last record; the plan at the end, when nobody waits for it
                self.log.write(record | self.data.timing.read() | (self._plan() if self.done() else {}))
            self.console.step(record)
            if self.done():
                break
            if config.eval.steps and progress.stage_step % config.eval.steps == 0:
                self.evaluate()
            due = config.save.steps and progress.stage_step % config.save.steps == 0
            stop = any(collectives.gather(bool(self.interrupted())))
            if due or stop:
                self.save(wait=stop)
            if stop:
                raise KeyboardInterrupt
        self.evaluate()
        progress.finished = True
        progress.stage_seconds = {**progress.stage_seconds, self.name: progress.seconds}
        progress.stage_configs = {**progress.stage_configs, self.name: config.model_dump(mode="json")}
        self.save(wait=True)

    def _say_if_never_warm(self) -> None:
        train, total = self.config.train, self.total_steps
        if train.lr_scheduler_type != "constant" and total is not None and train.warmup_steps > total:
            self.console.note(
                f"train.warmup_steps is {train.warmup_steps}, but stage {self.name!r} has {total} steps: the learning rate "
                f"ends at {(total - 1) / train.warmup_steps:.0%} of train.learning_rate"
            )

    def _plan(self) -> dict[str, float]:
        """{memory/planned_peak_gib} of this stage, where that can be held against its peak."""
        if self.engine.rank or not counts_allocations(self.models.device):
            return {}
        try:
            planned = self.planned_peak_gib()
        except Exception as error:  # whatever a plan cannot do, the stage that it is about is trained
            self.console.note(f"no plan to hold the peak memory against: {type(error).__name__}: {error}")
            return {}
        return {} if planned is None else {"memory/planned_peak_gib": planned}

    def close(self) -> None:
        """Give back the memory of the stage: the next one begins with the models it loads itself."""
        self.engine.close()

    def _step(self) -> dict:
        """One step. Raises TrainingError for a loss that is not finite, and where a served teacher stays away: then with
        a checkpoint of the moment before the step."""
        if not self._served:
            return self._take_step()
        before = Moment.of(self.items, self.progress, self._streams(), self.method)
        try:
            return self._take_step()
        except TeacherAway as error:
            self.items = before.restore(self.progress, self._streams(), self.method)
            raise self._stopped(error) from None

    def _stopped(self, error: TeacherAway) -> "TrainingError":
        """The error that ends the run, which is saved first where this stage has taken a step and all ranks are here."""
        progress = self.progress
        if progress.stage_step == 0:
            kept = f"stage {self.name!r} has taken no step yet"
        elif self.engine.world_size == 1 or error.everywhere:
            self.save(wait=True)
            kept = f"checkpoint-{progress.step} has everything so far"
        else:
            kept = "The last checkpoint is good"
        return TrainingError(f"{error}. {kept}: start the servers again, and --resume goes on")

    def _take_step(self) -> dict:
        started, progress, method, timing = time.perf_counter(), self.progress, self.method, self.data.timing
        collects = self._needs_collection()
        if collects:
            self.items = method.collect(self.data, self.models, progress.draw)
            progress.draw, progress.epoch, progress.position = progress.draw + 1, 0, 0
        chosen = self._next_indices()
        # every rank steps through a part of its own, and none is left over: what is collected is of whole steps, a
        # buffer by minillm.config.checks.stage_checks.whole_batches, and a step's items are as many on every rank
        balance = self.config.train.router_aux_loss_coef
        with timing.of("scoring"):
            micro_batches = self._cut(rank_items(self.items, chosen))
            left = None if self.total_steps is None else self.total_steps - progress.stage_step - 1
            self._turns.before(micro_batches, self._streams(), draw=progress.draw, left=self._left_of_turn(left))
            terms = made_together(
                lambda: [
                    add_balance(method.terms(micro_batch, self.data, self.models), balance, method.needs)
                    for micro_batch in micro_batches
                ],
                served=self._served,
            )
            if left is None or left > 0:
                ask_ahead(
                    method,
                    self.data,
                    self.models,
                    self._streams(),
                    draw=progress.draw,
                    order=self._order_of_step,
                    cut=self._cut,
                )
        try:
            with timing.of("update"):
                result = self.engine.step(terms)
        except NonFiniteError as error:
            items = next(words for words, stream in self._by_importance() if stream is not None)
            raise TrainingError(
                f"step {progress.step + 1} of stage {self.name!r}: {error}. The {items} of the batch (by index): "
                f"{[self.items[index].key for index in chosen]}. Nothing of this step was saved, and the last checkpoint is good. Look at "
                f"those {items}, at train.learning_rate and at the last lines of metrics.jsonl"
            ) from None
        self.data.rollouts.weights_changed()
        seconds, peak = time.perf_counter() - started, peak_memory_gib(self.models.device)
        if self.engine.world_size > 1:  # all must decide alike when time is up: by the clock of rank 0
            with timing.of("communication"):
                clocks = collectives.gather([seconds, peak])
            seconds, peak = clocks[0][0], max(other for _, other in clocks)
        self._slowest[collects] = max(self._slowest[collects], seconds)
        progress.step += 1
        progress.stage_step += 1
        progress.position += len(chosen)
        progress.seconds += seconds
        progress.student_tokens += result.rows
        adapted = method.observe(Observation("step", result.metrics, progress.stage_step))
        return {
            "kind": "train",
            "stage": self.name,
            "step": progress.step,
            "stage_step": progress.stage_step,
            "seconds": progress.seconds,
            "student_tokens": progress.student_tokens,
            "passes": self._passed.passes,
            "tokens_per_s": result.rows / seconds,
            "memory/peak_gib": peak,
            **result.metrics,
            **(load_metrics(result.expert_tokens) if result.expert_tokens else {}),
            **adapted,
        }

    def _cut(self, items: Sequence[Item]) -> list[list[Item]]:
        """The micro-batches of a step. A balance loss is a mean over a micro-batch, and so depends on how a step is cut."""
        train, needs = self.config.train, self.method.needs
        couples = needs.couples_items or needs.auxiliary or train.router_aux_loss_coef > 0
        by_length = self.progress.by_length and not couples
        return cut_step(items, train.per_device_train_batch_size, by_length=by_length)

    def _needs_collection(self) -> bool:
        """Move on to the next inner epoch where one is due; true where all of them are used up."""
        if self.progress.position >= len(self.items) and self.items:
            self.progress.epoch, self.progress.position = self.progress.epoch + 1, 0
        return not self.items or self.progress.epoch >= self.method.needs.inner_epochs

    def _next_indices(self) -> np.ndarray:  # (step_size,), or fewer at the end of what was collected
        order = self._order(len(self.items), self.progress.draw, self.progress.epoch)
        return order[self.progress.position :][: self.method.step_size]

    def _order(self, count: int, draw: int, epoch: int) -> np.ndarray:  # (count,)
        """The order in which an epoch goes through what was collected; `draw` counts the collections up to that one."""
        return np.random.default_rng([self.config.seed, draw, epoch]).permutation(count)

    def _left_of_turn(self, left: int | None) -> int | None:
        """Steps after this one, of which `left` are known to be taken, until teachers in turn read for an evaluation."""
        steps = self.config.eval.steps
        if self.evaluator is None or steps is None:
            return left
        until = steps - 1 - self.progress.stage_step % steps
        return until if left is None else min(left, until)

    def _order_of_step(self, count: int, draw: int) -> np.ndarray:  # (step_size,)
        """The items of a step that takes all that was collected for it."""
        return self._order(count, draw, 0)[: self.method.step_size]

    def _total_steps(self) -> int | None:
        """Steps of the stage as far as they are known before it starts."""
        train = self.config.train
        limits = [] if train.max_steps is None else [train.max_steps]
        if train.num_train_epochs is not None:
            answers = len(self._passed.items) * self.method.answers_per_prompt
            items = train.num_train_epochs * answers * self.method.needs.inner_epochs
            limits.append(max(1, math.ceil(items / self.method.step_size)))
        return min(limits, default=None)

    def done(self) -> bool:
        """True where the stage has all its steps."""
        progress, limit = self.progress, self._max_seconds()
        if self.total_steps is not None and progress.stage_step >= self.total_steps:
            return True
        tokens = self.config.train.max_student_tokens
        if tokens is not None and progress.student_tokens >= tokens:
            return True
        if limit is None:
            return False
        # the step that would overrun is not begun, so that two stages of equal time stay comparable
        spent = progress.position >= len(self.items) and progress.epoch + 1 >= self.method.needs.inner_epochs
        return progress.seconds + self._slowest[not self.items or spent] > limit

    def _max_seconds(self) -> float | None:
        limit = self.config.train.max_seconds
        return self.progress.stage_seconds[limit.removeprefix("stage:")] if isinstance(limit, str) else limit

    def evaluate(self, who: str = "student") -> None:
        """Measure and keep the best. Raises TrainingError where a served teacher stays away; a resumed run measures then."""
        if self.evaluator is None:
            return
        try:
            self._evaluate(who)
        except TeacherAway as error:
            self.progress.evaluation_due = True
            raise self._stopped(error) from None
        self.progress.evaluation_due = False

    def _evaluate(self, who: str) -> None:
        progress = self.progress
        started = time.perf_counter()
        judged = self.models.controlled() if self.method.needs.controls_teacher else self.models
        if judged.tokenizers is not None:  # there is no divergence to a teacher with ids of its own
            judged = replace(judged, teacher=None)
        evaluation = self.evaluator.evaluate(judged, self.data.rollouts, who)
        record = {
            "kind": "eval",
            "stage": self.name,
            "step": progress.step,
            "stage_step": progress.stage_step,
            "seconds": progress.seconds,
            "student_tokens": progress.student_tokens,
            "who": who,
            "time/evaluation_s": time.perf_counter() - started,
            "sets": evaluation.sets,
            "mean": evaluation.mean,
        }
        self.log.write(record)
        for sample in evaluation.samples:
            self.log.sample({"stage": self.name, "step": progress.step, **sample})
        self.console.evaluation(record, evaluation.samples)
        if who == "student":
            self.method.observe(Observation("evaluation", evaluation.mean, progress.stage_step))
            self.best.keep(evaluation.mean, progress)

    def save(self, *, wait: bool) -> None:
        """A checkpoint of this very moment. Unless it is waited for, it may be written while the next steps are taken."""
        with self.data.timing.of("saving"):
            self.saver.finish()  # before the log is flushed to the same disk
            progress = self.progress
            progress.streams = {name: stream.state_dict() for name, stream in self._streams().items()}
            progress.log = self.log.state()
            beside = [module_part(name, module) for name, module in self.modules.items()]
            self.saver.checkpoint(progress.step, beside, self._state_parts(), wait=wait)

    def _state_parts(self) -> list[SavedPart]:
        """All of state/ that this rank writes."""
        parts = [self.engine.state_part()]
        if isinstance(self.items, RolloutBuffer):  # of a finished stage too, which may be made longer
            parts.append(buffer_file(self._buffer_name, self.items))
        if self.engine.rank == 0:
            config = self.config.model_dump(mode="json")
            state = TrainerState(self.progress, config, self.engine.world_size)
            parts += [torch_file(METHOD_STATE, self.method.state_dict), trainer_state_part(state)]
        return parts

    def load(self, folder: Path) -> None:
        """Everything but the weights (which the caller loaded) and `progress` (which it was given)."""
        state = folder / "state"
        saved = read_trainer_state(folder)
        self.best.forget_another_measure(saved.config, self.progress)
        self.best.forget_damaged(self.progress)
        if (state / METHOD_STATE).exists():
            with reading_state(state / METHOD_STATE):
                self.method.load_state_dict(torch.load(state / METHOD_STATE, map_location="cpu", weights_only=True))
        before = saved.world_size
        if before != self.engine.world_size:
            self.console.note(
                f"{folder.name} was written by {before} ranks, and there are {self.engine.world_size}: the weights go on, "
                "optimiser, schedule, data order and rollouts start anew"
            )
            return
        self.engine.load_state(state)
        for name, stream in self._streams().items():
            stream.load_state_dict(saved.position(name, folder))
        buffer = state / self._buffer_name
        if buffer.exists():
            with reading_state(buffer):
                self.items = RolloutBuffer.from_state(load_file(buffer))

    @property
    def _passed(self) -> Stream | RankSlice:
        """The stream whose passes are counted."""
        return next(stream for _, stream in self._by_importance() if stream is not None)

    def _by_importance(self) -> list[tuple[str, Stream | RankSlice | None]]:
        """(words for its items, stream): a step is counted in the items of the first that there is."""
        data = self.data
        return [("prompts", data.prompts), ("pairs", data.pairs), ("blocks of data.corpus", data.corpus)]

    def _streams(self) -> dict[str, Stream | RankSlice]:
        streams = {
            "prompts": self.data.prompts,
            "pairs": self.data.pairs,
            "corpus": self.data.corpus,
            "forget": self.data.forget,
        }
        return {name: stream for name, stream in streams.items() if stream is not None}

    @property
    def _buffer_name(self) -> str:
        """Each rank keeps the teacher's hidden states that it holds."""
        rank, ranks = self.engine.rank, self.engine.world_size
        return "buffer.safetensors" if ranks == 1 else f"buffer-{rank}-of-{ranks}.safetensors"
