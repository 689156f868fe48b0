"""Answers to one prompt read it once, and are those of separate readings."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.rollout.local import decoding_check
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.decoding_check import copying_error, refilling_error, require_copied_rows
from minillm.rollout.local.growing_batch import GrowingBatch
from minillm.rollout.local.kv_cache import RoomyLayer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.local.shared_prompts import copies_of, in_batches, in_readings, prompt_numbers, whole_groups
from minillm.rollout.noise import distinct_keys
from minillm.rollout.rollouts import Answer, Sampling
from minillm.teachers.pair import Models
from tests.rollout.local.test_refilling import assert_same, pair_of  # noqa: F401  a fixture
from tests.sweep.tiny_models import tiny_architecture, tiny_model

LENGTHS = (5, 9, 2, 9, 4)  # tokens of the prompts
SEVERAL = 3


@pytest.fixture
def asked() -> list[list[int]]:
    """Prompts, each of which comes three times, as methods ask for them."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 61, (length,), generator=generator).tolist() for length in LENGTHS] * SEVERAL


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The number of prompts that a model read, each time."""
    counts, hidden = [], Decoder.hidden

    def counting(self, input_ids, *others, prompts, **options):
        counts.extend([len(input_ids)] * prompts)
        return hidden(self, input_ids, *others, prompts=prompts, **options)

    monkeypatch.setattr(Decoder, "hidden", counting)
    for name in ("decoding_error", "copying_error", "refilling_error"):  # whose prompts are not counted
        monkeypatch.setattr(decoding_check, name, lambda model, *others: 0.0)
    return counts


def sample(models: Models, prompts, sampling: Sampling, *, share=True, refill=True, who="student") -> list[Answer]:
    rollouts = LocalRollouts(models, share_prompts=share, refill=refill)
    keys = distinct_keys([place % len(LENGTHS) for place in range(len(prompts))])
    return rollouts.sample(prompts, sampling, keys=keys, seed=5, draw=2, who=who, batch_size=6)


# windows and a state that recurs, whose rows are copied by transformers; positions that are learned
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "bamba"])
@pytest.mark.parametrize("refill", [True, False])
def test_a_prompt_is_read_once_and_answered_as_by_itself(pair_of, asked, read, kind, refill):  # noqa: F811
    models, sampling = pair_of(kind), Sampling(16, alpha=0.3)
    expected = sample(models, asked, sampling, share=False, who="mixture")
    assert sum(read) == 2 * len(asked)
    read.clear()
    found = sample(models, asked, sampling, who="mixture", refill=refill)
    assert sum(read) == 2 * len(LENGTHS), "each model reads every prompt once"
    assert_same(found, expected)
    for place in range(len(LENGTHS)):
        assert len({tuple(answer.response) for answer in found[place :: len(LENGTHS)]}) == SEVERAL


def test_rows_that_ended_are_filled_with_all_answers_to_a_prompt(pair_of, asked, read):  # noqa: F811
    models, sampling = pair_of("llama"), Sampling(24)
    expected = sample(models, asked, sampling, share=False)
    read.clear()
    assert_same(sample(models, asked, sampling), expected)
    assert read == [2, 1, 1, 1]  # two prompts side by side; others follow


def test_answers_to_a_prompt_take_rows_one_after_the_other(pair_of, asked, read):  # noqa: F811
    """More of them than rows: what is read once waits for all of them."""
    models, sampling = pair_of("llama"), Sampling(16)
    prompts = [asked[0]] * 3 + [asked[1]] * 7
    options = {"keys": range(10), "seed": 5, "batch_size": 3}
    expected = LocalRollouts(models).sample(prompts, sampling, **options)
    read.clear()
    assert_same(LocalRollouts(models, share_prompts=True).sample(prompts, sampling, **options), expected)
    assert read == [1, 1, 1], "the longer prompt for the first rows, and for the answers that have none"


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])  # columns that are dropped, and of windows
def test_short_prompts_wait_longer_than_the_columns_of_a_long_one_that_was_read_with_them(pair_of, asked, kind):  # noqa: F811
    """Four prompts are read at once and have more answers than there are rows, which forget the columns of the longest in between."""
    models, sampling = pair_of(kind), Sampling(4)
    prompts = [prompt for prompt in (asked[1], [*range(1, 9)], [1], [2], [3]) for _ in range(16)]
    options = {"keys": range(len(prompts)), "seed": 5, "batch_size": 16}
    expected = LocalRollouts(models, refill=False).sample(prompts, sampling, **options)
    assert_same(LocalRollouts(models, share_prompts=True).sample(prompts, sampling, **options), expected)


def answers_in_a_running_batch(models: Models, running: tuple, asked: Sequence[tuple]) -> list[Answer]:
    """Answers of the student to prompts, (ids, extras) each, which are read at once and take all rows of a batch but its last.
    After them that of the last row, which has gone on."""
    models, size = replace(models, eos_ids=()), len(asked)
    noise = torch.rand(2 * size + 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ids, extras = zip(*[running] * (size + 1), strict=True)
    options = {"waiting": size, "share_prompts": True}
    with models.reading("student"):
        batch = GrowingBatch(
            models, Sampling(6), {"student": 1.0}, range(size + 1), ids, noise[size:], extras, **options
        )
        batch.step()
        batch.live[:size] = [False] * size
        ids, extras = zip(*asked, strict=True)
        batch.read_ahead(range(size + 1, 2 * size + 1), ids, noise[:size], extras)
        batch.fill_rows()
        while any(batch.live):
            batch.step()
    answers = batch.collect()
    return [answers[number] for number in (*range(size + 1, 2 * size + 1), size)]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "bamba"])
def test_several_prompts_that_are_read_at_once_are_copied_to_their_own_rows(pair_of, asked, kind):  # noqa: F811
    models = pair_of(kind)
    prompts = [asked[place] for place in (0, 0, 2, 2, 2, 4)]
    answers = answers_in_a_running_batch(models, (asked[1], {}), [(prompt, {}) for prompt in prompts])
    for answer, prompt in zip(answers, [*prompts, asked[1]], strict=True):
        logits = models.student(torch.tensor([prompt + answer.response])).logits[0, len(prompt) - 1 : -1]
        said = logits[:, : models.vocab_size].log_softmax(-1).gather(1, torch.tensor(answer.response)[:, None])[:, 0]
        torch.testing.assert_close(answer.logprobs.double(), said, atol=1e-5, rtol=0)


def test_ranks_sample_the_same_answers(pair_of, asked, in_ranks):  # noqa: F811
    sampling, prompts = Sampling(8), asked[:4] * SEVERAL
    models = [pair_of("llama") for _ in range(2)]
    for other in models:
        other.student.load_state_dict(models[0].student.state_dict())
    expected = sample(models[0], prompts, sampling, share=False)
    for answers in in_ranks(2, lambda rank: sample(models[rank], prompts, sampling)):
        assert_same(answers, expected)


@pytest.mark.parametrize("what", ["rows", "refilled"])
def test_a_cache_whose_rows_cannot_be_copied_is_refused(what, pair_of, asked, monkeypatch):  # noqa: F811
    model = tiny_model(tiny_architecture("llama")).double()
    assert copying_error(model) < 1e-5
    require_copied_rows("student", model)
    if what == "refilled":  # answers that begin in rows of a running batch
        put = RoomyLayer.put
        monkeypatch.setattr(RoomyLayer, "put", lambda self, rows, *states: put(self, rows, *(-one for one in states)))
        assert refilling_error(model) > 0.05
        return
    reorder = RoomyLayer.reorder_cache
    monkeypatch.setattr(RoomyLayer, "reorder_cache", lambda self, rows: reorder(self, rows.flip(0)))
    with pytest.raises(
        UserError, match="student: LlamaForCausalLM cannot answer a prompt several times.*per_prompt to 1"
    ):
        require_copied_rows("student", model)
    monkeypatch.setattr(decoding_check, "decoding_error", lambda model, *others: 0.0)
    with pytest.raises(UserError, match="several times"):
        sample(pair_of("llama"), asked, Sampling(4))


def test_loops_that_read_every_prompt_are_refused_and_layers_are_not_shared(pair_of, asked, read):  # noqa: F811
    models = pair_of("llama")
    for other in ("cuda_graphs", "shared_coins"):
        with pytest.raises(UserError, match=f"answers_per_prompt above 1: the loop of rollout.{other}"):
            LocalRollouts(models, share_prompts=True, **{other: True})
    sample(replace(models, by_layers=True), asked, Sampling(4))
    assert sum(read) == len(asked)


def test_the_same_prompt_shows_the_same_pictures():
    picture = {"pixel_values": torch.zeros(1)}
    prompts = [[1, 2], [3], [1, 2], [1, 2], [1, 2]]
    assert prompt_numbers(prompts, [{}, {}, {}, picture, picture]) == [0, 1, 0, 3, 3]


def test_answers_to_one_prompt_stay_together_where_they_can():
    assert [whole_groups([7, 7, 7, 2, 2, 2], rows) for rows in (2, 3, 5, 6, 9)] == [0, 3, 3, 6, 6]
    assert in_batches([7, 7, 7, 2, 2, 2, 4], 4) == [(0, 3), (3, 7)]
    assert in_batches([7] * 5 + [2], 2) == [(0, 2), (2, 4), (4, 6)]
    numbers = [7, 7, 7, 2, 2, 4, 1]
    assert in_readings(numbers, 0, 2) == [range(5), range(5, 7)] and in_readings(numbers, 7, 2) == []
    assert in_readings(numbers, 2, 3) == [range(2, 6), range(6, 7)]
    firsts, copies = copies_of([7, 7, 2, 4, 4])
    assert firsts == [0, 2, 3] and copies.tolist() == [0, 0, 1, 2, 2]
    assert copies_of([7, 2]) == ([0, 1], None)
