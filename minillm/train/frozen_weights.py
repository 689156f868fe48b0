"""bases/STAGE: the frozen weights below the adapters of a LoRA stage, as it began, whole and signed.

A checkpoint holds the adapters and the merged model, from which the frozen weights do not come back to the last bit.
They are written once a stage, since what they were made from (a folder, a hub name, a seed) may give others later.
"""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm import UserError
from minillm.models.saving import write_frozen
from minillm.storage.atomic import write_folder
from minillm.storage.manifest import find_damage, sign

BASES = "bases"


def write_frozen_weights(
    stage: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> None:
    """Write the frozen weights of a student with adapters. All ranks call it, before anything is sharded."""
    write_folder(output_dir / BASES / stage, lambda partial: write_frozen(model, tokenizer, partial), sign=sign)


def find_frozen_weights(stage: str, output_dir: Path) -> Path:
    """The folder, to load from. Raises UserError where it is not what was written."""
    folder = output_dir / BASES / stage
    damage = find_damage(folder)
    if damage is not None:
        raise UserError(
            f"{folder} is not whole ({damage}): the adapters of the checkpoints were trained on those weights and mean "
            "nothing on others. Put the folder back as it was, or start a new run in another output_dir with "
            "student.path at a checkpoint, which holds the merged model"
        )
    return folder
