"""The mathematics of MiniLLM on a language model small enough to enumerate every sequence, in float64.

The expectation over answers is a sum over all of them, so nothing here is statistical: a setting is exact to rounding
or it is wrong.
"""

from types import SimpleNamespace

import pytest
import torch

from minillm.config.methods.minillm_keys import MiniLLM
from minillm.losses import linear_objective
from minillm.methods.minillm import add_advantages, policy_objective
from minillm.rollout.buffer import Rollout

V, LONGEST, HIDDEN, EOS = 4, 3, 5, 0
EXACT = dict(
    name="minillm", alpha=0.0, gamma=1.0, length_norm=False, whiten="none", cliprange=None, return_from="next",
    reduction="sequences", lm_coef=0.0,
)  # fmt: skip


def markov(seed: int, scale: float) -> SimpleNamespace:
    """p(next | previous) = softmax(head @ states[previous]); row V of the states is the beginning."""
    generator = torch.Generator().manual_seed(seed)
    states = scale * torch.randn(V + 1, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(V, HIDDEN, generator=generator, dtype=torch.float64)
    return SimpleNamespace(states=states, head=head)


STUDENT, TEACHER = markov(1, 0.8), markov(2, 1.0)


def sequences() -> list[list[int]]:
    """Every answer: it ends with EOS or at the longest length."""
    done, open_ = [], [[]]
    while open_:
        prefix = open_.pop()
        for token in range(V):
            answer = [*prefix, token]
            (done if token == EOS or len(answer) == LONGEST else open_).append(answer)
    return done


def states_of(answer: list[int]) -> list[int]:
    return [V, *answer[:-1]]


def log_probs(model, answer):  # -> (T,)
    logits = model.states[states_of(answer)] @ model.head.T
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer]


def exact_gradient():
    """d/d(states, head) of sum_y q(y) log q(y)/p(y)."""
    student = SimpleNamespace(**{k: v.clone().requires_grad_() for k, v in vars(STUDENT).items()})
    total = 0
    for answer in sequences():
        log_q, log_p = log_probs(student, answer).sum(), log_probs(TEACHER, answer).sum()
        total = total + log_q.exp() * (log_q - log_p)
    return torch.autograd.grad(total, [student.states, student.head])


def method_gradient(**changes):
    """The expectation under p~ of the method's gradient, through the fused loss, over every answer."""
    method = MiniLLM(**{**EXACT, **changes})
    rollouts, probabilities = [], []
    for key, answer in enumerate(sequences()):
        log_q, log_p = log_probs(STUDENT, answer), log_probs(TEACHER, answer)
        log_mix = (method.alpha * log_p.exp() + (1 - method.alpha) * log_q.exp()).log()
        vectors = {"student_logprob": log_q, "teacher_logprob": log_p, "mixture_logprob": log_mix}
        rollouts.append(Rollout(key, [V], answer, answer[-1] == EOS, vectors, TEACHER.states[states_of(answer)]))
        probabilities.append(log_mix.sum().exp())
    add_advantages(rollouts, method)
    states, head = STUDENT.states.clone().requires_grad_(), STUDENT.head.clone().requires_grad_()
    names = ("advantage", "policy_weight", "single_step_weight")
    inputs = {name: torch.cat([r.vectors[name] for r in rollouts]).double() for name in names}
    inputs["old_logprob"] = torch.cat([r.vectors["student_logprob"] for r in rollouts])
    inputs["probability"] = torch.cat([p.expand(len(r.response)) for p, r in zip(probabilities, rollouts, strict=True)])
    objective = policy_objective(method)

    def expected(stats, *, probability, **vectors):
        loss, _ = objective(stats, **vectors)
        return probability * loss

    rows = torch.tensor([row for r in rollouts for row in states_of(r.response)])
    loss, _ = linear_objective(
        states[rows], head, TEACHER.states[rows], TEACHER.head,
        torch.tensor([token for r in rollouts for token in r.response]),
        expected, inputs=inputs, fields=("student_logprob", "reverse_kl", "student_entropy"),
    )  # fmt: skip
    return torch.autograd.grad(loss, [states, head])


def error(**changes) -> float:
    """Relative distance of the method's gradient from the exact one."""
    got = torch.cat([g.flatten() for g in method_gradient(**changes)])
    want = torch.cat([g.flatten() for g in exact_gradient()])
    return float((got - want).norm() / want.norm())


# The vectors are kept in fp32 on their way through the buffer; everything else is float64.
ROUNDING = 1e-6


@pytest.mark.parametrize(
    "exact",
    [
        dict(),
        dict(alpha=0.2, importance_weight="per_decision"),
        dict(alpha=0.2, importance_weight="sequence"),
        dict(alpha=0.7, importance_weight="per_decision"),
        dict(alpha=0.7, importance_weight="sequence", importance_weight_in_clip=False),
    ],
    ids=str,
)
def test_these_settings_give_the_gradient_of_the_sequence_level_reverse_kl(exact):
    assert error(**exact) < ROUNDING


@pytest.mark.parametrize(
    "biased",
    [
        dict(length_norm=True),
        dict(gamma=0.95),
        dict(return_from="current"),
        dict(whiten="valid"),
        dict(single_step=False),
        dict(alpha=0.2, importance_weight="token"),
        dict(alpha=0.2, importance_weight="per_decision", single_step_weighted=False),
        dict(reward_scaling=0.5),
    ],
    ids=str,
)
def test_these_settings_do_not(biased):
    assert error(**biased) > 1e-3


def with_products(monkeypatch, *, reward_through_own: bool, single_through_own: bool) -> float:
    """The error with per-decision products that do or do not include the token itself."""

    def products(student_logprob, mixture_logprob, kind):
        log_w = student_logprob - mixture_logprob
        through = log_w.cumsum(0)
        before = through - log_w
        reward, single = (through if reward_through_own else before), (through if single_through_own else before)
        return reward.exp(), torch.ones_like(log_w), single.exp()

    monkeypatch.setattr("minillm.methods.minillm.importance_weights", products)
    return error(alpha=0.2, importance_weight="per_decision")


def test_a_reward_needs_the_weight_of_its_own_token(monkeypatch):
    assert with_products(monkeypatch, reward_through_own=True, single_through_own=False) < ROUNDING
    assert with_products(monkeypatch, reward_through_own=False, single_through_own=False) > 1e-3


def test_the_single_step_term_is_also_exact_with_its_own_token_in_the_product(monkeypatch):
    """Its value depends on the prefix alone, and E[q(y_t)/p~(y_t)] = 1: the shorter product only has less variance."""
    assert with_products(monkeypatch, reward_through_own=True, single_through_own=True) < ROUNDING
