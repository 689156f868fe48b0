"""Small methods that use, each, one part of the protocol that no method of the package uses yet.

`python tests/house/probes.py VERB ARGUMENTS...` is the command line with these methods registered.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from minillm.cli.main import program
from minillm.config.lora import LoraConfig
from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds
from minillm.losses import TokenStats
from minillm.methods import register
from minillm.methods.protocol import HiddenLoss, Item, Method, Observation, Term, TrainingData
from minillm.methods.supervised import cross_entropy, mixed_term, take_references
from minillm.models.access import rows_of
from minillm.models.adapters import add_adapters
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.rollout.noise import distinct_keys
from minillm.rollout.rollouts import Sampling
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models


class OnReferences(Method):
    """Trains on the next references."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        return take_references(data, self.step_size)


class BothConfig(MethodConfig):
    """Adapters in the teacher are trained together with the student, each towards the other."""

    name: Literal["probe_both"]
    teacher_rate: float = 1e-2
    summary: ClassVar[str] = "student and teacher towards each other"

    def needs(self) -> Needs:
        terms = (TermNeeds("student", ("references",), teacher=True), TermNeeds("teacher", ("references",)))
        return Needs(
            terms,
            references=True,
            teacher=True,
            teacher_abilities=frozenset({"hidden", "train"}),
            trains=("student", "teacher"),
        )


class Both(OnReferences):
    """The student's forward KL to the teacher, and the teacher's to the student; the other side is a constant."""

    def modules(self, models: Models) -> dict[str, nn.Module]:
        return {"teacher": add_adapters(models.teacher.model, LoraConfig(r=2, alpha=4), seed=self.config.seed)}

    def learning_rates(self) -> dict[str, float]:
        return {"teacher": self.config.method.teacher_rate}

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        student = mixed_term(items, models, divergence="forward_kl", ce_ratio=0.0, name="student")
        batch = student.batch

        def towards_the_student(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
            return stats.forward_kl, {"distance_nats": stats.forward_kl.detach()}

        teacher = Term(
            "teacher",
            batch,
            towards_the_student,
            ("forward_kl",),
            count=float(len(batch.labels)),
            teacher=LocalTeacher(models.student).rows(batch),
            trains="teacher",
        )
        return [student, teacher]


class ProjectorConfig(MethodConfig):
    """A trained projector from the student's hidden states to the teacher's."""

    name: Literal["probe_projector"]
    summary: ClassVar[str] = "the teacher's features"

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("features", ("references",), teacher=True),),
            references=True,
            teacher=True,
            teacher_abilities=frozenset({"hidden"}),
            trains=("student", "projector"),
        )


def feature_loss(
    hidden: dict[int, Tensor],  # {layer: (B, L, H_s)}
    batch: TokenBatch,
    modules: nn.ModuleDict,
    *,
    features: Tensor,  # (N, H_t)
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over rows of the mean squared error of the projected states of layers 1 and -1."""
    errors = [
        (modules["projector"](rows_of(state, batch)) - features).square().mean(-1).sum() for state in hidden.values()
    ]
    total = torch.stack(errors).sum()
    return total, {"features": total.detach()}


class Projector(OnReferences):
    """Cross-entropy, and the teacher's last hidden states from the student's through the projector."""

    def modules(self, models: Models) -> dict[str, nn.Module]:
        sizes = (models.student.config.hidden_size, models.teacher.model.config.hidden_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return {"projector": nn.Linear(*sizes)}

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        batch = collate(items, models.pad_id)
        features = models.teacher.rows(batch).hidden
        hidden = HiddenLoss((1, -1), feature_loss, {"features": features})
        count = float(len(batch.labels))
        return [Term("features", batch, cross_entropy, ("student_logprob",), count, hidden=hidden)]


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to a prompt, the first preferred."""

    key: int
    chosen: TokenSequence
    rejected: TokenSequence


class PreferenceConfig(MethodConfig):
    """A preference between two answers, with the teacher as the reference."""

    name: Literal["probe_preference"]
    beta: float = 0.5
    summary: ClassVar[str] = "a preference for the references over the student's own answers"

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("preference", ("references", "answers"), teacher=True),),
            references=True,
            samples=("student",),
            teacher=True,
        )


class Preference(Method):
    """-log sigmoid(beta (log q/p of the chosen answer - log q/p of the rejected one)), the mean over pairs."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[AnswerPair]:
        references = take_references(data, self.step_size)
        answers = data.rollouts.sample(
            [item.prompt for item in references],
            Sampling(self.config.rollout.max_new_tokens),
            keys=distinct_keys([item.key for item in references]),
            seed=self.config.seed,
            draw=draw,
            batch_size=self.config.rollout.batch_size,
        )
        return [
            AnswerPair(item.key, item, TokenSequence(answer.prompt, answer.response, item.key))
            for item, answer in zip(references, answers, strict=True)
        ]

    def terms(self, items: Sequence[AnswerPair], data: TrainingData, models: Models) -> list[Term]:
        batch = collate([one for item in items for one in (item.chosen, item.rejected)], models.pad_id)
        pair, sign = [], []
        for place, length in enumerate(batch.lengths):
            pair += [place // 2] * length
            sign += [1.0 - 2.0 * (place % 2)] * length
        beta, pairs = self.config.method.beta, len(items)

        def preference(
            stats: TokenStats,
            *,
            pair: Tensor,
            sign: Tensor,  # (N,) each
        ) -> tuple[Tensor, dict[str, Tensor]]:
            ratio = sign.to(stats.student_logprob) * (stats.student_logprob - stats.teacher_logprob)
            margin = beta * ratio.new_zeros(pairs).index_add(0, pair, ratio)
            rows = torch.zeros_like(ratio)  # the loss of a pair stands in its first row
            first = torch.tensor([int((pair == one).nonzero()[0]) for one in range(pairs)], device=pair.device)
            loss = rows.index_add(0, first, nn.functional.softplus(-margin))
            return loss, {"margin": rows.index_add(0, first, margin.detach())}

        return [
            Term(
                "preference",
                batch,
                preference,
                ("student_logprob", "teacher_logprob"),
                count=float(pairs),
                inputs={"pair": torch.tensor(pair), "sign": torch.tensor(sign)},
                teacher=models.teacher.rows(batch),
                coupled=True,
            )
        ]


class BalanceConfig(MethodConfig):
    """Fine-tuning of a mixture of experts with its balance loss."""

    name: Literal["probe_balance"]
    weight: float = 0.1
    summary: ClassVar[str] = "references, with balanced experts"

    def needs(self) -> Needs:
        return Needs((TermNeeds("supervised", ("references",)),), references=True)


class Balance(OnReferences):
    """Cross-entropy plus `weight` times the load-balancing loss of the model's routers."""

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        batch = collate(items, models.pad_id)
        count = float(len(batch.labels))
        return [
            Term(
                "supervised",
                batch,
                cross_entropy,
                ("student_logprob",),
                count,
                auxiliary=self.config.method.weight,
            )
        ]


class AdaptiveConfig(MethodConfig):
    """Distillation whose mixture weight follows the losses that were seen."""

    name: Literal["probe_adaptive"]
    summary: ClassVar[str] = "references, and more and more of the teacher"

    def needs(self) -> Needs:
        return Needs((TermNeeds("distillation", ("references",), teacher=True),), references=True, teacher=True)


class Adaptive(OnReferences):
    """Cross-entropy with weight t and forward KL with 1 - t; t falls with every step, faster where the loss fell."""

    def __init__(self, config):
        super().__init__(config)
        self.t, self.losses = 0.9, []

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        return [mixed_term(items, models, divergence="forward_kl", ce_ratio=self.t)]

    def observe(self, observation: Observation) -> dict[str, float]:
        if observation.kind == "evaluation":
            self.t = max(0.1, self.t - 1e-3)
            return {}
        used = self.t
        fell = bool(self.losses) and observation.metrics["loss"] < self.losses[-1]
        self.losses.append(observation.metrics["loss"])
        self.t = max(0.1, self.t - (0.05 if fell else 0.01) * math.log1p(observation.step))
        return {"mixture_t": used}

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.losses = state["t"], list(state["losses"])


class SelectConfig(MethodConfig):
    """A stage without steps: the texts that the teacher finds likeliest."""

    name: Literal["probe_select"]
    keep: int = 4
    dies: bool = False  # at the first visit
    summary: ClassVar[str] = "nothing: texts were chosen"

    def needs(self) -> Needs:
        return Needs((), references=True, teacher=True, trains=())


class Select(Method):
    """Keeps the references with the highest mean log-probability under the teacher, as a corpus of JSON lines."""

    def collect(self, data: TrainingData, models: Models, draw: int):
        raise AssertionError("a stage without steps collects nothing")

    terms = collect

    def prepare(self, data: TrainingData, models: Models, folder: Path) -> None:
        from minillm.evaluate.token_statistics import token_statistics

        examples = list(data.prompts.items)
        scores = token_statistics(models, [one.sequence for one in examples], ("student_logprob",), batch_size=4)
        means = [vector.double().mean().item() for vector in scores["student_logprob"]]
        order = sorted(range(len(examples)), key=lambda index: -means[index])[: self.config.method.keep]
        with (data.folder / "visits.txt").open("a") as file:
            file.write("visited\n")
        if self.config.method.dies and len((data.folder / "visits.txt").read_text().splitlines()) == 1:
            (folder / "half.jsonl").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
        lines = [json.dumps({"text": " ".join(examples[index].references) * 3}) for index in sorted(order)]
        (folder / "kept.jsonl").write_text("\n".join(lines) + "\n")


PROBES = (
    (BothConfig, Both),
    (ProjectorConfig, Projector),
    (PreferenceConfig, Preference),
    (BalanceConfig, Balance),
    (AdaptiveConfig, Adaptive),
    (SelectConfig, Select),
)


def register_probes() -> None:
    for config_class, method_class in PROBES:
        register(config_class, method_class)


if __name__ == "__main__":
    # under its own name: the classes that are registered must be those that the tests import
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.house.probes import register_probes as register_all

    register_all()
    program(sys.argv[1:])
