"""Keys checked against the schema: typed groups, and everything that is wrong, in plain words."""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from minillm.config.errors import Finding
from minillm.config.loader.messages import explain
from minillm.config.models import SeveralTeachersConfig
from minillm.config.root import STAGE_SHAPE, StageConfig
from minillm.config.shape import Choice, Group, KeyPath, Leaf, Shape, child_shape, child_value, describe, walk
from minillm.config.wording import expected


def _adapter(field: FieldInfo) -> TypeAdapter:
    """The validator of one field: its discriminator innermost, so that a default `type` is filled in before it is read."""
    group = field.annotation
    if field.discriminator is not None:
        group = Annotated[group, Field(discriminator=field.discriminator)]
    for mark in field.metadata:
        group = Annotated[group, mark]
    return TypeAdapter(group)


@cache
def _group_adapter(name: str, annotation: Any) -> TypeAdapter:  # the annotation of `method` grows with its methods
    return _adapter(StageConfig.model_fields[name])


def validate_stage(data: Mapping[str, Any]) -> tuple[StageConfig | None, list[Finding]]:
    """The configuration that `data` is and [], or None and all that is wrong with it."""
    return validate_group(STAGE_SHAPE, data)


def validate_group(root: Group, data: Mapping[str, Any]) -> tuple[Any, list[Finding]]:
    """The instance of the group's class that `data` is and [], or None and all that is wrong with it."""
    try:
        return root.model.model_validate(data), []
    except ValidationError as error:
        return None, _findings(error, root, data)


def usable_groups(data: Mapping[str, Any], findings: list[Finding]) -> dict[str, Any]:
    """The typed groups by name, without the keys that the findings are about.

    A group that is missing, or of which nothing can be used, is absent.
    """
    kept = copy.deepcopy(dict(data))
    for finding in findings:
        above, _ = walk(STAGE_SHAPE, data, finding.path[:-1])
        whole_group = finding.kind == "missing" or isinstance(above, Choice) and finding.path[-1] == above.key
        _remove(kept, finding.path[:-1] if whole_group else finding.path)
    groups = {}
    for name, field in StageConfig.model_fields.items():
        if name in kept:
            try:
                groups[name] = _group_adapter(name, field.annotation).validate_python(kept[name])
            except ValidationError:  # a required key was among what is wrong
                continue
        elif not field.is_required() and name not in data:
            groups[name] = field.get_default()
    if data.get("teachers"):  # the checks of a teacher are of all of them together; of none where that cannot be made
        groups.pop("teacher", None)
        if groups.get("teachers") and groups.get("teachers_by") is not None:
            groups["teacher"] = SeveralTeachersConfig(teachers=groups["teachers"], by=groups["teachers_by"])
    return groups


def _findings(error: ValidationError, root: Group, data: Mapping[str, Any]) -> list[Finding]:
    of_several_types: dict[KeyPath, list[tuple[KeyPath, dict]]] = {}  # errors of values that may be a number or a text
    findings = []
    for one in error.errors(include_url=False):
        path, shape, above = _locate(one["loc"], root, data)
        if above is None:
            findings.append(explain(one, path, shape, root, data))
        else:
            of_several_types.setdefault(above, []).append((path, one))
    for above, errors in of_several_types.items():
        shape, value = walk(root, data, above)
        # an error that says more than "another type" is about the type that was meant
        meant = [(path, one) for path, one in errors if path != above or not one["type"].endswith("_type")]
        findings += [explain(one, path, shape, root, data) for path, one in meant]
        if not meant:
            findings.append(Finding(above, expected(describe(shape.annotation), value)))
    likely = {finding.instead for finding in findings}
    return [one for one in findings if one.kind != "missing" or one.path not in likely]


def _locate(location: KeyPath, root: Group, data: Mapping[str, Any]) -> tuple[KeyPath, Shape | None, KeyPath | None]:
    """The place that pydantic's location of an error means. Among the keys it has the alternatives that were tried.

    Returns (path, shape there, path of the value that may be of several types and that the error lies in, or None).
    """
    path, shape, value, rest = (), root, data, list(location)
    while rest:
        if isinstance(shape, Choice):
            shape = shape.options[rest.pop(0)]
        elif isinstance(shape, Leaf):
            return (*path, *rest[1:]), shape, path
        else:
            key = rest.pop(0)
            path, shape, value = (*path, key), child_shape(shape, value, key), child_value(value, key)
    return path, shape, None


def _remove(data: Any, path: KeyPath) -> None:
    """Take out the value at a path; for an item of a list, the whole list."""
    while path:
        _, parent = walk(None, data, path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)
            return
        path = path[:-1]
