"""The kernel benchmark from end to end at a tiny shape, its inputs, its oracle and its tables."""

import csv
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm.benchmarks import kernels, measure, tables
from minillm.benchmarks.cases import IGNORED, LOSSES, Case, make_inputs, oracle, suite, token_loss
from minillm.benchmarks.providers import PROVIDERS, Unavailable

CPU = torch.device("cpu")
TINY = dict(tokens=24, student_hidden=16, teacher_hidden=24, vocab=90, dtype="float32")


@pytest.mark.parametrize("sizes", [(16, 24), (24, 16), (16, 16)])
def test_inputs_are_those_of_a_student_that_has_learnt_something(sizes):
    case = Case("reverse_kl", 512, *sizes, vocab=1000, dtype="float32", ignored=0.25)
    inputs = make_inputs(case, CPU)
    student = inputs.student_hidden.detach() @ inputs.student_weight.detach().t()
    teacher = inputs.teacher_hidden @ inputs.teacher_weight.t()
    assert 2 < student.std() < 5
    assert torch.corrcoef(torch.stack((student.flatten(), teacher.flatten())))[0, 1] > 0.9
    assert 0.01 < token_loss(case, student, teacher, inputs.labels.clamp(min=0), inputs.advantages).mean() < 0.5
    assert (inputs.labels == IGNORED).sum() == 128 == case.tokens - case.kept
    assert torch.equal(make_inputs(case, CPU).student_weight, inputs.student_weight)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("provider", ["minillm_torch", "eager", "checkpointed"])
def test_providers_compute_what_the_oracle_computes(tmp_path, provider, loss, ignored):
    case = Case(loss, ignored=ignored, **TINY)
    inputs = make_inputs(case, CPU)
    truth = tmp_path / "truth.pt"
    torch.save(oracle(inputs), truth)
    run = measure.runner(PROVIDERS[provider](inputs), inputs, "full")
    errors = measure.compare(run(), inputs, truth, "full")
    assert set(errors) == set(tables.ERRORS)
    assert max(errors.values()) < 1e-5, errors
    measure.clear(inputs)
    wrong = measure.runner(
        PROVIDERS[provider](make_inputs(Case(loss, ignored=ignored, seed=1, **TINY), CPU)), inputs, "forward"
    )
    assert measure.compare(wrong(), inputs, truth, "forward")["loss_error"] > 1e-3


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "cross_entropy"])
@pytest.mark.parametrize("provider", ["minillm_torch", "eager", "checkpointed"])
def test_providers_take_a_teacher_that_is_known_by_its_likeliest_ids(tmp_path, provider, loss):
    case = Case(loss, ignored=0.5, top_k=7, **TINY)
    inputs, truth = make_inputs(case, CPU), tmp_path / "truth.pt"
    torch.save(oracle(inputs), truth)
    run = measure.runner(PROVIDERS[provider](inputs), inputs, "full")
    errors = measure.compare(run(), inputs, truth, "full")
    assert set(errors) == set(tables.ERRORS) and max(errors.values()) < 1e-5, errors
    dense = measure.runner(PROVIDERS[provider](make_inputs(Case(loss, ignored=0.5, **TINY), CPU)), inputs, "forward")
    assert measure.compare(dense(), inputs, truth, "forward")["loss_error"] > 1e-4
    for other in ("liger_chunked", "trl"):
        with pytest.raises(Unavailable, match="takes no top-k teacher"):
            PROVIDERS[other](inputs)


def test_what_cannot_run_says_why():
    inputs = make_inputs(Case("reverse_kl", **TINY), CPU)
    for provider in ("minillm_triton", "minillm_tiled", "liger_fused"):
        with pytest.raises(Unavailable, match="CUDA"):
            PROVIDERS[provider](inputs)
    with pytest.raises(Unavailable, match="does not compute reverse_kl"):
        PROVIDERS["cce"](inputs)
    for provider, module in (("trl", "trl"), ("liger_chunked", "liger_kernel")):
        if not _installed(module):
            with pytest.raises(Unavailable, match=f"{module} is not installed"):
                PROVIDERS[provider](inputs)


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_sees_what_is_freed_again_and_not_what_was_there():
    there = torch.ones(8 * 2**20)

    def run():
        return torch.ones(16 * 2**20).sum() + there[0]

    peak = measure.peak_bytes(run, CPU)
    assert 60 * 2**20 < peak < 80 * 2**20, peak


def test_floating_point_operations():
    case = Case("reverse_kl", 10, 3, 5, 7, ignored=0.5)
    assert case.flops("forward") == 2 * 5 * 7 * (3 + 5)
    assert case.flops("full") == 2 * 5 * 7 * (3 * 3 + 5)
    assert Case("cross_entropy", 10, 3, 5, 7).flops("full") == 2 * 10 * 7 * 3 * 3
    assert Case("reverse_kl", 10, 3, 5, 7, top_k=2).flops("full") == 2 * 10 * 7 * 3 * 3


@pytest.mark.parametrize("loss", ["reverse_kl", "cross_entropy"])
@pytest.mark.parametrize("mode", ["full", "forward"])
def test_the_yardstick_runs_those_products_alone(loss, mode):
    case = Case(loss, ignored=0.5, **TINY)
    run = measure.runner(PROVIDERS["matmuls"](make_inputs(case, CPU)), make_inputs(case, CPU), mode)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == case.flops(mode)


def test_the_yardstick_takes_half_precision_on_a_cpu():
    """In fp32: a CPU has no product of half precision with an fp32 result."""
    inputs = make_inputs(Case("reverse_kl", ignored=0.5, **{**TINY, "dtype": "bfloat16"}), CPU)
    for _ in range(2):
        measure.runner(PROVIDERS["matmuls"](inputs), inputs, "full")()
    assert inputs.student_weight.grad.dtype == torch.bfloat16


def test_quantiles():
    assert tables.quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    assert tables.quantile([4.0], 0.8) == 4.0
    assert math.isclose(tables.quantile([0.0, 1.0], 0.8), 0.8)


def test_suites_have_distinct_cases():
    for device in ("cpu", "cuda"):
        names = [case.name for case in suite(device)]
        assert len(set(names)) == len(names)


def test_end_to_end(tmp_path, capsys):
    out = tmp_path / "results"
    status = kernels.main(
        "--device cpu --losses reverse_kl --tokens 24 48 --shape 16 24 90 --dtype float32 --ignored 0.5 --threads 1 "
        "--top-k 0 5 "
        f"--repeats 1 --runs 2 --providers minillm_torch eager minillm_triton --output {out}".split()
    )
    assert status == 0
    page = (out / "results.md").read_text(encoding="utf-8")
    assert "minillm_triton: needs a CUDA device" in page
    assert torch.__version__ in page
    assert "reverse_kl-48x16_24x90-float32-ignored50-top5" in capsys.readouterr().out
    with (out / "results.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert set(lines[0]) == set(tables.COLUMNS)
    metrics = {(line["kernel_provider"], line["kernel_operation_mode"], line["metric_name"]) for line in lines}
    for provider in ("minillm_torch", "eager", "matmuls"):
        for mode in measure.MODES:
            assert {(provider, mode, "speed"), (provider, mode, "ratio_to_matmuls")} <= metrics
    assert ("minillm_torch", "full", "weight_grad_error") in metrics
    assert not any(provider == "minillm_triton" for provider, _, _ in metrics)
    for line in lines:
        assert float(line["y_value_20"]) <= float(line["y_value_50"]) <= float(line["y_value_80"])
    if _installed("matplotlib"):
        assert len(list(out.glob("*.png"))) == 6  # a plot a case, and two over tokens


def test_a_provider_that_dies_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    arguments = kernels._parser().parse_args(["--timeout", "60"])
    monkeypatch.setattr(kernels.sys, "executable", _dying(tmp_path))
    cases = [Case("reverse_kl", **TINY), Case("jsd", **TINY)]
    job = {"provider": "eager", "cases": [case.as_dict() for case in cases]}
    first, second = kernels._process(job, arguments, tmp_path)
    assert first["case"] == cases[0].name and "status 9: out of memory" in first["skipped"]
    assert second["skipped"].startswith("not reached")


def _dying(folder) -> str:
    program = folder / "python"
    program.write_text("#!/bin/sh\necho out of memory >&2\nexit 9\n", encoding="utf-8")
    program.chmod(0o755)
    return str(program)


def test_needs_neither_pydantic_nor_transformers():
    code = (
        "import sys; import minillm.benchmarks.kernels; "
        "print([m for m in ('pydantic', 'transformers', 'deepspeed', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_an_unknown_case_is_an_error(capsys):
    assert kernels.main(["--device", "cpu", "--match", "no such case"]) == 2
    assert "--list" in capsys.readouterr().err


def test_busy_processes_hold_their_cores_for_as_long_as_it_takes(monkeypatch):
    started, popen = [], kernels.subprocess.Popen
    monkeypatch.setattr(kernels.subprocess, "Popen", lambda command: started.append(popen(command)) or started[-1])
    with pytest.raises(RuntimeError), kernels._busy(2):
        ran_before = [_cpu_ticks(process.pid) for process in started]
        deadline = time.monotonic() + 30
        while not all(_cpu_ticks(p.pid) > ran + 5 for p, ran in zip(started, ran_before, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise RuntimeError
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def _cpu_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11])
