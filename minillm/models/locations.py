"""The place that a model's path leads to (a folder, a hub name, a .gguf file, a package's file, an earlier stage's model),
and the errors of what is read there."""

import errno
import importlib.util
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from minillm import UserError
from minillm.config.paths import PACKAGE, STAGE, expand, package_file
from minillm.distributed import collectives
from minillm.storage.manifest import MANIFEST, model_damage, published_damage

_NEEDS_SENTENCEPIECE = (
    "its tokenizer is a SentencePiece model without a tokenizer.json, which takes a package that is not installed: "
    "pip install sentencepiece"
)
# errno of OSErrors about what a folder, or the hub, does not have; transformers gives its own none
_OF_THE_FOLDER = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def resolve_path(text: str, output_dir: Path, *, verify: bool = True) -> Path | str:
    """A local path where `text` names one, else `text` itself: a hub name.

    `package:NAME/FILE` is a file inside an installed Python package, found without importing it; `package:NAME/*.gguf`
    may use a pattern. `stage:NAME` is the model that an earlier stage of the run left. Rank 0 verifies the checksums of
    that, and, with `verify`, of any folder that a run has signed. Raises UserError where a package, a file in it, or a
    stage is missing, and where a model is not what was signed.
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
    damage = model_damage(path) if verify and path.is_dir() and collectives.rank() == 0 else None
    if damage is not None:
        raise UserError(
            f"{text}: it is not the model that was saved there ({damage}). Put that file back as it was; or, where the "
            f"change is meant, delete {path / MANIFEST}, and the folder is taken as it is"
        )
    return path if path.exists() else text


@contextmanager
def reading(text: str | None) -> Iterator[None]:
    """Turn the errors of from_pretrained into UserErrors that name the path as it was written.

    Failures of the machine (no memory, a file that may not be read) pass as they are.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise UserError(
            f"{text}: a .safetensors file in it cannot be read ({error}); it is cut off or damaged"
        ) from None
    except (pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{text}: a .bin file in it holds no weights ({_first_line(error)})") from None
    except RecursionError:
        raise UserError(f"{text}: a JSON file in it is nested without end; it is damaged") from None
    except ImportError as error:
        raise UserError(f"{text}: {_missing_package(error)}") from error
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:  # a file of another shape than it should be
        raise UserError(
            f"{text}: transformers cannot read it ({type(error).__name__}: {_first_line(error)}); a file in it is damaged, or "
            "not what its name says"
        ) from error
    except StrictDataclassError as error:
        raise UserError(f"{text}: its config.json is no architecture ({_last_line(error)})") from error
    except ValueError as error:
        raise UserError(f"{text}: {_value_error(error)}") from error
    except OSError as error:
        if error.errno not in _OF_THE_FOLDER:
            raise
        local = text is None or Path(expand(text)).exists() or text.startswith((STAGE, PACKAGE))
        where = "" if local else f"no folder here (from {Path.cwd()}), and as a hub name: "
        raise UserError(f"{text}: {where}{_first_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # which is what `tokenizers` raises
            raise
        raise UserError(f"{text}: its tokenizer.json is no tokenizer ({_first_line(error)})") from error


def _value_error(error: ValueError) -> str:
    """The message of a ValueError of from_pretrained, in one sentence where transformers takes pages."""
    other = re.match(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)Config'>", str(error))
    if other is not None:
        return f"a {other[1]} model is no causal language model (llama, gpt2, qwen2, ...), which student and teacher must be"
    if "`tiktoken` is required" in str(error) and not _is_importable("sentencepiece"):
        return _NEEDS_SENTENCEPIECE
    return str(error)


def _missing_package(error: ImportError) -> str:
    if "sentencepiece" in str(error).lower():
        return _NEEDS_SENTENCEPIECE
    return " ".join(str(error).split())


def _is_importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def hub_arguments(
    text: str, output_dir: Path, revision: str | None = None, *, verify: bool = True
) -> tuple[Path | str, dict[str, str]]:
    """The arguments of from_pretrained for a path: the place, and gguf_file or revision where there is one.

    `revision` counts for hub names alone, `verify` is as for resolve_path, whose UserErrors it raises.
    """
    where = resolve_path(text, output_dir, verify=verify)
    if not isinstance(where, Path):
        return where, {} if revision is None else {"revision": revision}
    if where.suffix == ".gguf":
        return where.parent, {"gguf_file": where.name}
    return where, {}
