"""Heads and hidden states of a model on another device: the very numbers, and copies that are made as often as they must be."""

import pytest
import torch

from minillm.models.access import lm_head, row_hidden
from minillm.models.batch import TokenSequence, collate
from minillm.models.other_device import elsewhere, forget_copies, head_on, row_hidden_on
from tests.pretended_devices import pretended_devices

CPU, THERE = torch.device("cpu"), torch.device("xpu:1")


@pytest.fixture(autouse=True)
def devices():
    with pretended_devices():
        yield


def test_a_model_is_elsewhere_where_it_is_not(build_model):
    model = build_model("llama")
    assert elsewhere(model, CPU) is None
    assert elsewhere(model.to(THERE), CPU) == THERE and elsewhere(model, torch.device("xpu", 1)) is None


def test_a_sharded_model_is_where_its_ranks_are(build_model):
    model = build_model("llama")
    next(model.parameters()).ds_id = 0
    assert elsewhere(model, THERE) is None


@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma2", "cohere"])  # plain, bias, softcap, scale
def test_a_copy_of_a_head_is_that_head(build_model, architecture):
    model = build_model(architecture)
    own = lm_head(model)
    weight, bias = own.weight.detach().clone(), None if own.bias is None else own.bias.detach().clone()
    copy = head_on(model.to(THERE), CPU)
    assert copy.weight.device == CPU and torch.equal(copy.weight, weight) and not copy.weight.requires_grad
    assert (copy.bias is None) == (bias is None) and (bias is None or torch.equal(copy.bias, bias))
    assert (copy.logit_scale, copy.softcap) == (own.logit_scale, own.softcap)


def test_a_model_that_is_here_has_its_own_head(build_model):
    model = build_model("llama")
    assert head_on(model, CPU).weight is model.lm_head.weight


def test_frozen_weights_are_copied_once_and_trained_ones_every_time(build_model):
    model = build_model("llama").to(THERE).requires_grad_(False)
    first = head_on(model, CPU).weight
    assert head_on(model, CPU).weight is first and head_on(model, torch.device("xpu:0")).weight is not first
    forget_copies(model)
    assert head_on(model, CPU).weight is not first
    model.requires_grad_(True)
    before = head_on(model, CPU).weight
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(head_on(model, CPU).weight, before + 1.0)


def test_a_head_that_was_exchanged_is_copied_anew(build_model):
    model = build_model("llama").to(THERE).requires_grad_(False)
    first = head_on(model, CPU).weight
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1.0, requires_grad=False)
    assert torch.equal(head_on(model, CPU).weight, first + 1.0)


def test_hidden_states_come_to_where_they_are_asked_for(build_model):
    model, batch = build_model("llama"), collate([TokenSequence([5, 6], [7, 8])], 0)
    expected = row_hidden(model, batch).detach()
    found = row_hidden_on(model.to(THERE), batch, CPU)
    assert found.device == CPU and torch.equal(found, expected)
