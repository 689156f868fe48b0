"""What every implementation of the protocol is held to: settings in range, and abilities that a method can count on."""

from types import SimpleNamespace

import pytest

from minillm import UserError
from minillm.rollout.rollouts import Sampling, require_rollouts


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size is -2"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 4, **changes})


def test_the_defaults_are_the_models_own_distribution():
    neutral = Sampling(4, temperature=1.0, top_k=0, top_p=1.0, alpha=0.0, no_repeat_ngram_size=0)
    assert Sampling(4) == neutral


@pytest.mark.parametrize("samples, refused", [((), False), (("student", "teacher"), False), (("mixture",), True)])
def test_an_implementation_without_mixtures_is_refused_where_one_is_needed(samples, refused):
    alone, able = SimpleNamespace(mixtures=False), SimpleNamespace(mixtures=True)
    require_rollouts(able, samples, "stage 'distil'")
    if not refused:
        require_rollouts(alone, samples, "stage 'distil'")
        return
    with pytest.raises(UserError, match="stage 'distil' samples from a mixture .*, which SimpleNamespace cannot"):
        require_rollouts(alone, samples, "stage 'distil'")
