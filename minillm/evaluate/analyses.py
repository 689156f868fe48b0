"""The analyses that an evaluation adds where nothing is trained: exposure bias, calibration on label words, preference.

excess_error_L                 exposure_bias.py: what the student's own prefixes cost it by L tokens, in per cent
accuracy, ece                  calibration.py: of the classification sets, each a set of its own
margin_nats, preferred_share   pair_margins.py: of held-out pairs, each a set of its own, and of sampled ones of every set
"""

import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minillm.config.evaluation import EvalConfig
from minillm.data.instructions import PromptSet
from minillm.data.labels import LabelSet
from minillm.data.pairs import AnswerPair
from minillm.evaluate.calibration import calibration
from minillm.evaluate.evaluator import Evaluation, Who
from minillm.evaluate.exposure_bias import accumulated_error
from minillm.evaluate.pair_margins import pair_margins
from minillm.evaluate.token_statistics import token_statistics
from minillm.models.batch import TokenSequence
from minillm.rollout.rollouts import Answer, ProgressCallback, Rollouts, Sampling
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_ability


class Analyses:
    """Measures what eval.exposure_bias, eval.calibration and eval.preference ask for. It belongs to one teacher, whose
    answers it keeps."""

    def __init__(
        self,
        sets: Mapping[str, PromptSet],
        labels: Mapping[str, LabelSet],
        config: EvalConfig,
        pairs: Mapping[str, Sequence[AnswerPair]] | None = None,
        *,
        seed: int,
        report_progress: ProgressCallback = lambda what, done, total: None,
    ):
        self.pairs = pairs or {}
        self.sets, self.labels, self.config, self.seed, self.report_progress = (
            sets,
            labels,
            config,
            seed,
            report_progress,
        )
        self._teacher_answers: dict[tuple[str, str, int], list[Answer]] = {}  # by analysis, set and draw

    def add_to(self, evaluation: Evaluation, models: Models, rollouts: Rollouts, who: Who = "student") -> Evaluation:
        """The evaluation with what the analyses find. Exposure bias is a student's with a teacher alone."""
        sets = {name: dict(metrics) for name, metrics in evaluation.sets.items()}
        curves: dict[str, dict[str, dict]] = {}
        if self.config.exposure_bias is not None and who == "student" and models.teacher is not None:
            require_ability(models.teacher, "sample", "eval.exposure_bias")
            for name in self.sets:
                metrics, curve = self._exposure_bias(name, models, rollouts)
                sets[name] |= metrics
                curves.setdefault("exposure_bias", {})[name] = curve
        for name in self.labels:
            metrics, curve = self._calibration(name, models, who)
            sets[name] = {**sets.get(name, {}), **metrics}
            curves.setdefault("calibration", {})[name] = curve
        for name, metrics in self._preference(models, rollouts, who):
            sets[name] = {**sets.get(name, {}), **metrics}
        added = dict.fromkeys(
            key for name, one in sets.items() for key in one if key not in evaluation.sets.get(name, {})
        )
        mean = {key: statistics.fmean(one[key] for one in sets.values() if key in one) for key in added}
        return replace(evaluation, sets=sets, mean={**evaluation.mean, **mean}, curves={**evaluation.curves, **curves})

    def _exposure_bias(
        self, name: str, models: Models, rollouts: Rollouts
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        lengths, draws = self.config.exposure_bias.lengths, range(self.config.exposure_bias.samples)
        on_student, on_teacher = [], []
        for draw in draws:
            on_student += self._forward_kl(name, models, self._answers(name, rollouts, "student", draw))
            on_teacher += self._forward_kl(name, models, self._answers(name, rollouts, "teacher", draw))
        error = accumulated_error(on_student, on_teacher, max(lengths))
        metrics = {f"excess_error_{length}": error.excess(length) for length in lengths}
        return metrics, {"on_student": error.on_student.tolist(), "on_teacher": error.on_teacher.tolist()}

    def _answers(self, name: str, rollouts: Rollouts, who: Who, draw: int) -> list[Answer]:
        length = max(self.config.exposure_bias.lengths)
        return self._sampled("exposure bias", name, rollouts, who, Sampling(length), draw)

    def _sampled(
        self, what: str, name: str, rollouts: Rollouts, who: Who, sampling: Sampling, draw: int
    ) -> list[Answer]:
        """The answers of one model to a set; those of the teacher are kept."""
        if who == "teacher" and (what, name, draw) in self._teacher_answers:
            return self._teacher_answers[what, name, draw]
        examples = self.sets[name].examples
        answers = rollouts.sample(
            [example.prompt_for(who) for example in examples],
            sampling,
            keys=[example.index for example in examples],
            extras=[example.extras for example in examples],
            seed=zlib.crc32(f"{what} {self.seed} {name}".encode()),
            draw=draw,
            who=who,
            batch_size=self.config.batch_size,
            progress=lambda done: self.report_progress(f"{what} on {name}", done, len(examples)),
        )
        if who == "teacher":
            self._teacher_answers[what, name, draw] = answers
        return answers

    def _preference(self, models: Models, rollouts: Rollouts, who: Who) -> Iterator[tuple[str, dict[str, float]]]:
        """The margins of every set of pairs. A teacher is compared with nobody but on given pairs, without the reference."""
        keys = self.config.preference
        if keys is None or (who == "teacher" and not keys.reference_free):
            return
        if not keys.reference_free:
            require_ability(models.teacher, "read", "eval.preference")
        subject = models if who == "student" else models.teacher_alone()
        for name, pairs in self.pairs.items():
            yield name, pair_margins(subject, pairs, keys, batch_size=self.config.batch_size)
        if keys.sampled and who == "student":
            require_ability(models.teacher, "sample", "eval.preference.sampled")
            for name in self.sets:
                pairs = self._sampled_pairs(name, rollouts)
                yield name, pair_margins(models, pairs, keys, batch_size=self.config.batch_size)

    def _sampled_pairs(self, name: str, rollouts: Rollouts) -> list[AnswerPair]:
        """An answer of the teacher before one of the student, to every prompt with every seed of the evaluation."""
        examples, pairs = self.sets[name].examples, []
        for seed in self.config.seeds:
            chosen, rejected = (
                self._sampled("preference", name, rollouts, who, Sampling(self.config.max_new_tokens), seed)
                for who in ("teacher", "student")
            )
            pairs += [
                AnswerPair(example.index, example.answered(one.response), example.answered(other.response))
                for example, one, other in zip(examples, chosen, rejected, strict=True)
            ]
        return pairs

    def _forward_kl(self, name: str, models: Models, answers: list[Answer]) -> list[Tensor]:
        sequences = [
            example.answered(answer.response) for example, answer in zip(self.sets[name].examples, answers, strict=True)
        ]
        return token_statistics(models, sequences, ("forward_kl",), batch_size=self.config.batch_size)["forward_kl"]

    def _calibration(self, name: str, models: Models, who: Who) -> tuple[dict[str, float], dict[str, list]]:
        subject = models if who == "student" else models.teacher_alone()
        questions = self.labels[name].questions
        sequences = [TokenSequence(question.prompt_ids, ids) for question in questions for ids in question.word_ids]
        stats = token_statistics(
            replace(subject, teacher=None), sequences, ("student_logprob",), batch_size=self.config.batch_size
        )
        sums = torch.stack([vector.double().sum() for vector in stats["student_logprob"]])
        found = calibration(sums.reshape(len(questions), -1), torch.tensor([question.label for question in questions]))
        curve = {"counts": found.counts, "confidence": found.confidence, "correct": found.correct}
        return {"accuracy": found.accuracy, "ece": found.ece}, curve
