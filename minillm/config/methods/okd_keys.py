"""The keys of method okd; the formulas are in minillm/methods/okd.py."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.lora import LoraConfig
from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds


class OKD(MethodConfig):
    """Online knowledge distillation (arXiv 2409.12512, reconstructed): adapters in the teacher learn with the student."""

    name: Literal["okd"]
    lora: LoraConfig = Field(
        LoraConfig(r=8, alpha=16), description="The teacher's adapters; its own weights are frozen"
    )
    student_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="Of the student to the adapted teacher, which is a constant there"
    )
    student_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="jsd: mixture weight of the teacher")
    student_kd_ratio: Probability = Field(
        0.5, description="lambda: weight of the divergence in the student's loss; the rest is cross-entropy"
    )
    teacher_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="Of the adapted teacher to the student, which is a constant there: KL(q || p) is forward",
    )
    teacher_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="jsd: mixture weight of the student")
    teacher_kd_ratio: Probability = Field(
        0.5, description="mu: weight of the divergence in the adapters' loss; the rest is cross-entropy"
    )
    teacher_learning_rate: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Highest learning rate of the adapters; null: train.learning_rate"
    )
    anchor: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="Weight of KL(p_0 || p), from the unadapted to the adapted teacher; 0: none"
    )
    summary: ClassVar[str] = (
        "online distillation (OKD, reconstructed) with adapters in the teacher on reference answers"
    )
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "teacher_drift_nats": ("KL of the adapted from the unadapted teacher", "nats/token"),
        "loss/student": ("Loss of the student", "nats/token"),
        "loss/teacher": ("Loss of the teacher's adapters", "nats/token"),
    }

    def needs(self) -> Needs:
        terms = [TermNeeds(name, ("references",), teacher=True, trains=name) for name in ("student", "teacher")]
        if self.anchor > 0:
            terms.append(TermNeeds("anchor", ("references",), teacher=True, trains="teacher"))
        return Needs(
            tuple(terms),
            references=True,
            teacher=True,
            teacher_abilities=frozenset({"hidden", "train"}),
            teacher_lora=self.lora,
            trains=("student", "teacher"),
        )

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        for side in ("student", "teacher"):
            if getattr(self, f"{side}_kd_ratio") == 0:
                message = f"has no effect: with {side}_kd_ratio 0 the loss is the cross-entropy alone"
                for key in (f"{side}_divergence", f"{side}_beta"):
                    yield key, message, f"{side}_kd_ratio"
            elif getattr(self, f"{side}_divergence") != "jsd":
                message = f"has no effect on divergence {getattr(self, f'{side}_divergence')}; it is for jsd"
                yield f"{side}_beta", message, f"{side}_divergence"


KEYS = OKD
