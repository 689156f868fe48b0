"""Where a model's path leads: a folder, a hub name, a .gguf file, a file of an installed package, an earlier stage."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from minillm import UserError
from minillm.config.paths import PACKAGE, STAGE, expand, package_file
from minillm.distributed import collectives
from minillm.storage.manifest import published_damage


def resolve_path(text: str, output_dir: Path) -> Path | str:
    """A local path where `text` names one, else `text` itself: a hub name.

    `package:NAME/FILE` is a file inside an installed Python package, found without importing it; `package:NAME/*.gguf`
    may use a pattern. `stage:NAME` is the model that an earlier stage of the run left; rank 0 verifies its checksums.
    Raises UserError where a package, a file in it, or a stage is missing, and where a stage's model is damaged.
    """
    if text.startswith(STAGE):
        folder = Path(output_dir) / "stages" / text.removeprefix(STAGE)
        if not folder.is_dir():
            raise UserError(f"{text}: {folder} is not there; the stage has not finished")
        damage = published_damage(folder) if collectives.rank() == 0 else None
        if damage is not None:
            raise UserError(
                f"{text}: {folder} is not whole ({damage}), and what is trained on it would be another model. Put the "
                "folder back as it was, or start again in another output_dir"
            )
        return folder
    if text.startswith(PACKAGE):
        return package_file(text)
    path = Path(expand(text))
    return path if path.exists() else text


@contextmanager
def reading(text: str | None) -> Iterator[None]:
    """Errors of what from_pretrained reads inside name the path as it was written. Raises UserError."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{text}: a .safetensors file in it cannot be read ({error}); it is cut off or damaged"
        ) from None
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{text}: a .bin file in it holds no weights ({_first_line(error)})") from None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:  # a file of another shape than it should be
        raise UserError(
            f"{text}: transformers cannot read it ({type(error).__name__}: {_first_line(error)}); a file in it is damaged, or "
            "not what its name says"
        ) from error
    except ValueError as error:  # a model type that transformers does not know, code that it may not run
        raise UserError(f"{text}: {error}") from error
    except OSError as error:
        if text is None or Path(expand(text)).exists() or text.startswith((STAGE, PACKAGE)):
            raise
        raise UserError(
            f"{text}: no folder here (from {Path.cwd()}), and as a hub name: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def hub_arguments(text: str, output_dir: Path, revision: str | None = None) -> tuple[Path | str, dict[str, str]]:
    """What from_pretrained takes for a path: the place, and gguf_file or revision where there is one.

    `revision` counts for hub names alone. Raises UserError as resolve_path does.
    """
    where = resolve_path(text, output_dir)
    if not isinstance(where, Path):
        return where, {} if revision is None else {"revision": revision}
    if where.suffix == ".gguf":
        return where.parent, {"gguf_file": where.name}
    return where, {}
