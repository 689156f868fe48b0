"""The ledger counts what is alive, and fake tensors allocate what real ones do."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.planning.ledger import PARTS, Ledger, Timeline


def test_parts_and_peak():
    with Ledger() as ledger:
        with ledger.part("student weights"):
            weight = torch.empty(1000)
        first = torch.empty(500)
        del first
        second = torch.empty(300)
        view = second[:10]
        del second  # the view keeps it
        ledger.relabel([view], "gradients")
    peak = ledger.take().peak({}, {})
    assert peak["student weights"] == weight.nbytes and peak["activations"] == 2000
    now = ledger.take().peak({}, {})
    assert now["gradients"] == 1200 and now["activations"] == 0 and ledger.total == 4000 + 1200
    del view
    assert ledger.total == 4000


def test_what_is_repeated_counts_so_many_times_until_it_is_freed():
    with Ledger() as ledger:
        before = torch.empty(10)
        ledger.begin_repeated(before)
        kept, once, freed = (torch.empty(100) for _ in range(3))
        del freed
        ledger.repeat(5, without=once)
        assert ledger.total == 4 * (5 * 10 + 5 * 100 + 100)
        ledger.begin_repeated()
        gradient, other = torch.empty(7), torch.empty(30)
        ledger.relabel([gradient], "gradients")
        ledger.repeat(3, name="gradients")
        assert ledger.total == 4 * (5 * 10 + 5 * 100 + 100 + 3 * 7 + 30)
    del before, kept, once, gradient, other
    assert ledger.total == 0


def test_the_worst_moment_depends_on_the_factors():
    import numpy as np

    moments = np.zeros((2, len(PARTS)), dtype=np.int64)
    moments[0, PARTS.index("gradients")] = 100
    moments[1, PARTS.index("activations")] = 60
    timeline = Timeline(moments)
    assert timeline.peak({}, {})["gradients"] == 100
    assert timeline.peak({"gradients": 0.5}, {"loss buffers": 7})["activations"] == 60
    assert timeline.most("gradients") == 100


def test_the_most_since_a_moment():
    with FakeTensorMode(), Ledger() as ledger:
        kept, large = torch.empty(10, dtype=torch.uint8), torch.empty(1000, dtype=torch.uint8)
        del large
        moment = ledger.moment
        assert ledger.most_since(moment) == ledger.total == 10
        small = torch.empty(5, dtype=torch.uint8)
        del small
        assert (ledger.most_since(moment), ledger.most_since(0), ledger.total) == (15, 1010, 10)
        del kept


def test_fake_tensors_allocate_what_real_ones_do():
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    peaks = []
    for fake in (True, False):
        with FakeTensorMode() if fake else contextlib.nullcontext(), Ledger() as ledger:
            model = AutoModelForCausalLM.from_config(config)
            ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.ones(3, 9, dtype=torch.int64)
            mask[0, 0] = 0
            model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
            peaks.append(ledger.take().peak({}, {})["activations"])
    assert peaks[0] == peaks[1] > 0
