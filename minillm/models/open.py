"""Models that are named on the command line: a run's folder, a model's folder, a .gguf file or a hub name."""

from pathlib import Path

from minillm import UserError
from minillm.config.paths import PACKAGE, STAGE, expand, is_hub_name, package_file
from minillm.storage.metrics_log import METRICS


def model_path(text: str) -> str:
    """The path to load: of a run's folder its final/, of anything else itself.

    Raises UserError where it is no model, saying what is there instead; FileNotFoundError for a missing package.
    """
    path = expand(text)
    if path.startswith(STAGE):
        raise UserError(f"{text}: name the folder instead, OUTPUT_DIR/stages/{path.removeprefix(STAGE)}")
    if path.startswith(PACKAGE):
        package_file(path)
        return path
    folder = Path(path)
    if (folder / "config.json").is_file() or folder.is_file() and folder.suffix == ".gguf":
        return path
    if (folder / "final" / "config.json").is_file():
        return str(folder / "final")
    if folder.is_dir():
        models = sorted(str(config.parent) for config in folder.glob("*/config.json"))
        hint = f"models in it: {', '.join(models)}" if models else "it holds no config.json"
        unfinished = " is a run that has no final/ yet;" if (folder / "config.yaml").is_file() else " is no model:"
        raise UserError(f"{text}{unfinished} {hint}")
    if is_hub_name(path):
        return path
    raise UserError(f"{text}: no such folder (from the current folder, {Path.cwd()})")


def run_folder(model: Path) -> Path | None:
    """The folder of the run that a model's folder lies in, be it below stages/; None for a model of no run."""
    if not model.is_dir():
        return None
    return next((folder for folder in model.absolute().parents[:2] if (folder / METRICS).is_file()), None)
