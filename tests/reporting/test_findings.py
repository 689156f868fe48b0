"""What measurements say: verdicts on stages of equal time, and warnings of a collapse."""

import pytest

from tests.reporting.made_up import ARMS, DOCUMENT, Run, arms, rows

COLLAPSE = {"reverse_kl_nats": 0.3, "forward_kl_nats": 2.0, "entropy_nats": 0.1}


def test_equal_time_gets_a_verdict_with_the_ratios(tmp_path):
    report = arms(tmp_path / "run").report()
    (verdict,) = [line for line in report.splitlines() if line.startswith("**minillm against kd")]
    assert "minillm: 2 min 00 s, 4 steps, 400 student tokens; kd: 2 min 00 s, 12 steps, 1,200 student tokens" in verdict
    assert "minillm is ahead in Reverse KL and Rouge-L. kd is ahead in Forward KL." in verdict
    assert "Reverse KL 0.500 to 0.800 nats/token (ratio 0.625)" in verdict
    assert "Forward KL 1.25 to 1.00 nats/token (ratio 1.25)" in verdict
    assert "Rouge-L 21.0 to 19.5 (+1.50)" in verdict
    assert "One evaluation seed" in verdict


def test_no_verdict_between_stages_that_start_from_different_students(tmp_path):
    stages = {**ARMS["stages"], "kd": {**ARMS["stages"]["kd"], "student": {"path": "models/small"}}}
    assert "against kd" not in arms(tmp_path / "run", stages=stages).report()


def test_a_difference_within_the_deviation_over_seeds_is_level(tmp_path):
    run = arms(tmp_path / "run")
    run.evaluate("minillm", 4, rouge_l=21.0, rouge_l_std=1.0, loss_nats=2.0, loss_nats_std=0.01)
    run.evaluate("kd", 12, rouge_l=20.0, rouge_l_std=1.0, loss_nats=1.9, loss_nats_std=0.01)
    report = run.report()
    assert "kd is ahead in Loss on references. They are level in Rouge-L." in report
    assert "Rouge-L 21.0 ± 1.0 to 20.0 ± 1.0 (+1.00)" in report
    assert rows(report)["after kd"]["Rouge-L (F1 × 100) ↑"] == "20.0 ± 1.0"


@pytest.mark.parametrize(
    ("end", "warned"),
    [
        (COLLAPSE, True),
        ({**COLLAPSE, "reverse_kl_nats": 1.7}, False),  # it did not fall
        ({**COLLAPSE, "forward_kl_nats": 1.3}, False),  # it did not rise
        ({**COLLAPSE, "entropy_nats": 1.5}, False),  # it is still there
        ({"reverse_kl_nats": 0.3}, False),  # not known
    ],
)
def test_collapse_is_warned_of(tmp_path, end, warned):
    run = Run(tmp_path / "run", DOCUMENT)
    run.evaluate("main", 0, reverse_kl_nats=1.6, forward_kl_nats=1.3, entropy_nats=2.0)
    run.train("main", 4)
    run.evaluate("main", 4, **end)
    report = run.report()
    assert ("looks collapsed" in report) == warned
    if warned:
        assert "from 1.60 to 0.300 nats a token" in report and "entropy fell from 2.00 to 0.100" in report


def test_a_stage_is_compared_with_what_its_student_was_before_it(tmp_path):
    run = arms(tmp_path / "run")
    run.evaluate("kd", 12, **{**COLLAPSE, "forward_kl_nats": 1.5})  # above warmup's last 1.3, below its first 2.5
    assert "Warning: kd looks collapsed" in run.report()
