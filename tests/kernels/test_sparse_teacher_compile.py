"""The launches of a TopK teacher compile for Hopper without spilling a register: of the tail, and of its k + 1 outcomes.

As in `test_rows_triton_compile`: no GPU takes part.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

CASES = {
    "reverse_kl": dict(fields=("reverse_kl",)),
    "jsd": dict(fields=("jsd",), vocab_size=50257),
    "minillm": dict(fields=("student_logprob", "reverse_kl"), temperature=2.0, grad_dtype="float16"),
    "everything": dict(fields="sayable", softcap=30.0),
    "one_id": dict(fields=("reverse_kl",), vocab_size=1, k=1),
}
LAUNCHES = ("tail", "outcome_statistics", "outcome_gradients", "tail_gradients")


def report(folder: Path) -> dict[str, dict[str, int]]:
    """Compiles every case; run in a process without the interpreter."""
    from minillm.benchmarks.offline import Recorder, compile_for_hopper, resources
    from minillm.kernels import rows_triton, sparse_teacher_triton
    from minillm.kernels.divergences import FIELDS, RowSpec
    from minillm.kernels.sparse_teacher import SAYABLE, SparseRows

    tails = Recorder(sparse_teacher_triton.tail_kernel)
    statistics, gradients = Recorder(rows_triton.statistics_kernel), Recorder(rows_triton.gradient_kernel)
    sparse_teacher_triton.tail_kernel = tails
    rows_triton.statistics_kernel, rows_triton.gradient_kernel = statistics, gradients
    found = {}
    for name, case in CASES.items():
        fields = SAYABLE if case["fields"] == "sayable" else case["fields"]
        vocab_size, k = case.get("vocab_size", 151936), case.get("k", 64)
        spec = RowSpec(fields, temperature=case.get("temperature", 1.0), student_softcap=case.get("softcap"))
        student = torch.empty(2, -(-vocab_size // 16) * 16)[:, :vocab_size]
        teacher = SparseRows(torch.arange(k).repeat(2, 1), torch.full((2, k), -9.0))
        labels = torch.zeros(2, dtype=torch.int64)
        rows = sparse_teacher_triton.ROWS
        result = rows.row_statistics(student, teacher, labels, spec)
        coefficients = {field: torch.ones(2) for field in fields if FIELDS[field].differentiable}
        dtype = getattr(torch, case.get("grad_dtype", "bfloat16"))
        rows.row_gradients(student, teacher, labels, result, coefficients, spec, dtype)
        recorders = tails, statistics, gradients, gradients
        launched = [recorder.launches.pop(0) for recorder in recorders]
        assert not any(recorder.launches for recorder in recorders), name
        for launch, recorder, (args, kwargs) in zip(LAUNCHES, recorders, launched, strict=True):
            found[f"{name}: {launch}"] = resources(compile_for_hopper(recorder.kernel, args, kwargs), folder)
    return found


@pytest.fixture(scope="module")
def compiled(run_apart) -> dict[str, dict[str, int]]:
    return run_apart(__file__)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("case", CASES)
def test_no_register_goes_to_local_memory(compiled, case, launch):
    usage = compiled[f"{case}: {launch}"]
    # every field at once keeps one word on the stack, in a launch over k + 1 outcomes, which has no loop to slow down
    words = 1 if (case, launch) == ("everything", "outcome_gradients") else 0
    assert usage["local"] == 0 and usage["stack"] <= 8 * words, usage


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("case", CASES)
def test_two_programs_fit_on_a_multiprocessor(compiled, case, launch):
    limit = 255 if case == "everything" and launch.startswith("outcome") else 128  # 8 warps, 65,536 registers
    assert compiled[f"{case}: {launch}"]["registers"] <= limit


@pytest.mark.parametrize("launch", ["tail", "tail_gradients"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("one_id", "everything")])
def test_loads_of_whole_rows_are_16_bytes_wide(compiled, case, launch):
    assert compiled[f"{case}: {launch}"]["wide_loads"] >= 1


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]))))
