"""`student.lora`: training through low-rank adapters, under the names of peft's LoraConfig."""

from typing import Annotated

from pydantic import Field

from minillm.config.keys import Strict

# Names that families give to their LM heads and embedding tables; models/adapter_targets.py asks the model itself.
HEADS = frozenset({"lm_head", "embed_out", "output_projection"})
TABLES = frozenset({"embed_tokens", "embed_positions", "embed_in", "wte", "wpe", "word_embeddings"})
HEAD_REFUSED = (
    "{} is the LM head, which the fused losses read as a plain weight: an adapter on it would be ignored silently. "
    "Leave it out"
)
TABLE_REFUSED = (
    "{} is a table of embeddings, which an LM head may be tied to; adapters go on linear layers below the head. "
    "Leave it out"
)


class LoraConfig(Strict):
    """Adapters that are trained instead of the student's weights, which stay frozen.

    There is no dropout: the student must train the distribution that it samples from.
    """

    r: Annotated[int, Field(ge=1)] = Field(description="The rank of the adapters")
    alpha: Annotated[int, Field(ge=1)] = Field(description="The adapters' product is scaled by alpha / r")
    target_modules: Annotated[str, Field(pattern="^all-linear$")] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="The linear layers that have one: all-linear, which is all but the LM head, or a list of names, each the "
        "end of a module's path (q_proj, self_attn.q_proj)",
    )


def words(r: int, alpha: int, target_modules: str | list[str] = "all-linear") -> str:
    """The settings in words, such as LoRA (r 8, alpha 32, all linear layers)."""
    where = "all linear layers" if isinstance(target_modules, str) else ", ".join(target_modules)
    return f"LoRA (r {r}, alpha {alpha}, {where})"
