"""Rows of answers that have ended take the prompts that wait: the same answers as in batches one after the other."""

from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local import cache_rows, decoding_check, shared_prompts
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.decoding_check import refilling_error, replaces_rows
from minillm.rollout.local.growing_batch import GrowingBatch
from minillm.rollout.local.kv_cache import RoomyLayer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Answer, Sampling
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from tests.sweep.tiny_models import tiny_architecture, tiny_model

VOCABULARY = 264
SOME_ENDS = tuple(range(0, VOCABULARY, 16))
LENGTHS = (3, 11, 1, 7, 7, 2, 5, 6, 12, 4, 9, 1, 3, 8, 10, 2, 5)


@pytest.fixture
def many_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 61, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def pair_of():
    """A student and a teacher of a kind, with windows of a few tokens where they have any."""

    def make(kind: str, dtype: torch.dtype = torch.float64) -> Models:
        architecture = tiny_architecture(kind)
        for config in {id(one): one for one in (architecture, architecture.get_text_config())}.values():
            if getattr(config, "sliding_window", None) is not None:
                config.sliding_window = 6
        student, teacher = (tiny_model(architecture).to(dtype) for _ in range(2))
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.1)
        teacher = LocalTeacher(teacher.requires_grad_(False))
        return Models(student, teacher, byte_tokenizer(), VOCABULARY, SOME_ENDS, 0, torch.device("cpu"))

    return make


def sample(models: Models, prompts, sampling: Sampling, **options) -> list[Answer]:
    rollouts = LocalRollouts(
        models, refill=options.pop("refill", True), shared_coins=options.pop("shared_coins", False)
    )
    options = {"keys": range(len(prompts)), "seed": 5, "batch_size": 4, "who": "mixture", **options}
    return rollouts.sample(prompts, sampling, **options)


@pytest.fixture
def refilled(monkeypatch) -> list[int]:
    """How many prompts took rows of a running batch, each time."""
    counts, refill = [], Decoder.refill

    def counting(self, rows, *others):
        counts.append(len(rows))
        return refill(self, rows, *others)

    monkeypatch.setattr(Decoder, "refill", counting)
    monkeypatch.setattr(decoding_check, "refilling_error", lambda model: 0.0)  # whose prompts are not counted
    return counts


def assert_same(ours: list[Answer], theirs: list[Answer]) -> None:
    for got, expected in zip(ours, theirs, strict=True):
        assert (got.prompt, got.response, got.ended) == (expected.prompt, expected.response, expected.ended)
        torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-5, rtol=0)


# rotary and learned positions, normed heads, windows and chunks between layers that see everything, a state that recurs
# beside attention; ALiBi, whose code has no float64
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float64) for kind in ("llama", "gpt2", "qwen3", "gemma3_text", "llama4_text", "bamba")),
        ("bloom", torch.float32),
    ],
)
def test_the_answers_of_batches_one_after_the_other(pair_of, many_prompts, refilled, kind, dtype):
    models, sampling = pair_of(kind, dtype), Sampling(24, alpha=0.3)
    expected = sample(models, many_prompts, sampling, refill=False)
    assert not refilled and len({len(answer.response) for answer in expected}) > 4, "rows must end at different tokens"
    assert_same(sample(models, many_prompts, sampling), expected)
    assert sum(refilled) >= 8 * 2 and len(refilled) > 2 * 2, "of each of the two models, and not all at once"


@pytest.mark.parametrize("refill", [True, False])
def test_a_refilled_row_is_looked_at(refill):
    """The check finds a cache that keeps what was in a row."""
    model = tiny_model(tiny_architecture("llama")).double()
    assert replaces_rows(model) and refilling_error(model) < 1e-5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RoomyLayer,
            *(
                ("put", lambda *_: None)
                if refill
                else ("drop", lambda self, tokens: self.use(self.keys.shape[-2] - tokens))
            ),
        )
        assert refilling_error(model) > 0.05 and not replaces_rows(model)


def test_what_cannot_be_refilled_is_drawn_in_batches(pair_of, many_prompts, monkeypatch, refilled):
    """A kind of layer that nobody has looked at, frequencies that move with the longest text, coins, and layers that ranks
    gather together: the same answers, and the reason."""
    models, sampling = pair_of("bamba"), Sampling(12, alpha=0.3)
    expected = sample(models, many_prompts, sampling, refill=False)
    monkeypatch.setattr(cache_rows, "KNOWN_LAYERS", {RoomyLayer})
    assert_same(sample(models, many_prompts, sampling), expected)
    reason = LocalRollouts(models).unrefilled("student", "teacher")
    assert reason == "the student (BambaForCausalLM) cannot read a prompt beside answers in progress"
    llama = pair_of("llama")
    assert LocalRollouts(llama).unrefilled("student", "teacher") is None
    assert "gather every layer" in LocalRollouts(replace(llama, by_layers=True)).unrefilled("student")
    sample(llama, many_prompts, sampling, shared_coins=True)
    llama.student.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "the student (LlamaForCausalLM)" in LocalRollouts(llama).unrefilled("student")
    assert not refilled


@pytest.mark.parametrize("options", [{"no_repeat_ngram_size": 2}, {"temperature": 0}, {"top_k": 5, "temperature": 0.8}])
def test_every_way_to_draw(pair_of, many_prompts, refilled, options):
    models, sampling = pair_of("gpt2"), Sampling(16, **options)
    expected = sample(models, many_prompts, sampling, refill=False, who="student")
    assert_same(sample(models, many_prompts, sampling, who="student"), expected)
    assert refilled or "temperature" in options  # greedy answers of a random model may all run to the limit


@pytest.mark.parametrize("ahead", [0.0, 0.5, 10.0])  # one prompt at a time, several, all that are left
def test_prompts_are_read_some_at_a_time(pair_of, many_prompts, monkeypatch, refilled, ahead):
    models, sampling, counts = pair_of("llama"), Sampling(24), []
    expected = sample(models, many_prompts, sampling, refill=False, who="student")
    read = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, ids, *others: counts.append(len(ids)) or read(self, ids, *others))
    monkeypatch.setattr(shared_prompts, "READ_AHEAD", ahead)
    assert_same(sample(models, many_prompts, sampling, who="student"), expected)
    assert counts == {0.0: [1] * 13, 0.5: [2] * 6 + [1], 10.0: [13]}[ahead]
    # an answer of one token takes no row
    assert sum(refilled) == sum(len(answer.response) > 1 for answer in longest_first(expected)[4:])


def longest_first(answers: list[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda answer: len(answer.prompt), reverse=True)


def test_no_row_waits_while_a_prompt_does(pair_of, many_prompts, monkeypatch):
    models, sampling, seen, step = pair_of("llama"), Sampling(24), [], GrowingBatch.step

    def looking(self):
        seen.append((self.live.count(False), self.waiting is not None))
        step(self)

    monkeypatch.setattr(GrowingBatch, "step", looking)
    monkeypatch.setattr(shared_prompts, "READ_AHEAD", 1.0)  # several at a time
    answers = sample(models, many_prompts, sampling, who="student")
    assert not any(ended and waits for ended, waits in seen) and any(waits for _, waits in seen)
    # rows are full until the last prompt has one: no schedule that knows no lengths takes fewer steps
    left = [len(answer.response) - 1 for answer in longest_first(answers)]
    rows, steps = [0] * 4, 0
    while any(rows) or left:
        rows = [row or (left.pop(0) if left else 0) for row in rows]
        while left and not all(rows):  # an answer of one token
            rows = [row or (left.pop(0) if left else 0) for row in rows]
        steps += any(rows)
        rows = [max(0, row - 1) for row in rows]
    assert len(seen) == steps


def test_all_answers_end_with_their_first_token(pair_of, many_prompts):
    models = replace(pair_of("llama"), eos_ids=tuple(range(VOCABULARY)))
    answers = sample(models, many_prompts, Sampling(24), who="student")
    assert all(len(answer.response) == 1 and answer.ended for answer in answers)


def test_fewer_rows_are_read_and_no_more_room_is_kept(pair_of, many_prompts, monkeypatch):
    """Caches have the room of the longest prompt and answer, as in batches, and rows do not wait for the slowest. Prompts
    that wait have caches of their own, as long as they are."""
    models, sampling = pair_of("llama"), Sampling(24)
    fed, rooms, update = [], set(), RoomyLayer.update

    def counting(self, keys, values, *others):
        result = update(self, keys, values, *others)
        if keys.shape[-2] == 1 and self.room >= 24:  # not a prompt of one token
            fed.append(len(keys))
        rooms.add(self._stored[0].shape[:1] + self._stored[0].shape[2:3])
        return result

    monkeypatch.setattr(RoomyLayer, "update", counting)
    counts = {}
    for refill in (False, True):
        fed.clear(), rooms.clear()
        rollouts = LocalRollouts(models, refill=refill)
        rollouts._blocks, rollouts._rows_replaced = {"student": False}, {"student": True}
        rollouts.sample(many_prompts, sampling, keys=range(17), seed=5, batch_size=4)
        counts[refill] = len(fed), max(room for _, room in rooms), max(batch for batch, _ in rooms)
    assert counts[True][1:] == counts[False][1:] == (12 + 24 - 1, 4)
    assert counts[True][0] < 0.8 * counts[False][0]


def test_positions_stay_within_a_table(pair_of, many_prompts):
    """Rows that have ended wait without a position of their own: gpt2 has one for each token of the longest and no more."""
    models = pair_of("gpt2")
    longest = max(LENGTHS) + 24 - 1
    for model in (models.student, models.teacher.model):
        model.config.n_positions = model.config.max_position_embeddings = longest
        table = model.transformer.wpe
        table.weight.data = table.weight.data[:longest].clone()
    sampling = Sampling(24, alpha=0.3)
    assert_same(sample(models, many_prompts, sampling), sample(models, many_prompts, sampling, refill=False))


def test_ranks_refill_by_themselves(pair_of, many_prompts, in_ranks):
    sampling, heard = Sampling(12, alpha=0.3), []
    whole = sample(pair_of("llama"), many_prompts, sampling, refill=False)
    models = [pair_of("llama") for _ in range(2)]

    def sampled(rank: int) -> list[Answer]:
        progress = heard.append if rank == 0 else None
        return sample(models[rank], many_prompts, sampling, batch_size=2, progress=progress)

    for answers in in_ranks(2, sampled):
        assert_same(answers, whole)
    assert heard == sorted(heard) and heard[-1] == len(many_prompts) and len(heard) > 2


def test_weights_that_are_not_finite_are_named_by_the_token(pair_of, many_prompts):
    models = pair_of("llama")
    models.student.lm_head.weight.data[5] = torch.inf
    with pytest.raises(UserError, match=r"token 0 of 4 answer\(s\) are not finite: the weights of student"):
        sample(models, many_prompts, Sampling(6), who="student")
