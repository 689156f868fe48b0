"""Everything that the groups of the configuration share: strict, frozen, typed keys, and texts that name a place."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Strict(BaseModel):
    """A group of keys. Unknown keys are errors, no type is bent into another, and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Place:
    """Marks a text that names a place. `$VAR` and `~` in it are expanded where it is used, and the place is checked.

    model: a folder, a .gguf file, a hub name, package:NAME/FILE or stage:NAME. tokenizer: the same, or `byte`.
    dataset: a folder or a hub name. files: a local file or a glob; in `data` also stage:NAME, for the files that a stage
    without steps left. rows: the folder of a cached teacher, or stage:NAME. folder: a local folder, made where it is missing.
    """

    kind: Literal["model", "tokenizer", "dataset", "files", "rows", "folder"]


ModelPath = Annotated[str, Place("model")]
TokenizerPath = Annotated[str, Place("tokenizer")]
DatasetPath = Annotated[str, Place("dataset")]
FilesPath = Annotated[str, Place("files")]
CachePath = Annotated[str, Place("rows")]
FolderPath = Annotated[str, Place("folder")]

LARGEST_SEED = 2**63 - 1  # every generator of random numbers that is seeded takes 63 bits
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


def default_type(name: str) -> BeforeValidator:
    """Give a group without a `type` this one, in a union discriminated by it."""

    def add(value: Any) -> Any:
        return {"type": name, **value} if isinstance(value, dict) else value

    return BeforeValidator(add)
