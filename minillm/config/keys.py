"""What every group of the configuration shares: strict, frozen, typed; and what kind of place a text names."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Strict(BaseModel):
    """A group of keys. Unknown keys are errors, no type is bent into another, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Place:
    """Marks a text that names a place. `$VAR` and `~` in it are expanded where it is used; what it names is checked.

    model: a folder, a .gguf file, a hub name, package:NAME/FILE or stage:NAME. tokenizer: the same, or `byte`.
    dataset: a folder or a hub name. files: a local file, a glob, or stage:NAME, the files that a stage without steps left. folder: a local folder, made where it is missing.
    """

    kind: Literal["model", "tokenizer", "dataset", "files", "folder"]


ModelPath = Annotated[str, Place("model")]
TokenizerPath = Annotated[str, Place("tokenizer")]
DatasetPath = Annotated[str, Place("dataset")]
FilesPath = Annotated[str, Place("files")]
FolderPath = Annotated[str, Place("folder")]


def default_type(name: str) -> BeforeValidator:
    """In a union discriminated by `type`: what a group is that does not say its type."""

    def add(value: Any) -> Any:
        return {"type": name, **value} if isinstance(value, dict) else value

    return BeforeValidator(add)
