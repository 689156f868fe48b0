"""LMHead.sum_of: logits that are a sum of heads' logits, over every function, with some of the summands frozen."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.kernels import reference
from minillm.losses import (
    LMHead,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_objective,
    linear_token_stats,
)
from tests.kernels.gemms import CountGemms

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))
VOCAB, ROWS, TEMPERATURE = 113, 13, 1.3
CHUNK = 2 * 4 * VOCAB * 5
PLAIN = ({}, {})
SCALED = ({"logit_scale": 0.7}, {"logit_scale": 1.4})
CAPPED = ({"softcap": 4.0}, {"logit_scale": 0.7})  # a capped template under a plain delta
THREE = ({"logit_scale": 0.7}, {"softcap": 3.0, "logit_scale": 1.3}, {"softcap": 9.0})
KINDS = {"plain": PLAIN, "scaled": SCALED, "capped": CAPPED, "three": THREE}
FIELDS = ("reverse_kl", "student_logprob")


@dataclass
class Part:
    hidden: Tensor
    head: LMHead

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.head.weight, self.head.bias]

    def doubled(self) -> "Part":
        hidden, weight, bias = (leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in self.leaves)
        return Part(hidden, LMHead(weight, bias, self.head.logit_scale, self.head.softcap))


def parts(options, kit, *, frozen=(), seed=0, dtype=torch.float32, rows=ROWS) -> list[Part]:
    """A part for each of the options, of hidden sizes 8, 11, 14."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, trained):
        return torch.randn(*shape, generator=generator).to(kit.device, dtype).requires_grad_(trained)

    made = []
    for index, one in enumerate(options):
        size, trained = 8 + 3 * index, index not in frozen
        hidden = normal(rows, size, trained=trained)
        weight, bias = normal(VOCAB, size, trained=trained), normal(VOCAB, trained=trained)
        weight.data *= 2.0 / size**0.5
        made.append(Part(hidden, LMHead(weight, bias, **one)))
    return made


def labels_of(kit, rows=ROWS):
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, VOCAB, (rows,), generator=generator)
    labels[::4] = -100
    return labels.to(kit.device)


def joined(made):
    return tuple(part.hidden for part in made), LMHead.sum_of(*(part.head for part in made))


def exact_logits(made, kept):
    return (
        sum(
            reference.logits(
                part.hidden.double()[kept],
                part.head.weight.double(),
                part.head.bias.double(),
                logit_scale=part.head.logit_scale,
                softcap=part.head.softcap,
            )
            for part in made
        )
        / TEMPERATURE
    )


def trained(made):
    return [leaf for part in made for leaf in part.leaves if leaf.requires_grad]


def compare(loss, made, loss64, doubled, kit, tolerance=1e-5):
    assert loss.item() == pytest.approx(loss64.item(), rel=1e-5)
    found = torch.autograd.grad(loss, trained(made))
    for one, wanted in zip(found, torch.autograd.grad(loss64, trained(doubled)), strict=True):
        assert kit.relative_error(one, wanted) < tolerance


@pytest.mark.parametrize("entry", ["objective", "coupled", "token_stats", "one launch"])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_summed_student_matches_float64(kind, frozen, entry, backend, kit):
    made, labels = parts(KINDS[kind], kit, frozen=frozen), labels_of(kit)
    teacher = parts(({},), kit, seed=1, frozen=(0,))
    arguments = (*joined(made), teacher[0].hidden, teacher[0].head, labels)
    options = dict(temperature=TEMPERATURE, backend=backend, chunk_bytes=CHUNK)

    def combined(stats):
        return stats.reverse_kl - 0.5 * stats.student_logprob

    if entry == "token_stats":
        loss = combined(linear_token_stats(*arguments, fields=FIELDS, **options)).sum()
    elif entry == "one launch":
        loss = linear_divergence(*arguments[:4], labels=labels, reduction="sum", **options)
    else:
        loss, _ = linear_objective(*arguments, combined, fields=FIELDS, coupled=entry == "coupled", **options)
    kept, doubled = labels != -100, [part.doubled() for part in made]
    stats = reference.token_stats(exact_logits(doubled, kept), exact_logits(teacher, kept), labels[kept])
    loss64 = stats["reverse_kl"] if entry == "one launch" else stats["reverse_kl"] - 0.5 * stats["student_logprob"]
    compare(loss, made, loss64.sum(), doubled, kit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_summed_teacher_and_every_statistic(kind, backend, kit):
    """The teacher is a sum, of more heads or fewer than the student; nothing of it is trained, whatever it requires."""
    student, teacher, labels = parts(SCALED, kit), parts(KINDS[kind], kit, seed=1), labels_of(kit)
    fields = ("student_logprob", "teacher_logprob", "forward_kl", "jsd", "tvd", "student_entropy", "teacher_argmax")
    options = dict(temperature=TEMPERATURE, backend=backend, chunk_bytes=CHUNK, fields=fields)
    stats = linear_token_stats(*joined(student), *joined(teacher), labels, **options)
    kept, doubled = labels != -100, [part.doubled() for part in student]
    expected = reference.token_stats(exact_logits(doubled, kept), exact_logits(teacher, kept).detach(), labels[kept])
    for name in fields:
        torch.testing.assert_close(getattr(stats, name)[kept].double(), expected[name].double(), rtol=2e-6, atol=2e-6)
    compare(stats.jsd.sum(), student, expected["jsd"].sum(), doubled, kit)
    assert all(leaf.grad is None for part in teacher for leaf in part.leaves)


def test_the_functions_of_one_model(backend, kit):
    made, labels = parts(CAPPED, kit, frozen=(0,)), labels_of(kit)
    options = dict(temperature=TEMPERATURE, backend=backend)
    kept, doubled = labels != -100, [part.doubled() for part in made]
    log_q = exact_logits(doubled, kept).log_softmax(-1).gather(1, labels[kept, None])[:, 0]
    found = linear_logprobs(*joined(made), labels, **options)
    torch.testing.assert_close(found[kept].double(), log_q, rtol=2e-6, atol=2e-6)
    assert (found[~kept] == 0).all()
    compare(linear_cross_entropy(*joined(made), labels, **options), made, -log_q.mean(), doubled, kit)


@pytest.mark.parametrize("capped", [0, 1])
def test_ids_banned_in_any_summand_do_not_exist(capped, backend, kit):
    options = [{}, {}]
    options[capped] = {"softcap": 5.0}
    made, labels = parts(options, kit), torch.full((ROWS,), 9, device=kit.device)
    made[0].head.bias.data[3] = made[1].head.bias.data[4] = -math.inf
    loss = linear_cross_entropy(*joined(made), labels, backend=backend, temperature=TEMPERATURE)
    keep = torch.tensor([index for index in range(VOCAB) if index not in (3, 4)], device=kit.device)
    without = [
        Part(part.hidden, LMHead(part.head.weight[keep], part.head.bias[keep], softcap=part.head.softcap))
        for part in made
    ]
    labels[:] = 7  # where 9 is now
    other = linear_cross_entropy(*joined(without), labels, backend=backend, temperature=TEMPERATURE)
    torch.testing.assert_close(loss, other)
    found, wanted = (torch.autograd.grad(one, trained(made)) for one in (loss, other))
    for one, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)
        assert one.isfinite().all()
    assert (found[1][3] == 0).all() and (found[4][3] == 0).all() and found[5][4] == 0


def test_a_nan_stays_in_its_row(backend, kit):
    made, labels = parts(CAPPED, kit), labels_of(kit)
    made[1].hidden.data[2, 1] = math.nan
    labels[:] = 5
    found = linear_logprobs(*joined(made), labels, backend=backend)
    assert found.isnan().nonzero().flatten().tolist() == [2]


def test_nothing_kept_is_a_connected_zero(backend, kit):
    made = parts(CAPPED, kit)
    loss = linear_cross_entropy(*joined(made), torch.full((ROWS,), -100, device=kit.device), backend=backend)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, trained(made)))


@pytest.mark.parametrize(
    ("frozen", "products"), [((), 3 * (8 + 11)), ((0,), 8 + 3 * 11), ((1,), 3 * 8 + 11), ((0, 1), 19)]
)
@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_a_frozen_summand_costs_its_logits_and_nothing_else(kind, frozen, products, kit):
    made, labels = parts(KINDS[kind], kit, frozen=frozen), labels_of(kit)
    with CountGemms() as count:
        loss = linear_cross_entropy(*joined(made), labels)
        if len(frozen) < 2:
            loss.backward()
    assert count.total == int((labels != -100).sum()) * VOCAB * products
    for index, part in enumerate(made):
        assert all((leaf.grad is None) == (index in frozen) for leaf in part.leaves)


def test_one_hidden_state_and_one_weight_twice(backend, kit):
    """2 z from one head added to itself: gradients of both places add up."""
    (part,), labels = parts(({},), kit), labels_of(kit)
    twice = linear_cross_entropy(
        (part.hidden, part.hidden), LMHead.sum_of(part.head, part.head), labels, backend=backend
    )
    scaled = LMHead(part.head.weight, part.head.bias, logit_scale=2.0)
    once = linear_cross_entropy(part.hidden, scaled, labels, backend=backend)
    torch.testing.assert_close(twice, once)
    for one, other in zip(*(torch.autograd.grad(loss, part.leaves) for loss in (twice, once)), strict=True):
        assert kit.relative_error(one, other) < 1e-6


def test_summands_of_several_precisions(backend, kit):
    """A bf16 template and an fp32 delta: each is multiplied out in its own precision, the sum is fp32."""
    made, labels = parts(CAPPED, kit), labels_of(kit)
    half = parts(CAPPED, kit, dtype=torch.bfloat16)
    made = [half[0], made[1]]
    kept, doubled = labels != -100, [part.doubled() for part in made]
    loss64 = -exact_logits(doubled, kept).log_softmax(-1).gather(1, labels[kept, None]).mean()
    loss = linear_cross_entropy(*joined(made), labels, temperature=TEMPERATURE, backend=backend)
    compare(loss, made, loss64, doubled, kit, tolerance=5e-3)
    assert [leaf.grad_fn for leaf in trained(made)] == [None] * 6
    delta = torch.autograd.grad(
        linear_cross_entropy(*joined(made), labels, temperature=TEMPERATURE, backend=backend), made[1].leaves
    )
    for one, wanted in zip(delta, torch.autograd.grad(-_logprob(doubled, labels), doubled[1].leaves), strict=True):
        assert kit.relative_error(one, wanted) < 1e-5  # fp32 beside bf16


def _logprob(made, labels):
    kept = labels != -100
    return exact_logits(made, kept).log_softmax(-1).gather(1, labels[kept, None]).mean()


def test_where_the_weights_gradients_go(kit):
    made, labels = parts(SCALED, kit), labels_of(kit)
    expected = torch.autograd.grad(linear_cross_entropy(*joined(made), labels), trained(made))
    main = torch.full_like(made[1].head.weight, 2.0, requires_grad=False)
    for repeat in (1, 2):
        loss = linear_cross_entropy(*joined(made), labels, weight_grad=("fp32", main))
        loss.backward()
        assert made[1].head.weight.grad is None
        assert kit.relative_error(main - 2, repeat * expected[4]) < 1e-5
        assert kit.relative_error(made[0].head.weight.grad, repeat * expected[1]) < 1e-5
    stats = linear_token_stats(*joined(made), None, None, labels, weight_grad=("bf16", main))
    (-stats.student_logprob.sum() / (labels != -100).sum()).backward()
    assert kit.relative_error(main - 2, 3 * expected[4]) < 1e-5


def test_second_passes_and_no_double_backward(kit):
    made, labels = parts(THREE, kit, frozen=(0,)), labels_of(kit)
    for loss in (
        linear_cross_entropy(*joined(made), labels),
        -linear_logprobs(*joined(made), labels).sum() / (labels != -100).sum(),
    ):
        once = torch.autograd.grad(loss, trained(made), retain_graph=True)
        twice = torch.autograd.grad(-2.5 * loss, trained(made), retain_graph=True)
        for one, other in zip(once, twice, strict=True):
            torch.testing.assert_close(-2.5 * one, other)
        first = torch.autograd.grad(loss, trained(made), create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):
            sum(gradient.sum() for gradient in first).backward()


def test_a_shared_vocabulary_and_leading_dimensions(backend, kit):
    """Heads of 113 and 120 rows, of which 100 are used; tokens in two dimensions, or in none."""
    made, labels = parts(CAPPED, kit), labels_of(kit).clamp(max=99)
    long = torch.cat((made[1].head.weight.detach(), torch.ones(7, 11, device=kit.device))).requires_grad_()
    made[1] = Part(made[1].hidden, LMHead(long, None, logit_scale=0.7))
    states = tuple(part.hidden[:12].view(3, 4, -1) for part in made)
    head = LMHead.sum_of(made[0].head, made[1].head)
    found = linear_logprobs(states, head, labels[:12].view(3, 4), vocab_size=100, backend=backend)
    flat = linear_logprobs(joined(made)[0], head, labels, vocab_size=100, backend=backend)
    torch.testing.assert_close(found.flatten(), flat[:12])
    one = linear_logprobs(tuple(part.hidden[1] for part in made), head, labels[1], vocab_size=100, backend=backend)
    assert one.shape == ()
    torch.testing.assert_close(one, flat[1])
    gradient = torch.autograd.grad(found.sum(), long)[0]
    assert gradient.shape == (120, 11) and (gradient[100:] == 0).all() and gradient[:100].abs().sum() > 0


def test_a_sum_of_one_and_a_sum_of_sums(kit):
    (a, b, c), labels = parts(THREE, kit), labels_of(kit)
    alone = linear_cross_entropy((b.hidden,), LMHead.sum_of(b.head), labels)
    torch.testing.assert_close(alone, linear_cross_entropy(b.hidden, b.head, labels))
    nested = LMHead.sum_of(LMHead.sum_of(a.head, b.head), c.head)
    flat = LMHead.sum_of(a.head, b.head, c.head)
    states = (a.hidden, b.hidden, c.hidden)
    assert torch.equal(linear_cross_entropy(states, nested, labels), linear_cross_entropy(states, flat, labels))
    bare = LMHead.sum_of(a.head.weight, LMHead(b.head.weight))
    assert linear_cross_entropy(states[:2], bare, labels).isfinite()


def test_released_values(backend, kit):
    """The authors' cross-entropy over a frozen template's head and a trained delta's, in float64 there."""
    if not (GOLDEN / "3_cmc_training.npz").is_file():
        pytest.skip("MINILLM_GOLDEN has no 3_cmc_training.npz")
    import numpy

    arrays = numpy.load(GOLDEN / "3_cmc_training.npz")
    loss = json.loads((GOLDEN / "3_cmc_training.json").read_text(encoding="utf-8"))["two_head_loss"]

    def read(name, trained=False):
        return torch.from_numpy(arrays[name]).to(kit.device).float().requires_grad_(trained)

    template, delta = read("hidden_template"), read("hidden_delta", True)
    weight = read("head_delta", True)
    labels = torch.from_numpy(arrays["labels"]).to(kit.device)
    shifted = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), 1)  # logits[t] predict labels[t + 1]
    head = LMHead.sum_of(read("head_template"), weight)
    found = linear_cross_entropy((template, delta), head, shifted, backend=backend)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6)
    for gradient, name in ((delta.grad, "grad_hidden_delta"), (weight.grad, "grad_head_delta")):
        assert kit.relative_error(gradient.cpu(), torch.from_numpy(arrays[name])) < 1e-5


SUMMANDS = st.tuples(st.integers(1, 9), st.sampled_from([1.0, 0.6]), st.sampled_from([None, 3.0]), st.booleans())


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking takes minutes in Triton's interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 60),
    summands=st.lists(SUMMANDS, min_size=1, max_size=4),  # hidden size, scale, softcap, whether it is trained
    coupled=st.booleans(),
    chunk_bytes=st.integers(500, 20_000),
)
def test_any_sum(backend, kit, rows, vocab, summands, coupled, chunk_bytes):
    generator = torch.Generator().manual_seed(rows + vocab)
    made = []
    for size, scale, softcap, is_trained in summands:
        hidden, weight = (torch.randn(n, size, generator=generator).to(kit.device) for n in (rows, vocab))
        made.append(
            Part(hidden.requires_grad_(is_trained), LMHead(weight.requires_grad_(is_trained), None, scale, softcap))
        )
    labels = torch.randint(-1, vocab, (rows,), generator=generator).to(kit.device)
    states, head = joined(made)
    loss, _ = linear_objective(
        states,
        head,
        None,
        None,
        labels,
        lambda stats: stats.student_entropy - stats.student_logprob,
        coupled=coupled,
        chunk_bytes=chunk_bytes,
        backend=backend,
        ignore_index=-1,
    )
    doubled = [
        Part(part.hidden.detach().double(), LMHead(part.head.weight.detach().double(), None, *one[1:3]))
        for part, one in zip(made, summands, strict=True)
    ]
    kept = labels != -1
    leaves = [leaf.requires_grad_() for part in doubled for leaf in (part.hidden, part.head.weight)]
    z = sum(
        reference.logits(part.hidden[kept], part.head.weight, logit_scale=one[1], softcap=one[2])
        for part, one in zip(doubled, summands, strict=True)
    )
    stats = reference.token_stats(z, None, labels[kept])
    loss64 = (stats["student_entropy"] - stats["student_logprob"]).sum()
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    exact = dict(zip([id(leaf) for leaf in leaves], torch.autograd.grad(loss64, leaves), strict=True))
    if not any(one[3] for one in summands):
        assert not loss.requires_grad
        return
    loss.backward()
    for part, double, one in zip(made, doubled, summands, strict=True):
        for leaf, wanted in ((part.hidden, double.hidden), (part.head.weight, double.head.weight)):
            if one[3]:
                torch.testing.assert_close(leaf.grad.double(), exact[id(wanted)], rtol=1e-4, atol=1e-5)
            else:
                assert leaf.grad is None
