"""Token statistics against eager full logits, whatever the micro-batch."""

import pytest
import torch

from minillm.evaluate.token_statistics import kept_teacher_rows, token_statistics
from minillm.models.batch import TokenSequence

SEQUENCES = [
    TokenSequence([3, 4, 5], [6, 7, 0]),
    TokenSequence([1], [2, 2, 2, 2, 2, 2]),
    TokenSequence([9, 8, 7, 6, 5], [0]),
    TokenSequence([2, 2], [11, 0]),
]
FIELDS = ("student_logprob", "reverse_kl", "forward_kl", "student_entropy")


@pytest.fixture
def expected(make_models, eager_logprobs):
    models = make_models()
    results = {field: [] for field in FIELDS}
    for sequence in SEQUENCES:
        q, p = eager_logprobs(models.student, sequence), eager_logprobs(models.teacher.model, sequence)
        results["student_logprob"].append(q.gather(1, torch.tensor(sequence.response)[:, None])[:, 0])
        results["reverse_kl"].append((q.exp() * (q - p)).sum(1))
        results["forward_kl"].append((p.exp() * (p - q)).sum(1))
        results["student_entropy"].append(-(q.exp() * q).sum(1))
    return models, results


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equal_eager_full_logits(expected, batch_size):
    models, results = expected
    found = token_statistics(models, SEQUENCES, FIELDS, batch_size=batch_size)
    for field in FIELDS:
        for vector, exact in zip(found[field], results[field], strict=True):
            torch.testing.assert_close(vector.double(), exact, atol=2e-5, rtol=2e-5, msg=field)


def test_kept_teacher_rows_replace_the_teacher(expected):
    models, results = expected
    parts = kept_teacher_rows(models, SEQUENCES, batch_size=2)
    assert [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in parts] == [
        {"hidden": (length, 24)} for length in (3, 6, 1, 2)
    ]
    models.teacher.model.model.forward = None  # whoever calls it fails
    found = token_statistics(models, SEQUENCES, ("forward_kl",), batch_size=3, teacher_parts=parts)
    for vector, exact in zip(found["forward_kl"], results["forward_kl"], strict=True):
        torch.testing.assert_close(vector.double(), exact, atol=2e-5, rtol=2e-5)


def test_what_needs_no_teacher_runs_without_one(make_models):
    found = token_statistics(make_models(teacher=False), SEQUENCES, ("student_entropy",), batch_size=2)
    assert [len(vector) for vector in found["student_entropy"]] == [3, 6, 1, 2]


def test_no_graph_is_kept(make_models):
    models = make_models()
    models.student.train().requires_grad_(True)
    found = token_statistics(models, SEQUENCES, FIELDS, batch_size=2)
    assert not any(vector.requires_grad for vectors in found.values() for vector in vectors)


@pytest.mark.parametrize("ranks", [2, 3, 5])  # the last one more than there are sequences
def test_ranks_measure_a_slice_each_and_have_all_of_it(ranks, expected, make_models, in_ranks):
    models = [make_models() for _ in range(ranks)]  # before the threads, which share one random generator
    found = in_ranks(ranks, lambda rank: token_statistics(models[rank], SEQUENCES, FIELDS, batch_size=2))
    for of_rank in found:
        for field, exact in expected[1].items():
            assert len(of_rank[field]) == len(exact)
            for vector, one in zip(of_rank[field], exact, strict=True):
                torch.testing.assert_close(vector.double(), one, atol=2e-5, rtol=2e-5, msg=field)


def test_a_rank_keeps_the_teachers_rows_of_its_own_slice(make_models, in_ranks):
    models = [make_models(), make_models()]

    def kept(rank: int):
        parts = kept_teacher_rows(models[rank], SEQUENCES, batch_size=2)
        again = token_statistics(models[rank], SEQUENCES, ("forward_kl",), batch_size=2, teacher_parts=parts)
        return [bool(part) for part in parts], again["forward_kl"]

    whole = token_statistics(make_models(), SEQUENCES, ("forward_kl",), batch_size=2)["forward_kl"]
    (first, one), (second, other) = in_ranks(2, kept)
    assert first == [True, False, True, False] and second == [False, True, False, True]
    torch.testing.assert_close(one, whole, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(other, whole, atol=2e-5, rtol=2e-5)
