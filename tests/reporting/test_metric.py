"""How metrics are called whose names hold a number, and in which order they are shown."""

import pytest

from minillm.reporting.metric import find_metric, metrics_in


@pytest.mark.parametrize(
    ("key", "heading"),
    [
        ("rouge_l", "Rouge-L (F1 × 100) ↑"),
        ("rouge_l_0_5", "Rouge-L, references of 0 to 5 tokens (F1 × 100) ↑"),
        ("rouge_l_11_up", "Rouge-L, references from 11 tokens (F1 × 100) ↑"),
        ("distinct_4", "Distinct 4-grams (%)"),
        ("excess_error_128", "Excess error at 128 tokens (%) ↓"),
        ("margin_nats", "Margin of the preferred answer (nats) ↑"),
        ("preferred_share", "Pairs in their order (%) ↑"),
        ("ece", "Expected calibration error (0 to 1) ↓"),
    ],
)
def test_headings(key, heading):
    assert find_metric(key).heading == heading


def test_deviations_and_unknown_keys_are_no_metrics():
    assert find_metric("rouge_l_std") is None and find_metric("distinct_4_std") is None and find_metric("x") is None


def test_the_usual_ones_come_first():
    means = [{"distinct_4": 1.0, "rouge_l": 1.0, "rouge_l_std": 0.1}, {"ece": 0.1, "reverse_kl_nats": 1.0}]
    assert [metric.key for metric in metrics_in(means)] == ["reverse_kl_nats", "rouge_l", "distinct_4", "ece"]
