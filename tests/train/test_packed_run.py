"""Runs whose batches are read packed: the records of padded ones, from packed passes of every kind."""

import pytest
import torch
import yaml

from minillm.models import access
from minillm.teachers.preflight import PreflightError
from tests.runs import every_record, train


def test_a_run_takes_the_steps_of_padded_batches(two_stages, monkeypatch):
    """sft, a buffer that is sampled from the mixture and scored, updates over it, and evaluations with the teacher."""
    called, forward = set(), access.forward_packed

    def watch(model, batch, **options):
        called.add((model.config.hidden_size, torch.is_grad_enabled()))
        return forward(model, batch, **options)

    monkeypatch.setattr(access, "forward_packed", watch)
    folders = {}
    for packing in ("auto", "on"):
        folders[packing] = two_stages.parent / packing
        train(two_stages, f"output_dir={folders[packing]}", f"train.packing={packing}")
        if packing == "auto":
            assert not called, "with sdpa a mask of all pairs costs more than padding"
    assert called == {(24, True), (24, False), (16, True), (16, False)}  # teacher and student, trained and read
    ours, theirs = (every_record(folders[packing]) for packing in ("on", "auto"))
    assert len(ours) == len(theirs) > 10
    for mine, other in zip(ours, theirs, strict=True):
        where = mine["stage"], mine["kind"], mine["stage_step"]
        if mine["kind"] == "eval":
            assert mine["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5), where
            continue
        for name in ("loss", "grad_norm", "student_tokens"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (where, name)


def test_a_student_that_leaks_is_refused_before_a_step(small_run, tmp_path):
    document = small_run(tmp_path, layers=1)
    document["student"]["config"] = {
        "model_type": "opt", "hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
        "max_position_embeddings": 64, "word_embed_proj_dim": 16, "init_std": 0.3,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(PreflightError, match="train.packing: on: student: OPTForCausalLM"):
        train(path, "train.packing=on")
    assert not (tmp_path / "run" / "checkpoint-1").exists()
