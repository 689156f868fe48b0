"""Held-out prompts answered and scored: what the answers are worth, and how far the student is from its teacher.

Reverse KL, forward KL and entropy belong together: a reverse KL that falls while the entropy vanishes and the forward
KL rises is a student that collapsed onto a few answers.

    rouge_l, exact_match       of the scored answers, the best over the references, 0 to 100
    label_accuracy             of the scored answers, for eval.label_accuracy: their labels are right, 0 to 100
    unlabelled_share           share of them without a label
    rouge_l_LOW_HIGH           the same of the references of LOW to HIGH tokens, for eval.length_buckets
    length_tokens, ended_share of the scored answers
    distinct_N                 share of different N-grams among those of all scored answers, 0 to 100
    entropy_nats               token mean of the entropy of q     ) on the student's own samples at temperature 1:
    reverse_kl_nats            token mean of KL(q || p)           ) the scored answers where those are such samples,
    sequence_reverse_kl_nats   its sum over an answer, their mean ) else others, drawn for this alone
    forward_kl_nats            token mean of KL(p || q) on the teacher's samples at temperature 1, always the same ones
    loss_nats                  token mean of -log q(reference)
    loss_bits_per_byte         its sum in bits over the bytes of the references' text, for eval.bits_per_byte

In a set with a `teacher_context` p is the teacher that reads it, beside a student that does not; in others both read the
same prompt, whatever the teacher is told in training. What is measured of the teacher itself is of its own prompts likewise.
What cannot be measured (no teacher or a cached one, no references) is absent. With several seeds every metric is the mean over them,
and NAME_std their standard deviation where it was measured more than once.
"""

import math
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from minillm import UserError
from minillm.config.evaluation import EvalConfig
from minillm.data.instructions import Example, PromptSet
from minillm.evaluate.diversity import distinct
from minillm.evaluate.exact_match import exact_match
from minillm.evaluate.label_accuracy import LabelScorer
from minillm.evaluate.length_buckets import mean_by_length
from minillm.evaluate.rouge import rouge_l
from minillm.evaluate.seeds import summary
from minillm.evaluate.token_statistics import Parts, kept_teacher_rows, token_statistics
from minillm.models.batch import TokenSequence
from minillm.rollout.rollouts import Answer, ProgressCallback, Rollouts, Sampling
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_ability

Who = Literal["student", "teacher"]
Measurements = dict[str, list[float]]  # metric -> a value a seed, or the one value


@dataclass(frozen=True)
class Evaluation:
    """The findings of one evaluation."""

    sets: dict[str, dict[str, float]]  # set -> metric -> value
    mean: dict[str, float]  # metric -> mean over the sets that have it
    samples: list[dict]  # of each set the first answers: who, set, index, prompt, reference, answer, teacher, ...
    curves: dict[str, dict[str, dict]] = field(default_factory=dict)  # analysis -> set -> numbers to draw: analyses.py


class Evaluator:
    """Measures a student, or the teacher itself, on the same prompts with the same random numbers every time.

    It belongs to one teacher: the teacher's answers and its rows of them (T x H_t numbers an answer where they are
    hidden states, in the teacher's dtype, in CPU memory) are kept after the first call, for later steps and stages.
    """

    def __init__(
        self,
        sets: dict[str, PromptSet],
        config: EvalConfig,
        *,
        seed: int,
        report_progress: ProgressCallback = lambda what, done, total: None,
        keeps_teacher: bool = True,
    ):
        """Args: report_progress: told how far the sampling is. keeps_teacher: false where the teacher changes as well."""
        for name, prompts in sets.items():
            if not prompts.examples:
                raise UserError(f"eval.sets.{name}: no usable prompts in {prompts.source}; nothing could be measured")
        self.sets, self.config, self.seed, self.report_progress = sets, config, seed, report_progress
        self.keeps_teacher = keeps_teacher
        self._labels = (
            {}
            if config.label_accuracy is None
            else {name: LabelScorer(config.label_accuracy, one, f"eval.sets.{name}") for name, one in sets.items()}
        )
        self.scored = Sampling(
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
        )
        self.neutral = Sampling(config.max_new_tokens)
        self._teacher_answers: dict[tuple[str, int, int, Sampling], Answer] = {}  # by set, example, seed, sampling
        self._teacher_rows: dict[str, list[Parts]] = {}  # set -> what the teacher says of its neutral answers

    def evaluate(self, models: Models, rollouts: Rollouts, who: Who = "student") -> Evaluation:
        """Answer every set with every seed and measure.

        Args:
            models: the pair. Without a teacher, or with `eval.teacher` false, there are no divergences, nor with one that
                cannot read answers of the moment. Those that need the teacher's answers are left out where it cannot sample.
            rollouts: what samples the answers.
            who: "teacher" measures the teacher's own answers, entropy and loss; its answers are those kept.

        Raises UserError for who="teacher" without a teacher that can be evaluated.
        """
        if who == "teacher":
            require_ability(models.teacher, "evaluate", "evaluating the teacher")
        if not self.keeps_teacher:
            self._teacher_answers.clear()
            self._teacher_rows.clear()
        measured, samples = {}, []
        for name in self.sets:
            measured[name], shown = self._evaluate_set(name, models, rollouts, who)
            samples += shown
        sets = {name: summary(measurements) for name, measurements in measured.items()}
        return Evaluation(sets, summary(_mean_over_sets(list(measured.values()))), samples)

    def _evaluate_set(self, name: str, models: Models, rollouts: Rollouts, who: Who) -> tuple[Measurements, list[dict]]:
        examples, measured = self.sets[name].examples, Measurements()
        compares = who == "student" and models.teacher is not None and self.config.teacher
        compares = compares and "read" in models.teacher.abilities  # the divergences are over answers of the moment
        # from here on the one measured is "the student"; the teacher's answers still come from what is kept
        subject = models if who == "student" else models.teacher_alone()
        shown: list[dict] = []
        for seed in self.config.seeds:
            answers = self._answers(name, examples, rollouts, who, seed, self.scored)
            texts = [_text(models, answer) for answer in answers]
            scores = _score_texts(texts, examples)
            if name in self._labels:
                scores |= self._labels[name].score(texts)
            for metric, values in {**scores, **_shape(answers)}.items():
                _add(measured, metric, statistics.fmean(value for value in values if value is not None))
            self._measure_text(measured, models, examples, answers, scores.get("rouge_l"))
            if seed == self.config.seeds[0]:
                shown = self._samples(name, examples, models, rollouts, who, answers, texts, scores)
            if self.scored == self.neutral:
                self._measure_samples(measured, subject, _read_by(who, examples, answers), compares)
        if self.scored != self.neutral:  # one seed is enough for what is averaged over all tokens of a set
            answers = self._answers(name, examples, rollouts, who, self.config.seeds[0], self.neutral)
            self._measure_samples(measured, subject, _read_by(who, examples, answers), compares)
        if compares and "sample" in models.teacher.abilities:
            self._measure_teacher_samples(measured, name, models, rollouts, examples)
        self._measure_references(measured, subject, who, examples)
        return measured, shown

    def _answers(
        self, name: str, examples: list[Example], rollouts: Rollouts, who: Who, seed: int, sampling: Sampling
    ) -> list[Answer]:
        kept = self._teacher_answers if who == "teacher" else {}
        missing = [example for example in examples if (name, example.index, seed, sampling) not in kept]
        if missing:
            answers = rollouts.sample(
                [example.prompt_for(who) for example in missing],
                sampling,
                keys=[example.index for example in missing],
                extras=[example.extras for example in missing],
                # the same at every step and stage and for both models; never that of training samples
                seed=zlib.crc32(f"evaluation {self.seed} {seed} {name}".encode()),
                who=who,
                batch_size=self.config.batch_size,
                progress=lambda done: self.report_progress(f"evaluating on {name}", done, len(missing)),
            )
            for example, answer in zip(missing, answers, strict=True):
                kept[name, example.index, seed, sampling] = answer
        return [kept[name, example.index, seed, sampling] for example in examples]

    def _measure_text(
        self,
        measured: Measurements,
        models: Models,
        examples: list[Example],
        answers: list[Answer],
        rouge: list[float | None] | None,
    ) -> None:
        """Measure the answers of one seed as a whole."""
        for size in self.config.distinct:
            _add(measured, f"distinct_{size}", distinct([answer.response for answer in answers], size))
        if rouge is not None and self.config.length_buckets:
            lengths = [_text_tokens(example.response_ids, models.eos_ids) for example in examples]
            for bucket, (mean, _) in mean_by_length(rouge, lengths, self.config.length_buckets).items():
                _add(measured, f"rouge_l_{bucket}", mean)

    def _measure_samples(
        self, measured: Measurements, subject: Models, sequences: list[TokenSequence], compares: bool
    ) -> None:
        fields = ("student_entropy", "reverse_kl") if compares else ("student_entropy",)
        stats = token_statistics(subject, sequences, fields, batch_size=self.config.batch_size)
        _add(measured, "entropy_nats", _token_mean(stats["student_entropy"]))
        if compares:
            sums = [vector.double().sum().item() for vector in stats["reverse_kl"]]
            _add(measured, "reverse_kl_nats", _token_mean(stats["reverse_kl"]))
            _add(measured, "sequence_reverse_kl_nats", statistics.fmean(sums))

    def _measure_teacher_samples(
        self, measured: Measurements, name: str, models: Models, rollouts: Rollouts, examples: list[Example]
    ) -> None:
        answers = self._answers(name, examples, rollouts, "teacher", self.config.seeds[0], self.neutral)
        sequences, batch_size = _answered(examples, answers), self.config.batch_size
        if name not in self._teacher_rows:
            self._teacher_rows[name] = kept_teacher_rows(models, sequences, batch_size=batch_size)
        parts = self._teacher_rows[name]
        stats = token_statistics(models, sequences, ("forward_kl",), batch_size=batch_size, teacher_parts=parts)
        _add(measured, "forward_kl_nats", _token_mean(stats["forward_kl"]))

    def _measure_references(self, measured: Measurements, subject: Models, who: Who, examples: list[Example]) -> None:
        sequences = [example.sequence for example in examples if example.references and example.response_ids]
        sequences = [one.read_by_teacher() for one in sequences] if who == "teacher" else sequences
        if sequences:
            stats = token_statistics(subject, sequences, ("student_logprob",), batch_size=self.config.batch_size)
            _add(measured, "loss_nats", -_token_mean(stats["student_logprob"]))
            if self.config.bits_per_byte:
                nats = -torch.cat(stats["student_logprob"]).double().sum().item()
                texts = (subject.tokenizer.decode(one.response, skip_special_tokens=True) for one in sequences)
                length = sum(len(text.encode()) for text in texts)
                _add(measured, "loss_bits_per_byte", nats / math.log(2) / length if length else math.nan)

    def _samples(
        self,
        name: str,
        examples: list[Example],
        models: Models,
        rollouts: Rollouts,
        who: Who,
        answers: list[Answer],
        texts: list[str],
        scores: dict[str, list[float | None]],
    ) -> list[dict]:
        shown = examples[: self.config.samples]
        records = []
        for place, example in enumerate(shown):
            record = {
                "who": who,
                "set": name,
                "index": example.index,
                "prompt": example.prompt,
                "answer": texts[place],
                "length_tokens": len(answers[place].response),
                "ended": answers[place].ended,
            }
            if example.teacher_prompt is not None:
                record["teacher_prompt"] = example.teacher_prompt
            if example.references:
                record["reference"] = example.references[0]
                record["rouge_l"] = scores["rouge_l"][place]
            records.append(record)
        samples = models.teacher is not None and "sample" in models.teacher.abilities
        if who == "student" and samples and self.config.teacher:
            beside = self._answers(name, shown, rollouts, "teacher", self.config.seeds[0], self.scored)
            for record, answer in zip(records, beside, strict=True):
                record |= {"teacher": _text(models, answer), "teacher_ended": answer.ended}
        return records


def _text_tokens(response_ids: Sequence[int], eos_ids: Sequence[int]) -> int:
    """The tokens of a reference without the end of the answer, which one that was cut off has not."""
    return len(response_ids) - (bool(response_ids) and response_ids[-1] in eos_ids)


def _answered(examples: list[Example], answers: list[Answer]) -> list[TokenSequence]:
    return [example.answered(answer.response) for example, answer in zip(examples, answers, strict=True)]


def _read_by(who: Who, examples: list[Example], answers: list[Answer]) -> list[TokenSequence]:
    """The answered prompts as they are read by the one who is measured."""
    sequences = _answered(examples, answers)
    return [one.read_by_teacher() for one in sequences] if who == "teacher" else sequences


def _text(models: Models, answer: Answer) -> str:
    return models.tokenizer.decode(answer.response, skip_special_tokens=True)


def _score_texts(texts: list[str], examples: list[Example]) -> dict[str, list[float | None]]:
    """A score an example, None where it has no reference; no metric at all where no example has one."""
    if not any(example.references for example in examples):
        return {}
    return {
        metric: [
            score(text, example.references) if example.references else None
            for text, example in zip(texts, examples, strict=True)
        ]
        for metric, score in (("rouge_l", rouge_l), ("exact_match", exact_match))
    }


def _shape(answers: list[Answer]) -> dict[str, list[float]]:
    return {
        "length_tokens": [float(len(answer.response)) for answer in answers],
        "ended_share": [float(answer.ended) for answer in answers],
    }


def _token_mean(vectors: list[Tensor]) -> float:  # (T,) each
    return torch.cat(vectors).double().mean().item()


def _add(measured: Measurements, metric: str, value: float) -> None:
    measured.setdefault(metric, []).append(value)


def _mean_over_sets(sets: list[Measurements]) -> Measurements:
    """Seed by seed, so that the deviation over seeds is that of the mean."""
    metrics = dict.fromkeys(metric for measured in sets for metric in measured)
    return {
        metric: [
            statistics.fmean(values)
            for values in zip(*(measured[metric] for measured in sets if metric in measured), strict=True)
        ]
        for metric in metrics
    }
