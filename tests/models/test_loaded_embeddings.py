"""Rows of embeddings that an architecture would overwrite as it is read."""

import pytest
import torch
from transformers import PreTrainedModel

from minillm.config.models import TeacherConfig
from minillm.models.loading import load_teacher
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from tests.sweep.tiny_models import tiny_architecture, tiny_model


@pytest.mark.parametrize("kind", ["youtu", "llama"])
def test_the_row_of_the_padding_is_read_as_it_was_trained(kind, tmp_path):
    model = tiny_model(tiny_architecture(kind))
    table = model.get_input_embeddings()
    assert table.weight[table.padding_idx].norm() > 0
    save_model(model, byte_tokenizer(), tmp_path / "model")
    original = PreTrainedModel._initialize_weights
    config = TeacherConfig(path=str(tmp_path / "model"))
    again = load_teacher(config, output_dir=tmp_path, device=torch.device("cpu"))
    assert PreTrainedModel._initialize_weights is original
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
