"""The scoring pass against each model's own full logits."""

from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.models.batch import collate
from minillm.models.packing import pack_batches
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.rollout.scoring import score


@pytest.fixture
def scored(make_models, prompts):
    def make(architecture: str = "llama", batch_size: int = 3):
        models = make_models(architecture, eos_ids=tuple(range(0, 61, 8)))
        keys = [index + 100 for index in range(len(prompts))]
        options = {"keys": keys, "seed": 1, "who": "mixture", "batch_size": 4}
        answers = LocalRollouts(models).sample(prompts, Sampling(12, alpha=0.2), **options)
        return models, answers, score(models, answers, keys=keys, batch_size=batch_size)

    return make


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_vectors_are_those_of_full_logits(scored, eager_logprobs, architecture):
    models, answers, buffer = scored(architecture)
    for place, (answer, rollout) in enumerate(zip(answers, buffer, strict=True)):
        assert rollout.key == place + 100 and rollout.ended == answer.ended
        assert (rollout.prompt, rollout.response) == (answer.prompt, answer.response)
        student, teacher = (
            eager_logprobs(models, rollout.prompt, rollout.response, role) for role in ("student", "teacher")
        )
        chosen = torch.tensor(rollout.response)[:, None]
        expected = {
            "student_logprob": student.gather(-1, chosen)[:, 0],
            "teacher_logprob": teacher.gather(-1, chosen)[:, 0],
            "reverse_kl": (student.exp() * (student - teacher)).sum(-1),
        }
        for name, vector in expected.items():
            assert rollout.vectors[name].dtype == torch.float32
            torch.testing.assert_close(rollout.vectors[name].double(), vector, atol=1e-4, rtol=0)
        assert torch.equal(rollout.vectors["mixture_logprob"], answer.logprobs)
        # log p~ was recorded token by token, log q and log p in one pass: w = q / p~ stays below 1 / (1 - alpha)
        mixed = torch.logaddexp(
            rollout.vectors["teacher_logprob"] + torch.tensor(0.2).log(),
            rollout.vectors["student_logprob"] + torch.tensor(0.8).log(),
        )
        torch.testing.assert_close(rollout.vectors["mixture_logprob"], mixed, atol=1e-4, rtol=0)


def test_the_same_whatever_the_micro_batch(scored):
    for left, right in zip(scored(batch_size=7)[2], scored(batch_size=1)[2], strict=True):
        assert left.sequence == right.sequence
        torch.testing.assert_close(left.vectors, right.vectors, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(left.teacher, right.teacher, atol=1e-5, rtol=1e-5)


def test_teacher_hidden_is_what_its_head_reads(scored):
    models, _, buffer = scored()
    batch = collate([rollout.sequence for rollout in buffer], models.pad_id)
    hidden = models.teacher.rows(batch).hidden
    assert not hidden.requires_grad and hidden.shape == (sum(batch.lengths), 32)
    torch.testing.assert_close(
        hidden, torch.cat([rollout.teacher["hidden"] for rollout in buffer]), atol=1e-5, rtol=1e-5
    )
    logprobs = models.teacher.model.lm_head(hidden)[:, : models.vocab_size].log_softmax(-1)
    chosen = logprobs.gather(-1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(
        chosen, torch.cat([rollout.vectors["teacher_logprob"] for rollout in buffer]), atol=1e-4, rtol=0
    )


def test_packed_models_sample_the_very_same_answers_and_score_them_alike(make_models, prompts):
    """Caches are of rows, and nothing is packed beside them."""
    options, found = {"keys": range(7), "seed": 1, "batch_size": 4}, {}
    for packed in (False, True):
        models = make_models(eos_ids=tuple(range(0, 61, 8)))
        for model in (models.student, models.teacher.model):
            pack_batches(model, packed)
        answers = LocalRollouts(models).sample(prompts, Sampling(12, alpha=0.2), who="mixture", **options)
        bare = [replace(answer, scores=None) for answer in answers]
        found[packed] = answers, score(models, bare, keys=range(7), batch_size=4)
    for answer, other in zip(found[True][0], found[False][0], strict=True):
        assert answer.response == other.response and torch.equal(answer.logprobs, other.logprobs)
    for rollout, other in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(rollout.vectors, other.vectors, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rollout.teacher, other.teacher, atol=1e-5, rtol=1e-5)


@pytest.fixture
def drawn_by_student(make_models, prompts):
    models = make_models(eos_ids=tuple(range(0, 61, 8)))
    answers = LocalRollouts(models).sample(prompts, Sampling(12), keys=range(7), seed=1, batch_size=4)
    return models, answers, {"keys": range(7), "batch_size": 3, "fields": ("student_logprob", "teacher_logprob")}


def test_log_probabilities_of_the_student_are_not_computed_a_second_time(drawn_by_student):
    models, answers, options = drawn_by_student
    expected = score(models, answers, **options)
    rows_read = []
    models.student.model.embed_tokens.register_forward_hook(lambda module, ids, found: rows_read.append(len(found)))
    found = score(models, answers, **options, from_student=True)
    assert rows_read == [1]  # a look at the longest answer
    for answer, rollout, other in zip(answers, found, expected, strict=True):
        assert torch.equal(rollout.vectors["student_logprob"], answer.logprobs)
        torch.testing.assert_close(rollout.vectors, other.vectors, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rollout.teacher, other.teacher, atol=1e-5, rtol=1e-5)


def test_log_probabilities_that_one_pass_does_not_repeat_are_measured(drawn_by_student):
    models, answers, options = drawn_by_student
    longest = max(answers, key=lambda answer: len(answer.prompt) + len(answer.response))
    expected = score(models, answers, **options)
    longest.logprobs = longest.logprobs - 0.01
    for rollout, other in zip(score(models, answers, **options, from_student=True), expected, strict=True):
        assert torch.equal(rollout.vectors["student_logprob"], other.vectors["student_logprob"])


def test_half_precision_teacher_stays_half(make_models, prompts):
    models = make_models()
    models.teacher.model.bfloat16()
    answers = LocalRollouts(models).sample(prompts, Sampling(4), keys=range(7), seed=1, batch_size=4)
    buffer = score(models, answers, keys=range(7), batch_size=4)
    assert {rollout.teacher["hidden"].dtype for rollout in buffer} == {torch.bfloat16}
    assert {vector.dtype for rollout in buffer for vector in rollout.vectors.values()} == {torch.float32}


def test_modes_are_left_alone(make_models, prompts):
    models = make_models()
    models.student.train()
    answers = LocalRollouts(models).sample(prompts, Sampling(4), keys=range(7), seed=1, batch_size=4)
    score(models, answers, keys=range(7), batch_size=4)
    assert models.student.training and not models.teacher.model.training


def test_what_cannot_be_scored(make_models, prompts):
    models = make_models()
    answers = LocalRollouts(models).sample(prompts, Sampling(4), keys=range(7), seed=1, batch_size=4)
    with pytest.raises(ValueError, match="7 answers, but 2 keys"):
        score(models, answers, keys=[1, 2], batch_size=4)
    alone = replace(models, teacher=None)
    with pytest.raises(UserError, match="scoring answers needs a teacher, and there is none"):
        score(alone, answers, keys=range(7), batch_size=4)
    assert len(score(models, [], keys=[], batch_size=4)) == 0


def test_ranks_score_a_slice_each_and_have_all_vectors(make_models, prompts, in_ranks):
    answers = LocalRollouts(make_models()).sample(prompts, Sampling(6), keys=range(7), seed=1, batch_size=4)
    whole = score(make_models(), answers, keys=range(7), batch_size=4)
    models = [make_models(), make_models()]  # before the threads, which share one random generator
    buffers = in_ranks(2, lambda rank: score(models[rank], answers, keys=range(7), batch_size=2))
    for rank, buffer in enumerate(buffers):
        assert [bool(rollout.teacher) for rollout in buffer] == [place % 2 == rank for place in range(7)]
        for ours, one in zip(buffer, whole, strict=True):
            assert (ours.sequence, ours.ended) == (one.sequence, one.ended)
            torch.testing.assert_close(ours.vectors, one.vectors, atol=1e-5, rtol=1e-5)
            if ours.teacher:
                torch.testing.assert_close(ours.teacher, one.teacher, atol=1e-5, rtol=1e-5)
