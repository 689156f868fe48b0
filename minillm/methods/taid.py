"""TAID (arXiv 2501.16937): distillation towards a target between student and teacher, which moves to the teacher."""

import math
from collections.abc import Sequence
from typing import Any

from minillm.config.root import StageConfig
from minillm.methods.protocol import Item, Method, Observation, Term, TrainingData
from minillm.methods.supervised import mixed_term, take_references
from minillm.models.batch import TokenSequence
from minillm.teachers.pair import Models

TINY = 1e-15  # keeps the relative change finite where the loss before was 0, as in the released code


class TAID(Method):
    """L = -sum_v p_t,v log q_v with the constant p_t = softmax((1 - t) z_S + t z_T), mean over response tokens.

    The loss is a cross-entropy, so it is not 0 at p_t = q. After step n of the stage, counted from 0, with loss L_n:

        change = (L_{n-1} - L_n) / L_{n-1},   m <- beta m + (1 - beta) change
        t <- min(t_end, max(t_start + (t_end - t_start) n / steps, t + alpha sigmoid(m) (1 - t)))

    The first step only keeps its loss. Without `adaptive` t is the first of the two values alone. L_n is the loss of the
    whole optimiser step; the released code moves t with every micro-batch and in validation as well.
    """

    def __init__(self, config: StageConfig):
        super().__init__(config)
        self.t: float = config.method.t_start
        self.momentum = 0.0
        self.loss: float | None = None  # of the last step, None before the first

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        return take_references(data, self.step_size)

    def foreseeable(self, draw: int) -> bool:
        return True

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        options = {"interpolation": self.t}
        return [mixed_term(items, models, divergence="interpolated_cross_entropy", ce_ratio=0.0, options=options)]

    def observe(self, observation: Observation) -> dict[str, float]:
        """Move t after a step; the record has the t that the step was taken with."""
        if observation.kind != "step":
            return {}
        used, loss = self.t, observation.metrics["loss"]
        if self.loss is not None:
            self._move(self.loss, loss, observation.step - 1)
        self.loss = loss
        return {"interpolation": used}

    def _move(self, before: float, loss: float, step: int) -> None:
        keys = self.config.method
        self.momentum = keys.beta * self.momentum + (1 - keys.beta) * (before - loss) / (before + TINY)
        t = keys.t_start + (keys.t_end - keys.t_start) * step / keys.steps
        if keys.adaptive:
            t = max(t, self.t + keys.alpha * _sigmoid(self.momentum) * (1 - self.t))
        self.t = min(keys.t_end, t)

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "momentum": self.momentum, "loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.momentum, self.loss = state["t"], state["momentum"], state["loss"]


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))


METHOD = TAID
