"""A teacher is one of the models of tests/models in a role."""

import pytest

from tests.models.conftest import build


@pytest.fixture(scope="session")
def build_model():
    """build_model(architecture, seed=0, **config) -> a random model in evaluation mode."""
    return build
