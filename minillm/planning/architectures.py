"""The architectures of a stage's models, as configurations of transformers, from local files alone.

A hub name `organisation/name` is not looked up: its config.json is searched as organisation--name.json in folders
called `architectures` beside the configuration files and above, and in the local cache of the hub.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from minillm import UserError
from minillm.config.loader.run_plan import RunPlan, Stage
from minillm.config.models import ModelConfig, StudentConfig, TeacherConfig
from minillm.config.paths import BYTE_TOKENIZER, STAGE, expand, is_hub_name
from minillm.config.sparse_architecture import upcycled_architecture
from minillm.models.loading import changed_architecture, tokenizer_keys
from minillm.models.locations import hub_arguments
from minillm.models.processors import PROCESSOR_FILES, load_image_processor
from minillm.models.pruning import pruned_architecture
from minillm.models.tokenizers import load_tokenizer


class Architectures:
    """The architectures of the models that a plan names."""

    def __init__(self, plan: RunPlan):
        self.stages = {stage.name: stage for stage in plan.stages}
        self._folders = architecture_folders(plan.files)

    def student(self, stage: Stage) -> PreTrainedConfig:
        """Return the student's architecture as it is trained: pruned, upcycled, changed or fresh; or that of the reference model which
        stands in the student's place.

        Raises UserError where it is not known.
        """
        config = stage.config.student_side
        if config.init == "random":
            return self._random(config)
        architecture = self._read(config)
        if config.init == "prune":
            architecture = pruned_architecture(architecture, config.layers)
        elif config.init == "upcycle":
            architecture = upcycled_architecture(architecture, config.upcycle)
        return architecture

    def teacher(self, stage: Stage) -> PreTrainedConfig | None:
        """Return the teacher's architecture, None where the stage has no teacher, or none whose weights are loaded.

        Raises UserError as `student` does.
        """
        return self._read(stage.config.teacher) if isinstance(stage.config.teacher, TeacherConfig) else None

    def of(self, config: TeacherConfig) -> PreTrainedConfig:
        """Return the architecture of a teacher by its configuration. Raises UserError as `student` does."""
        return self._read(config)

    def named(self, path: str) -> PreTrainedConfig:
        """Return the architecture of a model by its path. Raises UserError as `student` does."""
        return self._read(TeacherConfig(path=path))

    def image_processor(self, config: ModelConfig) -> BaseImageProcessor:
        """Return what prepares pictures for a model. Raises UserError where it is not here, or cannot be read."""
        named = config.tokenizer if config.tokenizer != BYTE_TOKENIZER else None
        path = expand(named or config.path or "")
        if path.startswith(STAGE):
            return self.image_processor(self.stages[path.removeprefix(STAGE)].config.student_side)
        if path and is_hub_name(path):
            where = known_image_processor(path, self._folders, config.revision)
        else:
            where, _ = hub_arguments(path, Path("."), verify=False)
        return load_image_processor(where, trust_remote_code=config.trust_remote_code)

    def _random(self, config: StudentConfig) -> PreTrainedConfig:
        keys = dict(config.config or {})
        if config.path is not None:
            architecture = self._read(config)
        else:
            try:
                architecture = AutoConfig.for_model(**keys)
            except ValueError:
                raise UserError(
                    f"student.config.model_type: transformers knows no {keys.get('model_type')!r} (llama, gpt2, qwen2, ...)"
                ) from None
        known = config.tokenizer == BYTE_TOKENIZER or config.tokenizer and not is_hub_name(expand(config.tokenizer))
        if known:
            keys = tokenizer_keys(architecture, load_tokenizer(config, Path(".")), keys)
        elif config.path is None and "vocab_size" not in {**keys.get("text_config", {}), **keys}:
            raise UserError("student.config has no vocab_size; without loading the tokenizer `plan` needs it")
        return changed_architecture(architecture, keys)

    def _read(self, config: ModelConfig) -> PreTrainedConfig:
        path = expand(config.path)
        if path.startswith(STAGE):
            return self.student(self.stages[path.removeprefix(STAGE)])
        if is_hub_name(path):
            where, place = known_architecture(path, self._folders, config.revision), {}
        else:
            where, place = hub_arguments(config.path, Path("."), verify=False)  # config.json alone is read
        try:
            return AutoConfig.from_pretrained(where, trust_remote_code=config.trust_remote_code, **place)
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            if "trust_remote_code" in str(error):
                reason = "its architecture is Python code of its own, which runs only where trust_remote_code is true"
            raise UserError(f"{config.path} cannot be planned: {reason}") from error


def known_image_processor(name: str, folders: Sequence[Path], revision: str | None = None) -> Path:
    """Find the preprocessor_config.json of a hub name, or the folder that has it. Raises UserError, which says where to put it."""
    file = name.replace("/", "--") + ".preprocessor_config.json"
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    for one in PROCESSOR_FILES:
        cached = try_to_load_from_cache(name, one, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
    raise UserError(
        f"the image processor of {name} is not known here, and hub names are not looked up: put its preprocessor_config.json "
        f"as {file} into a folder `architectures` beside the configuration (searched: {_named(folders)})"
    )


def known_architecture(name: str, folders: Sequence[Path], revision: str | None = None) -> Path:
    """Find the config.json of a hub name. Raises UserError, which says where to put it."""
    file = name.replace("/", "--") + ".json"
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    raise UserError(
        f"the architecture of {name} is not known here, and hub names are not looked up: put its config.json as "
        f"{file} into a folder `architectures` beside the configuration (searched: {_named(folders)})"
    )


def _named(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders)) or "none was found"


def architecture_folders(files: Sequence[Path]) -> list[Path]:
    """Find the folders called `architectures` beside the files, in the folders above these, and in ./configs."""
    above = [folder for file in files for folder in file.resolve().parents]
    folders = [folder / "architectures" for folder in [*above, Path.cwd() / "configs"]]
    return [Path(os.path.relpath(folder)) for folder in dict.fromkeys(folders) if folder.is_dir()]
