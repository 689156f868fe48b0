"""Answers that the teacher writes once, before the first step, and that later runs of the stage find on disk; a cached
teacher has written them already."""

from collections.abc import Sequence, Set
from dataclasses import asdict, replace
from typing import Any

from minillm.config.models import AnyTeacherConfig, CachedTeacherConfig, ServedTeacherConfig
from minillm.config.root import StageConfig
from minillm.methods.protocol import TrainingData
from minillm.models.batch import TokenSequence
from minillm.rollout.archive import AnswerArchive
from minillm.rollout.noise import AGAIN
from minillm.rollout.rollouts import Sampling
from minillm.teachers.pair import Models

ARCHIVE = "answers.jsonl"  # in the folder of a stage
# The keys of the teacher that its answers depend on.
OF_THE_TEACHER = {"path", "revision", "dtype", "quantization"}


def identity_of(config: AnyTeacherConfig, models: Models, keys: Set[str]) -> dict[str, Any]:
    """The identity of a teacher that something was written by, in words that JSON knows: some of its keys, or of a served
    one the fingerprint of its weights."""
    if isinstance(config, ServedTeacherConfig):
        return {"fingerprint": models.teacher.fingerprint}
    return config.model_dump(mode="json", include=keys)


def asked_again(prompts: Sequence[TokenSequence], times: int) -> list[TokenSequence]:
    """Prompts to be answered several times, each time by a key of its own: the first time by that of the prompt."""
    return [replace(one, key=one.key + AGAIN * time) for time in range(times) for one in prompts]


def written_answers(
    prompts: Sequence[TokenSequence], data: TrainingData, models: Models, config: StageConfig, *, temperature: float
) -> dict[int, list[int]]:
    """The teacher's answer to each prompt, as it reads it, by its key: response ids, with the EOS of those that ended.

    Those that are in the archive of the stage are taken from there. All ranks call it together. Raises UserError
    where that, or a cached teacher, has answers of another teacher, to other prompts, or sampled in another way.
    """
    rollout = config.rollout
    prompts = [prompt.read_by_teacher() for prompt in prompts]
    sampling = Sampling(rollout.max_new_tokens, temperature, rollout.top_k, rollout.top_p)
    if isinstance(config.teacher, CachedTeacherConfig):
        return AnswerArchive(models.teacher.answers_file).read_matching(
            {prompt.key: prompt.prompt for prompt in prompts}, {"sampling": asdict(sampling)}
        )
    archive = AnswerArchive(data.folder / ARCHIVE)
    with data.timing.of("rollout"):
        archive.write(
            data.rollouts,
            [prompt.prompt for prompt in prompts],
            sampling,
            keys=[prompt.key for prompt in prompts],
            extras=[prompt.extras for prompt in prompts],
            seed=config.seed,
            batch_size=rollout.batch_size,
            vocab_size=models.vocab_size,
            teacher=identity_of(config.teacher, models, OF_THE_TEACHER),
            progress=lambda done: data.report_progress("the teacher writes", done, len(prompts)),
        )
    found = archive.read()
    return {prompt.key: found[prompt.key] for prompt in prompts}
