"""The margin of held-out pairs, against eager float64 full logits, given and sampled."""

import math
from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.config.analysis_keys import Preference
from minillm.config.evaluation import EvalConfig
from minillm.data.instructions import Example, PromptSet
from minillm.data.pairs import AnswerPair
from minillm.evaluate.analyses import Analyses
from minillm.evaluate.evaluator import Evaluation
from minillm.evaluate.pair_margins import pair_margins
from minillm.models.batch import TokenSequence
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.teachers.local import LocalTeacher

PROMPT = [3, 4]
PAIRS = [
    AnswerPair(0, TokenSequence(PROMPT, [5, 6, 0]), TokenSequence(PROMPT, [7])),  # lengths that differ
    AnswerPair(1, TokenSequence([8], [2, 9]), TokenSequence([8], [10, 11, 12, 0])),
    AnswerPair(2, TokenSequence([1, 2, 3], [4]), TokenSequence([1, 2, 3], [])),  # nothing was said
]
SETS = {"words": PromptSet([Example(3, [3, 4, 5], [6, 0], "a", ("w6",)), Example(5, [8], [2, 0], "b", ("w2",))], 0, "")}


def log_ratio(models, eager_logprobs, sequence: TokenSequence, keys: Preference) -> float:
    """The score of an answer in float64, from full logits."""

    def logprob(model) -> float:
        found = eager_logprobs(model, sequence)
        return found.gather(1, torch.tensor(sequence.response)[:, None]).sum().item()

    if not sequence.response:
        return 0.0
    total = logprob(models.student) - (0.0 if keys.reference_free else logprob(models.teacher.model))
    return total / len(sequence.response) if keys.length_norm else total


def expected(models, eager_logprobs, pairs: list[AnswerPair], keys: Preference) -> dict[str, float]:
    margins = [
        log_ratio(models, eager_logprobs, pair.chosen, keys) - log_ratio(models, eager_logprobs, pair.rejected, keys)
        for pair in pairs
    ]
    preferred = sum(margin > 0 for margin in margins) / len(margins)
    return {"margin_nats": pytest.approx(sum(margins) / len(margins), abs=1e-4), "preferred_share": preferred}


def analyses(keys: Preference, seeds: tuple[int, ...] = (1,)) -> Analyses:
    config = EvalConfig(max_new_tokens=4, batch_size=2, seeds=list(seeds), preference=keys)
    return Analyses(SETS, {}, config, {"given": PAIRS}, seed=0)


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("reference_free", [True, False])
def test_margins_are_those_of_full_logits(make_models, eager_logprobs, length_norm, reference_free):
    keys = Preference(length_norm=length_norm, reference_free=reference_free)
    models = make_models(teacher=not reference_free)
    found = pair_margins(models, PAIRS, keys, batch_size=2)
    assert found == expected(models, eager_logprobs, PAIRS, keys)
    assert abs(found["margin_nats"]) > 0.01  # the pairs differ
    turned = [AnswerPair(pair.key, pair.rejected, pair.chosen) for pair in PAIRS]
    other = pair_margins(models, turned, keys, batch_size=2)
    assert other["margin_nats"] == pytest.approx(-found["margin_nats"])
    assert other["preferred_share"] == pytest.approx(1 - found["preferred_share"])


def test_a_student_that_is_its_teacher_prefers_neither(make_models):
    models = make_models()
    models = replace(models, teacher=LocalTeacher(models.student))
    assert pair_margins(models, PAIRS, Preference(), batch_size=2) == {"margin_nats": 0.0, "preferred_share": 0.0}


def test_sampled_pairs_are_the_teachers_answer_before_the_students(make_models, eager_logprobs, monkeypatch):
    models, keys, drawn, real = make_models(), Preference(sampled=True), {}, LocalRollouts.sample

    def spy(rollouts, prompts, sampling, **options):
        answers = real(rollouts, prompts, sampling, **options)
        drawn.setdefault((options["who"], options["draw"]), []).append(answers)
        return answers

    monkeypatch.setattr(LocalRollouts, "sample", spy)
    one = analyses(keys, seeds=(1, 2))
    before = Evaluation({"words": {"rouge_l": 1.0}}, {"rouge_l": 1.0}, [])
    found, again = (one.add_to(before, models, LocalRollouts(models)) for _ in range(2))
    assert found.sets == again.sets
    assert {key: len(value) for key, value in drawn.items()} == {
        ("teacher", 1): 1, ("teacher", 2): 1, ("student", 1): 2, ("student", 2): 2
    }  # fmt: skip  # the teacher's answers are kept
    pairs = [
        AnswerPair(0, *(TokenSequence(answer.prompt, answer.response) for answer in both))
        for draw in (1, 2)
        for both in zip(drawn["teacher", draw][0], drawn["student", draw][0], strict=True)
    ]
    assert len(pairs) == 4
    assert found.sets["words"] == {"rouge_l": 1.0, **expected(models, eager_logprobs, pairs, keys)}
    assert found.sets["given"] == expected(models, eager_logprobs, PAIRS, keys)
    mean = (found.sets["words"]["margin_nats"] + found.sets["given"]["margin_nats"]) / 2
    assert found.mean["margin_nats"] == pytest.approx(mean) and found.mean["rouge_l"] == 1.0


def test_the_margin_of_sampled_pairs_is_minus_both_divergences(make_models, eager_logprobs):
    """In expectation over every answer of one token, which the first token alone decides."""
    models, keys = make_models(), Preference(length_norm=False)
    q, p = (eager_logprobs(model, TokenSequence(PROMPT, [0]))[0] for model in (models.student, models.teacher.model))
    scores = [
        pair_margins(
            models,
            [AnswerPair(0, TokenSequence(PROMPT, [one]), TokenSequence(PROMPT, []))],  # an empty answer scores 0
            keys,
            batch_size=1,
        )["margin_nats"]
        for one in range(len(q))
    ]
    # the shared ids of a padded teacher are normalised among themselves
    expectation = sum((math.exp(a) - math.exp(b)) * score for a, b, score in zip(p, q, scores, strict=True))
    divergences = (p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum()
    assert expectation == pytest.approx(-divergences.item(), abs=1e-4)


def test_the_teacher_is_compared_without_itself_as_the_reference(make_models, eager_logprobs):
    models = make_models()
    nothing = Evaluation({"words": {}}, {}, [])
    with_itself = analyses(Preference(sampled=True)).add_to(nothing, models, LocalRollouts(models), "teacher")
    assert with_itself.mean == {}
    keys = Preference(reference_free=True)
    alone = analyses(keys).add_to(nothing, models, LocalRollouts(models), "teacher")
    models = replace(models, student=models.teacher.model)
    assert alone.sets["given"] == expected(models, eager_logprobs, PAIRS, keys)


def test_a_teacher_that_only_reads_has_no_sampled_pairs(make_models):
    models = make_models()
    models.teacher.abilities = frozenset({"hidden", "evaluate", "read"})
    with pytest.raises(UserError, match="eval.preference.sampled needs a teacher that can"):
        analyses(Preference(sampled=True)).add_to(Evaluation({"words": {}}, {}, []), models, LocalRollouts(models))
