"""uld against formulas in float64 on full logits of two models with tokenizers of their own."""

import pytest
import torch

from minillm.config.methods.uld_keys import ULD
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.protocol import TrainingData
from minillm.methods.uld import common_positions
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.methods.conftest import stage_of
from tests.other_tokenizer import paired_examples, paired_models

# one that is shorter in the teacher's tokens, one of a character, one that the teacher splits into bytes, an empty one
TEXTS = ["the cat sat", "x", "日本", ""]


@pytest.fixture(scope="module")
def models():
    return paired_models()


def loss_of(models, tmp_path, **keys):
    """The loss of one step, its metrics, and the method's items."""
    method = build_method(stage_of(4, name="uld", **keys))
    data = TrainingData(Stream(paired_examples(TEXTS, models), seed=1), None, LocalRollouts(models), tmp_path)
    items = method.collect(data, models, draw=0)
    (term,) = method.terms(items, data, models)
    loss, metrics = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    return loss / term.count, metrics, items


def rows_of(model, sequence):  # (T, V), of every token of the response
    ids = torch.tensor([sequence.prompt + sequence.response])
    return model(ids).logits[0, len(sequence.prompt) - 1 : -1]


def distance(z_s, z_t, k=None):
    q, p = (torch.softmax(z, -1).sort(-1, descending=True).values for z in (z_s, z_t.detach()))
    width = max(q.shape[1], p.shape[1])
    q, p = (torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in (q, p))
    if k is not None:
        q, p = (torch.cat([one[:, :k], one[:, k:].sum(1, keepdim=True)], 1) for one in (q, p))
    return (p - q).abs().sum()


@pytest.mark.parametrize("top_k", [None, 5])
def test_loss_and_gradient_are_those_of_full_logits_in_float64(top_k, models, tmp_path):
    loss, metrics, items = loss_of(models, tmp_path, distance_coef=0.7, top_k=top_k)
    found = torch.autograd.grad(loss, list(models.student.parameters()))
    student, teacher = models.student.double(), models.teacher.model.double()
    try:
        entropy, apart, tokens = 0.0, 0.0, 0
        for item in items:
            z_s, z_t = rows_of(student, item.sequence), rows_of(teacher, item.teacher)
            common = min(len(z_s), len(z_t))
            entropy = (
                entropy - torch.log_softmax(z_s, -1).gather(1, torch.tensor(item.sequence.response)[:, None]).sum()
            )
            apart = apart + distance(z_s[:common], z_t[:common], top_k)
            tokens += len(z_s)
        want = (entropy + 0.7 * apart) / tokens
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert metrics["sorted_distance"].item() == pytest.approx(apart.item(), rel=1e-4)
    assert ("sorted_distance_left_out" in metrics) == (top_k is not None)
    scale = max(one.abs().max().item() for one in gradients)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * scale)


def test_the_distance_alone_has_a_gradient_of_its_own(models, tmp_path):
    """Without it the comparison above could hide a distance that is never differentiated beside a large cross-entropy."""
    small, _, _ = loss_of(models, tmp_path, distance_coef=1.0)
    large, _, _ = loss_of(models, tmp_path, distance_coef=101.0)
    weight = models.student.model.embed_tokens.weight
    one, other = (torch.autograd.grad(loss, weight)[0] for loss in (small, large))
    assert (other - one).abs().max() > 10 * one.abs().max()


def test_positions_go_as_far_as_the_shorter_answer():
    ours, theirs = common_positions((3, 1, 2), (2, 4, 2))
    assert ours.tolist() == [0, 1, 3, 4, 5] and theirs.tolist() == [0, 1, 2, 6, 7]


def test_each_model_reads_the_text_in_its_own_ids(models, tmp_path):
    _, _, items = loss_of(models, tmp_path)
    for item in items:
        text = TEXTS[item.key]
        assert models.tokenizer.decode(item.sequence.response, skip_special_tokens=True) == text
        assert models.tokenizers.teacher.decode(item.teacher.response, skip_special_tokens=True) == text
        assert item.teacher.response[-1] == models.tokenizers.teacher.eos_token_id
    assert any(len(item.teacher.response) < len(item.sequence.response) for item in items)


def test_it_needs_a_teacher_that_is_there():
    needs = ULD(name="uld").needs()
    assert needs.other_tokenizer and "read" in needs.required_abilities
