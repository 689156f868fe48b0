"""Compiling a launch of a Triton kernel for Hopper on a machine without a GPU, and reading what it will cost.

Needs a process without TRITON_INTERPRET.
"""

import re
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")  # tensor cores, and what feeds them


class Recorder:
    """Stands in for a Triton kernel: keeps the arguments of a launch instead of launching."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def compile_for_hopper(kernel, args: tuple, kwargs: dict):
    """The compiled kernel of one launch, specialised as Triton's launcher would."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    pointers = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64", "int32": "*i32"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[str(value.dtype).removeprefix("torch.")]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            element = pointers[str(value.base.dtype).removeprefix("torch.")][1:]
            signature[parameter.name] = f"tensordesc<{element}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=HOPPER, options=options)


def resources(compiled, folder: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory (0 where no register goes there), and shared memory, as cuobjdump
    reads them, and loads of 16 bytes."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    registers, stack, local = (int(number) for number in found.groups())
    wide = len(re.findall(r"ld\.global[^;]*\.v4\.b32|ld\.global[^;]*\.v2\.b64", compiled.asm["ptx"]))
    return dict(registers=registers, stack=stack, local=local, shared=compiled.metadata.shared, wide_loads=wide)


def instructions(compiled, folder: Path) -> dict[str, int]:
    """The number of each of INSTRUCTIONS in the machine code, which takes as long to read as a small kernel to compile."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    code = subprocess.run([CUOBJDUMP, "-sass", binary], capture_output=True, text=True, check=True).stdout
    return {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
