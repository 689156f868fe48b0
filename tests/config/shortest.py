"""The shortest group that chooses a method: for tests that go through all of them."""

from typing import Any

from pydantic.fields import FieldInfo

from minillm.config.root import method_classes

# for those that adapt to evaluations while they train
EVALUATED = {"steps": 2, "sets": {"held_out": {"path": "data/train.jsonl"}}}


def shortest_method(name: str) -> dict[str, Any]:
    """Its name, and for every key that has no default 1, or a hub name where it takes a text."""
    fields = method_classes()[name].model_fields
    return {key: _value(name, key, field) for key, field in fields.items() if field.is_required()}


def _value(name: str, key: str, field: FieldInfo) -> Any:
    if key == "name":
        return name
    return "organisation/model" if field.annotation is str else 1
