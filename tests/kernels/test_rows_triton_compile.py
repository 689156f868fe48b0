"""Every specialisation of the row kernels that the library launches compiles for Hopper, without spilling a register.

No GPU takes part: a process of its own, without the interpreter, records what the launchers would launch, compiles it
for sm_90 and reads registers, stack and local memory off the machine code.
"""

import json
import os
import re
import subprocess
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
    "odd_vocabulary": dict(vocab_size=50257),
    "temperature": dict(temperature=2.0),
    "softcap": dict(softcap=30.0),
    "everything": dict(fields="all", softcap=30.0, vocab_size=50257),
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
    "temperature_fp16": dict(fields=("student_logprob", "reverse_kl"), temperature=2.0, grad_dtype="float16"),
    "softcap": dict(fields=("student_logprob", "reverse_kl"), softcap=30.0),
    "token_stats": dict(fields=("student_logprob", "reverse_kl", "forward_kl", "student_entropy")),
    "everything": dict(fields="all", vocab_size=50257),
}


class Recorder:
    """Stands in for a Triton kernel: keeps the arguments of a launch instead of launching."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def compile_for_hopper(kernel, args: tuple, kwargs: dict):
    """The compiled kernel of one launch, specialised as Triton's launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    pointers = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64", "int32": "*i32"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[str(value.dtype).removeprefix("torch.")]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled, folder: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory, and shared memory, as cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    registers, stack, local = (int(number) for number in found.groups())
    code = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("STL", "LDL", "HGMMA", "UTMALDG")}
    wide = len(re.findall(r"\bLDG\.E\.128\b|\bLDG\.E(?:\.\w+)*\.128\b", code))
    return (
        dict(registers=registers, stack=stack, local=local, shared=compiled.metadata.shared, wide_loads=wide) | counts
    )


def report(folder: Path) -> dict[str, dict[str, int]]:
    """Compiles every case; run in a process without the interpreter."""
    from minillm.kernels import rows_triton
    from minillm.kernels.divergences import FIELDS, RowSpec
    from minillm.kernels.token_stats import TokenStats

    statistics, gradients = Recorder(rows_triton.statistics_kernel), Recorder(rows_triton.gradient_kernel)
    rows_triton.statistics_kernel, rows_triton.gradient_kernel = statistics, gradients
    names = []
    for kind, cases in (("statistics", STATISTICS), ("gradients", GRADIENTS)):
        for name, case in cases.items():
            fields = case.get("fields", tuple(TokenStats.__annotations__)[:8])
            fields = tuple(FIELDS) if fields == "all" else fields
            softcap = case.get("softcap")
            spec = RowSpec(
                fields, temperature=case.get("temperature", 1.0), student_softcap=softcap, teacher_softcap=softcap
            )
            vocab_size = case.get("vocab_size", 151936)
            student = torch.empty(2, -(-vocab_size // 16) * 16)[:, :vocab_size]
            teacher = torch.empty(2, -(-vocab_size // 16) * 16)[:, :vocab_size] if case.get("teacher", True) else None
            labels = torch.zeros(2, dtype=torch.int64)
            result = rows_triton.row_statistics(student, teacher, labels, spec)
            if kind == "gradients":
                statistics.launches.pop()
                coefficients = {field: torch.ones(2) for field in fields if FIELDS[field].differentiable}
                dtype = getattr(torch, case.get("grad_dtype", "bfloat16"))
                rows_triton.row_gradients(student, teacher, labels, result, coefficients, spec, dtype)
            names.append(f"{kind}: {name}")
    compiled = [
        compile_for_hopper(recorder.kernel, args, kwargs)
        for recorder in (statistics, gradients)
        for args, kwargs in recorder.launches
    ]
    return {name: resources(kernel, folder) for name, kernel in zip(names, compiled, strict=True)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("sm_90")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = [f"statistics: {name}" for name in STATISTICS] + [f"gradients: {name}" for name in GRADIENTS]


@pytest.mark.parametrize("case", CASES)
def test_no_register_goes_to_local_memory(compiled, case):
    usage = compiled[case]
    assert usage["STL"] == usage["LDL"] == usage["local"] == 0, usage


@pytest.mark.parametrize("case", CASES)
def test_two_programs_fit_on_a_multiprocessor(compiled, case):
    # 65,536 registers over 2 programs of 8 warps; fewer threads could not keep the memory busy
    limit = 255 if case.endswith("everything") else 128
    assert compiled[case]["registers"] <= limit, compiled[case]


@pytest.mark.parametrize("case", [c for c in CASES if "everything" not in c])
def test_loads_are_16_bytes_wide(compiled, case):
    assert compiled[case]["wide_loads"] >= (1 if "alone" in case or "cross_entropy" in case else 2), compiled[case]


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]))))
