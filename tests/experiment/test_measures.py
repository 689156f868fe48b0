"""The columns that an experiment's table may have."""

import pytest

from minillm.config.evaluation import EvalConfig
from minillm.experiment.measures import known_measures, metric_of

SETS = {name: {"type": "pydoc"} for name in ("a", "b")}


def evaluation(**keys) -> EvalConfig:
    return EvalConfig.model_validate({"sets": SETS, **keys})


def test_measures_follow_what_is_evaluated():
    plain = known_measures(evaluation())
    assert plain["rouge_l"] == ["a", "b"] and plain["train_seconds"] == []
    assert not {"distinct_2", "accuracy", "excess_error_8"} & plain.keys()
    labels = {"path": "x", "question": "{text}", "label": "label", "words": ["no", "yes"]}
    more = known_measures(
        evaluation(distinct=[2], length_buckets=[5], exposure_bias={"lengths": [8]}, calibration={"sst2": labels})
    )
    assert more["distinct_2"] == more["excess_error_8"] == ["a", "b"] and more["accuracy"] == ["sst2"]
    assert {key for key in more if key.startswith("rouge_l_")} == {"rouge_l_0_5", "rouge_l_6_up"}
    pairs = known_measures(evaluation(preference={"pairs": {"held": {"path": "x"}}, "sampled": True}))
    assert pairs["margin_nats"] == pairs["preferred_share"] == ["held", "a", "b"] and "margin_nats" not in plain
    assert all(metric_of(measure) is not None for measure in more)


@pytest.mark.parametrize(
    ("measure", "heading"),
    [
        ("reverse_kl_nats", "Reverse KL (nats/token) ↓"),
        ("rouge_l@dolly", "dolly: Rouge-L (F1 × 100) ↑"),
        ("distinct_4@dolly", "dolly: Distinct 4-grams (%)"),
        ("student_tokens", "Trained on (student tokens)"),
    ],
)
def test_a_measure_is_named_with_its_set(measure, heading):
    assert metric_of(measure).heading == heading
