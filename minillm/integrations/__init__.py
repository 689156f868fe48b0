"""The losses in the trainers of others: Hugging Face, TRL, Lightning, and loops of your own (docs/drop_in.md).

Nothing here needs minillm's own trainer; importing a name loads the library that it is for, and no other.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minillm.integrations.batch_loss import distillation_loss, next_token_labels
    from minillm.integrations.hugging_face import HFDistillationTrainer
    from minillm.integrations.lightning_module import DistillationModule
    from minillm.integrations.trainer_mixin import DistillationMixin

_FILES = {
    "distillation_loss": "batch_loss",
    "next_token_labels": "batch_loss",
    "DistillationMixin": "trainer_mixin",
    "HFDistillationTrainer": "hugging_face",
    "DistillationModule": "lightning_module",
}

__all__ = ["DistillationMixin", "DistillationModule", "HFDistillationTrainer", "distillation_loss", "next_token_labels"]


def __getattr__(name: str) -> object:
    if name not in _FILES:
        raise AttributeError(f"minillm.integrations has no {name!r}; it has {', '.join(__all__)}")
    found = getattr(import_module(f"minillm.integrations.{_FILES[name]}"), name)
    globals()[name] = found
    return found
