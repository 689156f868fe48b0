"""Runs of a mixture-of-experts student: killed and resumed, on two ranks of ZeRO-3, with adapters; what they leave."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.models.tokenizers import byte_tokenizer
from minillm.reporting import expert_report
from minillm.reporting.run_files import read_run
from minillm.train.trainer import StageTrainer
from tests.methods.conftest import (  # noqa: F401  fixtures
    assert_same_run,
    finish,
    start,
    steps_of,
    trained,
    two_ranks,
)
from tests.runs import in_a_child, train

STEPS, LAYERS, EXPERTS, BALANCE = 3, 2, 4, 0.5


@pytest.fixture(scope="module")
def undrawn_experts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_report, "draw_load", lambda loads, path: False)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run, undrawn_experts) -> Path:
    """A Qwen2 whose second layer gets experts, beside a shared one without weights; its teacher is what it was before."""
    folder = tmp_path_factory.mktemp("upcycled")
    document, tokenizer = small_run(folder, layers=LAYERS), byte_tokenizer()
    shape = document["student"]["config"] | {"model_type": "qwen2", "vocab_size": len(tokenizer), "pad_token_id": 256}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, eos_token_id=256, bos_token_id=None, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    document["student"] = {
        "path": str(folder / "dense"),
        "init": "upcycle",
        "upcycle": {"num_experts": EXPERTS, "every": 2, "router_std": 1.0},  # no near ties, which rounding would decide
    }
    document["teacher"] = {"path": str(folder / "dense")}
    document["method"] = {"name": "kd"}
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"max_steps": STEPS, "adam_epsilon": 1e-3, "router_aux_loss_coef": BALANCE}
    document["eval"] = {"sets": {}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_it_begins_as_the_dense_model_and_its_experts_part(trained):  # noqa: F811
    first, *_, last = steps_of(trained, "main")
    assert first["forward_kl_nats"] == pytest.approx(0, abs=1e-6) and last["forward_kl_nats"] > 1e-4
    assert first["loss"] == pytest.approx(
        0.5 * first["cross_entropy_nats"] + BALANCE * first["auxiliary_loss"], rel=1e-5
    )
    for step in (first, last):
        ((*shares,),) = step["expert_load"]  # one layer
        assert len(shares) == EXPERTS and sum(shares) == pytest.approx(1, abs=1e-4)
        assert (step["expert_load_least"], step["expert_load_most"]) == pytest.approx(
            (min(shares), max(shares)), abs=1e-5
        )
    model = AutoModelForCausalLM.from_pretrained(trained / "final")
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    one, *others = model.model.layers[1].mlp.experts.down_proj
    assert all((one - other).abs().max() > 1e-5 for other in others)
    assert "## Experts" in (trained / "report.md").read_text()


def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, recipe, one_thread):  # noqa: F811
    folder = recipe.parent / "killed"

    def killed():
        save = StageTrainer.save

        def save_and_die(trainer, *, wait):
            save(trainer, wait=True)
            if trainer.progress.stage_step == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        StageTrainer.save = save_and_die
        train(recipe, f"output_dir={folder}")

    assert os.WIFSIGNALED(in_a_child(killed))
    assert in_a_child(lambda: train(recipe, f"output_dir={folder}", resume=True)) == 0
    assert_same_run(folder, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps_with_sharded_experts(recipe, two_ranks):  # noqa: F811
    one = recipe.parent / "one_by_one"  # the balance loss is a mean over a micro-batch, so these must be cut alike
    cut = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2")
    assert in_a_child(lambda: train(recipe, f"output_dir={one}", *cut)) == 0
    for ours, theirs in zip(steps_of(two_ranks, "main"), steps_of(one, "main"), strict=True):
        assert ours["expert_load"] == theirs["expert_load"]
        for key in ("loss", "cross_entropy_nats", "auxiliary_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)
    models = [AutoModelForCausalLM.from_pretrained(folder / "final") for folder in (two_ranks, one)]
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    state = torch.load(two_ranks / f"checkpoint-{STEPS}" / "state" / "engine-0-of-2.pt", weights_only=True)
    half = sum(parameter.numel() for parameter in models[0].parameters()) / 2
    assert half <= sum(part.numel() for part in state["weights"]) < half + 100  # each weight is padded to two halves


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_leave_the_experts_as_they_were_copied(recipe):  # noqa: F811
    folder = recipe.parent / "lora"
    keys = ("student.lora={r: 2, alpha: 8}", "train.max_steps=1", "train.router_aux_loss_coef=0")
    assert in_a_child(lambda: train(recipe, f"output_dir={folder}", *keys)) == 0
    model, dense = (AutoModelForCausalLM.from_pretrained(one) for one in (folder / "final", recipe.parent / "dense"))
    experts, before = model.model.layers[1].mlp.experts, dense.model.layers[1].mlp
    assert all(torch.equal(one, before.down_proj.weight) for one in experts.down_proj)
    assert not torch.equal(model.model.layers[1].self_attn.q_proj.weight, dense.model.layers[1].self_attn.q_proj.weight)
    assert expert_report.load_of(read_run(folder).stages["main"]).shape == (1, 1, EXPERTS)
