"""A dozen kinds of decoders through all that is done with a model; `make sweep` takes every one of transformers."""

import pytest

from minillm import UserError
from tests.sweep.every_architecture import in_process, report_text
from tests.sweep.journey import FAILED, HELD, REFUSED, SKIPPED, STEPS, Different, Journey, Outcome, outcome_of
from tests.sweep.tiny_models import ARCHITECTURES, MOST_WEIGHTS, tiny_architecture, tiny_model

# architecture -> the steps that are refused in a sentence. One of each kind of positions, cache, layer list and experts
JOURNEYS = {
    "llama": set(),
    "gpt2": set(),
    "opt": set(),  # learned positions with an offset
    "gpt_neo": set(),  # without sdpa
    "mpt": set(),  # ALiBi
    "qwen3": set(),
    "gemma3_text": set(),  # windows
    "gemma4_text": set(),  # a table of all layers
    "qwen3_moe": set(),
    "deepseek_v3": set(),  # latent attention
    "llama4": set(),  # a language model, head and all, inside of a model of images and text
    "mamba2": set(),  # a state
    "bamba": set(),  # a state and attention
    "bart": {"decoding", "prune", "train", "eval", "generate"},  # positions without a look at the padding
}


@pytest.mark.parametrize("model_type", JOURNEYS)
def test_every_step_holds_or_is_refused_in_a_sentence(model_type, tmp_path, one_thread):
    found = Journey(model_type, tmp_path).outcomes()
    assert not {step: one.said for step, one in found.items() if one.result == FAILED}
    assert {step for step, one in found.items() if one.result == REFUSED} == JOURNEYS[model_type], found
    skipped = {"reload"} if "train" in JOURNEYS[model_type] else set()
    assert {step for step, one in found.items() if one.result == SKIPPED} == skipped


def test_what_the_sweep_builds_is_tiny_and_has_no_weights_at_rest():
    model = tiny_model(tiny_architecture("opt"))
    assert sum(one.numel() for one in model.parameters()) < MOST_WEIGHTS
    assert all(one.std() > 0.05 for one in model.parameters()), "a bias of 0 would hide what drops it"
    assert "llama" in ARCHITECTURES and len(ARCHITECTURES) > 100


def test_an_outcome_tells_refusals_from_failures():
    def refuse():
        raise UserError("no such thing; choose another")

    def differ():
        raise Different("apart by 1")

    assert outcome_of(lambda: None) == Outcome(HELD)
    assert outcome_of(refuse) == Outcome(REFUSED, "no such thing; choose another")
    assert outcome_of(differ).result == FAILED and outcome_of(differ).said.startswith(
        "Different at sweep/test_journey.py"
    )


def test_a_wrong_model_fails_where_it_differs(tmp_path, monkeypatch, one_thread):
    """The checks of the sweep do not rest on those of the program: with these off, they find it themselves."""
    monkeypatch.setattr("minillm.rollout.local.local_rollouts.require_exact_decoding", lambda role, model: None)
    journey = Journey("bart", tmp_path)
    journey.build()
    journey.open()
    with pytest.raises(Different, match="an answer to .* apart by"):
        journey.decoding()


def test_a_crash_and_a_hang_fail_the_step_that_they_were_at(monkeypatch):
    import os
    import signal
    import time

    monkeypatch.setattr(Journey, "open", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    found = in_process("llama", seconds=60)
    assert found["build"].result == HELD and found["open"] == (FAILED, "the process was ended by SIGKILL")
    assert found["rows"].result == SKIPPED and tuple(found) == STEPS
    monkeypatch.setattr(Journey, "open", lambda self: time.sleep(60))
    assert in_process("llama", seconds=2)["open"] == (FAILED, "not done after 2 seconds")
    text = report_text({"llama": found})
    assert "| llama | held | FAILED | - |" in text and "the process was ended by SIGKILL" in text
