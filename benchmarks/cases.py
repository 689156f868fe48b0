"""The cases that are measured: a loss, shapes, a dtype; its inputs, drawn at random; and its exact value and gradients.

Logits have a standard deviation of `SPREAD`, a quarter of the rows twice that (peaked distributions), and the teacher's
differ from the student's by noise, so that the divergences are those of a student that has learnt something. Uniform
or zero inputs would flatter: the logits of positive inputs are all offset, and zeros draw less power.
"""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from minillm.kernels import reference
from minillm.losses import TopK

LOSSES = ("reverse_kl", "forward_kl", "jsd", "cross_entropy", "minillm")
IGNORED = -100
TOP_K = 64
SPREAD, NOISE = 2.5, 0.4  # standard deviations of the student's logits and of what the teacher's add to them
ORACLE_BYTES = 64 * 2**20  # of one float64 chunk of logits on a CPU
DEVICE_ORACLE_BYTES = 1024 * 2**20


@dataclass(frozen=True)
class Case:
    """One set of inputs and one loss: the mean over kept tokens of it."""

    loss: str  # of LOSSES; minillm is a policy gradient on the label plus the reverse KL, the project's own objective
    tokens: int
    student_hidden: int
    teacher_hidden: int
    vocab: int
    dtype: str = "bfloat16"
    ignored: float = 0.0  # share of tokens whose label is IGNORED
    beta: float = 0.5  # of the jsd
    seed: int = 0
    top_k: int = 0  # the teacher is known by so many of its likeliest ids; 0: by its hidden states and head

    @property
    def name(self) -> str:
        shape = f"{self.student_hidden}_{self.teacher_hidden}x{self.vocab}"
        name = f"{self.loss}-{self.tokens}x{shape}-{self.dtype}-ignored{round(100 * self.ignored)}"
        return f"{name}-top{self.top_k}" if self.top_k else name

    @property
    def kept(self) -> int:
        return self.tokens - round(self.tokens * self.ignored)

    @property
    def needs_teacher(self) -> bool:
        """True where the teacher's hidden states and head take part."""
        return self.loss != "cross_entropy" and not self.top_k

    def flops(self, mode: str) -> float:
        """Floating-point operations of the least matrix products that give exact results without kept logits."""
        student = 2 * self.kept * self.vocab * self.student_hidden
        teacher = 2 * self.kept * self.vocab * self.teacher_hidden if self.needs_teacher else 0
        return (3 if mode == "full" else 1) * student + teacher

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass
class Inputs:
    """The tensors of a case. Student tensors require grad."""

    case: Case
    student_hidden: Tensor  # (N, H_s)
    student_weight: Tensor  # (V, H_s)
    teacher_hidden: Tensor  # (N, H_t)
    teacher_weight: Tensor  # (V, H_t)
    labels: Tensor  # (N,) int64, IGNORED in ignored rows
    advantages: Tensor  # (N,) fp32, for the minillm loss
    top_k: TopK | None  # (N, k), int32 and fp32, where the case has one

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_weight

    def kept(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student rows, teacher rows, labels and advantages of kept tokens, for providers that do not drop rows."""
        if not self.case.ignored:
            return self.student_hidden, self.teacher_hidden, self.labels, self.advantages
        mask = self.labels != IGNORED
        return self.student_hidden[mask], self.teacher_hidden[mask], self.labels[mask], self.advantages[mask]

    def kept_top_k(self) -> tuple[Tensor, Tensor]:
        """ids, int64, and log-probabilities of kept tokens, likewise."""
        mask = self.labels != IGNORED
        return self.top_k.ids[mask].long(), self.top_k.logprobs[mask]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The same tensors for every provider: drawn on the device from the case's seed."""
    generator = torch.Generator(device).manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shared = min(case.student_hidden, case.teacher_hidden)
    scale = SPREAD / shared**0.5
    student_hidden = randn(case.tokens, case.student_hidden)
    peaked = torch.arange(case.tokens, device=device) % 4 == 0
    student_hidden *= torch.where(peaked, 2.0, 1.0)[:, None]
    student_weight = randn(case.vocab, case.student_hidden).mul_(scale)
    student_weight[:, shared:] *= NOISE / SPREAD
    teacher_hidden = randn(case.tokens, case.teacher_hidden)
    teacher_hidden[:, :shared] = student_hidden[:, :shared]
    teacher_weight = randn(case.vocab, case.teacher_hidden).mul_(scale * NOISE / SPREAD)
    extra = max(case.teacher_hidden - shared, 0)
    teacher_weight *= (shared / (shared + extra)) ** 0.5
    teacher_weight[:, :shared] += student_weight[:, :shared]
    labels = torch.randint(case.vocab, (case.tokens,), generator=generator, device=device)
    order = torch.randperm(case.tokens, generator=generator, device=device)
    labels[order[case.kept :]] = IGNORED
    teacher_hidden, teacher_weight = teacher_hidden.to(dtype), teacher_weight.to(dtype)
    return Inputs(
        case,
        student_hidden.to(dtype).requires_grad_(),
        student_weight.to(dtype).requires_grad_(),
        teacher_hidden,
        teacher_weight,
        labels,
        randn(case.tokens),
        _likeliest(case, teacher_hidden, teacher_weight) if case.top_k else None,
    )


def _likeliest(case: Case, hidden: Tensor, weight: Tensor) -> TopK:  # (N, H_t), (V, H_t)
    weight, parts = weight.float(), []
    for chunk in hidden.split(_oracle_rows(case, hidden.device)):
        parts.append((chunk.float() @ weight.t()).log_softmax(1).topk(case.top_k, 1))
    return TopK(torch.cat([part.indices for part in parts]).int(), torch.cat([part.values for part in parts]))


def _oracle_rows(case: Case, device: torch.device) -> int:
    return max(1, (ORACLE_BYTES if device.type == "cpu" else DEVICE_ORACLE_BYTES) // (8 * case.vocab))


def token_loss(
    case: Case, student: Tensor, teacher: Tensor | TopK | None, labels: Tensor, advantages: Tensor
) -> Tensor:
    """The loss of each row of full logits, (N,), by the project's reference."""
    if isinstance(teacher, TopK):
        stats = reference.top_k_token_stats(student, teacher.ids.long(), teacher.logprobs, labels, beta=case.beta)
    else:
        stats = reference.token_stats(student, teacher, labels, beta=case.beta)
    if case.loss == "cross_entropy":
        return -stats["student_logprob"]
    if case.loss == "minillm":
        return stats["reverse_kl"] - advantages.to(student.dtype) * stats["student_logprob"]
    return stats[case.loss]


def oracle(inputs: Inputs) -> dict[str, Tensor]:
    """Loss, gradients of hidden states and weight, and the mean divergence, in float64 from the same rounded inputs."""
    case = inputs.case
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    weight = inputs.teacher_weight.double()
    rows = (inputs.labels != IGNORED).nonzero()[:, 0]
    total = 0.0
    for chunk in rows.split(_oracle_rows(case, rows.device)):
        teacher = inputs.teacher_hidden[chunk].double() @ weight.t() if case.needs_teacher else None
        if inputs.top_k is not None:
            teacher = TopK(inputs.top_k.ids[chunk], inputs.top_k.logprobs[chunk])
        loss = token_loss(
            case, leaves[0][chunk] @ leaves[1].t(), teacher, inputs.labels[chunk], inputs.advantages[chunk]
        ).sum() / max(case.kept, 1)
        loss.backward()
        total += loss.detach()
    return {"loss": total, "hidden_grad": leaves[0].grad, "weight_grad": leaves[1].grad}


def suite(device: str) -> list[Case]:
    """The cases that `minillm bench kernels` runs where it is told nothing."""
    if device == "cpu":
        cases = [Case(loss, 2048, 256, 256, 32000, "float32") for loss in ("reverse_kl", "forward_kl", "jsd")]
        return cases + [replace(case, top_k=TOP_K) for case in cases[:2]]
    shapes = [
        (2048, 5120, 32000),
        (2048, 5120, 151936),
        (768, 1600, 50257),  # MiniLLM's GPT-2 pair: an odd vocabulary
        (896, 3584, 151936),
        (2048, 4096, 128256),  # the shape of Liger's published table
    ]
    cases = [Case("reverse_kl", 8192, *shape, ignored=share) for shape in shapes for share in (0.0, 0.5)]
    cases += [Case("reverse_kl", tokens, *shapes[1]) for tokens in (1024, 2048, 4096, 16384, 32768)]
    cases += [Case("jsd", tokens, *shapes[4]) for tokens in (1024, 2048, 4096, 8192)]
    cases += [Case(loss, 8192, *shapes[1]) for loss in ("forward_kl", "cross_entropy", "minillm")]
    cases += [Case(loss, 8192, *shapes[1], top_k=TOP_K) for loss in ("reverse_kl", "forward_kl")]
    return cases
