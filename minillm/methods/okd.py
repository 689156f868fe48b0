"""OKD (arXiv 2409.12512): low-rank adapters in a frozen teacher are trained together with the student.

A reconstruction: no code is published, and neither ranks nor weights are known. The form below, the anchor and all
defaults are ours.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from minillm.config.paths import STAGE, expand
from minillm.losses import TokenStats, linear_token_stats
from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import mixed_term, take_references
from minillm.models.adapters import add_adapters, without_adapters
from minillm.models.batch import TokenSequence
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models


class OKD(Method):
    """Two losses on the references y, means over response tokens, with sg a constant and phi the adapters alone:

        student:  (1 - lambda) CE(y, q) + lambda D(sg[p_phi], q)
        teacher:  (1 - mu) CE(y, p_phi) + mu D'(sg[q], p_phi) + anchor KL(p_0 || p_phi)

    p_0 is the teacher without adapters, which p_phi equals at first. D and D' are the forward KL (from the constant
    side), the reverse KL or the generalised JSD. The drift KL(p_0 || p_phi) is measured without an anchor too, at the cost
    of one forward pass of the teacher.
    """

    def modules(self, models: Models) -> dict[str, nn.Module]:
        teacher = self.config.teacher
        base = (
            None if teacher.path.startswith(STAGE) else expand(teacher.path)
        )  # a stage's folder may move with its run
        adapted = add_adapters(
            models.teacher.model,
            self.config.method.lora,
            seed=self.config.seed,
            base=base,
            revision=teacher.revision,
            key="method.lora",
        )
        return {"teacher": adapted}

    def learning_rates(self) -> dict[str, float]:
        rate = self.config.method.teacher_learning_rate
        return {} if rate is None else {"teacher": rate}

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        return take_references(data, self.step_size)

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        keys, teacher = self.config.method, models.teacher
        targets = {"student": teacher, "teacher": LocalTeacher(models.student, teacher.model.device)}
        terms = []
        for side, target in targets.items():
            divergence = getattr(keys, f"{side}_divergence")
            options = {"beta": getattr(keys, f"{side}_beta")} if divergence == "jsd" else {}
            ratio = 1 - getattr(keys, f"{side}_kd_ratio")
            terms.append(
                mixed_term(
                    items,
                    models,
                    divergence=divergence,
                    ce_ratio=ratio,
                    options=options,
                    name=side,
                    trains=side,
                    target=target,
                )
            )
        return self._with_drift(*terms, models)

    def _with_drift(self, student: Term, teacher: Term, models: Models) -> list[Term]:
        """The terms with KL(p_0 || p_phi): as a loss of its own, or measured beside the teacher's where it has no weight."""
        batch, weight = student.batch, self.config.method.anchor
        with without_adapters(models.teacher.model):
            unadapted = models.teacher.rows(batch)
        if weight > 0:
            anchor = Term(
                "anchor", batch, drift_loss, ("forward_kl",), student.count, weight, teacher=unadapted, trains="teacher"
            )
            return [student, teacher, anchor]
        adapted = models.teacher.rows(batch) if student.teacher is None else student.teacher
        with torch.no_grad(), models.teacher.head() as head:
            drift = linear_token_stats(
                adapted.hidden,
                head,
                unadapted.hidden,
                head,
                batch.labels.to(adapted.hidden.device),
                fields=("forward_kl",),
                vocab_size=models.vocab_size,
                backend=self.config.engine.backend,
            ).forward_kl

        def objective(stats: TokenStats, *, drift: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
            loss, metrics = teacher.objective(stats)
            return loss, {**metrics, "teacher_drift_nats": drift}

        return [student, replace(teacher, objective=objective, inputs={"drift": drift})]


def drift_loss(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
    """KL(p_0 || p_phi) a token."""
    return stats.forward_kl, {"teacher_drift_nats": stats.forward_kl.detach()}


METHOD = OKD
