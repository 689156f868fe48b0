"""A delta in the decode loop and over whole answers: the same ids or a text in its own ids, alone and in batches."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm import UserError
from minillm.data.tokenization import encode
from minillm.evaluate.token_statistics import token_statistics
from minillm.models.batch import TokenSequence
from minillm.models.delta import Delta, DeltaPrompt, Translation
from minillm.models.spelling import spelling_of
from minillm.models.tokenizers import byte_tokenizer
from minillm.models.vocabulary_map import vocabulary_map
from minillm.rollout.local.delta_stream import TranslatedStream
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.teachers.pair import Models
from tests.conftest import tiny_llama

TEXTS = ["Once upon a time", "é", "Tom and Lily went out. Tom said,", "A"]
SIZE = 257
LENGTH = 8


@pytest.fixture(scope="module")
def letters():
    """A random model of bytes."""
    tokenizer = byte_tokenizer()
    return Models(
        tiny_llama(vocab_size=SIZE, seed=3).requires_grad_(False),
        None,
        tokenizer,
        SIZE,
        (256,),
        256,
        torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def stories(assets):
    """stories260k and its tokenizer, of other words than the bytes."""
    path = assets / "models" / "stories260k"
    return AutoModelForCausalLM.from_pretrained(path).requires_grad_(False).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(params=["one tokenizer", "two tokenizers"])
def controlled(request, letters):
    if request.param == "one tokenizer":
        delta = Delta(tiny_llama(vocab_size=SIZE, hidden_size=16, seed=9), letters.tokenizer, SIZE, alpha=1.5)
        return replace(letters, delta=delta)
    model, tokenizer = request.getfixturevalue("stories")
    made = vocabulary_map(spelling_of(letters.tokenizer), spelling_of(tokenizer))
    return replace(letters, delta=Delta(model, tokenizer, SIZE, 1.5, Translation(letters.tokenizer, made)))


def delta_ids(delta, prompt, response):
    """The ids that the delta is to read, from scratch."""
    if delta.translation is None:
        return prompt + response
    text = delta.translation.tokenizer.decode(prompt + response, skip_special_tokens=True).rstrip("\ufffd")
    return encode(delta.tokenizer, text, True)


@torch.no_grad()
def next_log_probs(models, prompt, response):
    """log softmax(z + alpha z_D[map]) by one uncached pass of each model over one text, in float64."""
    own = models.student.double()(torch.tensor([prompt + response])).logits[0, -1]
    delta = models.delta
    shift = delta.model.double()(torch.tensor([delta_ids(delta, prompt, response)])).logits[0, -1]
    models.student.float(), delta.model.float()
    if delta.translation is not None:
        ids = delta.translation.map.ids
        shift = torch.where(ids >= 0, shift[ids.clamp_min(0)], 0.0)
    return (own + delta.alpha * shift).log_softmax(-1)


def prompts_of(models):
    return [models.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


def sample(models, prompts, *, batch_size, temperature=1.0):
    return LocalRollouts(models).sample(
        prompts, Sampling(LENGTH, temperature=temperature), keys=range(len(prompts)), seed=5, batch_size=batch_size
    )


def test_answers_are_drawn_from_the_sum_whatever_they_are_decoded_beside(controlled):
    prompts = prompts_of(controlled)
    alone, together = (sample(controlled, prompts, batch_size=size) for size in (1, len(TEXTS)))
    assert [one.response for one in alone] == [one.response for one in together]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)
    assert [one.response for one in sample(replace(controlled, delta=None), prompts, batch_size=5)] != [
        one.response for one in alone
    ]
    for answer in together[1:3]:
        for place, token in enumerate(answer.response):
            want = next_log_probs(controlled, answer.prompt, answer.response[:place])[token].item()
            assert answer.logprobs[place].item() == pytest.approx(want, abs=2e-4), place


def test_greedy_answers_that_end_at_different_times_leave_the_batch(controlled):
    """Rows leave in groups: what is left goes on with its own ids and caches."""
    alone = sample(controlled, prompts_of(controlled), batch_size=1, temperature=0.0)
    # tokens that some rows come to early end an answer
    models = replace(
        controlled, eos_ids=(256, *{one.response[place] for place, one in zip((1, 3, 5), alone, strict=False)})
    )
    alone, together = (sample(models, prompts_of(models), batch_size=size, temperature=0.0) for size in (1, 4))
    assert [one.response for one in alone] == [one.response for one in together]
    assert len({len(one.response) for one in together}) > 1 and sum(one.ended for one in together) > 1


def test_statistics_are_those_of_the_answers_as_they_are_drawn(controlled):
    prompts = prompts_of(controlled)
    answers = sample(controlled, prompts, batch_size=5)
    sequences = [TokenSequence(one.prompt, one.response) for one in answers] + [TokenSequence(prompts[0], [])]
    for batch_size in (1, 6):
        stats = token_statistics(controlled, sequences, ("student_logprob",), batch_size=batch_size)
        for found, answer in zip(stats["student_logprob"], answers, strict=False):
            torch.testing.assert_close(found, answer.logprobs, atol=2e-4, rtol=1e-4)


def test_a_token_that_changes_the_ids_before_it_is_read_anew_and_the_rest_stays_cached(stories, letters):
    model, tokenizer = stories
    made = vocabulary_map(spelling_of(letters.tokenizer), spelling_of(tokenizer))
    delta = Delta(model, tokenizer, SIZE, 1.0, Translation(letters.tokenizer, made))
    prompt = letters.tokenizer("Once", add_special_tokens=False).input_ids
    stream, fed = TranslatedStream(delta, [prompt]), []
    forward = model.model.forward

    def count(*args, **kwargs):
        fed.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(model.model, "forward", count)
        stream.hidden()
        before = list(stream.fed[0])
        for token in letters.tokenizer(" upon a tímé", add_special_tokens=False).input_ids:
            stream.texts[0].append(token)
            last = stream.hidden()
    assert stream.fed[0] == tokenizer("Once upon a tímé").input_ids and before == tokenizer("Once").input_ids
    assert max(fed[1:]) <= 4 and sum(fed) < 40, fed  # never the whole text again
    with torch.no_grad():
        whole = model.model(torch.tensor([stream.fed[0]])).last_hidden_state[:, -1]
    torch.testing.assert_close(last, whole, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_read_in_the_deltas_own_words(stories, letters):
    model, tokenizer = stories
    made = vocabulary_map(spelling_of(letters.tokenizer), spelling_of(tokenizer))
    delta = Delta(model, tokenizer, SIZE, 1.0, Translation(letters.tokenizer, made))
    prompt = letters.tokenizer("Q", add_special_tokens=False).input_ids
    own = DeltaPrompt("Story: Q", tokenizer("Story: Q").input_ids, special=True)
    delta.translation.read(prompt, own)
    (text,) = TranslatedStream(delta, [prompt]).texts
    assert text.ids == own.ids
    text.append(letters.tokenizer("x", add_special_tokens=False).input_ids[0])
    assert text.ids == tokenizer("Story: Qx").input_ids


def test_an_unmapped_id_and_one_beyond_the_map_are_left_as_they_are(stories, letters):
    model, tokenizer = stories
    made = vocabulary_map(spelling_of(letters.tokenizer), spelling_of(tokenizer))
    made.ids[65] = -1
    head = Delta(model, tokenizer, SIZE + 3, 0.5, Translation(letters.tokenizer, made)).head()
    assert head.weight.shape[0] == SIZE + 3 and head.logit_scale == 0.5
    assert not head.weight[[65, SIZE, SIZE + 2]].any() and head.weight[66].any()


def test_pictures_and_cuda_graphs_are_refused(controlled):
    if controlled.delta.translation is None:
        with pytest.raises(UserError, match="cuda_graphs"):
            LocalRollouts(controlled, cuda_graphs=True)
        return
    with pytest.raises(UserError, match="pictures"):
        controlled.delta.translation.prompts.clear()
        from minillm.rollout.local.delta_stream import TranslatedDecoder

        TranslatedDecoder(controlled.delta, vocab_size=SIZE).forward(
            torch.zeros((1, 2), dtype=torch.int64),
            torch.ones((1, 2)),
            torch.zeros(1, 2),
            {"pixel_values": torch.zeros(1)},
        )
