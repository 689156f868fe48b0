"""The name that was probably meant."""

import pytest

from minillm.config.nearest import nearest

KEYS = ["learning_rate", "per_device_train_batch_size", "max_steps", "eval"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_stepz", "max_steps"),
        ("MAX_STEPS", "max_steps"),
        ("batch_size", "per_device_train_batch_size"),  # a part
        ("lr", "learning_rate"),  # initials
        ("xyz", None),
        ("a", None),  # a part of most names
    ],
)
def test_misspellings_parts_and_initials(name, meant):
    assert nearest(name, KEYS) == meant
    assert nearest(name, []) is None
