"""Labels of answers beside those of references: as texts, as equations, and where one of them has none."""

import json

import pytest

from minillm import UserError
from minillm.config.data import JsonlPrompts
from minillm.config.evaluation import EvalConfig, LabelAccuracy
from minillm.data.instructions import Example, PromptSet, load_prompts
from minillm.evaluate.evaluator import Evaluator
from minillm.evaluate.label_accuracy import LabelScorer
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local.local_rollouts import LocalRollouts


def prompts(*references: tuple[str, ...], parser=None) -> PromptSet:
    examples = [Example(index, [3 + index], [], "", one) for index, one in enumerate(references)]
    return PromptSet(examples, 0, "made up", parser)


def score(texts, references, *, of_references=None, **keys):
    return LabelScorer(LabelAccuracy(**keys), prompts(*references, parser=of_references), "eval.sets.a").score(texts)


def test_labels_that_end_a_text_are_compared_whatever_led_to_them():
    found = score(
        ["So 1 + 1. #### 2", "#### 3", "2", "#### TWO!", "#### 2"],
        [("Add. #### 2",), ("Add. #### 2",), ("Add. #### 2",), ("#### 4", "#### two"), ("no label",)],
        parser="gsm8k",
        of_references="gsm8k",
    )
    assert found == {"label_accuracy": [100.0, 0.0, 0.0, 100.0, None], "unlabelled_share": [0.0, 0.0, 1.0, 0.0, None]}


def test_an_answer_may_be_the_label_where_the_reference_ends_in_it():
    found = score([" 2 ", "3", " "], [("Add. #### 2",)] * 3, of_references="gsm8k")
    assert found == {"label_accuracy": [100.0, 0.0, 0.0], "unlabelled_share": [0.0, 0.0, 1.0]}


def test_equations_are_compared_by_their_exact_value():
    answers = ["5", "(8 - 3)", "5.00", "10/2", "5.0000000001", "exec()", "9**9**9", "$1,000"]
    found = score(answers, [("( 8.0 - 3.0 )",)] * 7 + [("1000.0",)], compare="equation")
    assert found["label_accuracy"] == [100.0, 100.0, 100.0, 100.0, 0.0, 0.0, 0.0, 100.0]
    assert found["unlabelled_share"] == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]


def test_equations_of_svamp_are_scored_by_their_values(assets, tmp_path):
    """Answers that reason and end in the equation of the record, or in another one."""
    records = json.loads((assets / "data" / "svamp" / "SVAMP.json").read_text(encoding="utf-8"))
    path = tmp_path / "svamp.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    keys = {"question": "{Body} {Question}", "answer": "{Equation}", "template": "none", "max_prompt_length": 600}
    found = load_prompts(JsonlPrompts(path=str(path), **keys), byte_tokenizer(), name="eval.sets.svamp")
    assert len(found) == 1000 and found[0].references == ("( 76.0 - 25.0 )",)
    scorer = LabelScorer(LabelAccuracy(compare="equation", parser="svamp"), found, "eval.sets.svamp")
    right = scorer.score([f"We see. The answer is ({one.references[0]})." for one in found])
    assert set(right["label_accuracy"]) == {100.0}
    wrong = scorer.score([f"We see. The answer is ({one.references[0]} + 1)." for one in found])
    assert set(wrong["label_accuracy"]) == {0.0} and set(wrong["unlabelled_share"]) == {0.0}


@pytest.mark.parametrize(
    "references, of_references, compare, message",
    [
        ([(), ()], None, "text", "eval.sets.a: no label to compare with.*there are no references"),
        ([("x",)], "svamp", "text", "the parser svamp finds none"),
        ([("1",), ("five",)], None, "equation", "the label 'five' of prompt 2 is no equation"),
    ],
)
def test_a_set_that_cannot_be_scored_is_named_before_anything_is_sampled(references, of_references, compare, message):
    config = EvalConfig(label_accuracy=LabelAccuracy(compare=compare))
    with pytest.raises(UserError, match=message):
        Evaluator({"a": prompts(*references, parser=of_references)}, config, seed=1)


def test_an_evaluation_reports_it_for_students_and_teachers(make_models, monkeypatch):
    models = make_models()
    rollouts, real = LocalRollouts(models), LocalRollouts.sample

    def sample(self, asked, *arguments, keys, **options):
        answers = real(self, asked, *arguments, keys=keys, **options)
        for key, answer in zip(keys, answers, strict=True):
            answer.response[:] = [1 + key, models.eos_ids[0]][: 1 + (key > 0)]
        return answers

    monkeypatch.setattr(LocalRollouts, "sample", sample)
    monkeypatch.setattr(Evaluator, "_measure_samples", lambda *arguments: None)
    monkeypatch.setattr(Evaluator, "_measure_teacher_samples", lambda *arguments: None)
    config = EvalConfig(label_accuracy=LabelAccuracy(), max_new_tokens=2, seeds=[1, 2])
    texts = [models.tokenizer.decode([1 + key]) for key in range(4)]
    evaluator = Evaluator({"a": prompts((texts[0],), (texts[1],), ("7", "8"), ())}, config, seed=1)
    for who in ("student", "teacher"):
        found = evaluator.evaluate(models, rollouts, who).mean
        assert found["label_accuracy"] == pytest.approx(200 / 3) and found["unlabelled_share"] == 0, who
