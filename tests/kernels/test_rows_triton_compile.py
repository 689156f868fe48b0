"""Every specialisation of the kernels over rows and tiles of logits that the library launches compiles for Hopper, without spilling a register.

No GPU takes part: a process of its own, without the interpreter, records what the launchers would launch, compiles it
for sm_90 and reads registers, stack and local memory off the machine code.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

STATISTICS = {
    "token_stats": dict(),
    "student_alone": dict(fields=("student_logprob", "student_entropy"), teacher=False),
    "cross_entropy": dict(fields=("student_logprob",), teacher=False),
    "reverse_kl": dict(fields=("reverse_kl",)),
    "forward_kl": dict(fields=("forward_kl",)),
    "jsd": dict(fields=("jsd",)),
    "skew_forward_kl": dict(fields=("skew_forward_kl",)),
    "skew_reverse_kl": dict(fields=("skew_reverse_kl",)),
    "tvd": dict(fields=("tvd",)),
    "interpolated_cross_entropy": dict(fields=("interpolated_cross_entropy",)),
    "odd_vocabulary": dict(vocab_size=50257),
    "temperature": dict(temperature=2.0),
    "softcap": dict(softcap=30.0),
    "everything": dict(fields="all", softcap=30.0, vocab_size=50257),
    "one_row": dict(rows=1),
    "one_id": dict(vocab_size=1),
}
GRADIENTS = {
    "minillm": dict(fields=("student_logprob", "reverse_kl")),
    "minillm_odd_vocabulary": dict(fields=("student_logprob", "reverse_kl"), vocab_size=50257),
    "student_alone": dict(fields=("student_logprob", "student_entropy"), teacher=False),
    "cross_entropy": dict(fields=("student_logprob",), teacher=False),
    "reverse_kl_fp32": dict(fields=("reverse_kl",), grad_dtype="float32"),
    "forward_kl": dict(fields=("forward_kl",)),
    "jsd": dict(fields=("jsd",)),
    "skew_forward_kl": dict(fields=("skew_forward_kl",)),
    "skew_reverse_kl": dict(fields=("skew_reverse_kl",)),
    "tvd": dict(fields=("tvd",)),
    "interpolated_cross_entropy": dict(fields=("interpolated_cross_entropy",)),
    "temperature_fp16": dict(fields=("student_logprob", "reverse_kl"), temperature=2.0, grad_dtype="float16"),
    "softcap": dict(fields=("student_logprob", "reverse_kl"), softcap=30.0),
    "token_stats": dict(fields=("student_logprob", "reverse_kl", "forward_kl", "student_entropy")),
    "everything": dict(fields="all", vocab_size=50257),
    "one_row": dict(fields=("student_logprob", "reverse_kl"), rows=1),
    "one_id": dict(fields=("student_logprob", "reverse_kl"), vocab_size=1),
}
TILES = {
    "token_stats": dict(),
    "reverse_kl": dict(fields=("reverse_kl",)),
    "cross_entropy": dict(fields=("student_logprob",), teacher=False),
    "softcap": dict(softcap=30.0),
    "narrow": dict(width=384),
    "one_id": dict(width=1),
}
SOFTCAPS = {
    "first": dict(),
    "added": dict(first=False),
    "gradient": dict(gradient=True),
    "odd_vocabulary": dict(vocab_size=50257),
}
ONE_LAUNCH = {
    **{
        name: dict(fields=(name,)) for name in ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
    },
    "tvd": dict(fields=("tvd",)),
    "interpolated_cross_entropy": dict(fields=("interpolated_cross_entropy",)),
    "cross_entropy": dict(fields=("student_logprob",), teacher=False),
    "odd_vocabulary": dict(fields=("reverse_kl",), vocab_size=50257),
    "softcap": dict(fields=("reverse_kl",), softcap=30.0),
}


def report(folder: Path) -> dict[str, dict[str, int]]:
    """Compiles every case; run in a process without the interpreter."""
    from minillm.benchmarks.offline import Recorder, compile_for_hopper, resources
    from minillm.kernels import rows_triton, tile_sums_triton
    from minillm.kernels.chunks import TILE_IDS
    from minillm.kernels.divergences import FIELDS, RowSpec
    from minillm.kernels.share_sums import ShareSums
    from minillm.kernels.token_stats import TokenStats

    statistics, gradients = Recorder(rows_triton.statistics_kernel), Recorder(rows_triton.gradient_kernel)
    rows_triton.statistics_kernel, rows_triton.gradient_kernel = statistics, gradients
    names, eight = [], tuple(TokenStats.__annotations__)[:8]
    both = Recorder(rows_triton.both_kernel)
    rows_triton.both_kernel = both
    for kind, cases in (("statistics", STATISTICS), ("gradients", GRADIENTS), ("one launch", ONE_LAUNCH)):
        for name, case in cases.items():
            fields = case.get("fields", eight)
            fields = tuple(FIELDS) if fields == "all" else fields
            softcap = case.get("softcap")
            spec = RowSpec(
                fields, temperature=case.get("temperature", 1.0), student_softcap=softcap, teacher_softcap=softcap
            )
            vocab_size = case.get("vocab_size", 151936)
            rows = case.get("rows", 2)
            student, teacher = torch.empty(2, rows, -(-vocab_size // 16) * 16)[:, :, :vocab_size]
            teacher = teacher if case.get("teacher", True) else None
            labels = torch.zeros(rows, dtype=torch.int64)
            names.append(f"{kind}: {name}")
            if kind == "one launch":
                known = dict.fromkeys(fields, 1.0)
                rows_triton.row_known_gradients(student, teacher, labels, spec, known, torch.bfloat16)
                continue
            result = rows_triton.row_statistics(student, teacher, labels, spec)
            if kind == "gradients":
                statistics.launches.pop()
                coefficients = {field: torch.ones(rows) for field in fields if FIELDS[field].differentiable}
                dtype = getattr(torch, case.get("grad_dtype", "bfloat16"))
                rows_triton.row_gradients(student, teacher, labels, result, coefficients, spec, dtype)
    tiles = Recorder(tile_sums_triton.tile_sums_kernel)
    tile_sums_triton.tile_sums_kernel = tiles
    for name, case in TILES.items():
        softcap = case.get("softcap")
        spec = RowSpec(case.get("fields", eight), student_softcap=softcap, teacher_softcap=softcap)
        student, teacher = torch.empty(2, 2, TILE_IDS)[:, :, : case.get("width", TILE_IDS)]
        with_teacher = case.get("teacher", True)
        sums = ShareSums(spec, teacher=with_teacher, shares=75, rows=2, device=torch.device("cpu"))
        labels = torch.zeros(2, dtype=torch.int64)
        place = dict(share=3, rows=slice(0, 2), first=3 * TILE_IDS, block=TILE_IDS)
        tile_sums_triton.tile_sums(student, teacher if with_teacher else None, labels, sums, **place)
        names.append(f"tiles: {name}")
    capped, sloped = Recorder(rows_triton.add_softcapped_kernel), Recorder(rows_triton.softcap_gradient_kernel)
    rows_triton.add_softcapped_kernel, rows_triton.softcap_gradient_kernel = capped, sloped
    for gradient in (False, True):
        for name, case in SOFTCAPS.items():
            if case.get("gradient", False) != gradient:
                continue
            vocab_size = case.get("vocab_size", 151936)
            total, raw = torch.empty(2, 2, -(-vocab_size // 16) * 16)[:, :, :vocab_size]
            if gradient:
                rows_triton.softcap_gradient(total, raw, 0.5, 30.0)
            else:
                rows_triton.add_softcapped(total, raw, 0.5, 30.0, first=case.get("first", True))
            names.append(f"softcaps: {name}")
    compiled = [
        compile_for_hopper(recorder.kernel, args, kwargs)
        for recorder in (statistics, gradients, both, tiles, capped, sloped)
        for args, kwargs in recorder.launches
    ]
    found = {name: resources(kernel, folder) for name, kernel in zip(names, compiled, strict=True)}
    for name, kernel in zip(names, compiled, strict=True):  # of single numbers, and what orders them
        found[name]["order"] = re.findall(r"bar\.sync|st\.global\.b32|ld\.global\.b32", kernel.asm["ptx"])
    return found


@pytest.fixture(scope="module")
def compiled(run_apart) -> dict[str, dict[str, int]]:
    return run_apart(__file__)


KINDS = {
    "softcaps": SOFTCAPS,
    "statistics": STATISTICS,
    "gradients": GRADIENTS,
    "one launch": ONE_LAUNCH,
    "tiles": TILES,
}
CASES = [f"{kind}: {name}" for kind, cases in KINDS.items() for name in cases]


@pytest.mark.parametrize("case", CASES)
def test_no_register_goes_to_local_memory(compiled, case):
    usage = compiled[case]
    assert usage["stack"] == usage["local"] == 0, usage


@pytest.mark.parametrize("case", CASES)
def test_two_programs_fit_on_a_multiprocessor(compiled, case):
    # 65,536 registers over 2 programs of 8 warps, or one launch's 16; fewer threads could not keep the memory busy
    limit = 255 if case.endswith("everything") else 64 if case.startswith("one launch") else 128
    assert compiled[case]["registers"] <= limit, compiled[case]


def reads_two_models(case: str) -> bool:
    alone = "alone" in case or case.endswith(": cross_entropy")
    return not alone and case not in ("softcaps: first", "softcaps: odd_vocabulary")


@pytest.mark.parametrize("case", [c for c in CASES if "everything" not in c and "one_id" not in c])
def test_loads_are_16_bytes_wide(compiled, case):
    assert compiled[case]["wide_loads"] >= (2 if reads_two_models(case) else 1), compiled[case]


@pytest.mark.parametrize("case", ["reverse_kl", "jsd", "cross_entropy"])
def test_statistics_are_written_before_any_thread_reads_them(compiled, case):
    """One launch goes through memory from the one to the other; the interpreter runs everything in order anyway."""
    order = compiled[f"one launch: {case}"]["order"]
    last = len(order) - 1 - order[::-1].index("st.global.b32")
    assert order[last + 1] == "bar.sync" and order[last + 2] == "ld.global.b32", order


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]))))
