"""The check that a model computes the same for texts put end to end as for each in a row of its own.

Recurrent layers go on from one text to the next, and some code numbers positions or makes masks without looking at
`position_ids`. Which architectures these are is found by running them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from minillm import UserError
from minillm.models.access import OUT_OF_MEMORY, failed_run, forward_batch, forward_packed, plain_head, rows_of
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.models.families import placeholder_id, text_config
from minillm.models.packing import reads_packed
from minillm.models.quantization import is_quantized

WIDTHS = (7, 2, 12, 1, 5)  # tokens of the texts: short ones beside long ones, and one that is a single token
REACH = 3  # tokens of a window or chunk while the check runs, so that texts are longer
EXACT, ROUNDED = 1e-3, 0.03
WINDOWS = ("sliding_window", "attention_chunk_size")  # as the masks of transformers read them from a configuration


def packing_problem(model: PreTrainedModel) -> str | None:
    """The reason why a model cannot read batches packed, as in "NAME ..."; None where it can.

    The model must not be packed already. Raises UserError, and what says that memory is short.
    """
    name = type(model).__name__
    try:
        first, later = packing_errors(model)
    except (UserError, *OUT_OF_MEMORY):
        raise
    except Exception as problem:  # whatever the code of an architecture raises
        return f"{name} cannot be run on texts put end to end {failed_run(model, problem)}"
    if model.dtype in (torch.float32, torch.float64) and not is_quantized(model):
        error, bound = later.max().item(), EXACT
    else:  # rounding can send single tokens to other experts, and the first text, into which nothing leaks, says what it does
        error, bound = later.median().item(), max(ROUNDED, 3 * first.median().item())
    if error <= bound:
        return None
    return f"{name} computes something else for texts put end to end than for each alone (by {error:.1%})"


@torch.no_grad()
def packing_errors(model: PreTrainedModel) -> tuple[Tensor, Tensor]:  # (n,), (m,) fp32
    """The distances of the last hidden states of texts put end to end from those of the same texts in a padded batch: the
    norm of the difference as a part of theirs, for each token of the first text, and for each of the others."""
    batch = _texts(model)
    if reads_packed(model, batch):
        raise ValueError("the model is packed already, so there is nothing to compare with")
    with _short_windows(text_config(model.config)):
        padded = rows_of(forward_batch(model, batch).last_hidden_state, batch).float()  # (tokens, H)
        packed = rows_of(forward_packed(model, batch).last_hidden_state, batch).float()
    apart = (packed - padded).norm(dim=-1) / padded.norm(dim=-1).clamp_min(1e-30)
    return apart[: WIDTHS[0]], apart[WIDTHS[0] :]


def _texts(model: PreTrainedModel) -> TokenBatch:
    """Random texts every token of which is a row. None is what stands for a picture."""
    size, shown = plain_head(model).weight.shape[0], placeholder_id(model.config)
    ids = torch.randint(size, (sum(WIDTHS),), generator=torch.Generator().manual_seed(0))
    if shown is not None:
        ids[ids == shown] = (shown + 1) % size
    # the last token is predicted, never fed
    texts = [TokenSequence(one[:1], [*one[1:], 0]) for one in map(Tensor.tolist, ids.split(WIDTHS))]
    return collate(texts, 0).to(model.device)


@contextmanager
def _short_windows(config: PreTrainedConfig) -> Iterator[None]:
    """Masks of layers that see a part of a text, for texts that are longer than that part."""
    before = {name: getattr(config, name, None) for name in WINDOWS}
    before = {name: one for name, one in before.items() if isinstance(one, int) and one > REACH}
    for name in before:
        setattr(config, name, REACH)
    try:
        yield
    finally:
        for name, one in before.items():
            setattr(config, name, one)
