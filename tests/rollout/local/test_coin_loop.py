"""Mixtures by shared coins: every answer's law, and scores that no further pass of the teacher would change."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minillm import UserError
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local import coin_loop, lagging_decoder
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.noise import coins
from minillm.rollout.rollouts import Answer, Sampling
from minillm.rollout.scoring import score
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from tests.rollout.conftest import IDS, ROTARY
from tests.sweep.tiny_models import tiny_architecture, tiny_model

ALPHA = 0.3
MANY_ENDS = tuple(range(0, 61, 8))  # so that rows end at different tokens


def run(models: Models, prompts, tokens: int = 20, **options) -> list[Answer]:
    options = {"keys": range(len(prompts)), "seed": 5, "batch_size": len(prompts), **options}
    sampling = options.pop("sampling", Sampling(tokens, alpha=ALPHA))
    return LocalRollouts(models, shared_coins=True).sample(prompts, sampling, who="mixture", **options)


def responses(answers: list[Answer]) -> list[list[int]]:
    return [answer.response for answer in answers]


def bare(answers: list[Answer]) -> list[Answer]:
    return [replace(answer, scores=None) for answer in answers]


@torch.no_grad()
def test_the_law_of_every_answer_is_the_mixtures():
    """Given the coins, a token is drawn by the asked model's interval of the noise and no other; summed over the coins,
    the lengths of these intervals are p~ of every answer."""
    vocabulary, end, longest, prompt = 4, 0, 3, [1, 3, 2]
    pair = []
    for seed, hidden in ((1, 16), (2, 24)):
        torch.manual_seed(seed)
        keys = {**ROTARY, **IDS, "num_key_value_heads": 4, "initializer_range": 0.5}
        pair.append(LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, **keys)).double().eval())
    student, teacher = pair
    models = Models(student, LocalTeacher(teacher), None, vocabulary, (end,), end, torch.device("cpu"))
    every = [
        answer
        for length in range(1, longest + 1)
        for answer in itertools.product(range(vocabulary), repeat=length)
        if end not in answer[:-1] and (answer[-1] == end or length == longest)
    ]

    def probabilities(model, answer):  # -> (T, V) float64
        return model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].softmax(-1)

    laws = {role: [probabilities(model, answer) for answer in every] for role, model in zip(("student", "teacher"), pair, strict=True)}  # fmt: skip
    summed = torch.zeros(len(every), dtype=torch.float64)
    for asked in itertools.product(("student", "teacher"), repeat=longest):
        noise = torch.full((2 * len(every), longest), 0.5, dtype=torch.float64)
        length_of = torch.ones(len(every), dtype=torch.float64)
        for row, answer in enumerate(every):
            for place, token in enumerate(answer):
                above = laws[asked[place]][row][place].cumsum(-1)[token]
                width = laws[asked[place]][row][place][token]
                assert width > 1e-4
                noise[2 * row, place], noise[2 * row + 1, place] = above - width + 1e-5, above - 1e-5
                length_of[row] *= width
        shared = torch.tensor(
            [ALPHA / 2 if one == "teacher" else (1 + ALPHA) / 2 for one in asked], dtype=torch.float64
        )
        sampling, blocks = Sampling(longest, alpha=ALPHA), {"student": True, "teacher": True}
        answers = coin_loop.decode(models, sampling, blocks, shared, [prompt] * len(noise), noise)
        assert responses(answers) == [list(answer) for answer in every for _ in range(2)]
        summed += length_of * math.prod(ALPHA if one == "teacher" else 1 - ALPHA for one in asked)
    mixed = [ALPHA * p + (1 - ALPHA) * q for p, q in zip(laws["teacher"], laws["student"], strict=True)]
    tokens = [one[torch.arange(len(answer)), list(answer)] for one, answer in zip(mixed, every, strict=True)]
    torch.testing.assert_close(summed, torch.stack([one.prod() for one in tokens]), rtol=1e-12, atol=0)
    torch.testing.assert_close(summed.sum().item(), 1.0, rtol=1e-12, atol=0)
    for expected, answer in zip(tokens, answers[::2], strict=True):
        torch.testing.assert_close(answer.logprobs, expected.log().float(), rtol=0, atol=1e-5)


# rotary and learned positions, a softcap and windows of 5 tokens
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_scores_are_those_of_full_passes(make_models, prompts, monkeypatch, architecture):
    models, keys = make_models(architecture, eos_ids=MANY_ENDS), range(len(prompts))
    answers = run(models, prompts, batch_size=4)
    assert len({len(answer.response) for answer in answers}) > 1, "some rows must end before others"
    full = score(models, bare(answers), keys=keys, batch_size=3)
    monkeypatch.setattr(models.teacher.model.base_model, "forward", None)
    passes = []
    monkeypatch.setattr(models.student.base_model, "forward", _counted(models.student.base_model.forward, passes))
    kept = score(models, answers, keys=keys, batch_size=3)
    assert len(passes) == 1, "one pass, to see that the scores hold"
    for ours, theirs in zip(kept, full, strict=True):
        assert (ours.sequence, ours.ended, ours.key) == (theirs.sequence, theirs.ended, theirs.key)
        torch.testing.assert_close(ours.vectors, theirs.vectors, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.teacher, theirs.teacher, rtol=0, atol=1e-4)
        mixed = torch.logaddexp(
            theirs.vectors["teacher_logprob"] + torch.tensor(ALPHA).log(),
            theirs.vectors["student_logprob"] + torch.tensor(1 - ALPHA).log(),
        )
        torch.testing.assert_close(ours.vectors["mixture_logprob"], mixed, rtol=0, atol=1e-4)


def _counted(forward, passes: list):
    def counting(*arguments, **options):
        passes.append(None)
        return forward(*arguments, **options)

    return counting


# a state that a block continues, and one that a block would begin anew
@pytest.mark.parametrize(("kind", "blocks"), [("bamba", True), ("falcon_mamba", False)])
def test_recurrent_layers_read_blocks_where_they_can(kind, blocks):
    models = Models(
        tiny_model(tiny_architecture(kind)),
        LocalTeacher(tiny_model(tiny_architecture(kind)).requires_grad_(False)),
        byte_tokenizer(), 264, tuple(range(0, 264, 8)), 0, torch.device("cpu"),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in models.teacher.model.parameters():
            parameter.mul_(1.1)
    rollouts = LocalRollouts(models, shared_coins=True)
    prompts = [list(range(5, 16)), [7, 9], list(range(40, 46))]
    options = {"keys": range(3), "seed": 4, "batch_size": 3}
    answers = rollouts.sample(prompts, Sampling(16, alpha=0.5), who="mixture", **options)
    assert rollouts._blocks == {"student": blocks, "teacher": blocks}
    full = score(models, bare(answers), keys=range(3), batch_size=3)
    for ours, theirs in zip(score(models, answers, keys=range(3), batch_size=3), full, strict=True):
        torch.testing.assert_close(ours.vectors | {"mixture_logprob": 0}, theirs.vectors | {"mixture_logprob": 0}, rtol=0, atol=1e-4)  # fmt: skip


def test_the_same_samples_whatever_the_batch(make_models, prompts, monkeypatch):
    models = make_models("gpt2", eos_ids=MANY_ENDS)
    together = run(models, prompts)
    for other in (
        run(models, prompts, batch_size=1),
        run(models, prompts[::-1], batch_size=3, keys=range(len(prompts))[::-1])[::-1],
    ):
        assert responses(together) == responses(other)
        for left, right in zip(together, other, strict=True):
            torch.testing.assert_close(left.logprobs, right.logprobs, atol=1e-5, rtol=0)
            torch.testing.assert_close(left.scores.vectors, right.scores.vectors, atol=1e-5, rtol=0)
    assert responses(run(models, prompts[2:4], keys=[2, 3])) == responses(together)[2:4]
    assert [response[:20] for response in responses(run(models, prompts, 30))] == responses(together)
    monkeypatch.setattr(lagging_decoder, "LONGEST_BLOCK", 1)
    assert responses(run(models, prompts)) == responses(together)


def test_seed_and_draw_decide_bit_by_bit(make_models, prompts):
    models = make_models()
    one, again = (run(models, prompts, seed=3, draw=2) for _ in range(2))
    for left, right in zip(one, again, strict=True):
        assert left.response == right.response and torch.equal(left.logprobs, right.logprobs)
        assert all(torch.equal(left.scores.vectors[name], right.scores.vectors[name]) for name in left.scores.vectors)
        assert torch.equal(left.scores.teacher["hidden"], right.scores.teacher["hidden"])
    assert responses(run(models, prompts, seed=3, draw=3)) != responses(one) != responses(run(models, prompts, seed=4))


@pytest.mark.parametrize(("ranks", "by_layers"), [(2, False), (2, True), (9, True)])
def test_ranks_sample_and_score_a_slice_each(ranks, by_layers, make_models, prompts, in_ranks):
    whole_models = make_models(eos_ids=MANY_ENDS)
    whole = run(whole_models, prompts, 8)
    whole_buffer = score(whole_models, whole, keys=range(7), batch_size=4)
    # before the threads, which share one generator
    models = [replace(make_models(eos_ids=MANY_ENDS), by_layers=by_layers) for _ in range(ranks)]

    def sampled(rank: int):
        answers = run(models[rank], prompts, 8, batch_size=2)
        return answers, score(models[rank], answers, keys=range(7), batch_size=2)

    for rank, (answers, buffer) in enumerate(in_ranks(ranks, sampled)):
        assert responses(answers) == responses(whole)
        for place, (ours, one) in enumerate(zip(buffer, whole_buffer, strict=True)):
            torch.testing.assert_close(ours.vectors, one.vectors, atol=1e-5, rtol=1e-5)
            assert bool(ours.teacher) == (place % ranks == rank)
            if ours.teacher:
                torch.testing.assert_close(ours.teacher, one.teacher, atol=1e-5, rtol=1e-5)


def test_each_model_runs_where_it_is_asked_and_reads_no_more_than_was_written(make_models, prompts, monkeypatch):
    models, prompts, tokens = make_models(eos_ids=MANY_ENDS), prompts * 3, 24
    hidden, fed = Decoder.hidden, {"student": [], "teacher": []}
    rollouts = LocalRollouts(models, shared_coins=True)
    rollouts.check("student", "teacher")

    def counting(self, input_ids, *others, **options):
        if not options["prompts"]:
            fed["student" if self.model is models.student else "teacher"].append(input_ids.shape)
        return hidden(self, input_ids, *others, **options)

    monkeypatch.setattr(Decoder, "hidden", counting)
    sample = partial(rollouts.sample, prompts, Sampling(tokens, alpha=ALPHA), keys=range(21), seed=5, who="mixture")
    expected = None
    for fraction, blocks in ((2.0, True), (0.01, True), (0.01, False)):
        for shapes in fed.values():
            shapes.clear()
        monkeypatch.setattr(lagging_decoder, "ENDED_FRACTION", fraction)
        rollouts._blocks = dict.fromkeys(fed, blocks)
        answers = sample(batch_size=21)
        expected = expected or responses(answers)
        assert responses(answers) == expected
        teacher = int((coins(5, 0, tokens) < ALPHA).sum())
        if blocks:  # once for every coin but a first one, and once at the end
            assert teacher - 1 <= len(fed["teacher"]) <= teacher + 1 < tokens - 1
            assert tokens - teacher - 1 <= len(fed["student"]) <= tokens - teacher + 1
        else:  # the last token is never fed
            wanted = sum(len(answer.response) - 1 for answer in answers)
            assert all(sum(rows for rows, _ in shapes) == wanted for shapes in fed.values())


def test_a_student_of_16_bits_is_scored_by_full_passes(make_models, prompts, monkeypatch):
    models = make_models()
    models.student.bfloat16()
    models.teacher.model.bfloat16()
    answers = run(models, prompts, 8)
    full = score(models, bare(answers), keys=range(7), batch_size=7)
    monkeypatch.setattr(models.teacher.model.base_model, "forward", None)
    for ours, theirs in zip(score(models, answers, keys=range(7), batch_size=7), full, strict=True):
        assert torch.equal(ours.vectors["student_logprob"], theirs.vectors["student_logprob"])
        torch.testing.assert_close(ours.vectors["teacher_logprob"], theirs.vectors["teacher_logprob"], rtol=0, atol=0.3)


def test_scores_that_do_not_hold_are_measured_anew(make_models, prompts):
    models = make_models()
    answers = run(models, prompts, 8)
    full = score(models, bare(answers), keys=range(7), batch_size=7)
    for answer in answers:
        answer.scores.vectors["student_logprob"] += 3e-4
    for ours, theirs in zip(score(models, answers, keys=range(7), batch_size=7), full, strict=True):
        torch.testing.assert_close(
            ours.vectors["student_logprob"], theirs.vectors["student_logprob"], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"top_k": 5}, {"no_repeat_ngram_size": 2}])
def test_what_is_not_neutral_is_drawn_by_both(make_models, prompts, options):
    models, sampling = make_models(), Sampling(8, alpha=ALPHA, **options)
    keys = {"keys": range(7), "seed": 5, "batch_size": 7, "who": "mixture"}
    expected = LocalRollouts(models).sample(prompts, sampling, **keys)
    answers = run(models, prompts, sampling=sampling)
    assert responses(answers) == responses(expected) and all(answer.scores is None for answer in answers)


def test_frequencies_that_move_with_the_length_are_drawn_by_both(make_models, prompts):
    models = make_models()
    models.student.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert all(answer.scores is None for answer in run(models, prompts, 3))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_are_not_finite(make_models, prompts, role):
    models = make_models()
    with torch.no_grad():
        models.model(role).model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite: the weights of student or teacher hold NaN"):
        run(models, prompts, 3)


def test_graphs_are_refused(make_models):
    with pytest.raises(UserError, match="rollout.shared_coins has no step of fixed shapes"):
        LocalRollouts(make_models(), cuda_graphs=True, shared_coins=True)
