"""The loss of a preference, against its published forms in float64 written out for a pair at a time."""

import math

import pytest
import torch

from minillm import UserError
from minillm.config.preference_keys import PreferenceKeys
from minillm.data.pairs import AnswerPair
from minillm.engine.module import TermLoss
from minillm.methods.preference import answer_sums, pair_means, preference_loss, preference_term
from minillm.models.batch import TokenSequence, collate

# lengths that differ within a pair and between pairs, an answer of one token, and prompts of different lengths
PAIRS = [
    AnswerPair(0, TokenSequence([60, 61], [90, 91, 92, 256]), TokenSequence([60, 61], [70, 256])),
    AnswerPair(1, TokenSequence([62], [93]), TokenSequence([62], [94, 95, 96])),
    AnswerPair(2, TokenSequence([63, 64, 65], [97, 98]), TokenSequence([63, 64, 65], [99, 97])),
]
FORMS = {
    "paper": {},
    "dpo": {"length_norm": False, "beta": 0.5},
    "smoothed": {"label_smoothing": 0.1},
    "ipo": {"preference_loss": "ipo", "beta": 0.4},
    "dpop": {"dpop": 5.0, "length_norm": False},
    "dpop with ipo": {"dpop": 5.0, "preference_loss": "ipo"},
    "simpo": {"reference_free": True, "target_margin": 0.7, "beta": 2.0},
    "kto_pair": {"preference_loss": "kto_pair", "length_norm": False, "beta": 0.5},
    "all at once": {"label_smoothing": 0.2, "dpop": 2.0, "target_margin": 0.3},
}


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def by_hand(w: torch.Tensor, l: torch.Tensor, keys: PreferenceKeys) -> torch.Tensor:  # noqa: E741  () each
    """The published formulas."""
    d = w - l
    if keys.dpop:
        d = d - keys.dpop * (-w if w < 0 else 0 * w)
    if keys.preference_loss == "ipo":
        return (d - 0.5 / keys.beta) ** 2
    if keys.preference_loss == "kto_pair":
        against = [one if one > 0 else 0 * one for one in (w, l)]  # each with its gradient
        return (1 - sigmoid(keys.beta * (w - against[1])) + 1 - sigmoid(keys.beta * (against[0] - l))) / 2
    order = torch.log(sigmoid(keys.beta * d - keys.target_margin))
    other = torch.log(1 - sigmoid(keys.beta * d - keys.target_margin))
    return -(1 - keys.label_smoothing) * order - keys.label_smoothing * other


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_those_of_full_logits_in_float64(form, make_models):
    keys, models = PreferenceKeys(**FORMS[form]), make_models()
    term = preference_term(PAIRS, models, keys)
    loss, metrics = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    found = torch.autograd.grad(loss / term.count, list(models.student.parameters()))

    student, teacher = models.student.double(), models.teacher.model.double()
    try:

        def score(sequence: TokenSequence) -> torch.Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for place, token in enumerate(sequence.response):
                ids = torch.tensor([sequence.prompt + sequence.response[:place]])
                total = total + torch.log_softmax(student(ids).logits[0, -1], -1)[token]
                if not keys.reference_free:
                    total = total - torch.log_softmax(teacher(ids).logits[0, -1], -1)[token].detach()
            return total / len(sequence.response) if keys.length_norm else total

        scores = [(score(pair.chosen), score(pair.rejected)) for pair in PAIRS]
        want = sum(by_hand(w, l, keys) for w, l in scores) / len(PAIRS)
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert loss.item() / 3 == pytest.approx(want.item(), rel=1e-5)
    scale = max(one.abs().max().item() for one in gradients)
    assert scale > 1e-3
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * scale)
    margins = [keys.beta * (w - l).item() for w, l in scores]
    means = pair_means({name: value.item() / 14 for name, value in metrics.items()})  # as an engine reports, over rows
    assert means["margin"] == pytest.approx(sum(margins) / 3, rel=1e-4)
    assert means["preferred"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert (term.teacher is None) == keys.reference_free and term.count == 3


def test_micro_batches_add_up_to_the_whole(make_models):
    models, keys = make_models(), PreferenceKeys()
    module = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")
    whole, _ = module(preference_term(PAIRS, models, keys))
    parts = sum(module(preference_term([pair], models, keys))[0].item() for pair in PAIRS)
    assert parts == pytest.approx(whole.item(), rel=1e-5)


def test_a_student_that_is_its_own_reference_is_indifferent():
    """With equal models every score is 0: log 2, or IPO's distance, and DPOP adds nothing."""
    zero = torch.zeros(4, dtype=torch.float64)
    for keys, value in (
        (PreferenceKeys(dpop=50.0), math.log(2)),
        (PreferenceKeys(label_smoothing=0.3), math.log(2)),
        (PreferenceKeys(preference_loss="ipo", beta=0.25), 4.0),
    ):
        loss, margin = preference_loss(zero, zero, keys)
        assert loss.tolist() == pytest.approx([value] * 4) and margin.tolist() == [0.0] * 4


def test_kto_pair_is_the_released_loss_of_one_pair_at_a_time():
    """All four signs of the two scores: LLaVA-MoD's loss at its batch of one, and the gradient through what it compares with."""
    keys = PreferenceKeys(preference_loss="kto_pair", beta=0.1)
    scores = [(3.0, 2.0), (3.0, -2.0), (-3.0, 2.0), (-3.0, -2.0)]
    chosen, rejected = torch.tensor(scores, dtype=torch.float64).T.clone().requires_grad_().unbind()
    loss, margin = preference_loss(chosen, rejected, keys)
    gradients = torch.autograd.grad(loss.sum(), (chosen, rejected))

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for place, (a, b) in enumerate(scores):
        first, second = 0.1 * (a - max(0, b)), 0.1 * (max(0, a) - b)
        assert loss[place].item() == pytest.approx((1 - s(first) + 1 - s(second)) / 2)
        one, two = (-0.05 * s(x) * (1 - s(x)) for x in (first, second))
        assert gradients[0][place].item() == pytest.approx(one + two * (a > 0))
        assert gradients[1][place].item() == pytest.approx(-one * (b > 0) - two)
        assert margin[place].item() == pytest.approx(0.1 * (a - b))


def test_answers_that_cannot_be_told_apart_sink_together_under_kto_pair_alone():
    """Two answers, each once chosen and once rejected, by a student that has them equally likely and a teacher that is sure."""
    student = torch.full((2,), 0.45, dtype=torch.float64).log().requires_grad_()
    chosen, rejected = student - math.log(0.97), student.flip(0) - math.log(0.02)  # s(w) < 0 < s(l), both times
    for name in ("kto_pair", "sigmoid", "ipo"):
        loss, _ = preference_loss(chosen, rejected, PreferenceKeys(preference_loss=name, beta=0.1))
        (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True)
        if name == "kto_pair":
            first, second = torch.sigmoid(-0.1 * (chosen - rejected)), torch.sigmoid(0.1 * rejected)
            slope = second * (
                1 - second
            )  # the first's pull on the chosen answer is undone by its push on the rejected one
            torch.testing.assert_close(gradient, 0.05 * slope.flip(0).detach())
            assert (gradient > 0.01).all() and (first > 0.5).all()
        else:
            torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_scores_far_apart_lose_no_digits():
    chosen = torch.tensor([-3e4, 3e4], dtype=torch.float32, requires_grad=True)
    loss, _ = preference_loss(chosen, torch.zeros(2), PreferenceKeys(beta=1.0))
    assert loss.tolist() == [3e4, 0.0]
    assert torch.autograd.grad(loss.sum(), chosen)[0].tolist() == [-1.0, 0.0]


def test_an_answer_without_tokens_scores_0():
    batch = collate([TokenSequence([5], [6, 7]), TokenSequence([5], []), TokenSequence([5], [8])], 0)
    vector = torch.tensor([1.0, 2.0, 4.0])
    assert answer_sums(vector, batch, mean=False).tolist() == [3.0, 0.0, 4.0]
    assert answer_sums(vector, batch, mean=True).tolist() == [1.5, 0.0, 4.0]


def test_without_a_teacher_it_says_so_unless_none_is_compared_with(make_models):
    models = make_models(teacher=False)
    with pytest.raises(UserError, match="configure `teacher`"):
        preference_term(PAIRS, models, PreferenceKeys())
    assert preference_term(PAIRS, models, PreferenceKeys(reference_free=True)).teacher is None
