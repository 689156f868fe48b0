"""Models that are named on the command line: a run's folder, a model's folder, a .gguf file or a hub name."""

from pathlib import Path

import transformers

from minillm import UserError
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.config.paths import PACKAGE, STAGE, expand, is_hub_name, package_file
from minillm.models.device import pick_device
from minillm.models.loading import load_student, load_teacher
from minillm.models.pair import Models
from minillm.models.preflight import preflight
from minillm.models.tokenizers import load_tokenizer


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


def open_models(
    model: str | None,
    teacher: TeacherConfig | None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    tokenizer: str | None = None,
    output_dir: Path = Path("."),
) -> tuple[Models, list[tuple[str, str, str]]]:
    """A pair to answer and to measure, nothing of it trained, and the rows of its preflight table.

    Args:
        model: what `model_path` returned; None for the teacher in both places.
        teacher: or None where there is none.
        device: as engine.device.
        dtype: of the student's weights.
        tokenizer: of the student, default its own.
        output_dir: where a teacher of stage:NAME lies.

    Raises PreflightError where the two do not go together, ValueError where there is no such device.
    """
    where = pick_device(device)
    transformers.utils.logging.disable_progress_bar()
    teacher_model = teacher_tokenizer = None
    if teacher is not None:
        teacher_model = load_teacher(teacher, output_dir=output_dir, device=where)
        teacher_tokenizer = load_tokenizer(teacher, output_dir)
    if model is None:
        return preflight(teacher_model, teacher_model, teacher_tokenizer, teacher_tokenizer, where)
    config = StudentConfig(path=model, dtype=dtype, tokenizer=tokenizer)
    student = load_student(config, output_dir=output_dir, device=where, seed=0).eval().requires_grad_(False)
    return preflight(student, teacher_model, load_tokenizer(config, output_dir), teacher_tokenizer, where)
