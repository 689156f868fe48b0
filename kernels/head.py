"""LMHead, and the GEMMs of a chunk: hidden states to fp32 logits, and the logits' gradient back to hidden and weight.

Logits are fp32 whatever the inputs (float64 for float64): on CUDA the tensor cores write fp32 from half-precision
inputs; on a CPU the weight is converted a tile at a time, so that no full converted copy exists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.kernels.workers import Worker, even_pieces, pieces, share

WEIGHT_TILE_BYTES = 2 * 2**20  # of weight rows: small enough that a GEMM finds them in the cache again
WEIGHT_TILE_ROWS = 4096  # at most: an fp32 sum over the vocabulary is more exact in parts


@dataclass(frozen=True)
class LMHead:
    """A language-model head: logits = softcap(logit_scale * (h W^T + b)), softcap(x) = softcap * tanh(x / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: nn.Module, *, check: bool = False) -> "LMHead":
        """The head of a language model of transformers, with what its architecture does to logits: a bias, Cohere's and
        Falcon-H1's scale, Granite's divisor, Gemma's softcap. It goes with the `last_hidden_state` of the model below it.

        PEFT's adapters on the head are part of it: the copy that `modules_to_save` trains, and LoRA merged on the fly,
        W + scaling * B A, with a graph to A and B. So make it anew for every forward pass, where the head is trained.
        Wrappers are looked through: DistributedDataParallel, DeepSpeed's engine, torch.compile, PEFT. Sharded weights
        stay so and are gathered by the losses.

        With `check` the model runs on eight ids (sharded: on all ranks), without gradient and dropout, and its own
        logits must be those of the head to rounding: 1e-4 of the largest, in half precision 0.05.

        Raises ValueError for a model without a head, an adapter that is not LoRA without dropout, a quantised head, and
        with `check` for an architecture that does more to its logits than is known here.
        """
        from minillm.kernels.model_heads import head_of_model

        return head_of_model(model, check=check)

    @staticmethod
    def sum_of(*heads: "LMHead | LMHeadSum | Tensor | nn.Module") -> "LMHeadSum":
        """The head whose logits are the sum of these heads' logits, each with its own bias, scale and softcap.

        Its hidden states are a tuple, one tensor for each head, whose hidden sizes may differ:
        linear_cross_entropy((h_a, h_b), LMHead.sum_of(a, b), labels). Gradients go to those hidden states, weights and
        biases that require them, and cost nothing for the others. A head that is a sum itself counts as its parts.
        """
        if not heads:
            raise ValueError("LMHead.sum_of needs at least one head")
        return LMHeadSum(
            tuple(part for head in heads for part in (head.heads if isinstance(head, LMHeadSum) else (head,)))
        )


@dataclass(frozen=True)
class LMHeadSum:
    """Heads whose logits are added up; `LMHead.sum_of` makes it."""

    heads: tuple[LMHead | Tensor | nn.Module, ...]


# what the losses take as a head: a tensor is a weight, a module a linear layer
Head = LMHead | LMHeadSum | Tensor | nn.Module
Hidden = Tensor | tuple[Tensor, ...]  # and as its hidden states: a tuple for a sum of heads


def _on_tensor_cores(dtype: torch.dtype, logits: torch.dtype, device: torch.device) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and logits == torch.float32


def _tiles(ids: int, hidden_size: int, logits: torch.dtype, device: torch.device) -> list[slice]:
    """Parts of the ids that are taken one at a time."""
    if device.type != "cpu":
        return pieces(ids, ids)
    return pieces(ids, max(1, min(WEIGHT_TILE_ROWS, WEIGHT_TILE_BYTES // (hidden_size * logits.itemsize))))


def _tile(weight: Tensor, ids: slice, compute: torch.dtype, logits: torch.dtype) -> Tensor:
    """Rows of the weight in the dtype of the logits, rounded to `compute` on the way."""
    return weight[ids].to(compute).to(logits)


def ready(weight: Tensor, compute: torch.dtype, logits: torch.dtype) -> Tensor:  # (V, H) -> (V, H)
    """The weight as `project` and `HeadGradients` read it chunk after chunk: cast once where the tensor cores take it."""
    return weight.to(compute) if _on_tensor_cores(compute, logits, weight.device) else weight


def project(
    hidden: Tensor,  # (C, H) in `compute`
    weight: Tensor,  # (V, H), `ready`
    bias: Tensor | None,  # (V,)
    compute: torch.dtype,
    out: Tensor,  # (C, V) fp32 or fp64, rows may be padded
) -> Tensor:
    """out = hidden W^T + b, accumulated and stored in the dtype of `out`."""
    if _on_tensor_cores(compute, out.dtype, hidden.device):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)

        def project_on(ids: slice, worker: Worker) -> None:
            torch.mm(hidden, _tile(weight, ids, compute, out.dtype).t(), out=out[:, ids])

        share(project_on, _tiles(*weight.shape, out.dtype, out.device), out)
    if bias is not None:
        out.add_(bias.to(out.dtype))
    return out


def add_projection(
    hidden: Tensor,  # (C, H) in `compute`
    weight: Tensor,  # (V, H), `ready`
    bias: Tensor | None,  # (V,)
    compute: torch.dtype,
    out: Tensor,  # (C, V) fp32 or fp64, rows may be padded
    scale: float,
) -> None:
    """out += scale * (hidden W^T + b), as `project` computes it."""
    if _on_tensor_cores(compute, out.dtype, hidden.device):
        torch.addmm(out, hidden, weight.t(), alpha=scale, out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)

        def add_on(ids: slice, worker: Worker) -> None:
            out[:, ids].addmm_(hidden, _tile(weight, ids, compute, out.dtype).t(), alpha=scale)

        share(add_on, _tiles(*weight.shape, out.dtype, out.device), out)
    if bias is not None:
        out.add_(bias.to(out.dtype), alpha=scale)


def logits_gradient_dtype(compute: torch.dtype, logits: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the products that follow want the gradient of the logits."""
    return compute if _on_tensor_cores(compute, logits, device) else logits


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:  # (M, N), (M, K), (K, N)
    """total += left right, or with `first` total = left right: by a GEMM into `total` where there is one of the dtypes."""
    fp32 = _on_tensor_cores(left.dtype, torch.float32, left.device)
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right)
    elif fp32 and total.dtype == torch.float32:
        into = dict(out_dtype=total.dtype, out=total)
        torch.mm(left, right, **into) if first else torch.addmm(total, left, right, **into)
    else:
        wide = dict(out_dtype=torch.float32) if fp32 else {}
        for start in range(0, total.shape[0], WEIGHT_TILE_ROWS):  # a product of all of the vocabulary would be large
            rows = slice(start, start + WEIGHT_TILE_ROWS)
            product = torch.mm(left[rows], right, **wide)
            total[rows].copy_(product) if first else total[rows].add_(product)


class HeadGradients:
    """Sums d loss / d (hidden, weight, bias) over chunks. What needs no gradient costs no GEMM.

    `accumulation` is the dtype of the weight's sum, or a tensor to add into.
    """

    def __init__(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H), its full shape
        bias: Tensor | None,  # (V,)
        *,
        needs: tuple[bool, bool, bool],  # of hidden, weight, bias
        compute: torch.dtype,
        logits: torch.dtype,
        vocab_size: int,  # rows of weight and bias that were used
        accumulation: torch.dtype | Tensor,
    ):
        self.compute, self.logits, self.vocab_size = compute, logits, vocab_size
        self.weight_value = ready(weight[:vocab_size], compute, logits) if needs[0] else None
        # A factor may still come, before which fp16 would lose its small numbers. bf16 has the range of fp32, and wide
        # rows would take memory that grows with the tokens.
        rows_dtype = logits if hidden.dtype == torch.float16 else hidden.dtype
        self.hidden = torch.zeros(hidden.shape, dtype=rows_dtype, device=hidden.device) if needs[0] else None
        self._weight = self.bias = None
        self.into = isinstance(accumulation, Tensor)
        self._unwritten = needs[1] and not self.into  # the first chunk's product takes the place of zeros
        if needs[1]:
            self._weight = accumulation if self.into else torch.empty_like(weight, dtype=accumulation)
        if self._unwritten:
            self._weight[vocab_size:].zero_()
        if needs[2]:
            self.bias = torch.zeros_like(bias, dtype=logits)

    @property
    def weight(self) -> Tensor | None:
        """The sum so far, (V, H)."""
        if self._unwritten:
            self._weight.zero_()
            self._unwritten = False
        return self._weight

    @property
    def dz_dtype(self) -> torch.dtype:
        """The dtype in which `add` wants the gradient of the logits."""
        return logits_gradient_dtype(self.compute, self.logits, self.device)

    @property
    def device(self) -> torch.device:
        return next(t.device for t in (self.hidden, self._weight, self.bias) if t is not None)

    def add(
        self,
        dz: Tensor,  # (C, V) d loss / d raw logits, of dz_dtype
        hidden: Tensor,  # (C, H) the chunk, in `compute`
        rows: Tensor | slice,  # where the chunk's rows are in (N,)
    ) -> None:
        on_tensor_cores = _on_tensor_cores(self.compute, self.logits, dz.device)
        if self.hidden is not None and on_tensor_cores:
            # summed in fp32 to the end: parts of a long sum would be added up in bf16
            self.hidden[rows] = torch.mm(dz, self.weight_value, out_dtype=torch.float32).to(self.hidden.dtype)
        elif self.hidden is not None:
            self._write_hidden(dz, rows)
        if self._weight is None and self.bias is None:
            return
        hidden = hidden if on_tensor_cores else hidden.to(self.logits)

        def add_on(ids: slice, worker: Worker) -> None:
            if self._weight is not None:
                add_product(self._weight[ids], dz[:, ids].t(), hidden, first=self._unwritten)
            if self.bias is not None:
                self.bias[ids] += dz[:, ids].sum(0, dtype=self.logits)

        share(add_on, _tiles(dz.shape[1], hidden.shape[1], self.logits, dz.device), dz)
        self._unwritten = False

    def _write_hidden(self, dz: Tensor, rows: Tensor | slice) -> None:
        """All of it in the workers: torch's own threads go on spinning for a while after a share of work, and hold cores."""
        tiles = _tiles(*self.weight_value.shape, self.logits, dz.device)

        def write_on(part: slice, worker: Worker) -> None:
            # products added up, not addmm_: one running fp32 sum over a large vocabulary loses digits
            products = (
                torch.mm(dz[part, ids], _tile(self.weight_value, ids, self.compute, self.logits)) for ids in tiles
            )
            theirs = rows[part] if isinstance(rows, Tensor) else slice(rows.start + part.start, rows.start + part.stop)
            self.hidden[theirs] = sum(products).to(self.hidden.dtype)

        share(write_on, even_pieces(len(dz), dz), dz)


def fp16_headroom(dtype: torch.dtype) -> float:
    """By how much the gradient of logits is multiplied before it is rounded to `dtype`, and its products are divided.

    fp16 is coarse below 6e-5, where most entries of a small divergence's gradient are, and ends at 65,504: sixteen
    times what a coefficient of one gives is far from that, unless a row's log-ratios are in the thousands.
    """
    return 16.0 if dtype == torch.float16 else 1.0


def rounded(total: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """total * factor, rounded once; `factor` is a scalar there, None for 1."""
    if total is None or factor is None:
        return None if total is None else total.to(dtype)
    return torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))
