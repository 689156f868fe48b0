"""Architectures that cannot be built, and models that predict no next token, said before anything is loaded."""

import json

import pytest

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4}


@pytest.fixture
def problems(recipe):
    def find(config: dict, **changes) -> dict[str, str]:
        keys = {key: value for key, value in {**config, **changes}.items() if value is not ...}
        return recipe.problems(student={"init": "random", "tokenizer": "byte", "config": keys})

    return find


@pytest.mark.parametrize("family", [LLAMA, GPT2, {"model_type": "qwen3"}, {"model_type": "mixtral"}])
def test_families_that_can_be_built(problems, family):
    assert problems(family) == {}


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "n_embd", "n_head"]
)
@pytest.mark.parametrize("value", [0, -1, 2**31, 10**30])
def test_a_size_is_at_least_one_and_no_larger_than_any_model(problems, key, value):
    found = problems(GPT2 if key.startswith("n_") else LLAMA, **{key: value})
    assert found == {f"student.config.{key}": f"must be from 1 to 2,147,483,647, not {value}"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", "x", "expected a whole number, not 'x'"),
        ("hidden_size", None, "expected a whole number, not null"),
        ("hidden_size", 2.5, "expected a whole number, not 2.5"),
        ("num_hidden_layers", [1], "expected a whole number, not [1]"),
        ("num_key_value_heads", "x", "expected a whole number, not 'x'"),
        ("tie_word_embeddings", "yes", "expected true or false, not 'yes'"),
        ("hiden_size", 64, "llama models have no such key (did you mean hidden_size?)"),
        ("model_type", "lama", "transformers knows no 'lama' (did you mean llama?)"),
        ("model_type", 3, "transformers knows no 3"),
        ("model_type", None, "transformers knows no null"),
        ("model_type", "t5", "t5 is an encoder-decoder; student and teacher must be causal language models"),
        ("model_type", "bart", "bart is an encoder-decoder"),
        ("model_type", "vit", "vit predicts no next token"),
    ],
)
def test_a_value_that_its_key_does_not_take(problems, key, value, words):
    found = problems(LLAMA if key != "model_type" else {}, **{key: value})
    assert list(found) == [f"student.config.{key}"] and words in found[f"student.config.{key}"]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (LLAMA, {"hidden_size": 33}, "The hidden size (33) is not a multiple of the number of attention heads (4)"),
        (LLAMA, {"num_attention_heads": 33}, "not a multiple of the number of attention heads (33)"),
        (LLAMA, {"num_key_value_heads": 3}, "the 4 attention heads are no multiple of the 3 key-value heads"),
        (LLAMA, {"num_key_value_heads": 33}, "no multiple of the 33 key-value heads"),
        (LLAMA, {"hidden_act": "gelu2"}, "KeyError: 'gelu2'"),
        (LLAMA, {"hidden_size": 2**30, "vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1, "head_dim": 2**30},
         "no llama model can be built of these keys"),
        (GPT2, {"n_embd": 33}, "must be divisible by num_heads"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(problems, family, changes, words):
    found = problems(family, **changes)
    assert list(found) == ["student.config"] and words in found["student.config"]
    assert "\n" not in found["student.config"]


def test_an_encoder_is_causal_where_it_says_so(problems):
    bert = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    assert "reads a text in both directions" in problems(bert)["student.config.model_type"]
    assert problems(bert, is_decoder=True) == {}


def test_keys_override_those_of_a_local_model(recipe):
    folder = recipe.model("models/pattern", **{**LLAMA, "layer_types": ["full_attention"] * 3, "num_hidden_layers": 3})
    student = {"init": "random", "path": str(folder)}
    assert recipe.problems(student={**student, "config": {"num_hidden_layers": 2}}) == {}
    found = recipe.problems(student={**student, "config": {"hidden_size": 33}})
    assert "The hidden size (33)" in found["student.config"]
    # of a hub name nothing is known here
    assert recipe.problems(student={"init": "random", "path": "org/model", "config": {"hidden_size": 33}}) == {}


def test_models_of_images_and_text(problems, recipe):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llava = {
        "model_type": "llava",
        "text_config": {**LLAMA},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }
    assert problems(llava) == {}
    assert "The hidden size (33)" in problems(llava, text_config={**LLAMA, "hidden_size": 33})["student.config"]
    folder = recipe.model("models/llava", **llava)
    student = {"init": "random", "path": str(folder), "config": {"text_config": {"hidden_size": 32}}}
    assert recipe.problems(student=student) == {}  # the rest of text_config is the model's
    student["config"]["text_config"]["num_attention_heads"] = 3
    assert (
        "(32) is not a multiple of the number of attention heads (3)"
        in recipe.problems(student=student)["student.config"]
    )


def test_one_error_stands_for_all_that_follow_from_it(problems):
    assert set(problems(LLAMA, hidden_size=0, num_hidden_layers=-1)) == {
        "student.config.hidden_size",
        "student.config.num_hidden_layers",
    }


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]},
         "is T5ForConditionalGeneration, an encoder-decoder; student and teacher must be causal language models"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM, which predicts no next token"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "predicts no next token"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, None),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, None),
        ({"model_type": "llama", "architectures": "LlamaForCausalLM"}, None),
        ({"model_type": "llama"}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_models_of_other_kinds_in_local_folders(recipe, who, keys, words):
    (recipe.folder / "models" / "big" / "other").mkdir()
    (recipe.folder / "models" / "big" / "other" / "config.json").write_text(json.dumps(keys))
    found = recipe.problems(**{f"{who}__path": "models/big/other"})
    assert list(found) == ([f"{who}.path"] if words else []) and (words is None or words in found[f"{who}.path"])


def test_a_config_json_that_cannot_be_read_says_nothing(recipe):
    (recipe.folder / "models" / "big" / "config.json").write_text("[" * 100_000)
    assert recipe.problems() == {}


@pytest.mark.parametrize(
    ("config", "upcycle", "wrong"),
    [
        ({}, {}, {}),
        ({"attention_bias": True}, {}, {"student.init": "has attention_bias: True, which no mixtral can have"}),
        ({"model_type": "qwen3"}, {"every": 2}, {}),
        ({"model_type": "qwen3"}, {"every": 9}, {"student.upcycle.every": "with 9 no layer has experts"}),
        ({"model_type": "qwen3"}, {"layers": [0, 2]}, {}),
        ({"model_type": "qwen3"}, {"layers": [4]}, {"student.upcycle.layers": "the layers 0 to 3, no 4"}),
        ({}, {"layers": [0, 2]}, {"student.upcycle.layers": "every layer of a mixtral has experts"}),
        ({"model_type": "gpt2"}, {}, {"student.init": "transformers has no architecture that is a gpt2 with experts"}),
        ({"model_type": "nobody_knows"}, {}, {}),
    ],
)
def test_what_an_upcycled_model_cannot_be_is_said_before_it_is_read(recipe, config, upcycle, wrong):
    recipe.model("models/dense", **{**LLAMA, "num_hidden_layers": 4, **config})
    found = recipe.problems(student={"path": "models/dense", "init": "upcycle", "upcycle": upcycle})
    assert set(found) == set(wrong)
    for path, words in wrong.items():
        assert words in found[path]


def test_a_later_stage_goes_on_from_the_mixture_and_does_not_upcycle_it_again(recipe):
    sparse = {"student": {"path": "models/big", "init": "upcycle"}}
    for init, wrong in (
        ("pretrained", {}),
        ("upcycle", {"stages.two.student.init": "is a mixture of experts already"}),
    ):
        stages = {"one": sparse, "two": {"student": {"path": "stage:one", "init": init}}}
        found = recipe.problems(student=..., stages=stages)
        assert set(found) == set(wrong) and all(wrong[path] in found[path] for path in wrong)
