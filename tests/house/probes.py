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

from minillm.cli.main import program
from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds
from minillm.methods import register
from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import cross_entropy, take_references
from minillm.models.batch import TokenSequence, collate
from minillm.teachers.pair import Models


class OnReferences(Method):
    """Trains on the next references."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        return take_references(data, self.step_size)


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
