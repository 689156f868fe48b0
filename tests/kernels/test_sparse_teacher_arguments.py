"""Errors of a TopK teacher: each names what is wrong with it and says what to do."""

import math

import pytest
import torch

from minillm.losses import LMHead, TopK, linear_divergence, linear_objective, linear_token_stats

N, V, K = 6, 20, 3


def base():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(N, V, generator=generator).log_softmax(1).topk(K, 1)
    return {
        "student_hidden": torch.randn(N, 4, generator=generator),
        "student_head": LMHead(torch.randn(V, 4, generator=generator)),
        "teacher_hidden": TopK(logprobs.indices, logprobs.values),
        "teacher_head": None,
        "labels": torch.randint(0, V, (N,), generator=generator),
    }


def call(**changes):
    return linear_token_stats(**{**base(), **changes})


def top_k(ids=None, logprobs=None, **changes):
    plain = base()["teacher_hidden"]
    return dict(
        teacher_hidden=TopK(
            plain.ids if ids is None else ids, plain.logprobs if logprobs is None else logprobs, **changes
        )
    )


def with_id(value, row=2):
    ids = base()["teacher_hidden"].ids.clone()
    ids[row, 1] = value
    return ids


def with_logprob(value, row=2):
    logprobs = base()["teacher_hidden"].logprobs.clone()
    logprobs[row, 1] = value
    return logprobs


IDS = base()["teacher_hidden"].ids
WRONG = {
    "a head beside it": (dict(teacher_head=torch.ones(V, 5)), "teacher_head must be None where teacher_hidden is a TopK"),
    "ids no tensor": (top_k(ids=[[1]]), "teacher_hidden.ids must be an int32 or int64 tensor, got list"),
    "ids of int16": (top_k(ids=IDS.short()), "teacher_hidden.ids must be an int32 or int64 tensor, got torch.int16"),
    "ids of floats": (top_k(ids=IDS.float()), "ids must be an int32 or int64 tensor, got torch.float32"),
    "logprobs no tensor": (top_k(logprobs=1.0), "teacher_hidden.logprobs must be a floating-point tensor, got float"),
    "logprobs of integers": (top_k(logprobs=IDS), "logprobs must be a floating-point tensor, got torch.int64"),
    "rows": (top_k(IDS[1:], with_logprob(-9.0)[1:]), r"teacher_hidden.ids has shape \(5, 3\), expected \(6, 'k'\)"),
    "a vector": (top_k(IDS[0], with_logprob(-9.0)[0]), r"teacher_hidden.ids has shape \(3,\), expected \(6, 'k'\)"),
    "logprobs shape": (top_k(logprobs=with_logprob(-9.0)[:, :2]), r"logprobs has shape \(6, 2\), ids \(6, 3\)"),
    "no id": (top_k(IDS[:, :0], with_logprob(-9.0)[:, :0]), "has k=0 ids in a row, expected 1 to 20"),
    "more ids than there are": (dict(vocab_size=2, labels=None), "has k=3 ids in a row, expected 1 to 2, the voc"),
    "temperature": (dict(temperature=2.0), "temperature=2.0, but teacher_hidden is a TopK of temperature 1.0"),
    "its temperature": (top_k(temperature=2.0), r"temperature=1.0, but .* TopK\(ids, logprobs, temperature=...\)"),
    "id too large": (top_k(with_id(V)), r"in 1 of 6 kept rows ids lies outside \[0, 20\)"),
    "id negative": (top_k(with_id(-1)), r"in 1 of 6 kept rows ids lies outside \[0, 20\)"),
    "id beyond 32 bits": (top_k(with_id(2**40)), r"in 1 of 6 kept rows ids lies outside"),
    "id beyond a cut": (
        dict(vocab_size=int(IDS.max()), labels=torch.zeros(N, dtype=torch.int64)),
        rf"ids lies outside \[0, {int(IDS.max())}\)",
    ),
    "id twice": (top_k(with_id(IDS[2, 0])), "in 1 of 6 kept rows ids names an id twice"),
    "logprob positive": (top_k(logprobs=with_logprob(0.1)), "in 1 of 6 kept rows logprobs is positive; pass natural"),
    "logprob infinite": (top_k(logprobs=with_logprob(math.inf)), "in 1 of 6 kept rows logprobs is positive"),
    "more than 1": (top_k(logprobs=with_logprob(-0.01)), "logprobs adds up to more than 1 in probability"),
    "decadic": (top_k(logprobs=base()["teacher_hidden"].logprobs / 9), "logprobs adds up to more than 1 in prob"),
    "entropy": (dict(fields=("teacher_entropy",)), "fields: teacher_entropy cannot be said of a teacher that is known"),
    "label unknown": (dict(fields="teacher_logprob"), "ids does not name the label.*leave the field teacher_logprob"),
    "unknown field": (dict(fields=("kl",)), "fields: unknown statistic 'kl'"),
    "field without labels": (dict(labels=None, fields=("teacher_logprob",)), "fields: teacher_logprob needs labels"),
    "labels too large": (dict(labels=torch.full((N,), V)), r"labels: 6 of 6 kept labels are outside \[0, 20\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    changes, message = WRONG[what]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(**changes)


@pytest.mark.parametrize("what", ["id too large", "id twice", "logprob positive", "more than 1"])
def test_rows_are_checked_without_labels_too_and_not_where_they_are_ignored(what):
    changes, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        call(**changes, labels=None)
    labels = base()["labels"].clone()
    labels[2] = -100
    assert call(**changes, labels=labels).reverse_kl.isfinite().all()


def test_what_is_no_more_than_rounding_is_no_error():
    call(**top_k(torch.zeros(N, 1, dtype=torch.int64), torch.full((N, 1), 5e-5)))
    call(**top_k(logprobs=with_logprob(-math.inf)))
    halves = torch.tensor([[0.5, 0.3, 0.2]] * N).log()
    for dtype in (torch.bfloat16, torch.float16):
        call(**top_k(logprobs=halves.to(dtype)))


def test_every_k_that_can_be_said_is_by_default():
    assert call().fields == (
        "student_logprob", "reverse_kl", "forward_kl", "student_entropy", "student_argmax", "teacher_argmax"
    )  # fmt: skip


def test_devices_must_agree():
    plain = base()["teacher_hidden"]
    with pytest.raises(ValueError, match="teacher_hidden.ids is on meta, the student on cpu"):
        call(**top_k(plain.ids.to("meta"), plain.logprobs))
    with pytest.raises(ValueError, match="teacher_hidden.logprobs is on meta"):
        call(**top_k(plain.ids, plain.logprobs.to("meta")))


def test_a_temperature_that_both_have():
    """It divides the student's logits alone; the log-probabilities have had theirs."""
    tempered = base() | top_k(temperature=2.0)
    found = linear_token_stats(**tempered, temperature=2.0)
    plain = linear_token_stats(**base() | {"student_head": LMHead(base()["student_head"].weight / 2)})
    torch.testing.assert_close(found.reverse_kl, plain.reverse_kl)


def test_the_student_alone_needs_nothing_of_it():
    """Statistics without the teacher are those of the student, by any backend, whatever the rows hold."""
    wrong = base() | top_k(with_id(V))
    found = linear_token_stats(**wrong, fields=("student_logprob", "student_entropy"))
    plain = linear_token_stats(**base() | {"teacher_hidden": None}, fields=("student_logprob", "student_entropy"))
    assert torch.equal(found.student_logprob, plain.student_logprob)


def test_tiled_refuses_it_by_name():
    pytest.importorskip("triton")
    for fields in ("reverse_kl", "jsd"):
        with pytest.raises(ValueError, match="backend='tiled' does not offer .*use backend='triton' or 'auto'"):
            call(backend="tiled", fields=fields)
    four = list(base().values())[:4]
    with pytest.raises(ValueError, match="backend='tiled' does not offer a TopK as teacher_hidden"):
        linear_divergence(*four, backend="tiled")
    with pytest.raises(ValueError, match="backend='tiled' does not offer linear_objective"):
        linear_objective(*four, None, lambda stats: stats.reverse_kl, backend="tiled")


def test_a_divergence_names_what_is_missing():
    four = list(base().values())[:4]
    with pytest.raises(ValueError, match="teacher_head must be None where teacher_hidden is a TopK"):
        linear_divergence(*four[:3], torch.ones(V, 4))
    with pytest.raises(ValueError, match="teacher_hidden and teacher_head must be given"):
        linear_divergence(four[0], four[1], four[0], None)


def test_ids_that_nobody_looked_at_are_brought_into_the_vocabulary():
    """Where the count is passed for another device, as for labels: a wrong id must not read foreign memory."""
    arguments = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in base().items()}
    ids = torch.empty(N, K, dtype=torch.int32, device="meta")
    arguments["student_head"] = torch.empty(V, 4, device="meta")
    arguments["teacher_hidden"] = TopK(ids, torch.empty(N, K, device="meta"))
    from minillm.kernels.arguments import prepare
    from minillm.kernels.options import LossOptions, declared

    options = {name: option.default for name, (_, option) in declared(LossOptions).items()} | {"kept": 4}
    clamped = []
    real = torch.Tensor.clamp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clamp", lambda tensor, *ends: clamped.append(ends) or real(tensor, *ends))
        prepare(**arguments, options=options, fields=("reverse_kl", "student_logprob"))
    assert clamped == [(0, V - 1)] * 2
