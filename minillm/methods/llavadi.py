"""LLAVADI (arXiv 2407.19409): what to imitate of a teacher that sees, each with a weight.

    L = a CE(y, q) + b mean_s mean_t D(p, q) + c mean over pairs of layers, mean_s mean_t d(g(h_t), h'_t)
      + e mean over pairs (i, j) of (cos(h_i, h_j) - cos(h'_i, h'_j))^2

CE is a mean over the tokens of all answers of a step. The next two are means over the tokens of a sequence and then over
sequences: answers, or the prompts too. h and h' are hidden states of student and teacher, g a trained projector (Linear,
GELU, Linear), d the mean squared error or 1 less the cosine. The last is over the places i of a sequence's pictures and j
where its answer is predicted, without a projector, pooled over all pairs of a step. Distribution and hidden states come
from one forward pass of each model, and no full logits are ever held.

Differences from the released code. Its answers are the positions of their own tokens, so that the prediction of the first
one is left out and one beyond the last taken in; here they are the positions that predict the answer. Its projector is not
in its checkpoints. Its `norm_logits` is `standardize`: logits that are standardised row by row before the softmax. The
divergence at the positions with the largest affinities is not offered, nor answers of the student's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from minillm.losses import TokenStats
from minillm.methods.features import DISTANCES, affinities, mean_in_sequences, places_of
from minillm.methods.protocol import HeadLoss, HiddenLoss, Method, Term, TrainingData, sequences_of
from minillm.methods.standardized import standardized_divergence
from minillm.methods.supervised import take_references
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.models.families import placeholder_id
from minillm.models.projectors import make_projectors
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_ability, require_teacher


@dataclass(frozen=True)
class OfStep:
    """A sequence, with the sizes of the step that it is part of."""

    sequence: TokenSequence
    sequences: int
    tokens: int  # of all answers
    pairs: int  # of places of pictures and tokens of answers, within sequences

    @property
    def key(self) -> int:
        return self.sequence.key

    @property
    def width(self) -> int:
        return self.sequence.width


class LLAVADI(Method):
    """See the module."""

    def modules(self, models: Models) -> dict[str, nn.Module]:
        (term,) = self.needs.terms
        if not term.features:
            return {}
        teacher = models.model("teacher")
        return {"projector": make_projectors(models.student, teacher, term.features, seed=self.config.seed)}

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[OfStep]:
        sequences = take_references(data, self.step_size)
        picture = placeholder_id(models.student.config)
        tokens = sum(len(one.response) for one in sequences)
        pairs = sum(one.prompt.count(picture) * len(one.response) for one in sequences)
        return [OfStep(one, len(sequences), tokens, pairs) for one in sequences]

    def terms(self, items: Sequence[OfStep], data: TrainingData, models: Models) -> list[Term]:
        return [_MicroBatch(self.config.method, items, models).term()]


class _MicroBatch:
    """The one term of a micro-batch: coefficients with which sums over rows become the means of the whole step, once they
    are divided by its number of sequences."""

    def __init__(self, keys, items: Sequence[OfStep], models: Models):
        self.keys, self.step, self.models = keys, items[0], models
        self.batch = collate(sequences_of(items), models.pad_id)
        self.width = self.batch.input_ids.shape[1]
        picture = placeholder_id(models.student.config)
        self.pictures = self.batch.input_ids == (-1 if picture is None else picture)  # (B, L)
        asked = self.batch.rows
        if keys.reads_prompts:
            asked = places_of(self.batch, "all", self.pictures)
        self.asked = asked  # (A,) the positions at which the teacher is asked, in order
        self.pairs = [(student, teacher) for student, teacher in keys.layers] if keys.features_coef else []
        self.said = self._ask_teacher()  # {layer: (A, H_t)}

    def _ask_teacher(self) -> dict[int, Tensor]:
        keys, teacher = self.keys, self.models.teacher
        require_teacher(teacher, "method llavadi")
        if not (self.pairs or keys.reads_prompts):
            return {}
        require_ability(teacher, "layers", "method llavadi")
        layers = {-1} if keys.logits_coef or keys.affinity_coef else set()
        wanted = replace(self.batch, rows=self.asked)
        return teacher.layers(wanted, sorted(layers | {layer for _, layer in self.pairs}))

    def _said_at(self, layer: int, places: Tensor) -> Tensor:  # (P,) -> (P, H_t)
        said = self.said[layer]
        return said[torch.searchsorted(self.asked, places).to(said.device)]

    def term(self) -> Term:
        keys, step = self.keys, self.step
        rows = places_of(self.batch, keys.logits_tokens, self.pictures) if keys.logits_coef else self.batch.rows
        teacher = None
        if keys.logits_coef and self.said:
            teacher = self.models.teacher.rows_of({"hidden": self._said_at(-1, rows)})
        elif keys.logits_coef:
            teacher = self.models.teacher.rows(self.batch)
        batch, answers = self._with_rows(rows)
        inputs, heads = {"answers": answers}, None
        options = {"beta": keys.beta, "alpha": keys.skew} if keys.logits_coef else {}
        weights = keys.logits_coef * mean_in_sequences(rows, self.width)
        if keys.standardizes:
            objective = partial(
                standardized_divergence, divergence=keys.divergence, vocab_size=self.models.vocab_size, options=options
            )
            heads = HeadLoss(objective, teacher, {"weights": weights, "answers": answers})
            teacher, options = None, {}
        elif keys.logits_coef:
            inputs["distance_weight"] = weights
        return Term(
            "distillation",
            batch,
            _row_loss(keys, ce_weight=keys.ce_coef * step.sequences / max(step.tokens, 1)),
            ("student_logprob",) + (keys.divergence,) * (teacher is not None),
            count=float(len(self.batch.lengths)),
            inputs=inputs,
            teacher=teacher,
            options=options,
            hidden=self._hidden_loss(),
            heads=heads,
        )

    def _with_rows(self, rows: Tensor) -> tuple[TokenBatch, Tensor]:  # (N,) -> (N,) bool
        """The batch with other rows, which take in those of the answers, and which of them these are."""
        labels, answers = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.bool)
        places = torch.searchsorted(rows, self.batch.rows)
        labels[places], answers[places] = self.batch.labels, True
        return replace(self.batch, rows=rows, labels=labels), answers

    def _hidden_loss(self) -> HiddenLoss | None:
        keys, step = self.keys, self.step
        inputs = {}
        if self.pairs:
            places = places_of(self.batch, keys.features_tokens, self.pictures)
            inputs = {
                "places": places,
                "weights": mean_in_sequences(places, self.width) / len(self.pairs),
                **{f"target_{number}": self._said_at(layer, places) for number, (_, layer) in enumerate(self.pairs)},
            }
        if keys.affinity_coef:
            said = self.said[-1]
            asked, rows, pictures = (one.to(said.device) for one in (self.asked, self.batch.rows, self.pictures))
            inputs |= {
                "attended": asked,
                "answers": rows,
                "pictures": pictures,
                "teacher_affinities": affinities(said, asked, self.batch.split(rows), pictures),
            }
        if not inputs:
            return None
        layers = {student for student, _ in self.pairs} | ({-1} if keys.affinity_coef else set())
        objective = _FeatureLoss(
            features_coef=keys.features_coef,
            distance=keys.features_loss,
            layers=tuple(student for student, _ in self.pairs),
            affinity_coef=keys.affinity_coef * step.sequences / max(step.pairs, 1),
            affinity_mean=step.tokens / max(step.pairs, 1),
            sequence_mean=step.tokens / step.sequences,
        )
        return HiddenLoss(tuple(sorted(layers)), objective, inputs)


def _row_loss(keys, *, ce_weight: float):
    """The objective of the rows. Cross-entropy is of the answers' alone, and so are the metrics."""

    def objective(
        stats: TokenStats,
        *,
        answers: Tensor,  # (C,) bool
        distance_weight: Tensor | None = None,  # (C,), where a divergence is of these rows
    ) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
        surprise = torch.where(answers, -stats.student_logprob, 0.0)
        loss, metrics = ce_weight * surprise, {"cross_entropy_nats": surprise.detach()}
        if distance_weight is not None:
            distance = getattr(stats, keys.divergence)
            loss = loss + distance_weight * distance
            metrics[f"{keys.divergence}_nats"] = torch.where(answers, distance.detach(), 0.0)
        return loss, metrics

    return objective


@dataclass(frozen=True)
class _FeatureLoss:
    """The objective of the hidden states. Metrics are divided by the tokens of the step's answers, so that the means over
    sequences and over pairs are multiplied by them."""

    features_coef: float
    distance: str
    layers: tuple[int, ...]  # of the student
    affinity_coef: float  # for a sum over pairs
    affinity_mean: float
    sequence_mean: float

    def __call__(
        self,
        hidden: dict[int, Tensor],  # {layer: (B, L, H_s)}
        batch: TokenBatch,
        modules: nn.ModuleDict,
        *,
        places: Tensor | None = None,  # (P,) flattened positions
        weights: Tensor | None = None,  # (P,)
        attended: Tensor | None = None,  # (A,) flattened positions of prompts and answers
        answers: Tensor | None = None,  # (N,) those that predict the answers
        pictures: Tensor | None = None,  # (B, L) bool
        teacher_affinities: Tensor | None = None,  # (pairs,)
        **targets: Tensor,  # target_0, ...: (P, H_t) each
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = 0.0, {}
        if self.layers:
            distances = []
            for number, layer in enumerate(self.layers):
                projector = modules["projector"][number]
                projected = projector(hidden[layer].flatten(0, 1).index_select(0, places))
                distances.append((weights * DISTANCES[self.distance](projected, targets[f"target_{number}"])).sum())
            sums = torch.stack(distances).sum()
            total = total + self.features_coef * sums
            metrics["features_loss"] = self.sequence_mean * sums.detach()
        if self.affinity_coef:
            last = hidden[-1].flatten(0, 1).index_select(0, attended)
            found = affinities(last, attended, batch.split(answers), pictures)
            sums = (found - teacher_affinities).square().sum()
            total = total + self.affinity_coef * sums
            metrics["affinity_loss"] = self.affinity_mean * sums.detach()
        return total, metrics


METHOD = LLAVADI
