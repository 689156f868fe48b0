"""The schema as dotted paths walk it: groups, choices between groups, named entries, lists and plain values.

Merging, error messages, path checks and the editors' schema all read it from the configuration classes, so that a group
or a key is added in one place.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minillm.config.keys import Place

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Leaf:
    """A plain value: text, a number, true or false, or any of several of these."""

    annotation: Any
    place: Place | None = None

    def names(self) -> list[str]:
        """The values that it may have, where they are listed; else []."""
        return [str(name) for name in get_args(self.annotation)] if get_origin(self.annotation) is Literal else []


@dataclass(frozen=True)
class Many:
    """A list, or freely named entries where `named`, whose items all have the same shape."""

    of: "Shape"
    named: bool


@dataclass(frozen=True)
class Group:
    """The keys of one configuration class."""

    model: type[BaseModel]

    def child(self, name: str) -> "Shape | None":
        """The shape of a key, None where there is no such key."""
        field = self.model.model_fields.get(name)
        return None if field is None else _field_shape(field)

    def keys(self) -> list[str]:
        """The names of all keys."""
        return list(self.model.model_fields)


@dataclass(frozen=True)
class Choice:
    """Several groups, of which `key` picks one by its name."""

    key: str
    options: dict[str, Group]
    default: str | None  # the group where `key` is not given

    def pick(self, value: Mapping[str, Any]) -> Group | None:
        """The group that `value` is, None where it does not say, or names none of them."""
        name = value.get(self.key, self.default)
        return self.options.get(name) if isinstance(name, str) else None


Shape = Leaf | Many | Group | Choice


def group_of(shape: Shape | None, value: Any) -> Group | None:
    """The group whose keys `value` must have; None where it is no group, or one that cannot be told."""
    if isinstance(shape, Choice):
        return shape.pick(value) if isinstance(value, Mapping) else None
    return shape if isinstance(shape, Group) else None


def child_shape(shape: Shape | None, value: Any, key: str | int) -> Shape | None:
    """The shape of `value[key]`, None where the schema has none."""
    if isinstance(shape, Many):
        return shape.of
    group = group_of(shape, value)
    return group.child(key) if group is not None and isinstance(key, str) else None


def child_value(value: Any, key: str | int) -> Any:
    """`value[key]`, None where there is no such item."""
    if isinstance(value, Mapping):
        return value.get(key)
    return value[key] if isinstance(value, list) and isinstance(key, int) and key < len(value) else None


def walk(shape: Shape | None, value: Any, path: KeyPath) -> tuple[Shape | None, Any]:
    """The shape and the value at a path below these two, None for one that is not there."""
    for key in path:
        shape, value = child_shape(shape, value, key), child_value(value, key)
    return shape, value


def all_keys(shape: Shape, prefix: str = "") -> Iterator[str]:
    """Every dotted key below `shape`, in all of its choices, except those below freely named entries."""
    groups = shape.options.values() if isinstance(shape, Choice) else [shape] if isinstance(shape, Group) else []
    for group in groups:
        for name in group.keys():
            yield f"{prefix}{name}"
            yield from all_keys(group.child(name), f"{prefix}{name}.")


def places(shape: Shape | None, value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Place, str]]:
    """(path, place, text) of every text in `value` that names a place."""
    if isinstance(shape, Leaf) and shape.place is not None and isinstance(value, str):
        yield path, shape.place, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(child_shape(shape, value, key), item, (*path, key))


def _field_shape(field: FieldInfo) -> Shape:
    place = next((mark for mark in field.metadata if isinstance(mark, Place)), None)
    return _shape(field.annotation, field.discriminator, place)


def _shape(annotation: Any, discriminator: Any = None, place: Place | None = None) -> Shape:
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
        for mark in marks:
            if isinstance(mark, FieldInfo) and mark.discriminator:
                discriminator = mark.discriminator
            place = mark if isinstance(mark, Place) else place
        return _shape(annotation, discriminator, place)
    members = _members(annotation)
    if discriminator and len(members) > 1:
        options = {get_args(model.model_fields[discriminator].annotation)[0]: Group(model) for model in members}
        # where none is given, it is the group whose discriminator has a default
        default = [name for name, group in options.items() if not group.model.model_fields[discriminator].is_required()]
        return Choice(discriminator, options, next(iter(default), None))
    if len(members) == 1 and members[0] is not annotation:  # X | None
        return _shape(members[0], discriminator, place)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return Many(_shape(arguments[1]), named=True)
    if origin is list:
        return Many(_shape(arguments[0]), named=False)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Group(annotation)
    return Leaf(annotation, place)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without None; of anything else, itself."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for member in get_args(annotation) if member is not NoneType)
    return (annotation,)


def describe(annotation: Any) -> str:
    """A type in words: a whole number, a number, text, ..."""
    if get_origin(annotation) is Annotated:
        return describe(get_args(annotation)[0])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(describe(member) for member in _members(annotation))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments)) if len(arguments) > 1 else repr(arguments[0])
    if origin is list:
        return "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(annotation, "keys and values")
