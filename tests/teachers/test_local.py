"""The rows of a teacher whose weights are here, against its own full logits."""

import pytest
import torch

from minillm.losses import linear_cross_entropy
from minillm.models.batch import TokenSequence, collate
from minillm.teachers.local import LocalTeacher
from minillm.teachers.teacher import ABILITIES

# answers of several lengths, one of them empty, so that rows and positions are not the same thing
SEQUENCES = [TokenSequence([5], [6, 7, 8, 9]), TokenSequence([1, 2, 3], [4, 5]), TokenSequence([9], [])]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi", "opt"])  # plain, softcap, bias, projected states
def test_rows_and_head_are_the_full_logits(build_model, architecture):
    model = build_model(architecture)
    batch = collate(SEQUENCES, 0)
    rows = LocalTeacher(model).rows(batch)
    assert len(rows) == 6 and not rows.hidden.requires_grad
    with torch.no_grad():
        exact = [
            model(torch.tensor([one.prompt + one.response])).logits[0, len(one.prompt) - 1 : -1]
            for one in SEQUENCES[:2]
        ]
    expected = -torch.cat(exact).double().log_softmax(-1).gather(-1, batch.labels[:, None]).mean()
    with rows.for_losses() as (hidden, head):
        found = linear_cross_entropy(hidden, head, batch.labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_that_were_kept_are_rows_again(build_model):
    teacher = LocalTeacher(build_model("llama"))
    rows = teacher.rows(collate(SEQUENCES, 0))
    again = teacher.rows_of(rows.parts())
    assert torch.equal(again.hidden, rows.hidden) and again.source is teacher


def test_asking_leaves_no_trace(build_model):
    """As a student that is in training and judges another model."""
    model = build_model("llama").train()
    LocalTeacher(model).rows(collate(SEQUENCES, 0))
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_it_can_do_everything_and_speaks_of_every_row_of_its_head(build_model):
    teacher = LocalTeacher(build_model("llama", vocab_size=80))
    assert teacher.abilities == set(ABILITIES) and teacher.vocab_size == 80


def test_closing_one_that_is_not_sharded_leaves_it_to_whoever_has_it_besides(build_model):
    model = build_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    LocalTeacher(model).close()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
