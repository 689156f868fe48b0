"""The analyses on tiny models, against eager full logits of the answers that were sampled."""

import pytest
import torch

from minillm import UserError
from minillm.config.evaluation import EvalConfig
from minillm.data.instructions import Example, PromptSet
from minillm.data.labels import LabelSet, Question
from minillm.evaluate.analyses import Analyses
from minillm.evaluate.calibration import calibration
from minillm.evaluate.evaluator import Evaluation, Evaluator
from minillm.models.batch import TokenSequence
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.teachers.pair import Models

SETS = {
    "words": PromptSet(
        [Example(3, [3, 4, 5], [6, 7, 0], "a", ("w6 w7",)), Example(5, [8], [2, 0], "b", ("w2",))], 0, ""
    )
}
LABELS = {"moods": LabelSet([Question([1, 2], [[5], [6, 7]], 1), Question([4], [[5], [6, 7]], 0)], 0)}


def config(**keys) -> EvalConfig:
    return EvalConfig(max_new_tokens=4, batch_size=2, seeds=[1], **keys)


def add(analyses: Analyses, evaluation: Evaluation, models: Models, who: str = "student") -> Evaluation:
    return analyses.add_to(evaluation, models, LocalRollouts(models), who)


@pytest.fixture
def drawn(monkeypatch) -> list[dict]:
    made, real = [], LocalRollouts.sample

    def spy(rollouts, prompts, sampling, **options):
        answers = real(rollouts, prompts, sampling, **options)
        made.append({"who": options["who"], "draw": options["draw"], "answers": answers})
        return answers

    monkeypatch.setattr(LocalRollouts, "sample", spy)
    return made


def test_exposure_bias_is_the_forward_kl_summed_along_the_answers(make_models, eager_logprobs, drawn):
    models = make_models()
    keys = config(exposure_bias={"lengths": [1, 3], "samples": 2})
    before = Evaluation({"words": {"rouge_l": 1.0}}, {"rouge_l": 1.0}, [])
    found = add(Analyses(SETS, {}, keys, seed=0), before, models)
    totals = {}
    for who in ("student", "teacher"):
        answers = [answer for one in drawn if one["who"] == who for answer in one["answers"]]
        assert len(answers) == 4  # two prompts, two draws
        for length in (1, 3):
            sums = []
            for answer in answers:
                sequence = TokenSequence(answer.prompt, answer.response)
                p, q = (eager_logprobs(model, sequence) for model in (models.teacher.model, models.student))
                sums.append((p.exp() * (p - q)).sum(1)[:length].sum().item())
            totals[who, length] = sum(sums) / 4
    for length in (1, 3):
        expected = 100 * (totals["student", length] / totals["teacher", length] - 1)
        assert found.sets["words"][f"excess_error_{length}"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert found.mean[f"excess_error_{length}"] == found.sets["words"][f"excess_error_{length}"]
    assert found.mean["rouge_l"] == 1.0 and found.sets["words"]["rouge_l"] == 1.0
    assert found.sets["words"]["excess_error_1"] == pytest.approx(
        0, abs=1e-4
    )  # the same prompts before the first token
    curve = found.curves["exposure_bias"]["words"]
    assert curve["on_student"][2] == pytest.approx(totals["student", 3], rel=1e-4) and len(curve["on_teacher"]) == 3


def test_draws_differ_and_the_teacher_answers_once(make_models, drawn):
    models, keys = make_models(), config(exposure_bias={"lengths": [6], "samples": 2})
    analyses = Analyses(SETS, {}, keys, seed=0)
    for _ in range(2):
        add(analyses, Evaluation({"words": {}}, {}, []), models)
    assert [(one["who"], one["draw"]) for one in drawn] == [
        ("student", 0), ("teacher", 0), ("student", 1), ("teacher", 1), ("student", 0), ("student", 1)
    ]  # fmt: skip
    first, second = ([answer.response for answer in drawn[place]["answers"]] for place in (0, 2))
    assert first != second and first == [answer.response for answer in drawn[4]["answers"]]


def test_a_teacher_and_a_student_alone_have_no_exposure_bias(make_models):
    keys = config(exposure_bias={"lengths": [2]})
    nothing = Evaluation({"words": {}}, {}, [])
    assert add(Analyses(SETS, {}, keys, seed=0), nothing, make_models(), "teacher").mean == {}
    assert add(Analyses(SETS, {}, keys, seed=0), nothing, make_models(teacher=False)).mean == {}


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_calibration_compares_the_words_as_answers(make_models, eager_logprobs, who):
    models = make_models()
    found = add(Analyses({}, LABELS, config(), seed=0), Evaluation({}, {}, []), models, who)

    def logprob(prompt: list[int], ids: list[int]) -> float:
        logprobs = eager_logprobs(models.model(who), TokenSequence(prompt, ids))
        return logprobs.gather(1, torch.tensor(ids)[:, None]).sum().item()

    sums = [[logprob(question.prompt_ids, ids) for ids in question.word_ids] for question in LABELS["moods"].questions]
    expected = calibration(torch.tensor(sums), torch.tensor([1, 0]))
    assert found.sets["moods"] == {"accuracy": expected.accuracy, "ece": pytest.approx(expected.ece, abs=1e-5)}
    assert found.mean == found.sets["moods"] and found.curves["calibration"]["moods"]["counts"] == expected.counts


def test_the_evaluator_counts_n_grams_and_buckets_where_asked(make_models):
    keys = config(distinct=[1, 2], length_buckets=[1])
    models = make_models()
    found = Evaluator(SETS, keys, seed=0).evaluate(models, LocalRollouts(models)).sets["words"]
    assert 0 < found["distinct_1"] <= 100 and 0 < found["distinct_2"] <= 100
    assert found["rouge_l"] == pytest.approx((found["rouge_l_0_1"] + found["rouge_l_2_up"]) / 2)


def test_exposure_bias_needs_a_teacher_that_answers(make_models):
    models = make_models()
    models.teacher.abilities = frozenset({"hidden", "evaluate", "read"})
    analyses = Analyses(SETS, {}, config(exposure_bias={"lengths": [1], "samples": 1}), seed=0)
    with pytest.raises(UserError, match="eval.exposure_bias needs a teacher that can"):
        add(analyses, Evaluation({"words": {}}, {}, []), models)
