"""The phases on fake tensors: counts that can be computed by hand."""

import pytest

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.planning import simulate
from minillm.planning.planner import plan_run
from minillm.rollout.local.static_loop import static_room
from tests.planning.small import ANSWER, BOTH, PARAMETERS, PROMPT, SHARDED, planned


def test_weights_gradients_moments_and_caches_are_counted(recipe):
    stage = planned(recipe(), BOTH)
    assert stage.simulation.student.parameters == PARAMETERS
    assert stage.simulation.vocab_size == 512  # cut to what both heads have
    rollout = next(phase for phase in stage.memory if phase.phase == "rollout").device
    assert rollout["student weights"] >= 4 * PARAMETERS  # and the table of rotary frequencies
    assert rollout["student weights"] - 4 * PARAMETERS < 1024
    assert rollout["gradients"] == 0 and rollout["optimizer states"] == 8 * PARAMETERS
    assert stage.simulation.phases["update"].most("gradients") == 4 * PARAMETERS
    tokens = 4 * (PROMPT + ANSWER - 1) + PROMPT  # of one that is read ahead
    timeline = stage.simulation.phases["rollout"]
    assert (
        timeline.most("student KV cache") == tokens * 2 * 2 * 2 * 16 * 4
    )  # layers, keys and values, heads, size, fp32
    assert timeline.most("teacher KV cache") == tokens * 4 * 2 * 2 * 16 * 2  # bf16, one layer of it extrapolated
    assert stage.simulation.teacher.kv_bytes_per_token == 4 * 2 * 2 * 16 * 2


def test_prompts_that_are_read_ahead_have_caches_of_their_own(recipe):
    """One of four rows, of the whole prompts, beside the caches of the rows; of the teacher with a layer of it extrapolated."""
    path = recipe()
    one_batch, refilled, graphs = (
        planned(path, *keys, gpu="A100-80GB").simulation.phases["rollout"]
        for keys in (("rollout.batch_size=8", BOTH), (BOTH,), ("rollout.cuda_graphs=true",))
    )
    for who, token in (("student", 2 * 2 * 2 * 16 * 4), ("teacher", 4 * 2 * 2 * 16 * 2)):
        part = f"{who} KV cache"
        assert one_batch.most(part) == 8 * (PROMPT + ANSWER - 1) * token
        assert refilled.most(part) == (4 * (PROMPT + ANSWER - 1) + PROMPT) * token
        assert graphs.most(part) == (4 * static_room(PROMPT, ANSWER) + PROMPT) * token


def test_a_prompt_of_several_answers_is_read_once(recipe):
    """Long prompts: what reading them takes is of half as many rows, and the caches in the end are the same."""
    keys = ("data.prompts.max_prompt_length=200", "rollout.batch_size=8")
    each, once = (planned(recipe(), *keys, f"rollout.answers_per_prompt={answers}").simulation for answers in (1, 4))
    parts = ("student KV cache", "teacher KV cache")
    assert [each.phases["rollout"].most(part) for part in parts] == [
        once.phases["rollout"].most(part) for part in parts
    ]
    assert (each.student, each.teacher) == (once.student, once.teacher)
    assert once.phases["rollout"].most("activations") < 0.6 * each.phases["rollout"].most("activations")


def test_with_cuda_graphs_the_caches_have_whole_buckets(recipe):
    key, path, whole = "rollout.cuda_graphs=true", recipe(), "rollout.batch_size=8"
    plain, graphs = (planned(path, whole, *keys, gpu="A100-80GB") for keys in ((), (key,)))
    for who in ("student", "teacher"):
        part = f"{who} KV cache"
        few, many = (stage.simulation.phases["rollout"].most(part) for stage in (plain, graphs))
        assert many == few * static_room(PROMPT, ANSWER) // (PROMPT + ANSWER - 1) > few
    few, many = (stage.simulation.phases["rollout"].most("activations") for stage in (plain, graphs))
    assert many > few  # a step's memory stays beside that of the next prompts
    methods = ({"name": "gkd"}, {"name": "seqkd"})
    assert all(planned(recipe(method=method), key, gpu="A100-80GB").work.decodings[0].cuda_graphs for method in methods)


def test_by_shared_coins_the_buffer_fills_while_answers_are_sampled(recipe):
    whole = "rollout.batch_size=8"  # no prompt is read ahead of a row
    plain, coins = (planned(recipe(), whole, f"rollout.shared_coins={key}") for key in ("false", "true"))
    for who in ("student", "teacher"):
        caches = [stage.simulation.phases["rollout"].most(f"{who} KV cache") for stage in (plain, coins)]
        assert caches[0] == caches[1]
    held = [{memory.phase: memory.device["rollout buffer"] for memory in stage.memory} for stage in (plain, coins)]
    assert held[1]["rollout"] == held[1]["scoring"] == held[0]["scoring"] == 2 * held[0]["rollout"]
    assert coins.simulation.losses["rollout"].rows == 8 * ANSWER
    assert coins.simulation.phases["scoring"].most("teacher hidden states") == 0


def test_deepspeed_brings_the_gradients_together_in_fp32_before_the_step(recipe):
    update = planned(recipe(), *SHARDED).simulation.phases["update"]
    assert update.most("gradients") == (2 + 4) * PARAMETERS and update.most("fp32 master weights") == 4 * PARAMETERS


def test_what_is_planned_twice_is_simulated_once(recipe, monkeypatch):
    """A stage is planned for its ranks and for one; two stages of the same shapes are one."""
    runs, run = [], simulate._Simulator.run
    monkeypatch.setattr(simulate, "_DONE", {})
    monkeypatch.setattr(simulate._Simulator, "run", lambda self, wanted: runs.append(wanted) or run(self, wanted))
    plan_run(load_run([recipe(stages={"one": {}, "two": {"train": {"learning_rate": 1e-3}}})]), gpu="cpu")
    assert len(runs) == 1


def test_checkpointing_and_smaller_parts_need_less(recipe):
    path = recipe(method={"name": "kd"})
    keys = ["student.config.num_hidden_layers=6", "train.per_device_train_batch_size=16"]
    whole = planned(path, *keys)
    assert whole.activations(True) < whole.activations(False)
    checkpointed = planned(path, *keys, "train.gradient_checkpointing=true")
    assert checkpointed.peak.device_bytes < whole.peak.device_bytes
    parts = planned(path, *keys, "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4")
    assert parts.peak.device_bytes < whole.peak.device_bytes


def test_an_architecture_without_gradient_checkpointing_is_planned_all_the_same(recipe):
    path = recipe(method={"name": "kd"})
    own = ["model_type: ctrl", "n_embd: 32", "n_layer: 2", "n_head: 2", "dff: 32", "n_positions: 256"]
    stage = planned(path, f"student.config={{{', '.join(own)}}}")
    assert stage.activations(False) > 0 and stage.activations(True) is None
    with pytest.raises(UserError, match="no plan for .*ctrl.*: the architecture's code refuses .* checkpointing"):
        planned(path, f"student.config={{{', '.join(own)}}}", "train.gradient_checkpointing=true")


def test_an_architecture_that_swallows_the_cache_is_refused_in_a_sentence(recipe):
    own = ["model_type: openai-gpt", "n_embd: 32", "n_layer: 2", "n_head: 2", "n_positions: 256"]
    with pytest.raises(UserError, match="no plan for .*openai-gpt.*: the architecture's code refuses what a plan does"):
        planned(recipe(method={"name": "gkd"}), f"student.config={{{', '.join(own)}}}")


def test_what_is_packed_takes_a_mask_of_all_pairs_where_attention_has_no_other_way(recipe):
    path, keys = recipe(method={"name": "kd"}), ["train.per_device_train_batch_size=64"]
    padded, packed = (planned(path, *keys, f"train.packing={asked}") for asked in ("auto", "on"))
    tokens = 64 * (PROMPT + ANSWER - 1) - 1  # of the longest batch that has padding
    more = [stage.simulation.phases["update"].most("activations") for stage in (padded, packed)]
    assert more[1] - more[0] > tokens**2  # a byte each, and what attention makes of them
    rows = 4 * PROMPT * 64 * 64 * 4  # what the layers keep of a row differs by a token of 64
    masked = [stage.simulation.phases["scoring"].most("activations") for stage in (padded, packed)]
    assert masked[1] - masked[0] > tokens**2 - rows
    assert packed.speed.update_flops > padded.speed.update_flops
    by_sequence = [f"{who}.attn_implementation=flex_attention" for who in ("student", "teacher")]
    by_sequence = planned(path, *keys, *by_sequence, "train.packing=on")
    assert by_sequence.simulation.phases["update"].most("activations") <= more[0]
    assert by_sequence.speed.update_flops == padded.speed.update_flops
