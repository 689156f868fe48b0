"""Sampled answers against full forward passes, transformers' generate, and one another in other batches."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from minillm.rollout.local import growing_loop, local_rollouts
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Answer, Sampling
from minillm.teachers.pair import Models

ARCHITECTURES = ("llama", "gpt2", "opt", "qwen2", "gemma2", "cohere")
MANY_ENDS = tuple(range(0, 61, 8))  # so that rows end at different tokens


def run(models: Models, prompts, sampling: Sampling, **options) -> list[Answer]:
    options = {"keys": range(len(prompts)), "seed": 5, "batch_size": len(prompts), **options}
    return LocalRollouts(models).sample(prompts, sampling, **options)


def responses(answers: list[Answer]) -> list[list[int]]:
    return [answer.response for answer in answers]


@pytest.fixture
def fed_rows(monkeypatch) -> list[int]:
    """Rows of every forward pass in the decode loop."""
    rows, forward = [], Decoder.forward

    def counting(self, input_ids, *others):
        rows.append(len(input_ids))
        return forward(self, input_ids, *others)

    monkeypatch.setattr(Decoder, "forward", counting)
    monkeypatch.setattr(
        local_rollouts, "require_exact_decoding", lambda role, model: None
    )  # whose passes are no answers
    return rows


@pytest.mark.parametrize("who", ["student", "teacher", "mixture"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_those_of_a_full_forward(make_models, prompts, eager_logprobs, architecture, who):
    models = make_models(architecture, eos_ids=MANY_ENDS)
    alpha = 0.3 if who == "mixture" else 0.0
    answers = run(models, prompts, Sampling(20, alpha=alpha), who=who, batch_size=4)
    assert [answer.prompt for answer in answers] == prompts
    assert len({len(answer.response) for answer in answers}) > 1, "some rows must end before others"
    alpha = {"student": 0.0, "teacher": 1.0, "mixture": 0.3}[who]
    for answer in answers:
        student, teacher = (
            eager_logprobs(models, answer.prompt, answer.response, role).exp() for role in ("student", "teacher")
        )
        expected = (alpha * teacher + (1 - alpha) * student).log()
        expected = expected.gather(-1, torch.tensor(answer.response)[:, None])[:, 0]
        assert answer.logprobs.dtype == torch.float32
        torch.testing.assert_close(answer.logprobs.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_generate(make_models, prompts, architecture):
    models = make_models(architecture, eos_ids=MANY_ENDS)
    answers = run(models, prompts, Sampling(16, temperature=0))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = models.student.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=16, eos_token_id=list(MANY_ENDS), pad_token_id=0
            ),
        )
        assert answer.response == expected[0, len(prompt) :].tolist()


def test_greedy_logprobs_are_the_models_own(make_models, prompts, eager_logprobs):
    models = make_models()
    for answer in run(models, prompts, Sampling(8, temperature=0, top_k=1)):
        expected = eager_logprobs(models, answer.prompt, answer.response, "student").amax(-1)
        torch.testing.assert_close(answer.logprobs.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("who", ["student", "teacher", "mixture"])
def test_samples_follow_the_distribution(make_models, who):
    models = make_models(vocab_size=5, eos_ids=(2,))
    prompt, draws = [3, 1], 4000
    alpha = {"student": 0.0, "teacher": 1.0, "mixture": 0.4}[who]
    sampling = Sampling(2, alpha=alpha if who == "mixture" else 0.0)
    answers = run(models, [prompt] * draws, sampling, who=who, batch_size=1000)

    def following(context: list[int]) -> torch.Tensor:
        with torch.no_grad():
            student, teacher = (
                model(torch.tensor([context])).logits[0, -1, :5].double().softmax(-1)
                for model in (models.student, models.teacher.model)
            )
        return alpha * teacher + (1 - alpha) * student

    expected = {}
    for first, probability in enumerate(following(prompt).tolist()):
        if first in models.eos_ids:
            expected[first,] = probability
            continue
        for second, next_probability in enumerate(following([*prompt, first]).tolist()):
            expected[first, second] = probability * next_probability
    counts = Counter(map(tuple, responses(answers)))
    assert set(counts) <= set(expected) and len(expected) == 21
    # outcomes too rare for the approximation are counted together
    rare = {outcome for outcome, probability in expected.items() if probability * draws < 5}
    groups = [{outcome} for outcome in expected if outcome not in rare] + ([rare] if rare else [])
    chi_square = 0.0
    for group in groups:
        mean = draws * sum(expected[outcome] for outcome in group)
        chi_square += (sum(counts[outcome] for outcome in group) - mean) ** 2 / mean
    freedom = len(groups) - 1
    assert freedom > 5 and chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "temperature": 0.8}, {"no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("who", ["student", "mixture"])
def test_the_same_samples_whatever_the_batch(make_models, prompts, who, options):
    models = make_models("gpt2", eos_ids=MANY_ENDS)
    sampling = Sampling(20, alpha=0.3 if who == "mixture" else 0.0, **options)
    together = run(models, prompts, sampling, who=who)
    one_by_one = run(models, prompts, sampling, who=who, batch_size=1)
    backwards = run(models, prompts[::-1], sampling, who=who, batch_size=3, keys=range(len(prompts))[::-1])[::-1]
    part = run(models, prompts[2:4], sampling, who=who, keys=[2, 3])
    assert responses(together) == responses(one_by_one) == responses(backwards)
    assert responses(together)[2:4] == responses(part)
    for left, right in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(left.logprobs, right.logprobs, atol=1e-5, rtol=0)
    longer = run(models, prompts, replace(sampling, max_new_tokens=30), who=who)
    assert [response[:20] for response in responses(longer)] == responses(together)


def test_seed_draw_and_key_change_the_samples(make_models, prompts):
    models, sampling = make_models(), Sampling(12)
    base = responses(run(models, prompts, sampling))
    assert base == responses(run(models, prompts, sampling))
    for change in ({"seed": 6}, {"draw": 1}, {"keys": range(50, 50 + len(prompts))}):
        assert responses(run(models, prompts, sampling, **change)) != base


@pytest.mark.parametrize("who", ["student", "mixture"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_rows_that_have_ended_leave_the_batch(make_models, prompts, monkeypatch, fed_rows, architecture, who):
    models, prompts = make_models(architecture, eos_ids=MANY_ENDS), prompts * 3
    sampling = Sampling(24, alpha=0.3 if who == "mixture" else 0.0)
    results = {}
    for fraction in (0.01, 0.25, 2.0):  # at once, in groups, never
        fed_rows.clear()
        monkeypatch.setattr(growing_loop, "ENDED_FRACTION", fraction)
        results[fraction] = run(models, prompts, sampling, who=who), sum(fed_rows), min(fed_rows)
    assert results[0.01][1] < results[0.25][1] < results[2.0][1]
    assert results[0.01][2] < len(prompts) == results[2.0][2]
    wanted = sum(len(answer.response) for answer in results[2.0][0]) * (2 if who == "mixture" else 1)
    assert results[0.01][1] == wanted, "not a row more than the tokens that were asked for"
    for fraction in (0.01, 0.25):
        for got, expected in zip(results[fraction][0], results[2.0][0], strict=True):
            assert got.response == expected.response and got.ended == expected.ended
            torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_any_end_ends_and_belongs_to_the_answer(make_models, prompts):
    models = make_models(eos_ids=MANY_ENDS)
    answers = run(models, prompts, Sampling(10))
    for answer in answers:
        assert not set(answer.response[:-1]) & set(MANY_ENDS)
        assert answer.ended == (answer.response[-1] in MANY_ENDS)
        assert answer.ended or len(answer.response) == 10
        assert len(answer.logprobs) == len(answer.response)
    assert len({answer.response[-1] for answer in answers if answer.ended}) > 1
    assert {answer.ended for answer in answers} == {True, False}


def test_padding_that_is_also_the_end(make_models, prompts):
    models = make_models(eos_ids=(0,))
    assert models.pad_id in models.eos_ids
    with_ends = [[0, *prompt, 0] for prompt in prompts]  # real tokens, not padding
    sampling = Sampling(12)
    expected = run(models, with_ends, sampling, batch_size=1)
    assert responses(run(models, with_ends, sampling)) == responses(expected)
    # padding with another id gives the same
    assert responses(run(replace(models, pad_id=9), with_ends, sampling)) == responses(expected)


def test_an_end_as_the_last_token(make_models):
    models = make_models(teacher=False)
    [answer] = run(models, [[4, 5]], Sampling(6, temperature=0))
    [ended] = run(replace(models, eos_ids=(answer.response[0],)), [[4, 5]], Sampling(1, temperature=0))
    assert ended.response == answer.response[:1] and ended.ended and not answer.ended


@pytest.mark.parametrize("alpha, role", [(0.0, "student"), (1.0, "teacher")])
def test_a_mixture_of_one_runs_one(make_models, prompts, monkeypatch, alpha, role):
    models = make_models()
    idle = models.teacher.model if role == "student" else models.student
    monkeypatch.setattr(idle, "forward", None)
    for module in idle.modules():
        monkeypatch.setattr(module, "forward", None)
    answers = run(models, prompts, Sampling(6, alpha=alpha), who="mixture")
    assert responses(answers) == responses(run(models, prompts, Sampling(6), who=role))


def test_no_ngram_is_repeated(make_models, prompts):
    models = make_models(eos_ids=(), vocab_size=8)
    prompts = [[token % 8 for token in prompt] for prompt in prompts]
    for sampling in (Sampling(40), Sampling(40, no_repeat_ngram_size=2, alpha=0.3)):
        repeats = 0
        for answer in run(models, prompts, sampling, who="mixture"):
            whole = answer.prompt + answer.response
            pairs = list(zip(whole, whole[1:], strict=False))
            fresh = pairs[len(answer.prompt) - 1 :]
            repeats += sum(pair in pairs[: len(answer.prompt) - 1 + place] for place, pair in enumerate(fresh))
        assert (repeats == 0) == bool(sampling.no_repeat_ngram_size)


@pytest.mark.parametrize("ranks", [2, 9])  # nine ranks are more than there are prompts
def test_ranks_sample_a_slice_each_and_have_all_answers(ranks, make_models, prompts, in_ranks):
    sampling, heard = Sampling(6, alpha=0.3), []
    whole = run(make_models(eos_ids=MANY_ENDS), prompts, sampling, who="mixture")

    models = [make_models(eos_ids=MANY_ENDS) for _ in range(ranks)]  # before the threads, which share one generator

    def sampled(rank: int) -> list[Answer]:
        progress = heard.append if rank == 0 else None
        return run(models[rank], prompts, sampling, who="mixture", batch_size=2, progress=progress)

    for answers in in_ranks(ranks, sampled):
        assert [answer.prompt for answer in answers] == prompts
        assert [(one.response, one.ended) for one in answers] == [(one.response, one.ended) for one in whole]
        for one, other in zip(answers, whole, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)
    assert heard == {2: [4, 6, 7], 9: [7]}[ranks]  # of all ranks together, and never more than there are


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")
def test_modes_are_left_alone_and_checkpointing_does_no_harm(make_models, prompts):
    models = make_models()
    models.student.train()
    models.student.gradient_checkpointing_enable()
    models.student.config.use_cache = False
    answers = run(models, prompts, Sampling(6))
    assert models.student.training and not models.teacher.model.training
    assert all(layer.gradient_checkpointing and layer.training for layer in models.student.model.layers)
    assert models.student.config.use_cache is False
    models.student.gradient_checkpointing_disable()
    models.student.eval()
    models.student.config.use_cache = True
    assert responses(answers) == responses(run(models, prompts, Sampling(6)))
    # what was sampled can be trained on
    (models.student(torch.tensor([prompts[0]])).logits.sum() * answers[0].logprobs.sum()).backward()


def test_progress_and_nothing_to_do(make_models, prompts):
    models, seen = make_models(), []
    run(models, prompts, Sampling(2), batch_size=3, progress=seen.append)
    assert seen == [3, 6, 7]
    assert LocalRollouts(models).sample([], Sampling(2), keys=[], seed=0, batch_size=3) == []


def test_what_cannot_be_sampled(make_models, prompts):
    models = make_models("gpt2")
    for options, message in (
        ({"keys": [1]}, "7 prompts, but 1 keys"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"who": "both"}, "who is 'both'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(models, prompts, Sampling(2), **options)
    with pytest.raises(ValueError, match="alpha is 0.2"):
        run(models, prompts, Sampling(2, alpha=0.2))
    with pytest.raises(ValueError, match="key 1 has no tokens"):
        run(models, [[3], []], Sampling(2))
    with pytest.raises(ValueError, match="weight of 1.0 for the teacher needs a teacher, and there is none"):
        run(replace(models, teacher=None), prompts, Sampling(2), who="teacher")
    # 11 + 85 are the 96 positions, and the last token is never fed
    assert len(run(models, prompts[:2], Sampling(86), keys=[0, 1])) == 2
    with pytest.raises(ValueError, match="needs 97"):
        run(models, prompts, Sampling(87))


def test_weights_that_are_not_finite(make_models, prompts):
    models = make_models(teacher=False)
    with torch.no_grad():
        models.student.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="token 0 of 7 answer.* not finite: the weights of student hold"):
        run(models, prompts, Sampling(3))
