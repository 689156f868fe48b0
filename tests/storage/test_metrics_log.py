"""metrics.jsonl: what is in it after kills, resumes and numbers that JSON has no word for."""

import json
import math

import numpy as np
import pytest
import torch

from minillm.storage.metrics_log import METRICS, SAMPLES, MetricsLog, read_numbers, read_records


def train_record(step: int, **values) -> dict:
    return {"kind": "train", "stage": "main", "step": step, "stage_step": step, "seconds": float(step), **values}


def eval_record(step: int, **metrics) -> dict:
    return {
        "kind": "eval", "stage": "main", "step": step, "stage_step": step, "seconds": 0.0, "who": "student",
        "sets": {"dolly": metrics}, "mean": metrics,
    }  # fmt: skip


def strict(line: str) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_every_line_is_on_the_disk_before_the_next_step(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2):
            log.write(train_record(step))
            lines = (tmp_path / METRICS).read_text().splitlines()
            assert [strict(line)["step"] for line in lines] == list(range(1, step + 1))


def test_a_resumed_run_reads_as_if_it_had_never_stopped(tmp_path):
    def write(log, steps):
        for step in steps:
            log.write(train_record(step, loss=1 / step))
            log.sample({"step": step, "answer": f"née {step}"})

    with MetricsLog(tmp_path / "unbroken") as log:
        write(log, range(1, 6))
    with MetricsLog(tmp_path / "resumed") as log:
        write(log, (1, 2, 3))
        state = json.loads(json.dumps(log.state()))
        write(log, (4,))
    with (tmp_path / "resumed" / METRICS).open("ab") as file:
        file.write(b'{"kind": "train", "st')  # killed in the middle of a line
    with MetricsLog(tmp_path / "resumed") as log:
        log.truncate(state)
        write(log, (4, 5))
    for name in (METRICS, SAMPLES):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_without_a_recorded_state_both_files_start_anew(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(train_record(1))
        log.sample({"answer": "x"})
        log.truncate({})
        log.write(train_record(1, loss=2.0))
    assert read_records(tmp_path / METRICS) == [train_record(1, loss=2.0)]
    assert read_records(tmp_path / SAMPLES) == []


def test_a_file_that_lost_its_tail_keeps_its_whole_lines(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(train_record(step))
        state = log.state()
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-5])
    with MetricsLog(tmp_path) as log:
        log.truncate(state)
        log.write(train_record(4))
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_numbers_that_are_not_finite_stay_valid_json_and_come_back(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(eval_record(1, rouge_l=math.nan, reverse_kl_nats=math.inf, forward_kl_nats=-math.inf))
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    numbers = read_numbers(strict(line)["mean"])
    assert math.isnan(numbers["rouge_l"])
    assert (numbers["reverse_kl_nats"], numbers["forward_kl_nats"]) == (math.inf, -math.inf)


def test_numbers_of_torch_and_numpy_are_written_as_numbers(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(
            train_record(
                1, a=torch.tensor(0.5), b=np.float32(0.25), c=np.int64(3), d=np.float64("inf"), e=[np.int32(1)]
            )
        )
    record = strict((tmp_path / METRICS).read_text())
    assert (record["a"], record["b"], record["c"], record["d"], record["e"]) == (0.5, 0.25, 3, "Infinity", [1])


def test_any_text_can_be_a_sample(tmp_path):
    answer = "a\u2028b\nc\ud800"  # a line separator, a line end, half a surrogate pair
    with MetricsLog(tmp_path) as log:
        log.sample({"answer": answer})
        log.sample({"answer": "next"})
    assert [record["answer"] for record in read_records(tmp_path / SAMPLES)] == [answer, "next"]


def test_reading_passes_over_a_cut_last_line_and_names_any_other(tmp_path):
    path = tmp_path / METRICS
    assert read_records(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_records(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_records(path)


def test_tensorboard_has_the_numbers_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        for step in (1, 2):
            log.write(train_record(step, loss=float(step)))
        log.write(eval_record(2, rouge_l=20.0))
        state = log.state()
        log.write(train_record(3, loss=-1.0))
        log.write(train_record(4, loss=-1.0))
    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        log.truncate(state)
        log.write(train_record(3, loss=3.0))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("main/train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [event.value for event in board.Scalars("main/eval/student/dolly/rouge_l")] == [20.0]


def test_no_tensorboard_where_it_is_not_asked_for(tmp_path):
    with MetricsLog(tmp_path, []) as log:
        log.write(train_record(1, loss=1.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, SAMPLES]
