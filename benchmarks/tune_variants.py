"""The variants that `minillm bench tune` times: the machine's ceilings, and the kernels with every size that is worth a try."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from minillm.benchmarks.cases import Inputs
from minillm.kernels import arguments, chunks
from minillm.kernels.divergences import RowSpec
from minillm.kernels.head import HeadGradients, LMHead, project
from minillm.losses import linear_divergence

MIB = 2**20
FIELDS = ("student_logprob", "reverse_kl")  # what a MiniLLM step reads

Settings = tuple[tuple[ModuleType, str, object], ...]


@dataclass(frozen=True)
class Variant:
    """One thing to time, under some constants."""

    part: str
    name: str
    run: Callable[[], object]
    amount: float  # floating-point operations or bytes
    unit: str  # TFLOP/s or GB/s
    settings: Settings = ()
    current: bool = False  # what the code does now
    result: Callable[[], Tensor] | None = None  # to compare variants of a part by; None: the run's own

    def value(self) -> Tensor:
        with applied(self.settings):
            return (self.result or self.run)()


@contextlib.contextmanager
def applied(settings: Settings) -> Iterator[None]:
    """Constants of modules set to other values for a while."""
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def ceilings(inputs: Inputs) -> Iterator[Variant]:
    """A copy, and the four products of a chunk in the layouts in which the losses call them."""
    case, device = inputs.case, inputs.labels.device
    source = torch.randn(MIB * (256 if device.type == "cuda" else 1), device=device)
    target = torch.empty_like(source)
    yield Variant("ceilings", "copy", lambda: target.copy_(source), 2 * source.nbytes, "GB/s")
    student, teacher = inputs.student_hidden.detach(), inputs.teacher_hidden
    weight, dtype = inputs.student_weight.detach(), inputs.student_hidden.dtype
    for rows in sorted({min(rows, case.tokens) for rows in (512, 1024, 2048, 4096)}):
        out = chunks.logits_buffer(rows, case.vocab, torch.float32, device)
        sums = HeadGradients(
            student,
            weight,
            None,
            needs=(True, True, False),
            compute=dtype,
            logits=torch.float32,
            vocab_size=case.vocab,
            accumulation=torch.float32,
        )
        dz = out.normal_() if sums.dz_dtype == out.dtype else out.view(dtype)[:, : case.vocab].normal_()
        products = {
            "student's logits": lambda out=out, rows=rows: project(student[:rows], weight, None, dtype, out),
            "teacher's logits": lambda out=out, rows=rows: project(
                teacher[:rows], inputs.teacher_weight, None, dtype, out
            ),
            "gradients of hidden states and weight": lambda sums=sums, dz=dz, rows=rows: sums.add(
                dz, student[:rows], slice(0, rows)
            ),
        }
        sizes = (case.student_hidden, case.teacher_hidden, 2 * case.student_hidden)
        for (name, run), size in reversed(list(zip(products.items(), sizes, strict=True))):  # before dz is overwritten
            yield Variant("ceilings", f"{name}, {rows} rows", run, 2.0 * rows * case.vocab * size, "TFLOP/s")


def _chunk(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both models and labels of one chunk, as the losses would cut it."""
    case, device = inputs.case, inputs.labels.device
    rows = chunks.chunk_rows(case.kept, case.vocab, models=2, itemsize=4, device=device, chunk_bytes=None)
    student, teacher = (chunks.logits_buffer(rows, case.vocab, torch.float32, device) for _ in range(2))
    dtype = inputs.student_hidden.dtype
    project(inputs.student_hidden.detach()[:rows], inputs.student_weight.detach(), None, dtype, student)
    project(inputs.teacher_hidden[:rows], inputs.teacher_weight, None, dtype, teacher)
    return student, teacher, inputs.labels[:rows]


def statistics(inputs: Inputs) -> Iterator[Variant]:
    from minillm.kernels import rows_triton

    student, teacher, labels = _chunk(inputs)
    spec = RowSpec(FIELDS)
    used = rows_triton.STATISTICS_BLOCK, rows_triton.STATISTICS_WARPS

    def run() -> dict[str, Tensor]:
        return rows_triton.row_statistics(student, teacher, labels, spec)

    for block, warps in _first(used, [(b, w) for b in (512, 1024, 2048, 4096) for w in (4, 8, 16)]):
        yield Variant(
            "statistics",
            f"STATISTICS_BLOCK {block}, {warps} warps",
            run,
            8.0 * student.numel(),
            "GB/s",
            ((rows_triton, "STATISTICS_BLOCK", block), (rows_triton, "STATISTICS_WARPS", warps)),
            current=(block, warps) == used,
            result=lambda: run()["reverse_kl"],
        )


def gradients(inputs: Inputs) -> Iterator[Variant]:
    from minillm.kernels import rows_triton

    student, teacher, labels = _chunk(inputs)
    spec, dtype = RowSpec(FIELDS), inputs.student_hidden.dtype
    found = rows_triton.row_statistics(student, teacher, labels, spec)
    coefficients = {name: torch.ones_like(found["reverse_kl"]) for name in FIELDS}
    used = rows_triton.GRADIENT_BLOCK, rows_triton.GRADIENT_WARPS
    before = student.clone()

    def run() -> Tensor:  # over and over in the same memory: what the numbers are does not matter to the time
        return rows_triton.row_gradients(student, teacher, labels, found, coefficients, spec, dtype)

    def result() -> Tensor:
        student.copy_(before)
        return run().clone()

    for block, warps in _first(used, [(b, w) for b in (1024, 2048, 4096) for w in (4, 8, 16)]):
        yield Variant(
            "gradients",
            f"GRADIENT_BLOCK {block}, {warps} warps",
            run,
            (8.0 + dtype.itemsize) * student.numel(),
            "GB/s",
            ((rows_triton, "GRADIENT_BLOCK", block), (rows_triton, "GRADIENT_WARPS", warps)),
            current=(block, warps) == used,
            result=result,
        )


def launches(inputs: Inputs) -> Iterator[Variant]:
    """The reverse KL's statistics and gradient by one launch, and by two. The bytes are those of two."""
    from minillm.kernels import rows_triton

    student, teacher, labels = _chunk(inputs)
    spec, dtype, known = RowSpec(("reverse_kl",)), inputs.student_hidden.dtype, {"reverse_kl": 1.0}
    used = rows_triton.BOTH_BLOCK, rows_triton.BOTH_WARPS
    before = student.clone()

    def one() -> Tensor:
        return rows_triton.row_known_gradients(student, teacher, labels, spec, known, dtype)[1]

    def two() -> Tensor:
        found = rows_triton.row_statistics(student, teacher, labels, spec)
        weights = {name: torch.full_like(found[name], value) for name, value in known.items()}
        return rows_triton.row_gradients(student, teacher, labels, found, weights, spec, dtype)

    def result(run: Callable[[], Tensor]) -> Tensor:
        student.copy_(before)
        return run().clone()

    amount = (16.0 + dtype.itemsize) * student.numel()
    for block, warps in _first(used, [(b, w) for b in (1024, 2048, 4096) for w in (8, 16, 32)]):
        settings = (rows_triton, "BOTH_BLOCK", block), (rows_triton, "BOTH_WARPS", warps)
        name = f"one, BOTH_BLOCK {block}, {warps} warps"
        is_used = (block, warps) == used
        yield Variant("launches", name, one, amount, "GB/s", settings, is_used, lambda: result(one))
    yield Variant("launches", "two", two, amount, "GB/s", result=lambda: result(two))


def tiled(inputs: Inputs) -> Iterator[Variant]:
    from minillm.kernels import tiled_triton

    size = inputs.student_hidden.dtype.itemsize
    config, waves = tiled_triton.CONFIGS[size], tiled_triton.WAVES
    student = inputs.student_hidden.detach(), LMHead(inputs.student_weight.detach())
    teacher = inputs.teacher_hidden, LMHead(inputs.teacher_weight)

    def run() -> dict[str, Tensor]:
        return tiled_triton.tiled_stats(*student, *teacher, inputs.labels, RowSpec(FIELDS))

    shapes = [(128, 64, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (64, 256, 8), (128, 256, 8)]
    tried = [{**config, "BLOCK_M": m, "BLOCK_N": n, "num_warps": w} for m, n, w in shapes]
    tried += [{**config, "num_stages": stages} for stages in (2, 4)]
    variants = [(one, waves) for one in tried] + [(config, number) for number in (1, 2, 8)]
    for one, number in _first((config, waves), variants):
        tile = "{BLOCK_M} x {BLOCK_N} x {BLOCK_H}, {num_warps} warps, {num_stages} stages".format(**one)
        yield Variant(
            "tiled",
            f"{tile}, WAVES {number}",
            run,
            inputs.case.flops("forward"),
            "TFLOP/s",
            ((tiled_triton, "CONFIGS", {**tiled_triton.CONFIGS, size: one}), (tiled_triton, "WAVES", number)),
            current=(one, number) == (config, waves),
            result=lambda: run()["reverse_kl"],
        )


def losses(inputs: Inputs) -> Iterator[Variant]:
    """Forward and backward of the reverse KL: by chunks of several sizes, and by the tiled engine's tiles."""
    from minillm.kernels import tiles

    student = inputs.student_hidden, inputs.student_weight
    teacher = inputs.teacher_hidden, inputs.teacher_weight

    def run(backend: str, chunk_bytes: int | None) -> Tensor:
        for leaf in student:
            leaf.grad = None
        linear_divergence(*student, *teacher, backend=backend, chunk_bytes=chunk_bytes).backward()
        return inputs.student_hidden.grad

    flops, default = inputs.case.flops("full"), chunks.DEVICE_BUDGET
    for budget in _first(default, [320 * MIB, 640 * MIB, 1280 * MIB, 2560 * MIB]):
        yield Variant(
            "losses",
            f"triton, chunks of {budget // MIB} MiB",
            lambda budget=budget: run("triton", None if budget == default else budget),
            flops,
            "TFLOP/s",
            current=budget == default,
        )
    used = chunks.TILE_IDS, chunks.TILE_BYTES
    for ids, budget in _first(used, [(i, b * MIB) for i in (2048, 4096) for b in (32, 64, 128)]):
        yield Variant(
            "losses",
            f"tiled, TILE_IDS {ids}, tiles of {budget // MIB} MiB",
            lambda budget=budget: run("tiled", budget),
            flops,
            "TFLOP/s",
            ((arguments, "TILE_IDS", ids), (tiles, "TILE_IDS", ids)),
            current=(ids, budget) == used,
        )


def _first(used: object, variants: list) -> list:
    """The one in use before all others, which are compared with it."""
    return [used, *(one for one in variants if one != used)]


VARIANTS = {
    "ceilings": ceilings,
    "statistics": statistics,
    "gradients": gradients,
    "launches": launches,
    "tiled": tiled,
    "losses": losses,
}
