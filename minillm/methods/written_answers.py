"""The teacher's answers to all prompts, written once: by a teacher that samples, or taken from a cached one."""

from dataclasses import asdict

from minillm.config.models import CachedTeacherConfig
from minillm.config.root import StageConfig
from minillm.methods.protocol import TrainingData
from minillm.rollout.archive import AnswerArchive
from minillm.rollout.rollouts import Sampling
from minillm.teachers.pair import Models

ARCHIVE = "answers.jsonl"  # in the folder of a stage
# The keys of the teacher that its answers depend on.
OF_THE_TEACHER = {"path", "revision", "dtype", "quantization"}


def written_answers(
    data: TrainingData, models: Models, config: StageConfig, *, temperature: float
) -> dict[int, list[int]]:
    """Response ids by the number of the prompt, for all prompts of a stage. All ranks call it together.

    Raises UserError as AnswerArchive does, and for a cached teacher whose answers are to other prompts or were sampled in
    another way.
    """
    rollout, examples = config.rollout, list(data.prompts.items)
    sampling = Sampling(rollout.max_new_tokens, temperature, rollout.top_k, rollout.top_p)
    if isinstance(config.teacher, CachedTeacherConfig):
        return AnswerArchive(models.teacher.answers_file).read_matching(
            {example.index: example.prompt_ids for example in examples}, {"sampling": asdict(sampling)}
        )
    archive = AnswerArchive(data.folder / ARCHIVE)
    archive.write(
        data.rollouts,
        [example.prompt_ids for example in examples],
        sampling,
        keys=[example.index for example in examples],
        extras=[example.extras for example in examples],
        seed=config.seed,
        batch_size=rollout.batch_size,
        vocab_size=models.vocab_size,
        teacher=config.teacher.model_dump(mode="json", include=OF_THE_TEACHER),
        progress=lambda done: data.report_progress("the teacher writes", done, len(examples)),
    )
    return archive.read()
