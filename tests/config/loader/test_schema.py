"""The editors' schema accepts what loads and refuses misspellings, checked by an evaluator of its own."""

import json

import pytest

from minillm.config.loader.schema import file_schema

SCHEMA = json.loads(json.dumps(file_schema()))
TYPES = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool}


def accepts(schema: dict, value) -> bool:
    """The part of JSON Schema 2020-12 that the schema uses."""
    known = {
        "$ref",
        "anyOf",
        "type",
        "properties",
        "additionalProperties",
        "items",
        "enum",
        "const",
        "title",
        "default",
    }
    known |= {"description", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "pattern"}
    assert set(schema) <= known | {"propertyNames", "$schema", "$defs"}, set(schema) - known
    if "$ref" in schema and not accepts(SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], value):
        return False
    if "anyOf" in schema and not any(accepts(option, value) for option in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"] or "const" in schema and value != schema["const"]:
        return False
    kinds = schema.get("type", [])
    if kinds and not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if isinstance(value, dict):
        for key, item in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties", True))
            if below is False or below is not True and not accepts(below, item):
                return False
    if isinstance(value, list) and "items" in schema:
        return all(accepts(schema["items"], item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return True


def _is(value, kind: str) -> bool:
    if kind in ("integer", "number"):
        return not isinstance(value, bool) and isinstance(value, int | float if kind == "number" else int)
    return isinstance(value, TYPES[kind])


WHOLE = {
    "output_dir": "x",
    "student": {"path": "a", "init": "prune", "layers": [0, 2]},
    "data": {"prompts": {"path": "x.jsonl"}, "corpus": None},
    "eval": {"sets": {"a": {"type": "pydoc", "split": "test"}, "b": {"limit": 3}}},
    "method": {"name": "minillm", "cliprange": None},
    "train": {"max_steps": 3, "max_seconds": "stage:a"},
    "stages": {"a": {"method": {"name": "sft"}, "train": {"max_steps": 1}}, "b": None, "c": {"method": {"alpha": 0.1}}},
}


def test_files_with_and_without_stages_and_parts_of_files():
    assert accepts(SCHEMA, WHOLE)
    assert accepts(SCHEMA, {key: value for key, value in WHOLE.items() if key != "stages"})
    assert accepts(SCHEMA, {"train": {"learning_rate": 1e-4}})
    assert accepts(SCHEMA, {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"trian": {}},
        {"train": {"max_stepz": 3}},
        {"train": {"max_steps": "3"}},
        {"train": {"max_steps": 0}},
        {"student": {"init": "pruned"}},
        {"method": {"name": "minilm"}},
        {"method": {"name": "sft", "alpha": 0.1}},
        {"data": {"prompts": {"type": "pydoc", "path": "x"}}},
        {"eval": {"sets": {"a": {"pth": "x"}}}},
        {"stages": {"a": {"train": {"max_stepz": 3}}}},
        {"stages": {"a": {"output_dir": "x"}}},
        {"stages": {"a": {"stages": {}}}},
        {"stages": {"a": {"log": {"report_to": []}}}},
        {"stages": ["a"]},
    ],
)
def test_misspellings_are_refused(wrong):
    assert not accepts(SCHEMA, wrong)


def test_every_key_is_explained():
    """A group by its own description; what says which group is meant needs none."""
    bare = [
        f"{name}.{key}"
        for name, group in {"": SCHEMA, **SCHEMA["$defs"]}.items()
        for key, value in group.get("properties", {}).items()
        if not {"description", "$ref", "const"} & value.keys() and "$ref" not in json.dumps(value)
    ]
    assert bare == []


def test_every_reference_is_there():
    text = json.dumps(SCHEMA)
    names = {part.partition('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert names <= set(SCHEMA["$defs"])
    assert "Mixture weight of the teacher" in text
