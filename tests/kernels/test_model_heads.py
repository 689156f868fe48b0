"""LMHead.of: heads of models and of PEFT's wrappers, beside the logits and gradients of the models themselves."""

import pytest
import torch
from torch import nn

from minillm.losses import LMHead, linear_cross_entropy
from tests.models.conftest import CONFIGS, build


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_a_models_head_is_that_of_its_logits(name, ids):
    model = build(name)
    head = LMHead.of(model, check=True)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    loss = linear_cross_entropy(hidden, head, ids)
    expected = nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1).float(), ids.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "scale", "softcap"),
    [
        ({"lm_head_multiplier": 0.5}, 0.5, None),  # Falcon-H1
        ({"output_multiplier": 2.0, "final_logit_softcapping": 20}, 2.0, 20.0),
        ({"logits_soft_cap": 30.0}, 1.0, 30.0),  # RecurrentGemma
        ({"logits_scaling": 4, "model_type": "granite"}, 0.25, None),
        ({"logits_scaling": 4, "model_type": "hyperclovax"}, 4.0, None),
        ({"logit_scale": "inv_sqrt_d_model", "model_type": "mpt"}, 1.0, None),
        ({"logit_scale": None, "final_logit_softcapping": None}, 1.0, None),
    ],
)
def test_names_that_configurations_have_for_it(settings, scale, softcap):
    model = build("llama")
    text = model.config.get_text_config(decoder=True)
    for name, value in settings.items():
        setattr(text, name, value)
    head = LMHead.of(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)


def test_the_check_finds_what_the_head_does_not_know():
    model = build("llama").train()
    model.lm_head.register_forward_hook(lambda module, inputs, output: 1.01 * output)
    assert LMHead.of(model).weight is model.lm_head.weight
    with pytest.raises(
        ValueError, match=r"logits of LlamaForCausalLM differ from its head .* by 1.0%.*build the LMHead by"
    ):
        LMHead.of(model, check=True)
    assert model.training


def test_models_without_a_head_are_refused():
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        LMHead.of(build("llama").model)
    with pytest.raises(ValueError, match="Linear has no LM head"):
        LMHead.of(nn.Linear(2, 2))


def test_wrappers_are_looked_through():
    model = build("gemma2")
    wrapper = nn.Module()
    wrapper.module = model
    for outside in (torch.compile(model, backend="eager"), wrapper):
        assert LMHead.of(outside) == LMHead.of(model)


def adapted(*, name="gemma2", **options):
    """A model with random LoRA weights or copies, B too, which begins as 0."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(name), peft.LoraConfig(r=3, lora_alpha=5, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gradients(model, loss) -> dict[str, torch.Tensor]:
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


WAYS = {
    "LoRA": dict(target_modules=["lm_head", "q_proj"]),
    "rank-stabilised": dict(target_modules=["lm_head"], use_rslora=True),
    "modules_to_save": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_on_the_head_are_trained_as_by_the_models_own_loss(way, ids):
    model = adapted(**WAYS[way])
    hidden = model.get_base_model().base_model(input_ids=ids).last_hidden_state
    ours = gradients(model, linear_cross_entropy(hidden, LMHead.of(model, check=True), ids))
    logits = model(input_ids=ids).logits.flatten(0, 1)
    theirs = gradients(model, nn.functional.cross_entropy(logits, ids.flatten()))
    assert ours.keys() == theirs.keys() and any("lm_head" in name for name in ours)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-5, atol=1e-6, msg=name)


def test_a_wrapped_module_is_a_head_itself(ids):
    model = adapted(target_modules=["lm_head"], name="phi").get_base_model()  # with a bias
    hidden = model.base_model(input_ids=ids).last_hidden_state
    expected = nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(linear_cross_entropy(hidden, model.lm_head, ids), expected, rtol=1e-5, atol=1e-6)


def test_adapters_that_are_off_or_merged_leave_the_base_weight(ids):
    model = adapted(target_modules=["lm_head"])
    trained = LMHead.of(model).weight
    with model.disable_adapter():
        base = LMHead.of(model).weight
        assert not torch.equal(base, trained)
    model.merge_adapter()
    torch.testing.assert_close(LMHead.of(model).weight, trained)


def test_adapters_that_no_weight_can_stand_for_are_refused():
    dropped = adapted(target_modules=["lm_head"], lora_dropout=0.1).train()
    with pytest.raises(ValueError, match="adapter 'default' has lora_dropout=0.1, which no merged weight can have"):
        LMHead.of(dropped)
    LMHead.of(dropped.eval(), check=True)
    with pytest.raises(ValueError, match="adapter 'default' is not plain LoRA"):
        LMHead.of(adapted(target_modules=["lm_head"], use_dora=True))
    quantised = nn.Linear(4, 8)
    quantised.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="head is quantised, its weight is torch.uint8"):
        linear_cross_entropy(torch.randn(2, 4), quantised, torch.zeros(2, dtype=torch.int64))


@pytest.fixture(scope="module")
def ids():
    """Two rows of ids, (2, 9)."""
    return torch.randint(1, 71, (2, 9), generator=torch.Generator().manual_seed(4))
