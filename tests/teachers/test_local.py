"""The rows of a teacher whose weights are here, against its own full logits."""

from dataclasses import replace

import pytest
import torch

from minillm.losses import linear_cross_entropy
from minillm.models.batch import TokenSequence, collate
from minillm.teachers.local import LocalTeacher
from minillm.teachers.teacher import ABILITIES
from tests.pretended_devices import pretended_devices

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


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_from_another_device_it_gives_the_same(build_model, architecture):
    here, model = torch.device("cpu"), build_model(architecture)
    batch, expected = collate(SEQUENCES, 0), LocalTeacher(model)
    rows, layers = expected.rows(batch).hidden, expected.layers(batch, [1, -1])
    with expected.head() as head:
        weight = head.weight.detach().clone()
    with pretended_devices():
        teacher = LocalTeacher(model.requires_grad_(False).to("xpu:1"))
        with teacher.head() as head:
            assert head.weight.device == model.device, "where nobody says another, the model's own"
        teacher.give_to(here)
        found = teacher.rows(batch)
        with found.for_losses() as (hidden, head):
            assert hidden.device == head.weight.device == here
            assert torch.equal(hidden, rows) and torch.equal(head.weight, weight)
        for layer, states in teacher.layers(batch, [1, -1]).items():
            assert states.device == here and torch.equal(states, layers[layer])
        teacher.close()
        with teacher.head() as again:
            assert again.weight is not head.weight, "its copy went when it was closed"


def test_closing_one_that_is_not_sharded_leaves_it_to_whoever_has_it_besides(build_model):
    model = build_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    LocalTeacher(model).close()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # rotary positions, and a table of them
def test_rows_after_a_prompt_of_its_own_are_those_of_that_text_by_hand(build_model, architecture):
    """By itself, padded at the right and padded at the left, in float64."""
    model = build_model(architecture).double()
    told = [
        TokenSequence([5], [6, 7, 8, 9], teacher_prompt=[30, 31, 32, 5]),
        TokenSequence([1, 2, 3], [4, 5], teacher_prompt=[33, 1, 2, 3]),
        TokenSequence([9], [], teacher_prompt=[34, 9]),
        TokenSequence([9, 8], [7, 6, 5]),
    ]
    teacher = LocalTeacher(model)
    rows = teacher.rows(collate(told, 0)).hidden
    layers = teacher.layers(collate(told, 0), [-1, 1])
    assert torch.equal(layers[-1], rows) and len(layers[1]) == len(rows) == 9
    read = [(one.teacher_prompt or one.prompt, one.response) for one in told]
    width = max(len(prompt) + len(response) for prompt, response in read)
    by_hand = {"alone": [], "left": []}
    with torch.no_grad():
        for prompt, response in read:
            ids = prompt + response
            states = model.base_model(torch.tensor([ids])).last_hidden_state[0]
            by_hand["alone"].append(states[len(prompt) - 1 : len(ids) - 1])
        left = torch.tensor([[0] * (width - len(prompt + response)) + prompt + response for prompt, response in read])
        mask = torch.tensor(
            [[0] * (width - len(prompt + response)) + [1] * len(prompt + response) for prompt, response in read]
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = model.base_model(left, attention_mask=mask, position_ids=positions).last_hidden_state
        for place, (_, response) in enumerate(read):
            by_hand["left"].append(states[place, width - len(response) - 1 : width - 1])
    for found in by_hand.values():
        torch.testing.assert_close(rows, torch.cat(found), rtol=1e-9, atol=1e-9)
    untold = teacher.rows(collate([replace(one, teacher_prompt=None) for one in told], 0)).hidden
    assert (untold - rows)[:6].abs().amax(1).min() > 1e-6 and torch.allclose(untold[6:], rows[6:], rtol=1e-9)
