"""The keyword arguments that every function of `minillm.losses` takes: type, default and meaning, declared once.

A function says `**options: Unpack[LossOptions]`, which editors and type checkers read; `entry_point` turns the same
declaration into its signature, its defaults and the end of its docstring.
"""

from typing import Annotated, Any, NamedTuple, TypedDict, get_type_hints

from torch import Tensor

WeightGrad = str | Tensor | tuple[str | Tensor, ...]


class Option(NamedTuple):
    """The part of an option's declaration besides its type."""

    default: Any
    meaning: str


class HeadOptions(TypedDict, total=False):
    """Options of every function."""

    ignore_index: Annotated[int, Option(-100, "tokens with this label are left out: they reach no GEMM")]
    temperature: Annotated[float, Option(1.0, "divides the logits of every model, after scale and softcap")]
    vocab_size: Annotated[
        int | None, Option(None, "use the first ids alone, of every head; labels then lie in [0, vocab_size)")
    ]
    kept: Annotated[
        int | None,
        Option(None, "the number of labels that are not ignore_index, if known: then the host waits for no device"),
    ]
    weight_grad: Annotated[
        WeightGrad,
        Option(
            "fp32",
            "how the weight's gradient is summed over chunks: 'fp32', 'bf16' (lossy; tiled: as fp32), or into a "
            "tensor of the weight's shape, which the backward pass adds to while the weight's own .grad gets nothing; "
            "for a sum of heads also a tuple, one for each",
        ),
    ]
    backend: Annotated[
        str,
        Option("auto", "auto (triton for CUDA tensors, torch elsewhere), torch, triton or tiled; float64 is torch's"),
    ]
    chunk_bytes: Annotated[int | None, Option(None, "bytes of logits alive at a time; None fits them to the device")]
    process_group: Annotated[
        Any,
        Option(
            None,
            "a torch.distributed group whose ranks have cut the vocabulary among them: each passes the same tokens, and "
            "its own rows of every head (and bias), consecutive ids in the order of the ranks. Labels and vocab_size count "
            "all ids. Every rank gets the whole loss, the gradient of its rows, and that of the hidden states in full. In "
            "torch's operations on rows; without a TopK and LMHead.sum_of",
        ),
    ]


class LossOptions(HeadOptions, total=False):
    """Options of every function of a student and a teacher."""

    beta: Annotated[float, Option(0.5, "jsd: m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, equation 1)")]
    alpha: Annotated[float, Option(0.1, "skew divergences (DistiLLM, arXiv 2402.03898, equations 4 and 5)")]
    interpolation: Annotated[
        float,
        Option(
            0.4,
            "interpolated_cross_entropy: the teacher's part t of the target softmax((1 - t) z_s + t z_t), 0 to 1 "
            "(TAID, arXiv 2501.16937)",
        ),
    ]


def declared(options: type) -> dict[str, tuple[Any, Option]]:
    """{name: (type, Option)} of one of the declarations above, in their order."""
    hints = get_type_hints(options, include_extras=True)
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()}
