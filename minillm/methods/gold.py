"""General online logit distillation (GOLD, Hugging Face 2025): what student and teacher say of the same bytes.

    L = 1/T sum_g L_g + ce_coef CE,    L_g as minillm/kernels/group_distance.py has it

T counts the student's response tokens. The tokens of an answer, as each model reads it, are cut into groups of equal bytes
(minillm/models/byte_alignment.py). With probability `on_policy` a step trains on the student's own answers, whose text the
teacher reads in its own ids, without the cross-entropy; else on references. No gradient goes through sampling.

Differences from the released code (TRL): its merged rows do not add up to 1; it drops the last token of an answer, and takes
tokenizers alone that are byte-level; its weight of what matches is the fraction of the teacher's vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minillm.data.instructions import Example
from minillm.data.tokenization import written_text
from minillm.kernels.group_distance import Matches, Side, linear_group_distance
from minillm.losses import LMHead, TokenStats
from minillm.methods.on_policy import sample_answers
from minillm.methods.protocol import HeadLoss, Method, Term, TrainingData
from minillm.methods.text_pairs import PairedText, collate_pairs, paired, take_paired_references
from minillm.models.batch import TokenBatch
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.rollout.local.decoder import check_positions
from minillm.rollout.rollouts import Answer
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_ability

_PARTS = ("last", "last_labels", "before", "before_labels", "before_groups")


class GeneralOnlineLogitDistillation(Method):
    """See the module."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[PairedText]:
        if self.foreseeable(draw):
            return take_paired_references(data, self.step_size)
        examples = data.prompts.take(self.step_size)
        answers = sample_answers([one.sequence for one in examples], data, self.config, draw=draw)
        return [read_again(one, answer, models.tokenizers) for one, answer in zip(examples, answers, strict=True)]

    def foreseeable(self, draw: int) -> bool:
        """True where the step is on references. One coin a step, keyed like everything random."""
        return np.random.default_rng([self.config.seed, draw]).random() >= self.config.method.on_policy

    def teacher_batch(self, items: Sequence[PairedText], models: Models) -> TokenBatch:
        return collate_pairs(items, models)[1]

    def terms(self, items: Sequence[PairedText], data: TrainingData, models: Models) -> list[Term]:
        require_ability(models.teacher, "logprobs", "the term 'distillation'")
        batch, theirs = collate_pairs(items, models)
        if models.teacher.model is not None:  # of an answer that the student wrote it may read more tokens
            check_positions(models.teacher.model, theirs.input_ids.shape[1])
        pair, keys = models.tokenizers, self.config.method
        groups = grouped(items, pair)
        ids = torch.tensor([*pair.matches.items()], dtype=torch.int64).reshape(-1, 2)
        sizes = [len(spelling.names) for spelling in pair.spellings]
        weight = len(ids) / min(sizes) if keys.matched_weight is None else keys.matched_weight
        objective = partial(weighted_groups, beta=keys.beta, matched_weight=weight)
        inputs = {**groups, "student_ids": ids[:, 0], "teacher_ids": ids[:, 1]}
        heads = HeadLoss(objective, models.teacher.rows(theirs), inputs)
        coefficient = 0.0 if items[0].sampled else keys.ce_coef

        def cross_entropy(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
            nats = -stats.student_logprob
            loss = coefficient * nats if coefficient else torch.zeros_like(nats.detach())
            return loss, {"cross_entropy_nats": nats.detach()}

        count = float(len(batch.labels))
        return [Term("distillation", batch, cross_entropy, ("student_logprob",), count, heads=heads)]


def read_again(example: Example, answer: Answer, pair: TokenizerPair) -> PairedText:
    """A sampled answer beside its text in the teacher's ids."""
    special = {*pair.student.all_special_ids, *pair.ends[0]}
    said = [index for index in answer.response if index not in special]
    text = written_text(pair.student, answer.prompt, said)
    theirs = example.other.answered(pair.teacher, text, ended=answer.ended)
    return paired(example, answer.response, theirs, sampled=True)


def grouped(items: Sequence[PairedText], pair: TokenizerPair) -> dict[str, Tensor]:
    """The groups of a batch as `Side` and `Matches` name their parts: student_last, teacher_last, ..., same_beginning.

    `grouped_tokens` is the number of the student's tokens in them.
    """
    sides = {"student": [], "teacher": []}  # of every group the rows of its tokens, and the tokens
    same, start = [], {"student": 0, "teacher": 0}
    for item in items:
        responses = {"student": item.sequence.response, "teacher": item.teacher.response}
        for group in pair.groups(responses["student"], responses["teacher"]):
            beginnings = []
            for number, name in enumerate(sides):
                first, stop = getattr(group, name)
                tokens = responses[name][first:stop]
                sides[name].append((start[name] + first, tokens))
                beginnings.append(pair.text(number, tokens[:-1]))
            last = sides["student"][-1][1][-1], sides["teacher"][-1][1][-1]
            same.append(beginnings[0] == beginnings[1] and pair.matches.get(last[0]) == last[1])
        start = {name: start[name] + len(response) for name, response in responses.items()}
    found = {"same_beginning": torch.tensor(same, dtype=torch.bool)}
    for name, groups in sides.items():
        before = [
            (first + place, token, number)
            for number, (first, tokens) in enumerate(groups)
            for place, token in enumerate(tokens[:-1])
        ]
        last = [(first + len(tokens) - 1, tokens[-1]) for first, tokens in groups]
        columns = [*_columns(last, 2), *_columns(before, 3)]
        found |= {f"{name}_{part}": column for part, column in zip(_PARTS, columns, strict=True)}
    found["grouped_tokens"] = torch.tensor(float(sum(len(tokens) for _, tokens in sides["student"])))
    return found


def _columns(rows: Sequence[tuple[int, ...]], width: int) -> Sequence[Tensor]:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, width).unbind(1)


def weighted_groups(
    hidden: Tensor,  # (N, H_s)
    head: LMHead,
    teacher_hidden: Tensor,  # (M, H_t)
    teacher_head: LMHead,
    *,
    beta: float,
    matched_weight: float,
    **inputs: Tensor,  # what `grouped` gives, and student_ids and teacher_ids, (I,) each
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the groups' losses, and what is reported of them."""
    student = Side(hidden, head, *(inputs[f"student_{part}"] for part in _PARTS))
    teacher = Side(teacher_hidden, teacher_head, *(inputs[f"teacher_{part}"] for part in _PARTS))
    matches = Matches(inputs["student_ids"], inputs["teacher_ids"], inputs["same_beginning"])
    loss, metrics = linear_group_distance(student, teacher, matches, beta=beta, matched_weight=matched_weight)
    return loss, {**metrics, "grouped_tokens": inputs["grouped_tokens"]}


METHOD = GeneralOnlineLogitDistillation
