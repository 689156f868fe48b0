"""The decode loop of a mixture by coins: of two models one is asked for a token, and the other one reads it later.

A token of alpha p + (1 - alpha) q is a coin and then a token of one of the two. The coin of a position is the same for
all answers of a draw, so that a step runs one model; the other one catches up in a block when it is asked. Every answer
has the law of the mixture; answers of one draw are not independent of each other.

Both models have read every answer in the end, and their last hidden states are what scoring needs.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minillm import UserError
from minillm.distributed import collectives
from minillm.models.batch import join_extras
from minillm.rollout.local.decoder import Decoder, decoder_of
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache
from minillm.rollout.local.lagging_decoder import LaggingDecoder
from minillm.rollout.local.token_drawing import Answer, PartialAnswers, Sampling, choose, pad_left
from minillm.rollout.rollouts import Scores
from minillm.rollout.scoring import FIELDS, statistics
from minillm.teachers.pair import Models, Role


def decode(
    models: Models,
    sampling: Sampling,  # neutral but for alpha
    blocks: Mapping[Role, bool],  # models that read several tokens at a time as they read one
    coins: Tensor,  # (max_new_tokens,) float64 in (0, 1), of this draw: below alpha the teacher is asked
    prompts: Sequence[list[int]],
    noise: Tensor,  # (B, max_new_tokens) float64, CPU
    extras: Sequence[Mapping[str, Tensor]] = (),  # what each prompt shows beside its ids
) -> list[Answer]:
    """The answers of one batch, with their scores. Raises UserError for logits that are not finite."""
    device, batch, steps = models.device, len(prompts), sampling.max_new_tokens
    width = max(map(len, prompts))
    room = width + steps - 1
    writing = PartialAnswers(models, ("student", "teacher"), batch, steps)
    ids, padding, position = (part.to(device) for part in pad_left(prompts, width, models.pad_id))
    mask = (torch.arange(room, device=device) >= padding).long()
    shown = {name: tensor.to(device) for name, tensor in join_extras(extras).items()}
    roles: tuple[Role, ...] = ("student", "teacher")
    readers = {role: LaggingDecoder(_decoder(models, role, room), writing, blocks=blocks[role]) for role in roles}
    for reader in readers.values():
        reader.read_prompts(ids, position, mask, shown)
    asked: list[Role] = ["teacher" if heads else "student" for heads in (coins < sampling.alpha).tolist()]
    noise, running = noise.to(device), torch.arange(batch, device=device)
    for step in range(steps):
        reader = readers[asked[step]]
        reader.catch_up(step)
        token, logprob = choose([reader.logits(running, step)], [1.0], sampling, noise[running, step])
        writing.put(running, writing.places[step : step + 1], token, logprob)
        left = writing.look(step, step + 1)
        if step + 1 == steps or not (collectives.anywhere(left > 0) if models.by_layers else left):
            break
        if left and left < len(running):
            running = (~writing.ended).nonzero()[:, 0]
    for reader in readers.values():
        reader.catch_up(step)
    states = {role: reader.states for role, reader in readers.items()}
    del reader, readers  # with their caches
    return _scored(models, sampling.alpha, prompts, writing, states)


def _decoder(models: Models, role: Role, room: int) -> Decoder:
    model = models.model(role)
    return decoder_of(models, role, make_cache(model, lambda: RoomyLayer(room)))


def _scored(
    models: Models,
    alpha: float,
    prompts: Sequence[list[int]],
    writing: PartialAnswers,
    states: dict[Role, Tensor],  # (B, max_new_tokens, H) each
) -> list[Answer]:
    written = writing.places < writing.lengths[:, None]  # (B, max_new_tokens)
    rows = models.teacher.rows_of({"hidden": states.pop("teacher")[written]})
    stats = statistics(models, states.pop("student")[written], writing.tokens[written], rows, FIELDS)
    mixture = torch.logaddexp(
        stats.teacher_logprob.double() + math.log(alpha), stats.student_logprob.double() + math.log1p(-alpha)
    )
    if not bool(mixture.isfinite().all()):
        raise UserError(
            "the log-probabilities of sampled tokens are not finite: the weights of student or teacher hold NaN or "
            "infinity, or overflow in their dtype"
        )
    answers = writing.answers(prompts)
    lengths = [len(answer.response) for answer in answers]
    vectors = {name: getattr(stats, name).float().cpu().split(lengths) for name in FIELDS}
    parts = {name: part.cpu().split(lengths) for name, part in rows.parts().items()}
    for place, (answer, logprobs) in enumerate(zip(answers, mixture.float().cpu().split(lengths), strict=True)):
        answer.logprobs = logprobs.clone()
        answer.scores = Scores(
            {name: of_answers[place].clone() for name, of_answers in vectors.items()},
            {name: of_answers[place] for name, of_answers in parts.items()},
        )
    return answers
