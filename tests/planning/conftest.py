import pytest
import yaml

from tests.planning.elsewhere import Elsewhere, Sieve
from tests.planning.small import ANSWER, PROMPT, document


@pytest.fixture
def recipe(tmp_path):
    """Writes the small configuration, with some groups replaced, and returns its path."""

    def write(**groups):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(document(tmp_path, **groups)))
        return path

    return write


@pytest.fixture
def methods_of_elsewhere(registered):
    """`method.name` may be `elsewhere` or `sieve`."""
    registered(Elsewhere)
    registered(Sieve)


@pytest.fixture
def with_a_sieve(recipe, tmp_path):
    """Writes a configuration whose first stage is a sieve, with some of its keys, and returns its path."""

    def write(**keys):
        (tmp_path / "corpus.txt").write_text("plain text")
        corpus = {"path": str(tmp_path / "corpus.txt"), "block_size": 32}
        prompts = {"type": "pydoc", "max_prompt_length": PROMPT, "max_response_length": ANSWER}
        stages = {"choose": {"method": {"name": "sieve", **keys}}, "train": {"method": {"name": "sft"}}}
        return recipe(data={"prompts": prompts, "corpus": corpus}, stages=stages)

    return write
