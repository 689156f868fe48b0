"""The captured step: in what order torch is asked on any machine, and the answers themselves where there is a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from minillm.rollout.local import cuda_graphs as graphs
from minillm.rollout.local import static_loop
from minillm.rollout.local.cuda_graphs import CudaGraphs
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling

MANY_ENDS = tuple(range(0, 61, 8))


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[str]]:
    """What torch.cuda is asked, in order; a capture whose step raises fails as CUDA's does."""
    events: list[str] = []

    class Stream:
        def __init__(self, device=None, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            events.append("replay")

    @contextmanager
    def inside(what):
        events.append(f"{what} begins")
        yield
        events.append(f"{what} ends")

    main = Stream(name="main")
    graphs._side_stream.cache_clear()
    for name, stand_in in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda: main,
        "device": lambda device: inside(f"{device}"),
        "stream": lambda stream: inside(f"stream {stream.name}"),
        "graph": lambda graph, pool, stream, **options: inside(f"capture on {stream.name} in {pool} {options}"),
    }.items():
        monkeypatch.setattr(graphs.torch.cuda, name, stand_in)
    yield events
    graphs._side_stream.cache_clear()


def test_a_step_runs_once_and_is_captured_on_a_side_stream(asked):
    capture = CudaGraphs(torch.device("cuda:1"))
    replay = capture(lambda: asked.append("step"))
    assert asked == [
        "cuda:1 begins",
        "side waits for main",
        "stream side begins",
        "step",
        "stream side ends",
        "main waits for side",
        "capture on side in pool {'capture_error_mode': 'thread_local'} begins",
        "step",
        "capture on side in pool {'capture_error_mode': 'thread_local'} ends",
        "cuda:1 ends",
    ]
    replay()
    assert asked[-1] == "replay"


def test_a_step_that_cannot_be_captured(asked):
    def step():
        asked.append("step")
        if asked.count("step") == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(
        ValueError, match=r"cannot be captured \(operation not permitted.* Leave rollout.cuda_graphs out"
    ):
        CudaGraphs(torch.device("cuda"))(step)
    assert CudaGraphs(torch.device("cuda")).stream is CudaGraphs(torch.device("cuda")).stream


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("who", ["student", "mixture"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "qwen2", "cohere"])
def test_the_same_answers_on_a_gpu(make_models, prompts, monkeypatch, architecture, who):
    monkeypatch.setattr(static_loop, "BUCKET", 16)
    models = replace(make_models(architecture, eos_ids=MANY_ENDS), device=torch.device("cuda"))
    for model in (models.student, models.teacher.model):
        model.to(models.device)
    sampling = Sampling(40, alpha=0.3 if who == "mixture" else 0.0)
    options = {"keys": range(len(prompts)), "seed": 5, "batch_size": 3, "who": who}
    expected = LocalRollouts(models).sample(prompts, sampling, **options)
    for got, answer in zip(
        LocalRollouts(models, cuda_graphs=True).sample(prompts, sampling, **options), expected, strict=True
    ):
        assert (got.response, got.ended) == (answer.response, answer.ended)
        torch.testing.assert_close(got.logprobs, answer.logprobs, atol=1e-4, rtol=0)
