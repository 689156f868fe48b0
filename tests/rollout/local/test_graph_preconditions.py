"""What cannot be sampled with CUDA graphs is refused by name."""

from dataclasses import replace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from minillm.rollout.local import graph_preconditions
from minillm.rollout.local.graph_preconditions import require_cuda_graphs, require_static_shapes
from minillm.rollout.local.local_rollouts import LocalRollouts


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "qwen2", "cohere"])
def test_models_that_are_fit_for_it(make_models, monkeypatch, architecture):
    monkeypatch.setattr(graph_preconditions, "require_gpu", lambda device: None)
    models = make_models(architecture)
    assert not LocalRollouts(models).cuda_graphs
    assert LocalRollouts(models, cuda_graphs=True).cuda_graphs
    require_cuda_graphs(make_models(architecture, teacher=False))


def test_a_cpu(make_models):
    models = make_models()
    with pytest.raises(ValueError, match="the models are on the cpu, and CUDA graphs need a GPU"):
        require_cuda_graphs(models)
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        LocalRollouts(models, cuda_graphs=True)


def test_a_teacher_with_sliding_windows(make_models, monkeypatch):
    monkeypatch.setattr(graph_preconditions, "require_gpu", lambda device: None)
    models = replace(make_models(), teacher=make_models("gemma2").teacher)
    with pytest.raises(
        ValueError, match=r"the teacher \(Gemma2ForCausalLM\) keeps DynamicSlidingWindowLayer in its cache"
    ):
        require_cuda_graphs(models)
    models.teacher.model = None  # a teacher elsewhere decodes there
    require_cuda_graphs(models)


@pytest.mark.parametrize("rotary", ["dynamic", "longrope"])
def test_rotary_frequencies_by_the_longest_sequence(make_models, rotary):
    model = make_models(teacher=False).student
    model.config.rope_parameters = {"rope_type": rotary, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=f"rope_type {rotary}"):
        require_static_shapes("student", model)
    model.config.rope_parameters = {"full_attention": {"rope_type": rotary}}  # one for each type of layer
    with pytest.raises(ValueError, match=f"rope_type {rotary}"):
        require_static_shapes("student", model)
    model.config.rope_parameters = {"rope_type": "llama3"}
    require_static_shapes("student", model)


def test_positions_from_the_mask():
    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM.* ALiBi"):
        require_static_shapes("student", model)


def test_attention_that_takes_no_mask(make_models):
    model = make_models(teacher=False).student
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation flash_attention_2, .* sdpa and eager do"):
        require_static_shapes("student", model)
