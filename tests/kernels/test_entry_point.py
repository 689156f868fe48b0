"""The door's functions as a reader, an editor and torch's transforms meet them."""

import inspect

import pytest
import torch

from minillm import losses
from minillm.kernels.options import HeadOptions, LossOptions, WeightGrad, declared

DEFAULTS = {  # which callers rely on
    "ignore_index": -100,
    "temperature": 1.0,
    "vocab_size": None,
    "kept": None,
    "weight_grad": "fp32",
    "backend": "auto",
    "chunk_bytes": None,
}
PAIR_DEFAULTS = {**DEFAULTS, "beta": 0.5, "alpha": 0.1, "interpolation": 0.4}
FUNCTIONS = {
    "linear_logprobs": DEFAULTS,
    "linear_cross_entropy": DEFAULTS,
    "linear_divergence": PAIR_DEFAULTS,
    "linear_token_stats": PAIR_DEFAULTS,
    "linear_objective": PAIR_DEFAULTS,
}


def one_model():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 3, generator=generator) for rows in (5, 7))
    return hidden, weight, torch.arange(5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_signature_has_every_option_with_its_default_and_type(name):
    parameters = inspect.signature(getattr(losses, name)).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option, default in FUNCTIONS[name].items():
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[option].default == default
    assert parameters["temperature"].annotation is float and parameters["weight_grad"].annotation == WeightGrad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_explains_every_option_once(name):
    text = inspect.getdoc(getattr(losses, name))
    for option, default in FUNCTIONS[name].items():
        assert text.count(f"\n    {option}: ") == 1, option
        assert f"Default: {default!r}." in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120
    assert ("Raises:" not in text) or text.index("Options:") < text.index("Raises:")


def test_options_of_one_model_are_options_of_two():
    assert declared(HeadOptions).items() <= declared(LossOptions).items()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("temprature", r"linear_logprobs\(\) has no argument 'temprature'; did you mean 'temperature'\?"),
        ("temp", "did you mean 'temperature'"),
        ("hiden", "did you mean 'hidden'"),
        ("chunk_byte", "did you mean 'chunk_bytes'"),
        ("beta", "there are hidden, head, labels, ignore_index"),  # an option, but of functions of two models
        ("zzz", "there are hidden, head, labels, ignore_index"),
    ],
)
def test_an_unknown_argument_names_the_nearest(wrong, message):
    with pytest.raises(TypeError, match=message):
        losses.linear_logprobs(*one_model(), **{wrong: 1})


def test_missing_and_surplus_arguments_are_pythons_own_errors():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'labels'"):
        losses.linear_logprobs(*one_model()[:2])
    with pytest.raises(TypeError, match="takes 3 positional arguments but 4 were given"):
        losses.linear_logprobs(*one_model(), 1.0)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_torch_func_are_refused_in_one_line(transform):
    hidden, weight, labels = one_model()

    def loss(hidden):
        return losses.linear_cross_entropy(hidden, weight, labels)

    calls = {
        "grad": lambda: torch.func.grad(loss)(hidden),
        "vmap": lambda: torch.func.vmap(loss)(hidden.expand(2, 5, 3)),
        "jvp": lambda: torch.func.jvp(loss, (hidden,), (hidden,)),
    }
    with pytest.raises(RuntimeError, match="^linear_cross_entropy does not support torch.func[^\n]*$"):
        calls[transform]()
