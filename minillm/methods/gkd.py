"""Generalised knowledge distillation (GKD, arXiv 2306.13649, equation 4 and algorithm 1).

With probability `on_policy` a step trains on the student's own answers, else on the references; the loss is the
generalised JSD a token, m = beta p + (1 - beta) q, with no gradient through sampling. At the end points the JSD
vanishes, so they mean its limits: beta 0 the forward KL, beta 1 the reverse KL.
"""

from collections.abc import Sequence

import numpy as np

from minillm.methods.on_policy import answered, sample_answers
from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import mixed_term, take_references
from minillm.models.batch import TokenSequence
from minillm.teachers.pair import Models


class GeneralisedDistillation(Method):
    """L = mean over response tokens of JSD_beta(p || q) on a mixture of references and student samples."""

    def __init__(self, config):
        super().__init__(config)
        beta = config.method.beta
        self.divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
        self.options = {"beta": beta} if self.divergence == "jsd" else {}

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        references = take_references(data, self.step_size // self.answers_per_prompt) * self.answers_per_prompt
        if self.foreseeable(draw):
            return references
        return answered(references, sample_answers(references, data, self.config, draw=draw))

    def foreseeable(self, draw: int) -> bool:
        """True where the step is on references. One coin a step, keyed like everything random."""
        return np.random.default_rng([self.config.seed, draw]).random() >= self.config.method.on_policy

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        return [mixed_term(items, models, divergence=self.divergence, ce_ratio=0.0, options=self.options)]


METHOD = GeneralisedDistillation
