"""The terms of MiniLLM through real models: against formulas written out on full logits, and the field's known bugs."""

import pytest
import torch

from minillm.config.root import StageConfig
from minillm.config.training import TorchEngine as TorchEngineConfig
from minillm.config.training import TrainConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.torch import TorchEngine
from minillm.methods import build_method
from minillm.methods.minillm import VECTORS
from minillm.methods.protocol import TrainingData
from minillm.rollout.buffer import RolloutBuffer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.noise import distinct_keys
from minillm.rollout.rollouts import Sampling
from tests.methods.conftest import SHOWN, stage_of


def stage(**method) -> StageConfig:
    return stage_of(6, rollout={"buffer_size": 6, "batch_size": 6, "max_new_tokens": 7}, name="minillm", **method)


@pytest.fixture
def data(models, tmp_path):
    examples = [Example(i, [60 + i, 70, 71 + i][: 1 + i % 3], [90, 91], "", ()) for i in range(6)]
    corpus = [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5]]
    return TrainingData(Stream(examples, seed=1), Stream(corpus, seed=1), LocalRollouts(models), tmp_path)


def full_log_probs(model, rollout):  # -> (T, V)
    """Log-probabilities at every position that predicts a response token, from one unpadded sequence."""
    ids = torch.tensor([rollout.prompt + rollout.response])
    logits = model(ids).logits[0].double()
    return logits.log_softmax(-1)[len(rollout.prompt) - 1 : -1]


def term_loss(term, models):
    from minillm.engine.module import TermLoss

    loss, _ = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    return loss.double() * term.weight / term.count


def written_lmops(models, buffer, width):
    """What the released code computes, on padded matrices: A from gamma 0.95 and the current token, divided by the
    remaining length, whitened over all positions; w inside the clip; the unweighted reverse KL; token means."""
    B = len(buffer)
    reward, mask = torch.zeros(B, width, dtype=torch.float64), torch.zeros(B, width, dtype=torch.float64)
    new, old, w, kl = (torch.zeros(B, width, dtype=torch.float64) for _ in range(4))
    for b, rollout in enumerate(buffer):
        T, index = len(rollout.response), torch.tensor(rollout.response)
        log_q, log_p = full_log_probs(models.student, rollout), full_log_probs(models.teacher.model, rollout)
        token_q, token_p = log_q[torch.arange(T), index], log_p[torch.arange(T), index]
        mix = (0.8 * token_q.exp() + 0.2 * token_p.exp()).log()
        reward[b, :T] = ((token_p - token_q) / 0.5).clamp(-100, 100).detach()
        mask[b, :T] = 1
        new[b, :T], old[b, :T] = token_q, token_q.detach()
        w[b, :T] = (token_q - mix).exp().detach()
        kl[b, :T] = (log_q.exp() * (log_q - log_p)).sum(-1)
    total, rows = torch.zeros(B, dtype=torch.float64), []
    for t in reversed(range(width)):
        total = reward[:, t] + 0.95 * total
        rows.append(total)
    remaining = mask.flip(1).cumsum(1).flip(1).clamp(min=1)
    advantage = torch.stack(rows[::-1], 1) / remaining
    advantage = (advantage - advantage.mean()) / (advantage.var() + 1e-8).sqrt()
    ratio = (new - old).exp() * w
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    return ((policy + kl) * mask).sum() / mask.sum()


def written_paper(models, buffer):
    """The published formulas: w R^Norm_{t+1} with clipping, w times the reverse KL, summed over tokens, sequence mean."""
    total = 0.0
    for rollout in buffer:
        T, index = len(rollout.response), torch.tensor(rollout.response)
        log_q, log_p = full_log_probs(models.student, rollout), full_log_probs(models.teacher.model, rollout)
        token_q, token_p = log_q[torch.arange(T), index], log_p[torch.arange(T), index]
        r = (token_p - token_q).detach()
        w = (token_q - (0.8 * token_q.exp() + 0.2 * token_p.exp()).log()).exp().detach()
        for t in range(T):
            R = float(r[t + 1 :].mean()) if t + 1 < T else 0.0
            rho = (token_q[t] - token_q[t].detach()).exp() * w[t]
            policy = torch.maximum(-R * rho, -R * rho.clamp(0.8, 1.2))
            total = total + policy + w[t] * (log_q[t].exp() * (log_q[t] - log_p[t])).sum()
    return total / len(buffer)


@pytest.mark.parametrize("preset", ["paper", "lmops"])
def test_a_preset_is_its_formulas_in_value_and_gradient(preset, models, data):
    method = build_method(stage(preset=preset, lm_coef=0.0))
    buffer = method.collect(data, models, draw=0)
    width = max(len(rollout.response) for rollout in buffer)
    (term,) = method.terms(list(buffer), data, models)
    got = term_loss(term, models)
    want = written_paper(models, buffer) if preset == "paper" else written_lmops(models, buffer, width)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)
    parameters = list(models.student.parameters())
    for ours, theirs in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5 * float(theirs.abs().max()) + 1e-7)


def moved_student(models, buffer):
    """Move the student's weights, as a step does. Returns log q(y_t) of before and of now for each answer, (T,) each."""

    def token_log_probs():
        with torch.no_grad():
            return [
                full_log_probs(models.student, one).gather(1, torch.tensor(one.response)[:, None])[:, 0]
                for one in buffer
            ]

    before = token_log_probs()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in models.student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return before, token_log_probs()


@pytest.mark.parametrize("in_clip", [True, False])
def test_ratio_is_to_the_student_that_sampled(in_clip, models, data):
    """The weights move between collecting and the step: from the second step of a buffer on, q is not q_old."""
    method = build_method(stage(lm_coef=0.0, preset="paper", importance_weight_in_clip=in_clip))
    buffer = method.collect(data, models, draw=0)
    before, now = moved_student(models, buffer)
    policies, divergences, entropies, silenced, loss = [], [], [], [], 0.0
    for rollout, old, new in zip(buffer, before, now, strict=True):
        log_q, log_p = (full_log_probs(one, rollout).detach() for one in (models.student, models.teacher.model))
        token_p = log_p.gather(1, torch.tensor(rollout.response)[:, None])[:, 0]
        w = (old - (0.8 * old.exp() + 0.2 * token_p.exp()).log()).exp()
        for t in range(len(old)):
            later = (token_p - old)[t + 1 :]
            advantage = float(later.mean()) if len(later) else 0.0
            ratio = float((new - old)[t].exp()) * (float(w[t]) if in_clip else 1.0)
            bounded = min(max(ratio, 0.8), 1.2)
            policies.append(-min(advantage * ratio, advantage * bounded) * (1.0 if in_clip else float(w[t])))
            silenced.append(ratio > 1.2 if advantage > 0 else advantage < 0 and ratio < 0.8)
            divergences.append(float((log_q[t].exp() * (log_q[t] - log_p[t])).sum()))
            entropies.append(float(-(log_q[t].exp() * log_q[t]).sum()))
            loss += policies[-1] + float(w[t]) * divergences[-1]
    assert 0.1 < sum(silenced) / len(silenced) < 0.4  # far from what its opposite would be
    train = TrainConfig(max_steps=1)
    engine = TorchEngine(models, train, TorchEngineConfig(device="cpu"), total_steps=1)
    # micro-batches of unequal length: a mean of their means is another number
    parts = [list(buffer)[:1], list(buffer)[1:3], list(buffer)[3:]]
    metrics = engine.step([method.terms(part, data, models) for part in parts]).metrics
    want = {
        "loss": loss / len(buffer),
        "policy_loss": sum(policies) / len(policies),
        "reverse_kl_nats": sum(divergences) / len(divergences),
        "entropy_nats": sum(entropies) / len(entropies),
        "clipped_share": sum(silenced) / len(silenced),
    }
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_advantages_are_constants_and_know_nothing_of_padding(models, data):
    method = build_method(stage(lm_coef=0.0))
    buffer = method.collect(data, models, draw=0)
    for rollout in buffer:
        advantage = rollout.vectors["advantage"]
        assert len(advantage) == len(rollout.response)
        assert {rollout.vectors[name].dtype for name in VECTORS} == {torch.float32}  # as checkpoints hold them
        assert not advantage.requires_grad
        reward = (rollout.vectors["teacher_logprob"] - rollout.vectors["student_logprob"]).double()
        later = [float(reward[t + 1 :].mean()) if t + 1 < len(reward) else 0.0 for t in range(len(reward))]
        torch.testing.assert_close(advantage.double(), torch.tensor(later, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_a_prompt_that_comes_twice_into_a_buffer_is_answered_anew(models, tmp_path):
    examples = [Example(i, [60 + i, 70], [90, 91], "", ()) for i in range(3)]
    data = TrainingData(Stream(examples, seed=1), None, LocalRollouts(models), tmp_path)
    buffer = build_method(stage(lm_coef=0.0)).collect(data, models, draw=0)
    assert sorted(rollout.key for rollout in buffer) == [0, 0, 1, 1, 2, 2]
    assert len({(rollout.key, *rollout.response) for rollout in buffer}) == 6


@pytest.mark.parametrize("alpha, who", [(0.0, "student"), (0.3, "mixture"), (1.0, "mixture")])
def test_a_buffer_is_sampled_from_the_mixture_and_scored_by_prompt(alpha, who, asked, monkeypatch):
    one, scored = asked(name="minillm", alpha=alpha, lm_coef=0.0), []

    def score(models, answers, *, keys, judges, batch_size, fields, from_student):
        scored.append((models, answers, keys, batch_size))
        assert from_student == (who == "student") and "reverse_kl" not in fields
        return RolloutBuffer()

    monkeypatch.setattr("minillm.methods.minillm.score", score)
    build_method(one.config).collect(one.data, "models", draw=3)
    (call,) = one.calls
    numbers = [prompt[0] - 20 for prompt in call["prompts"]]  # Example 40 + i begins with token 60 + i
    assert call["sampling"] == Sampling(9, alpha=alpha) and call["who"] == who
    assert (call["seed"], call["draw"], call["batch_size"]) == (7, 3, 2) and call["extras"] == [SHOWN] * 5
    assert call["keys"] == distinct_keys(numbers) and len(set(numbers)) == 3
    ((models, answers, keys, batch_size),) = scored
    assert models == "models" and keys == numbers and batch_size == 2
    assert [answer.response[0] for answer in answers] == [key % 200 for key in call["keys"]]
    assert one.told[-1] == ("sampling answers", 5, 5)
    assert {"time/rollout_s", "time/scoring_s"} <= one.data.timing.read().keys()


def test_inner_epochs_never_run_the_teacher(models, data, monkeypatch):
    method = build_method(stage(lm_coef=0.0))
    buffer = method.collect(data, models, draw=0)

    def refuse(*args, **kwargs):
        raise AssertionError("the teacher was run again")

    monkeypatch.setattr(models.teacher.model.model, "forward", refuse)
    (term,) = method.terms(list(buffer)[:2], data, models)
    assert torch.isfinite(term_loss(term, models))


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3])
def test_the_pretraining_term_is_the_weighted_loss_of_the_blocks(kd_ratio, models, data):
    method = build_method(stage(lm_coef=0.7, pt_kd_ratio=kd_ratio))
    buffer = method.collect(data, models, draw=0)
    ids = torch.tensor(Stream(data.corpus.items, seed=1).take(2))
    _, term = method.terms(list(buffer)[:2], data, models)
    log_q, log_p = (
        m(ids).logits[:, :-1].flatten(0, 1).double().log_softmax(-1) for m in (models.student, models.teacher.model)
    )
    cross_entropy = torch.nn.functional.nll_loss(log_q, ids[:, 1:].flatten())
    forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    want = 0.7 * ((1 - kd_ratio) * cross_entropy + kd_ratio * forward_kl)
    torch.testing.assert_close(term_loss(term, models), want, rtol=1e-5, atol=1e-6)


def test_the_presets_are_the_published_and_the_released_settings():
    differences = {
        "gamma": (1.0, 0.95),
        "return_from": ("next", "current"),
        "whiten": ("none", "all"),
        "single_step_weighted": (True, False),
        "reduction": ("sequences", "tokens"),
        "reward_scaling": (None, 0.5),
        "cliprange_reward": (None, 100.0),
        "pt_kd_ratio": (0.0, 0.5),
    }
    shared = {"alpha": 0.2, "cliprange": 0.2, "ppo_epochs": 4, "lm_coef": 1.0, "length_norm": True,
              "importance_weight_in_clip": True, "importance_weight": "token", "single_step": True}  # fmt: skip
    for place, preset in enumerate(("paper", "lmops")):
        expected = shared | {key: values[place] for key, values in differences.items()}
        assert stage(preset=preset).method.model_dump(exclude={"name", "preset"}) == expected
    assert stage(preset="lmops", gamma=0.5).method.gamma == 0.5


def test_the_default_is_the_published_formulas_with_what_measured_better():
    settings = [stage(**keys).method.model_dump(exclude={"preset"}) for keys in ({}, {"preset": "paper"})]
    assert settings[0] == {**settings[1], "ppo_epochs": 2} and stage().method.preset == "measured"
    assert stage(preset="paper", ppo_epochs=3).method.ppo_epochs == 3


@pytest.mark.parametrize("reduction, count", [("sequences", 6.0), ("tokens", None)])
def test_the_divisor_counts_sequences_or_tokens(reduction, count, models, data):
    method = build_method(stage(lm_coef=0.0, reduction=reduction))
    buffer = method.collect(data, models, draw=0)
    (term,) = method.terms(list(buffer), data, models)
    assert term.count == (count or sum(len(rollout.response) for rollout in buffer))
