"""The noise: a function of its four coordinates alone, uniform, and the same on every machine."""

import numpy as np
import pytest
import torch

from minillm.rollout.noise import coins, distinct_keys, uniforms


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Four words of Philox 4x64-10, from its paper."""
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (high >> 64) ^ counter[1] ^ key[0],
            high % 2**64,
            (low >> 64) ^ counter[3] ^ key[1],
            low % 2**64,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter


@pytest.mark.parametrize("seed, key, draw", [(7, 3, 2), (2**63 + 9, -4, 2**40)])
def test_is_philox(seed, key, draw):
    # a change here would change every sample, and a resumed run would not see the noise of the one before
    words = [philox([block, 0, key % 2**64, 0], [seed, draw]) for block in (1, 2)]  # numpy counts before it answers
    expected = [((word >> 12) + 0.5) / 2**52 for block in words for word in block]
    assert uniforms(seed, [key], draw, 8)[0].tolist() == expected


def test_depends_on_its_coordinates_alone():
    alone = uniforms(1, [42], 3, 10)
    assert torch.equal(uniforms(1, [5, 42, 6], 3, 10)[1:2], alone)
    assert torch.equal(uniforms(1, [42], 3, 1000)[:, :10], alone)
    assert torch.equal(uniforms(1 + 2**64, [42], 3, 10), alone)


@pytest.mark.parametrize("other", [(2, 42, 3), (1, 43, 3), (1, 42, 4), (42, 1, 3), (1, -42, 3), (1, 42 + 2**63, 3)])
def test_every_coordinate_matters(other):
    seed, key, draw = other
    assert not set(uniforms(seed, [key], draw, 50)[0].tolist()) & set(uniforms(1, [42], 3, 50)[0].tolist())


def test_uniform_in_every_direction():
    grid = np.stack([uniforms(0, range(100), draw, 100).numpy() for draw in range(10)])  # draw, key, position
    assert grid.dtype == np.float64 and 0 < grid.min() and grid.max() < 1
    counts, _ = np.histogram(grid, bins=64, range=(0, 1))
    chi_square = ((counts - grid.size / 64) ** 2 / (grid.size / 64)).sum()
    assert chi_square < 63 + 5 * np.sqrt(2 * 63)
    centred = grid - 0.5
    for axis in range(3):
        neighbours = np.moveaxis(centred, axis, 0)
        correlation = (neighbours[1:] * neighbours[:-1]).mean() * 12
        assert abs(correlation) < 5 / np.sqrt(grid.size)


def test_coins_are_of_a_draw_and_independent_of_its_tokens():
    words = [philox([block, 0, 0, 1], [7, 2]) for block in (1, 2)]
    assert coins(7, 2, 8).tolist() == [((word >> 12) + 0.5) / 2**52 for block in words for word in block]
    assert torch.equal(coins(7, 2, 1000)[:8], coins(7, 2, 8))
    many = torch.stack([coins(seed, draw, 64) for seed in range(20) for draw in range(20)])
    tokens = torch.stack([uniforms(seed, [0], draw, 64)[0] for seed in range(20) for draw in range(20)])
    assert not set(many.flatten().tolist()) & set(tokens.flatten().tolist())
    asked = (many < 0.2).double()
    assert abs(asked.mean() - 0.2) < 5 * (0.16 / asked.numel()) ** 0.5
    for one, other in ((asked[1:], asked[:-1]), (asked[:, 1:], asked[:, :-1]), (asked, tokens - 0.3)):
        assert (
            abs(((one - 0.2) * (other - 0.2)).mean())
            < 5 * (0.16 * 0.16 if other is not tokens else 0.16 / 12) ** 0.5 / one.numel() ** 0.5
        )


def test_keys_are_never_rounded():
    large = [-1, -2, 2**63, 2**63 + 1, 2**53, 2**53 + 1]
    assert len({tuple(row.tolist()) for row in uniforms(1, large, 0, 4)}) == len(large)


def test_seeds_and_draws_are_not_interchangeable_sums():
    # (seed + 1, draw) and (seed, draw + 1) would share noise if the key were their sum
    assert not torch.equal(uniforms(1, [0], 0, 4), uniforms(0, [0], 1, 4))


def test_no_samples():
    assert uniforms(0, [], 0, 5).shape == (0, 5)


def test_a_prompt_that_is_answered_twice_has_two_keys():
    assert distinct_keys([3, 8, 5]) == [3, 8, 5]
    keys = distinct_keys([3, 8, 3, 3, 8])
    assert keys[:2] == [3, 8] and len(set(keys)) == 5
