"""The static decode loop, replayed as a CUDA graph would be, against the growing one."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from minillm.rollout.local import growing_loop, local_rollouts, static_loop
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.local.static_loop import StaticLoop, static_room
from minillm.rollout.local.token_drawing import PartialAnswers
from minillm.rollout.noise import uniforms
from minillm.rollout.rollouts import Answer, Sampling
from minillm.teachers.pair import Models

ARCHITECTURES = ("llama", "gpt2", "opt", "qwen2", "cohere")  # gemma2 has a sliding window
MANY_ENDS = tuple(range(0, 61, 8))  # so that rows end at different tokens


class Recording(TorchDispatchMode):
    """The operations of a step with the tensors that they read and wrote, run again by `replay` in the same memory.

    This is what a CUDA graph keeps: addresses and the numbers of the host as they were; no line of Python runs again.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            aliases = [one.alias_info for one in func._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view, which is there
            results = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_flatten(before)[0], tree_flatten(results)[0], strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class Graphs:
    """In the place of CudaGraphs; counts what was captured and replayed."""

    def __init__(self, device: torch.device | None = None):
        self.captured = self.replayed = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        with Recording() as recording:
            step()

        def again() -> None:
            self.replayed += 1
            recording.replay()

        return again


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several graphs and several looks within a few tokens."""
    monkeypatch.setattr(static_loop, "BUCKET", 8)
    monkeypatch.setattr(static_loop, "LOOK", 3)


def both(models: Models, prompts, sampling: Sampling, who: str, **sizes) -> tuple[list[Answer], list[Answer], Graphs]:
    """The answers of the growing loop and of the static one."""
    alpha = {"student": 0.0, "teacher": 1.0, "mixture": sampling.alpha}[who]
    roles = {role: weight for role, weight in (("student", 1.0 - alpha), ("teacher", alpha)) if weight}
    noise, graphs = uniforms(5, range(len(prompts)), 0, sampling.max_new_tokens), Graphs()
    with torch.no_grad():
        sizes = {"batch": len(prompts), "longest": max(map(len, prompts)), **sizes}
        loop = StaticLoop(models, sampling, roles, capture=graphs, **sizes)
        return (
            growing_loop.decode(models, sampling, roles, prompts, noise.__getitem__),
            loop.decode(prompts, noise.__getitem__),
            graphs,
        )


def assert_same(ours: list[Answer], theirs: list[Answer]) -> None:
    for got, expected in zip(ours, theirs, strict=True):
        assert (got.prompt, got.response, got.ended) == (expected.prompt, expected.response, expected.ended)
        assert got.logprobs.dtype == torch.float32
        torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("who", ["student", "teacher", "mixture"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_answers_of_the_growing_loop(make_models, prompts, architecture, who):
    models = make_models(architecture, eos_ids=MANY_ENDS)
    expected, got, graphs = both(models, prompts, Sampling(22, alpha=0.3 if who == "mixture" else 0.0), who)
    assert len({len(answer.response) for answer in expected}) > 2, "rows must end at different tokens"
    assert_same(got, expected)
    assert graphs.captured >= 2 and graphs.replayed >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_k": 7, "top_p": 0.9, "temperature": 1.5},
    ],
)
@pytest.mark.parametrize("who", ["student", "mixture"])
def test_every_way_to_draw(make_models, prompts, who, options):
    models = make_models("gpt2", eos_ids=MANY_ENDS[1:3])
    expected, got, _ = both(models, prompts, Sampling(18, alpha=0.3 if who == "mixture" else 0.0, **options), who)
    assert_same(got, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_beside_fp32(make_models, prompts, attention):
    """Each model adds a mask of its own dtype. bf16 rounds by shape, so what is drawn is left out of the comparison."""
    models = make_models(eos_ids=())
    models.teacher.model.bfloat16()
    for model in (models.student, models.teacher.model):
        model.set_attn_implementation(attention)
    expected, got, _ = both(models, prompts, Sampling(12, alpha=0.5, top_k=1), "mixture")
    for ours, theirs in zip(got, expected, strict=True):
        shared = [left == right for left, right in zip(ours.response, theirs.response, strict=True)]
        same = shared.index(False) if False in shared else len(shared)
        torch.testing.assert_close(ours.logprobs[:same], theirs.logprobs[:same], atol=0.05, rtol=0)
    assert sum(ours.response == theirs.response for ours, theirs in zip(got, expected, strict=True)) >= 5


@pytest.mark.parametrize("waiting", [1, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_ended_take_the_prompts_that_wait(make_models, prompts, monkeypatch, architecture, waiting):
    """The longest first, in three rows; the shorter ones' answers begin in columns of their own."""
    monkeypatch.setattr(static_loop, "LOOK_WAITING", waiting)
    models, heard, read = make_models(architecture, eos_ids=MANY_ENDS), [], []
    asked, sampling, roles = (
        sorted(prompts * 2, key=len, reverse=True),
        Sampling(22, alpha=0.3),
        {"student": 0.7, "teacher": 0.3},
    )
    noise, graphs, reads = uniforms(5, range(len(asked)), 0, 22), Graphs(), Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, ids, *others: read.append(len(ids)) or reads(self, ids, *others))
    with torch.no_grad():
        expected = growing_loop.decode(models, sampling, roles, asked, noise.__getitem__)
        assert not read
        loop = StaticLoop(models, sampling, roles, batch=3, longest=len(asked[0]), capture=graphs)
        assert_same(loop.decode(asked, noise.__getitem__, progress=heard.append), expected)
    assert sum(read) == 2 * (len(asked) - 3) and heard == sorted(heard) and heard[-1] == len(asked)
    one_after_the_other = sum(
        max(len(answer.response) - 1 for answer in expected[start : start + 3]) for start in range(0, len(asked), 3)
    )
    assert graphs.captured + graphs.replayed < one_after_the_other + (waiting > 1) * 2 * len(asked)


def test_first_tokens_that_end_take_no_row(make_models, prompts):
    models, graphs = make_models(eos_ids=tuple(range(61))), Graphs()
    noise = uniforms(5, range(len(prompts)), 0, 9)
    with torch.no_grad():
        loop = StaticLoop(models, Sampling(9), {"student": 1.0}, batch=2, longest=11, capture=graphs)
        answers = loop.decode(sorted(prompts, key=len, reverse=True), noise.__getitem__)
    assert graphs.captured == 0 and all(len(answer.response) == 1 and answer.ended for answer in answers)


def test_one_token(make_models, prompts):
    expected, got, graphs = both(make_models(eos_ids=MANY_ENDS), prompts, Sampling(1), "student")
    assert_same(got, expected)
    assert graphs.captured == 0 and {answer.ended for answer in got} == {True, False}


def test_all_end_at_once(make_models, prompts):
    expected, got, graphs = both(make_models(eos_ids=tuple(range(61))), prompts, Sampling(9), "student")
    assert_same(got, expected)
    assert graphs.captured == 0 and all(len(answer.response) == 1 and answer.ended for answer in got)


@pytest.mark.parametrize("look", [1, 2, 100])
def test_steps_after_the_last_end_change_nothing(make_models, prompts, monkeypatch, look):
    monkeypatch.setattr(static_loop, "LOOK", look)
    models = make_models(eos_ids=tuple(range(0, 61, 2)))
    expected, got, graphs = both(models, prompts, Sampling(40), "student")
    assert_same(got, expected)
    longest = max(len(answer.response) for answer in expected)
    assert longest < 30
    assert graphs.captured + graphs.replayed == min(39, -(-(longest - 1) // look) * look)


def test_batches_share_memory_and_graphs(make_models, prompts):
    """Shorter prompts, fewer of them, and weights that an optimiser has changed in place."""
    models, sampling, graphs = make_models("opt", eos_ids=MANY_ENDS), Sampling(14, alpha=0.3), Graphs()
    roles = {"student": 0.7, "teacher": 0.3}
    with torch.no_grad():
        loop = StaticLoop(models, sampling, roles, batch=5, longest=11, capture=graphs)
        for draw, chosen in enumerate((prompts[:5], prompts[4:6], prompts[2:3], prompts[1:6])):
            noise = uniforms(0, range(len(chosen)), draw, sampling.max_new_tokens)
            assert_same(
                loop.decode(chosen, noise.__getitem__),
                growing_loop.decode(models, sampling, roles, chosen, noise.__getitem__),
            )
            for parameter in models.student.parameters():
                parameter.mul_(1.1)
    assert graphs.captured == static_room(11, 14) // 8 == 3 and graphs.replayed > 20


def test_sampling_takes_this_loop_where_it_is_asked_for(make_models, prompts, monkeypatch):
    made = []
    monkeypatch.setattr(local_rollouts, "CudaGraphs", lambda device: made.append(Graphs()) or made[-1])
    monkeypatch.setattr(local_rollouts, "require_cuda_graphs", lambda models: None)
    models = make_models(eos_ids=MANY_ENDS)
    without, with_graphs = LocalRollouts(models), LocalRollouts(models, cuda_graphs=True)
    options = {"keys": range(len(prompts)), "seed": 5, "batch_size": 3, "who": "mixture"}
    plain = without.sample(prompts, Sampling(12, alpha=0.3), **options)
    assert not made
    assert_same(with_graphs.sample(prompts, Sampling(12, alpha=0.3), **options), plain)
    assert len(made) == 1 and made[0].captured >= 2
    banned = Sampling(12, alpha=0.3, no_repeat_ngram_size=2)
    assert_same(with_graphs.sample(prompts, banned, **options), without.sample(prompts, banned, **options))
    assert with_graphs.sample([], Sampling(2), keys=[], seed=0, batch_size=3) == []
    assert len(made) == 1
    with pytest.raises(ValueError, match="no_repeat_ngram_size"):
        StaticLoop(models, banned, {"student": 1.0}, batch=1, longest=1, capture=Graphs())


def test_prompts_with_pictures_have_no_static_step(make_models):
    loop = StaticLoop(make_models(), Sampling(2), {"student": 1.0}, batch=1, longest=1, capture=Graphs())
    with pytest.raises(ValueError, match="rollout.cuda_graphs: prompts that show pictures"):
        loop.decode([[1]], uniforms(5, [0], 0, 2).__getitem__, [{"pixel_values": torch.zeros(1, 3, 4, 4)}])


def test_weights_that_are_not_finite(make_models, prompts):
    models = make_models(teacher=False)
    with torch.no_grad():
        models.student.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    # of 7, whatever fills the batch beside them
    with pytest.raises(ValueError, match="token 0 of 7 answer.* not finite: the weights of student hold"):
        sample_static(models, prompts, 1)
    with pytest.raises(ValueError, match="token 0 of 7 answer"):
        sample_static(models, prompts, 3)
    with pytest.raises(ValueError, match="token 3 of 2 answer"):
        writing = PartialAnswers(models, ["student"], 3, 6)
        writing.logprobs[:, 3] = torch.nan
        assert writing.rows_ended([3, 3, 2]) == [False] * 3
        writing.rows_ended([6, 4, 0])


def sample_static(models: Models, prompts, steps: int) -> list[Answer]:
    loop = StaticLoop(models, Sampling(steps), {"student": 1.0}, batch=len(prompts) + 3, longest=11, capture=Graphs())
    with torch.no_grad():
        return loop.decode(prompts, uniforms(5, range(len(prompts)), 0, steps).__getitem__)


def test_a_look_names_the_first_token_that_is_not_finite(make_models):
    writing = PartialAnswers(make_models(eos_ids=(7,), teacher=False), ["student"], 3, 6)
    rows, bad = torch.arange(3), torch.tensor([torch.nan, -1.0, -1.0], dtype=torch.float64)
    for place, token in enumerate(([1, 1, 7], [1, 1, 7])):
        writing.put(rows, torch.tensor([place]), torch.tensor(token), torch.full((3,), -1.0, dtype=torch.float64))
    assert writing.look(0, 2) == 2
    writing.put(rows, torch.tensor([2]), torch.ones(3, dtype=torch.int64), bad.flip(0))  # after the end of the last
    assert writing.look(0, 3) == 2
    writing.put(rows, torch.tensor([3]), torch.ones(3, dtype=torch.int64), bad)
    with pytest.raises(ValueError, match="token 3 of 1 answer"):
        writing.look(1, 4)
    assert [answer.response for answer in writing.answers([[1], [1], [1]])][2] == [7]


def test_rooms_are_whole_buckets():
    assert [static_room(3, steps) for steps in (1, 5, 6, 7, 14)] == [8, 8, 8, 16, 16]
