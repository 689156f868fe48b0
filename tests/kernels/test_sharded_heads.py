"""Heads whose weights lie on several ranks: FSDP2, DDP, ZeRO-3 and vocabulary-parallel, beside one process.

The ranks are processes of `sharded_ranks.py`, one set for each number of them: they run every case and save what they found.
"""

import os
import socket
from pathlib import Path

import pytest
import torch

from tests.forked import Forked
from tests.kernels import sharded_ranks
from tests.kernels.sharded_ranks import DATA_PARALLEL, VOCABULARY_PARALLEL, ZERO3

TOLERANCE = 2e-6  # relative L2


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> list[dict]:
    """The findings of each rank, by case."""
    folder, count = tmp_path_factory.mktemp("ranks"), request.param
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "PYTHONPATH": root}
    processes = [
        Forked(
            [sharded_ranks.__file__, str(folder / f"{rank}.pt")],
            {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        distance = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12)
        assert distance < TOLERANCE, (name, float(distance))


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_gradients_of_data_parallel_ranks_are_those_of_the_whole_batch(name, ranks):
    expected = sharded_ranks.data_parallel_alone(name, len(ranks))
    for rank in ranks:
        assert_equal(rank[name], expected)


def test_a_sharded_head_is_gathered_once(ranks):
    """Weight and bias each: gathered in the forward pass, their gradients scattered in the backward pass."""
    for rank in ranks:
        assert rank["traffic"] == {
            "forward": {"all_gather_into_tensor": 2},
            "backward": {"reduce_scatter_tensor": 2},
        }


@pytest.mark.parametrize("name", VOCABULARY_PARALLEL)
def test_ranks_with_their_rows_of_the_vocabulary_have_the_whole_loss(name, ranks):
    expected = sharded_ranks.vocabulary_parallel_alone(name)
    weights = [rank[name].pop("weight") for rank in ranks]
    assert_equal({"weight": torch.cat(weights)}, {"weight": expected.pop("weight")})
    biases = [rank[name].pop("bias") for rank in ranks]
    assert_equal({"bias": torch.cat(biases)}, {"bias": expected.pop("bias")})
    for rank in ranks:
        assert_equal(rank[name], expected)
        assert torch.equal(rank[name]["loss"], ranks[0][name]["loss"])


@pytest.mark.parametrize("name", ZERO3)
def test_a_zero3_head_is_gathered_outside_of_the_engine_too(name, ranks):
    pytest.importorskip("deepspeed")
    expected = sharded_ranks.data_parallel_alone("alone", len(ranks))
    for rank in ranks:
        assert_equal(rank[name], expected)


def test_what_cannot_be_is_refused_on_every_rank(ranks):
    for rank in ranks:
        for message, found in rank["refused"].items():
            assert message in found, found
