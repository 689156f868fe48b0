"""The pictures of a plan: how many a prompt shows, and passes over as many of them on fake tensors.

A picture's tokens are in the lengths of prompts already (`max_prompt_length`). What is counted here is the pass of the
vision tower and the projector, and their place in the embeddings. Architectures that cut pictures up by their sizes, or
number their tokens along the sides, ask for values, and a plan has none.
"""

from itertools import islice
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from minillm import UserError
from minillm.config.data import EasyVqaSource, HfSource, JsonlSource, Pairs, ParquetSource, Prompts
from minillm.config.paths import STAGE, expand, is_hub_name
from minillm.config.root import StageConfig
from minillm.data.images import count_pictures
from minillm.data.instructions import records_of
from minillm.data.sources import DataError
from minillm.models.families import decoder, opens_pictures

OF_ONE_SIZE = {"llava", "paligemma", "gemma3"}  # architectures that read every picture at vision_config.image_size
LOOKED_AT = 1000  # records of a set, from the first on


def pictures_shown(config: StageConfig, architecture: PreTrainedConfig) -> int:
    """The most pictures that a prompt of a stage shows to a model of an architecture, 0 for one that reads text alone.

    They are counted in the first records of each set. A set that is not here, such as one of the hub, counts as one whose
    prompts show a picture each.
    """
    if not opens_pictures(architecture):
        return 0
    needs, data = config.method.needs(), config.data
    read = {"prompts": data.prompts, "pairs": data.pairs, "forget": data.forget}
    sets = [source for need, source in read.items() if getattr(needs, need)]
    return max((_most(one) for one in [*sets, *config.eval.sets.values()] if one is not None), default=0)


def _most(source: Prompts | Pairs) -> int:
    if isinstance(source, EasyVqaSource):
        return 1
    if not isinstance(source, JsonlSource | ParquetSource | HfSource):  # such as sums, which show none
        return 0
    path = expand(source.path)
    if path.startswith(STAGE) or isinstance(source, HfSource) and is_hub_name(path):
        return 1
    try:
        return max((count_pictures(record) for _, record in islice(records_of(source), LOOKED_AT)), default=0)
    except DataError:  # which the run will say
        return 1


def can_be_shown(architecture: PreTrainedConfig) -> bool:
    """True for an architecture whose passes over pictures a plan can take."""
    return architecture.model_type in OF_ONE_SIZE


def prepare_for_pictures(model: PreTrainedModel) -> None:
    """Let a model put the features of pictures into embeddings without values: its code compares their number with the
    ids' placeholders, which fake tensors cannot say."""
    body = decoder(model)
    body.get_placeholder_mask = MethodType(_placeholder_mask, body)


def _placeholder_mask(
    body: nn.Module,
    input_ids: Tensor,  # (B, L)
    inputs_embeds: Tensor,  # (B, L, H)
    image_features: Tensor,  # (pictures, tokens, H), or (all tokens, H)
) -> Tensor:  # (B, L, 1)
    """In the place of the architecture's own, as transformers calls it."""
    tokens, room = image_features.numel() // image_features.shape[-1], input_ids.numel()
    if tokens > room:
        raise UserError(
            f"the pictures of a batch take {tokens:,} tokens, and all of its texts have {room:,}: a picture's tokens count in "
            "max_prompt_length; raise it"
        )
    return (input_ids == 0).unsqueeze(-1)


def show(model: PreTrainedModel, pictures: int) -> dict[str, Tensor]:
    """The arguments of a forward pass over texts that show so many pictures."""
    if not pictures:
        return {}
    config = model.config.vision_config
    side = config.image_size
    pixels = torch.empty(pictures, getattr(config, "num_channels", 3), side, side)
    return {"pixel_values": pixels}
