"""From a stage's configuration to its trainer, with what stages and runs have in common loaded once."""

import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.config.loader.run_plan import Stage
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.config.training import shards_student, shards_teacher
from minillm.data.corpus import load_corpus
from minillm.data.instructions import load_prompts
from minillm.data.stream import RankSlice, Stream
from minillm.distributed import collectives
from minillm.engine.placement import check_backend, engine_device, loading_device
from minillm.evaluate.evaluator import Evaluator
from minillm.methods.protocol import TrainingData
from minillm.models.adapters import FOLDER, load_adapter
from minillm.models.loading import load_student, load_teacher
from minillm.models.preflight import preflight, require_same_tokenizer
from minillm.models.sharded import gathered, is_sharded, release
from minillm.models.tokenizers import load_tokenizer
from minillm.rollout.local.graph_preconditions import use_cuda_graphs
from minillm.storage.metrics_log import MetricsLog
from minillm.train.frozen_weights import find_frozen_weights, write_frozen_weights
from minillm.train.progress import Progress
from minillm.train.trainer import StageTrainer


class StageBuilder:
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
        planned_peak_gib: Callable[[torch.device], float | None],
    ) -> StageTrainer:
        config = stage.config
        device = engine_device(config.engine)
        check_backend(config.engine, device)
        # tokenizers and data first: what is wrong with them is said before a model is read
        tokenizer = load_tokenizer(config.student, self.output_dir)
        if config.teacher is not None:
            require_same_tokenizer(tokenizer, load_tokenizer(config.teacher, self.output_dir))
        prompts = load_prompts(config.data.prompts, tokenizer)
        read = [("prompts", f"{len(prompts)} used, {prompts.dropped_long} too long", prompts.source)]
        corpus = None
        if config.data.corpus is not None:
            corpus = load_corpus(config.data.corpus, tokenizer)
            read.append(("corpus", f"{len(corpus.blocks)} blocks", f"{corpus.documents} documents"))
        evaluator = self._load_evaluator(stage, tokenizer)
        # what is cut over the ranks rank 0 reads, and hands out piece by piece
        cut, teacher_cut = shards_student(config.engine), shards_teacher(config.engine, config.teacher)
        hollow = cut and collectives.rank() > 0
        teacher, teacher_tokenizer = collectives.together(
            lambda: self.teacher(
                config.teacher,
                loading_device(config.engine, cut=teacher_cut),
                cut=teacher_cut,
            )
        )
        adapted = config.student.lora is not None
        source = saved = None
        if checkpoint is not None:  # the architecture and the weights are the checkpoint's, or lie below its adapters
            saved = (
                Path(collectives.on_rank_0(lambda: str(find_frozen_weights(stage.name, self.output_dir))))
                if adapted
                else checkpoint
            )
        elif teacher is not None and not is_sharded(teacher) and not hollow:
            source = teacher if _same_weights(config.student, config.teacher) else None
        first = loading_device(config.engine, cut=cut)
        options = {"output_dir": self.output_dir, "device": first, "seed": config.seed, "hollow": hollow}
        student = collectives.together(lambda: load_student(config.student, source=source, saved=saved, **options))
        if adapted and checkpoint is not None:
            collectives.together(lambda: load_adapter(student, checkpoint / FOLDER))
        by_layers = config.engine.type == "deepspeed" and config.engine.gather == "layers"
        with gathered(teacher, by_layers=by_layers):  # an earlier stage may have sharded it
            models, rows = collectives.together(
                lambda: preflight(student, teacher, tokenizer, teacher_tokenizer, device)
            )
        if config.rollout.cuda_graphs:
            use_cuda_graphs(models)
        if adapted and checkpoint is None:
            write_frozen_weights(stage.name, student, tokenizer, self.output_dir)
        self.console.preflight([*rows, *read])
        # each stage in an order of its own: one that goes on from another must not see the same records first again
        order = zlib.crc32(f"{config.seed}/{stage.name}".encode())
        return StageTrainer(
            stage,
            models,
            TrainingData(
                prompts=Stream(prompts.examples, seed=order),
                corpus=None if corpus is None else _corpus_slice(Stream(corpus.blocks, seed=order)),
                written=self.output_dir / "written" / stage.name,
                report_progress=self.console.working,
            ),
            output_dir=self.output_dir,
            evaluator=evaluator,
            log=log,
            console=self.console,
            progress=progress,
            judge_teacher=judge_teacher,
            planned_peak_gib=lambda: planned_peak_gib(device),
            interrupted=interrupted,
        )

    def teacher(self, config: TeacherConfig | None, device: torch.device, *, cut: bool = False):
        """(model, tokenizer); the model that was loaded last is kept. `cut`: over the ranks, of which rank 0 reads it."""
        if config is None:
            return None, None
        key = self._of_this_run(config), cut
        if self._teacher[0] != key:
            self.close()
            hollow = cut and collectives.rank() > 0
            model = load_teacher(config, output_dir=self.output_dir, device=device, hollow=hollow)
            self._teacher = (key, (model, load_tokenizer(config, self.output_dir)))
        return self._teacher[1]

    def close(self) -> None:
        """Give back the teacher's memory."""
        if self._teacher[1] is not None:
            teacher, _ = self._teacher[1]
            if is_sharded(teacher):
                release(teacher, teacher.zero_engine)
        self._teacher = (None, None)

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

            def tell(*progress) -> None:  # the console of the moment: an evaluator may outlive the run it was made for
                self.console.working(*progress)

            self._evaluator = (key, Evaluator(sets, config.eval, seed=config.seed, report_progress=tell))
        return self._evaluator[1]


def _corpus_slice(stream: Stream) -> Stream | RankSlice:
    if collectives.world_size() == 1:
        return stream
    return RankSlice(stream, rank=collectives.rank(), world_size=collectives.world_size())


def _same_weights(student: StudentConfig, teacher: TeacherConfig) -> bool:
    """Whether the loaded teacher holds exactly what the student would be read from."""
    return teacher.quantization is None and (student.path, student.revision, student.dtype) == (
        teacher.path,
        teacher.revision,
        teacher.dtype,
    )
