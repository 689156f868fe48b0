"""The parts of models that see: every weight in one of them, and those that are frozen receive no gradient."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from minillm import UserError
from minillm.config.upcycle import UpcycleConfig
from minillm.models.parts import train_parts, weights_of
from minillm.models.upcycling import upcycle
from tests.conftest import tiny_llama
from tests.pictures import KINDS, build_processor, build_seeing

# words that the names of a part's weights hold, whatever the architecture, and those that they do not
NAMES = {
    "projector": ("projector", "connector", "merger", "image_newline"),
    "language": ("language_model", "text_model", "lm_head"),
    "vision": ("vision_tower", "vision_model", "visual"),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return build_seeing(request.param, build_processor(request.param))


def names(model, weights) -> list[str]:
    known = {id(weight): name for name, weight in model.named_parameters()}
    return [known[id(weight)] for weight in weights]


def trained(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_every_weight_is_of_one_part(model):
    found = {part: names(model, weights) for part, weights in weights_of(model).items()}
    assert sorted(sum(found.values(), [])) == sorted(name for name, _ in model.named_parameters())
    for part, of_part in found.items():
        assert of_part and all(any(word in name for word in NAMES[part]) for name in of_part), part
    assert not any(word in name for name in found["vision"] for word in NAMES["projector"])


def test_the_parts_that_are_named_are_trained(model):
    parts = {part: set(names(model, weights)) for part, weights in weights_of(model).items()}
    for chosen in (("projector",), ("projector", "language"), ("vision",)):
        train_parts(model, chosen)
        assert trained(model) == set().union(*(parts[part] for part in chosen))
    train_parts(model, ("projector", "vision"), vision_from_layer=1)
    upper = trained(model) - parts["projector"]
    assert upper and upper < parts["vision"] and all(".1." in name for name in upper), upper
    with pytest.raises(UserError, match=r"student.vision_from_layer: the vision tower of .* layers 0 to 1, no 2"):
        train_parts(model, ("vision",), vision_from_layer=2)


def test_feed_forward_layers_are_those_of_the_language_model(model):
    language = set(names(model, weights_of(model)["language"]))
    found = trained(train_parts(model, ("feed_forward",)))
    assert found == {name for name in language if ".mlp." in name} and len(found) >= 2 * 3  # layers, matrices
    both = trained(train_parts(model, ("feed_forward", "projector")))
    assert both == found | set(names(model, weights_of(model)["projector"]))


def test_experts_and_routers_are_of_the_feed_forward_layers():
    dense = tiny_llama()
    sparse = upcycle(dense, UpcycleConfig(num_experts=2), seed=0)
    found = trained(train_parts(sparse, ("feed_forward",)))
    assert found == {name for name, _ in sparse.named_parameters() if ".mlp." in name}
    assert any("experts" in name for name in found) and any("gate.weight" in name for name in found)


def test_a_model_without_named_feed_forward_layers_says_so():
    opt = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
                             word_embed_proj_dim=16, vocab_size=64, max_position_embeddings=16)
    )  # fmt: skip
    with pytest.raises(
        UserError, match="student.train: OPTForCausalLM has no feed_forward that minillm can tell apart"
    ):
        train_parts(opt, ("feed_forward",))


def test_a_text_model_is_all_language():
    model = tiny_llama()
    assert trained(train_parts(model, ("language",))) == {name for name, _ in model.named_parameters()}
    with pytest.raises(UserError, match="student.train: LlamaForCausalLM has no projector and no vision"):
        train_parts(model, ("projector", "language", "vision"))
