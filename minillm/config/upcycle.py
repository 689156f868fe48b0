"""`student.upcycle`: a dense model whose feed-forward layers are copied into experts, and the architectures that can be."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from minillm.config.keys import Strict


class UpcycleConfig(Strict):
    """The mixture of experts that a dense model becomes. Routed are the likeliest experts of every token, none dropped,
    with weights that sum to 1, so that the mixture begins as the dense model."""

    num_experts: Annotated[int, Field(ge=2)] = Field(4, description="Copies of every feed-forward layer")
    num_experts_per_tok: Annotated[int, Field(ge=1)] = Field(
        2, description="Experts that a token is sent to; with 1 the routers learn from train.router_aux_loss_coef alone"
    )
    every: Annotated[int, Field(ge=1)] = Field(
        1,
        description="Every n-th layer gets experts (with 2 the second, the fourth, ...), where the architecture has dense "
        "layers between sparse ones",
    )
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None,
        description="The layers that get experts, counted from 0, in the place of `every`, where the architecture can say it",
    )
    noise: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="Standard deviation of normal noise on each copy, keyed by `seed`, as a multiple of the standard "
        "deviation of the weights that are copied. With it the first outputs are no longer those of the dense model",
    )
    router_std: Annotated[float, Field(gt=0.0)] = Field(
        0.02, description="Standard deviation of the routers' normal weights, keyed by `seed`"
    )


ANY = ()  # in the place of a value: whatever it is, nothing is computed from it


@dataclass(frozen=True)
class SparseForm:
    """The stock architecture that the experts of a dense one go into, in the words of transformers."""

    model_type: str
    layer_step: str | None = None  # the key of `every`; None where every layer has experts
    dense_layers: str | None = None  # the key of a list of layers without experts
    between: tuple[str, str] | None = None  # the keys of the first and the last layer that `every` is for
    experts: str = "num_experts"
    per_token: str = "num_experts_per_tok"
    width: str = "intermediate_size"  # the key of an expert's own width
    fixed: dict[str, Any] = field(default_factory=dict)  # values that make the experts all that a layer computes
    only: dict[str, Any] = field(
        default_factory=dict
    )  # keys of the dense architecture -> the one value that can be said
    block: str = "mlp"  # the name in a layer of what holds router and experts; the dense one is called mlp
    zeros: tuple[str, ...] = ()  # other weights of the block, which begin at 0


SPARSE_FORMS: dict[str, SparseForm] = {
    "llama": SparseForm(
        "mixtral",
        experts="num_local_experts",
        only={"attention_bias": False, "mlp_bias": False, "pretraining_tp": ANY},
    ),
    "mistral": SparseForm("mixtral", experts="num_local_experts"),
    "qwen2": SparseForm(
        "qwen2_moe",
        "decoder_sparse_step",
        width="moe_intermediate_size",
        dense_layers="mlp_only_layers",
        fixed={"norm_topk_prob": True, "mlp_only_layers": [], "qkv_bias": True, "shared_expert_intermediate_size": 0},
        zeros=("shared_expert_gate", "shared_expert"),
    ),
    "qwen3": SparseForm(
        "qwen3_moe",
        "decoder_sparse_step",
        width="moe_intermediate_size",
        dense_layers="mlp_only_layers",
        fixed={"norm_topk_prob": True, "mlp_only_layers": []},
        only={"layer_types": ANY, "max_window_layers": ANY},  # alike in all layers: minillm.config.sparse_architecture
    ),
    "olmo2": SparseForm("flex_olmo", fixed={"norm_topk_prob": True}),
    "granite": SparseForm(
        "granitemoe", experts="num_local_experts", only={"mlp_bias": False}, block="block_sparse_moe"
    ),
    "ernie4_5": SparseForm(
        "ernie4_5_moe",
        "moe_layer_interval",
        experts="moe_num_experts",
        per_token="moe_k",
        width="moe_intermediate_size",
        between=("moe_layer_start_index", "moe_layer_end_index"),
        fixed={"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": -1},
        only={"use_bias": False},
        zeros=("gate.moe_statics",),
    ),
}  # fmt: skip
