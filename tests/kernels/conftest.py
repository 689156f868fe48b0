"""For the kernel tests: problems of any shape, the float64 oracle on full logits, and every backend that runs here."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from minillm.kernels import reference
from minillm.kernels.divergences import FIELDS
from minillm.losses import LMHead

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _exists(name: str) -> bool:
    return importlib.util.find_spec(f"minillm.kernels.{name}") is not None


BACKENDS = ["torch"]
if _exists("rows_triton") and importlib.util.find_spec("triton") is not None:
    BACKENDS.append("triton")


@pytest.fixture(scope="session", autouse=True)
def interpreted():
    """Launches under Triton's interpreter are faster; see tests.interpreted."""
    if "triton" in BACKENDS and DEVICE == "cpu":
        from triton.runtime import interpreter

        from tests.interpreted import quicken

        quicken(interpreter)


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(params=[*BACKENDS, *(["tiled"] if "triton" in BACKENDS else [])])
def engine(request) -> str:
    """Every backend, also the one that does not offer everything."""
    return request.param


@dataclass
class Case:
    """Inputs of a fused loss. Leaves of the student require grad."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    student_options: dict = field(default_factory=dict)  # logit_scale, softcap
    teacher_options: dict = field(default_factory=dict)
    temperature: float = 1.0
    beta: float = 0.3
    alpha: float = 0.15
    interpolation: float = 0.6
    vocab_size: int | None = None

    @property
    def arguments(self) -> tuple:
        """The first five arguments of linear_token_stats."""
        return (
            self.student_hidden,
            LMHead(self.student_weight, self.student_bias, **self.student_options),
            self.teacher_hidden,
            LMHead(self.teacher_weight, self.teacher_bias, **self.teacher_options),
            self.labels,
        )

    @property
    def options(self) -> dict:
        return {
            "temperature": self.temperature,
            "beta": self.beta,
            "alpha": self.alpha,
            "interpolation": self.interpolation,
            "vocab_size": self.vocab_size,
        }

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.student_hidden, "weight": self.student_weight, "bias": self.student_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def kept(self) -> Tensor:
        return self.labels.flatten() != -100

    def with_(self, **changes) -> "Case":
        return replace(self, **changes)

    def doubled(self) -> "Case":
        """The same numbers in float64, with leaves of its own."""

        def double(tensor: Tensor | None, leaf: bool) -> Tensor | None:
            return None if tensor is None else tensor.detach().double().requires_grad_(leaf)

        return replace(
            self,
            student_hidden=double(self.student_hidden, True),
            student_weight=double(self.student_weight, True),
            student_bias=double(self.student_bias, True),
            teacher_hidden=double(self.teacher_hidden, False),
            teacher_weight=double(self.teacher_weight, False),
            teacher_bias=double(self.teacher_bias, False),
        )


def make_case(
    *,
    rows: int | tuple[int, ...] = 13,
    vocab: int = 113,
    hidden: int = 16,
    teacher_hidden: int = 24,
    teacher_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
    ignored: float = 0.3,
    bias: bool = False,
    spread: float = 3.0,
    noise: float = 0.5,
    seed: int = 0,
    device: str = DEVICE,
    **changes,
) -> Case:
    """Logits of standard deviation `spread`; a teacher that is the student plus noise, in a hidden size of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows,) if isinstance(rows, int) else rows
    teacher_vocab = teacher_vocab or vocab

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    student_hidden = normal(*shape, hidden)
    student_weight = normal(vocab, hidden) * (spread / hidden**0.5)
    shared = min(hidden, teacher_hidden)
    teacher_states = noise * normal(*shape, teacher_hidden)
    teacher_states[..., :shared] += student_hidden[..., :shared]
    teacher_weight = noise * normal(teacher_vocab, teacher_hidden) * (spread / hidden**0.5)
    both = min(vocab, teacher_vocab)
    teacher_weight[:both, :shared] += student_weight[:both, :shared]
    labels = torch.randint(0, min(both, changes.get("vocab_size") or both), shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100

    def put(tensor: Tensor, leaf: bool = False) -> Tensor:
        return tensor.to(device=device, dtype=dtype).requires_grad_(leaf)

    return Case(
        student_hidden=put(student_hidden, True),
        student_weight=put(student_weight, True),
        student_bias=put(normal(vocab), True) if bias else None,
        teacher_hidden=put(teacher_states),
        teacher_weight=put(teacher_weight),
        teacher_bias=put(normal(teacher_vocab)) if bias else None,
        labels=labels.to(device),
        **changes,
    )


def oracle(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every statistic of the kept rows, (K,) float64 with a graph to the leaves, which come second, by name."""
    case = case.doubled()
    kept, size = case.kept, case.vocab_size or case.student_weight.shape[0]

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict) -> Tensor:
        return reference.logits(
            hidden.flatten(0, -2)[kept],
            weight[:size],
            None if bias is None else bias[:size],
            temperature=case.temperature,
            **options,
        )

    student = logits(case.student_hidden, case.student_weight, case.student_bias, case.student_options)
    teacher = logits(case.teacher_hidden, case.teacher_weight, case.teacher_bias, case.teacher_options)
    labels = case.labels.flatten()[kept]
    weights = dict(beta=case.beta, alpha=case.alpha, interpolation=case.interpolation)
    return reference.token_stats(student, teacher, labels, **weights), case.leaves


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)


DIFFERENTIABLE = [name for name, entry in FIELDS.items() if entry.differentiable]


@pytest.fixture(scope="session")
def kit():
    """The helpers of this file, for test modules."""
    return SimpleNamespace(
        make_case=make_case,
        oracle=oracle,
        relative_error=relative_error,
        differentiable=DIFFERENTIABLE,
        backends=BACKENDS,
        interpreted=lambda backend: backend != "torch" and DEVICE == "cpu",
        device=DEVICE,
    )


@pytest.fixture(scope="session")
def run_apart(tmp_path_factory):
    """run_apart(FILE): what `python FILE FOLDER` prints as JSON, in a process where Triton compiles instead of interpreting.

    Of several workers of pytest the first does it for all.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def run(file: str) -> dict:
        folder = shared / Path(file).stem
        printed = folder / "printed.json"
        with FileLock(shared / f"{folder.name}.lock"):
            if not printed.exists():
                folder.mkdir(exist_ok=True)
                environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
                environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
                done = subprocess.run(
                    [sys.executable, file, str(folder)], env=environment, capture_output=True, text=True, timeout=600
                )
                assert done.returncode == 0, done.stderr
                printed.write_text(done.stdout)
        return json.loads(printed.read_text())

    return run
