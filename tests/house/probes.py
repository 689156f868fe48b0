"""Small methods that use, each, one part of the protocol that no method of the package uses yet.

`python tests/house/probes.py VERB ARGUMENTS...` is the command line with these methods registered.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from minillm.cli.main import program
from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds
from minillm.methods import register
from minillm.methods.protocol import HiddenLoss, Item, Method, Term, TrainingData
from minillm.methods.supervised import cross_entropy, take_references
from minillm.models.access import rows_of
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.teachers.pair import Models


class OnReferences(Method):
    """Trains on the next references."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        return take_references(data, self.step_size)


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


class BalanceConfig(MethodConfig):
    """Fine-tuning of a mixture of experts with its balance loss."""

    name: Literal["probe_balance"]
    weight: float = 0.1
    summary: ClassVar[str] = "references, with balanced experts"

    def needs(self) -> Needs:
        return Needs((TermNeeds("supervised", ("references",)),), references=True, auxiliary=True)


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
    (ProjectorConfig, Projector),
    (BalanceConfig, Balance),
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
