"""Returns, whitening and importance weights against formulas written out here, and the field's known bugs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.methods.returns import discounted_returns, importance_weights, shape_rewards, whiten

REWARDS = torch.tensor([0.5, -2.0, 3.0, 0.25], dtype=torch.float64)


def written_out(rewards, gamma, start, length_norm):
    shift = 1 if start == "next" else 0
    result = []
    for t in range(len(rewards)):
        later = range(t + shift, len(rewards))
        total = sum(gamma ** (k - t - shift) * float(rewards[k]) for k in later)
        result.append(total / len(later) if length_norm and len(later) else total)
    return torch.tensor(result, dtype=torch.float64)


@given(
    rewards=st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    gamma=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    start=st.sampled_from(["next", "current"]),
    length_norm=st.booleans(),
)
def test_returns_are_the_formula(rewards, gamma, start, length_norm):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    got = discounted_returns(rewards, gamma=gamma, start=start, length_norm=length_norm)
    torch.testing.assert_close(got, written_out(rewards, gamma, start, length_norm))


def test_the_last_token_has_no_later_reward():
    assert discounted_returns(REWARDS, start="next")[-1] == 0
    assert discounted_returns(REWARDS[:1], start="next").tolist() == [0.0]


def test_returns_are_undiscounted_means_of_later_rewards_where_nothing_is_said():
    torch.testing.assert_close(discounted_returns(REWARDS), written_out(REWARDS, 1.0, "next", True))


def test_discount_is_relative_to_the_token_and_not_to_the_absolute_position():
    ones = torch.ones(4, dtype=torch.float64)
    got = discounted_returns(ones, gamma=0.95, start="current", length_norm=False)
    torch.testing.assert_close(got, torch.tensor([3.709875, 2.8525, 1.95, 1.0], dtype=torch.float64))


def test_long_answers_with_length_norm_and_discount_stay_finite():
    got = discounted_returns(torch.ones(10_000), gamma=0.95, start="current", length_norm=True)
    assert torch.isfinite(got).all()
    assert got[5000] == pytest.approx(20 / 5000, rel=1e-6)


def test_reward_shaping_scales_before_it_clips():
    assert shape_rewards(REWARDS, scaling=0.5, cliprange=3.0).tolist() == [1.0, -3.0, 3.0, 0.5]
    assert shape_rewards(REWARDS, scaling=None, cliprange=None) is REWARDS


def test_whitening_valid_ignores_padding_and_all_counts_it():
    long, short = torch.arange(6, dtype=torch.float64), torch.tensor([10.0, -4.0], dtype=torch.float64)
    both = torch.cat([long, short])
    valid = torch.cat(whiten([long, short], over="valid"))
    torch.testing.assert_close(valid, (both - both.mean()) / (both.var() + 1e-8).sqrt())
    padded = torch.cat([both, torch.zeros(4, dtype=torch.float64)])
    everything = torch.cat(whiten([long, short], over="all"))
    torch.testing.assert_close(everything, (both - padded.mean()) / (padded.var() + 1e-8).sqrt())
    assert whiten([long], over="none")[0] is long


def test_whitening_needs_two_values():
    one, two = torch.tensor([3.0], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert torch.equal(whiten([one], over="valid")[0], one)
    torch.testing.assert_close(whiten([two], over="valid")[0], torch.tensor([-(0.5**0.5), 0.5**0.5]).double())
    assert whiten([], over="valid") == []


def test_weights_of_fp32_vectors_are_computed_in_float64():
    student, mixture = torch.full((5000,), -0.1), torch.full((5000,), -0.1001)
    _, _, single = importance_weights(student, mixture, "per_decision")
    log_w = student.double() - mixture.double()
    torch.testing.assert_close(single[-1], (4999 * log_w[0]).exp(), rtol=1e-9, atol=0)
    assert importance_weights(student, mixture, "token")[1].dtype == torch.float64


def test_importance_weights_are_the_named_products():
    student = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    mixture = torch.tensor([-1.2, -1.5, -0.4], dtype=torch.float64)
    w = (student - mixture).exp()
    reward, policy, single = importance_weights(student, mixture, "token")
    torch.testing.assert_close((reward, policy, single), (torch.ones_like(w), w, w))
    reward, policy, single = importance_weights(student, mixture, "per_decision")
    torch.testing.assert_close(reward, torch.stack([w[0], w[0] * w[1], w.prod()]))
    torch.testing.assert_close(single, torch.stack([torch.ones_like(w[0]), w[0], w[0] * w[1]]))
    torch.testing.assert_close(policy, torch.ones_like(w))
    reward, policy, single = importance_weights(student, mixture, "sequence")
    torch.testing.assert_close((policy, single), (w.prod() * torch.ones_like(w), w.prod() * torch.ones_like(w)))
