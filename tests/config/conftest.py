"""A small valid recipe in a folder of its own, and what loading says of changes to it."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from minillm.config.errors import ConfigErrors
from minillm.config.loader.run_plan import RunPlan, load_run


class Recipe:
    """A valid document to change, the folder it lies in, and short ways to load it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model("models/big", num_hidden_layers=5, max_position_embeddings=512)
        (folder / "data").mkdir()
        (folder / "data" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        (folder / "data" / "book.txt").write_text("Once upon a time.")
        self.document = {
            "output_dir": "runs/one",
            "student": {"path": "models/big"},
            "teacher": {"path": "models/big"},
            "data": {"prompts": {"path": "data/train.jsonl"}, "corpus": {"path": "data/*.txt"}},
            "method": {"name": "minillm"},
            "train": {"max_steps": 10},
        }

    def model(self, path: str, **config) -> Path:
        folder = self.folder / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        return folder

    def write(self, text: str | dict, name: str = "run.yaml") -> Path:
        path = Path(name)  # as someone in the folder would name it
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
        return path

    def load(self, *overrides: str, **changes) -> RunPlan:
        """The recipe with `group__key=value` changes (a value of `...` takes the key out) and overrides."""
        document = copy.deepcopy(self.document)
        for name, value in changes.items():
            *above, key = name.split("__")
            group = document
            for part in above:
                group = group.setdefault(part, {})
            if value is ...:
                group.pop(key)
            else:
                group[key] = value
        return load_run([self.write(document)], overrides)

    def problems(self, *overrides: str, **changes) -> dict[str, str]:
        """path -> message of every problem; {} where there is none."""
        try:
            self.load(*overrides, **changes)
        except ConfigErrors as errors:
            found = {problem.path: problem.message for problem in errors.problems}
            assert len(found) == len(errors.problems), f"two problems with one key: {errors}"
            return found
        return {}


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return Recipe(tmp_path)
