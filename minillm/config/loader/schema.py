"""The JSON schema of a configuration file, for completion and hints in editors.

Files are merged and stages inherit, so that no file need have every key: nothing is required here. `minillm validate`
says which keys are missing, and what must hold between them.
"""

from typing import Any

from minillm.config.root import OF_THE_RUN, StageConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def file_schema() -> dict[str, Any]:
    """The JSON schema of a file with or without `stages`."""
    whole = _relaxed(StageConfig.model_json_schema())
    definitions, properties = whole["$defs"], whole["properties"]
    shared = {key: value for key, value in properties.items() if key not in OF_THE_RUN}
    for group, _, key in (name.partition(".") for name in OF_THE_RUN if "." in name):
        definitions[f"Stage{group}"] = _without(definitions[shared[group]["$ref"].rpartition("/")[2]], key)
        shared[group] = {**shared[group], "$ref": f"#/$defs/Stage{group}"}
    definitions["Stage"] = {
        "title": "Stage",
        "description": "The keys that this stage changes",
        "type": ["object", "null"],
        "properties": shared,
        "additionalProperties": False,
    }
    stages = {
        "title": "Stages",
        "description": "Stages by name, run in order; each is merged over the rest of the file",
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
        "additionalProperties": {"$ref": "#/$defs/Stage"},
    }
    return {
        "$schema": DIALECT,
        "title": "minillm configuration",
        "type": "object",
        "properties": {**properties, "stages": stages},
        "additionalProperties": False,
        "$defs": definitions,
    }


def _without(group: dict[str, Any], key: str) -> dict[str, Any]:
    return {**group, "properties": {name: value for name, value in group["properties"].items() if name != key}}


def _relaxed(schema: Any) -> Any:
    """The schema without required keys, and with anyOf for every oneOf.

    A group that need not give its `type` may fit several of the groups that it could be, which oneOf would refuse.
    """
    if isinstance(schema, list):
        return [_relaxed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed = {key: _relaxed(value) for key, value in schema.items() if key not in ("required", "discriminator")}
    if "oneOf" in relaxed:
        relaxed["anyOf"] = relaxed.pop("oneOf")
    return relaxed
