import pytest
import yaml

from tests.planning.small import document


@pytest.fixture
def recipe(tmp_path):
    """Writes the small configuration, with some groups replaced, and returns its path."""

    def write(**groups):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(document(tmp_path, **groups)))
        return path

    return write
