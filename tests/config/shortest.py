"""The shortest group that chooses a method: for tests that go through all of them."""

from typing import Any

from minillm.config.root import method_classes

# for those that adapt to evaluations while they train
EVALUATED = {"steps": 2, "sets": {"held_out": {"path": "data/train.jsonl"}}}


def shortest_method(name: str) -> dict[str, Any]:
    """Its name, and 1 for every key that has no default."""
    fields = method_classes()[name].model_fields
    return {key: name if key == "name" else 1 for key, field in fields.items() if field.is_required()}
