"""The check that answers are drawn as a model scores them: cached steps, and blocks of tokens behind them, over prompts
padded at the left, against full passes.

Some architectures swallow a cache under a name of its own, number positions without a look at the padding, or read the
padding as if it were text; all of them answer without a word, as a model that is not the one that is trained.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from minillm import UserError
from minillm.kernels.reference import logits as head_logits
from minillm.models.access import OUT_OF_MEMORY, failed_run, lm_head, row_hidden
from minillm.models.batch import TokenSequence, collate
from minillm.models.families import cache_argument, text_config
from minillm.models.loading import is_hollow
from minillm.models.modes import sampling_mode
from minillm.models.quantization import is_quantized
from minillm.models.sharded import is_sharded
from minillm.rollout.local.cache_rows import rows_are_known
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.graph_preconditions import rotary_by_length
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache
from minillm.rollout.local.token_drawing import pad_left

PROMPTS = (4, 2)  # tokens
STEPS = (1, 1)  # tokens of an answer, fed at a time; before the last of them the first row leaves the batch
BLOCKS = (1, 3, 1, 2)
# Parts of the norm of the logits less their mean. In 16 bits right models were off by 0.002 to 0.011, and small trained
# ones that lose their cache by 0.14 to 0.6.
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.1


def require_exact_decoding(role: str, model: PreTrainedModel) -> None:
    """Raises UserError for a model whose cached steps give other logits than its full passes, or cannot be taken.

    One that is sharded over the ranks or whose weights are not there yet is not looked at.
    """
    if is_sharded(model) or is_hollow(model):
        return
    name = type(model).__name__
    try:
        apart = decoding_error(model)
    except (UserError, *OUT_OF_MEMORY):
        raise
    except Exception as error:  # whatever the code of an architecture raises
        raise UserError(
            f"{role}: answers of {name} cannot be drawn token by token with a cache {failed_run(model, error)}. Choose another "
            "model, or a method and an evaluation that draw none"
        ) from error
    if not apart <= _tolerance(model):
        raise UserError(
            f"{role}: the logits of {name} in a batch of prompts padded at the left, token by token with a cache, differ "
            f"from those of whole texts by {apart:.1%}, so answers would be of another model. Its code loses the cache, or "
            "reads padding as text; choose another model, or a method and an evaluation that draw no answers"
        )


def require_copied_rows(role: str, model: PreTrainedModel) -> None:
    """Raises UserError for a model of whose cache no row can be copied: answers to one prompt would not be its own."""
    if is_sharded(model) or is_hollow(model):
        return
    try:
        apart = copying_error(model)
    except OUT_OF_MEMORY:
        raise
    except Exception:  # whatever the code of an architecture raises
        apart = float("inf")
    if not apart <= _tolerance(model):
        raise UserError(
            f"{role}: {type(model).__name__} cannot answer a prompt several times from one reading of it, as rows of its "
            "cache cannot be copied; set rollout.answers_per_prompt to 1"
        )


def reads_blocks(model: PreTrainedModel) -> bool:
    """True where several tokens behind a cache, in one pass, give the logits of full passes.

    Recurrent layers may begin anew with such a block. Weights that are sharded over the ranks or not there yet are not
    run: then it is true where every layer keeps keys and values.
    """
    if is_sharded(model) or is_hollow(model):
        kept = cache_argument(model) == "past_key_values"
        return kept and all(
            isinstance(layer, DynamicLayer) for layer in make_cache(model, lambda: RoomyLayer(0)).layers
        )
    try:
        return decoding_error(model, BLOCKS) <= _tolerance(model)
    except OUT_OF_MEMORY:
        raise
    except Exception:  # whatever the code of an architecture raises
        return False


def replaces_rows(model: PreTrainedModel) -> bool:
    """True where new prompts may take rows of a running batch: their logits, and those of the rows beside them, are those
    of full passes.

    It takes a cache whose layers are known, and positions that do not depend on the other rows. Weights that are sharded
    over the ranks or not there yet are not run.
    """
    if not rows_are_known(model) or rotary_by_length(text_config(model.config)):
        return False
    if is_sharded(model) or is_hollow(model):
        return True
    try:
        return refilling_error(model) <= _tolerance(model)
    except OUT_OF_MEMORY:
        raise
    except Exception:  # whatever the code of an architecture raises
        return False


def _tolerance(model: PreTrainedModel) -> float:
    exact = model.dtype in (torch.float32, torch.float64) and not is_quantized(model)
    return TOLERANCE if exact else TOLERANCE_16_BITS


@torch.no_grad()
def decoding_error(model: PreTrainedModel, fed: tuple[int, ...] = STEPS) -> float:
    """The difference between the logits of a few cached passes and those of full passes over each text alone, as a part
    of the norm of the latter, each less its mean; the largest of all tokens, 0 where the model's own are NaN.

    `fed` are the tokens of the answers in each of the cached passes.

    The mean changes no probability, and where it is far from 0 (logits of GPT-2 are about -100, give or take 5) it
    would hide a difference that changes them all.
    """
    texts = _texts(model, *((one, sum(fed) + 1) for one in PROMPTS))
    return _apart(model, texts, lambda size: _stepwise(model, texts, size, fed))


@torch.no_grad()
def copying_error(model: PreTrainedModel) -> float:
    """As `decoding_error`, of two answers to the first prompt, which is read once, and one to the second."""
    first, second = _texts(model, *((one, sum(STEPS) + 1) for one in PROMPTS))
    other = TokenSequence(first.prompt, first.response[::-1])
    return _apart(model, [first, other, second], lambda size: _copied(model, [first, other, second], size))


@torch.no_grad()
def refilling_error(model: PreTrainedModel) -> float:
    """As `decoding_error`, of three answers of which the third takes the row of the first, while the second goes on; then
    the columns that none of them needs are dropped."""
    texts = _texts(model, (4, 3), (2, 7), (3, 5))
    return _apart(model, texts, lambda size: _refilled(model, texts, size))


def _texts(model: PreTrainedModel, *lengths: tuple[int, int]) -> list[TokenSequence]:  # of prompts and answers
    size, numbers = _vocabulary(model), iter(range(1, 99))
    return [TokenSequence(*([next(numbers) % size for _ in range(n)] for n in one)) for one in lengths]


def _vocabulary(model: PreTrainedModel) -> int:
    return min(len(lm_head(model).weight), text_config(model.config).vocab_size)


def _apart(
    model: PreTrainedModel,
    texts: Sequence[TokenSequence],
    decode: Callable[[int], list[Tensor]],  # from the vocabulary's size to the (tokens, size) logits of each answer
) -> float:
    head, size = lm_head(model), _vocabulary(model)
    with sampling_mode([model]):
        errors = []
        for text, ours in zip(texts, decode(size), strict=True):
            batch = collate([text], 0).to(model.device)
            hidden = row_hidden(model, batch)
            options = {"logit_scale": head.logit_scale, "softcap": head.softcap}
            theirs = head_logits(hidden, head.weight, head.bias, **options)[: len(ours), :size].float()
            if theirs.isnan().any():  # of weights that are not finite, which the decode loop names by their token
                return 0.0
            banned = theirs == -torch.inf
            same = banned & (ours == theirs)
            apart, spread = _centred(ours - theirs, same), _centred(theirs, banned)
            errors.append((apart.norm(dim=-1) / spread.norm(dim=-1).clamp_min(1e-30)).max())
    return torch.stack(errors).max().item()


def _centred(logits: Tensor, left_out: Tensor) -> Tensor:  # (tokens, size) twice -> (tokens, size)
    """Logits less their mean, both of the ids that are not left out; 0 for those that are."""
    counted = (~left_out).sum(-1, keepdim=True).clamp_min(1)
    kept = logits.masked_fill(left_out, 0.0)
    return (kept - kept.sum(-1, keepdim=True) / counted).masked_fill(left_out, 0.0)


def _stepwise(
    model: PreTrainedModel, texts: list[TokenSequence], size: int, fed: tuple[int, ...]
) -> list[Tensor]:  # (tokens, size) each
    """The logits of every text's answer as the decode loops have them; the first text's without those of the last pass."""
    width = max(len(text.prompt) for text in texts)
    room = width + sum(fed)
    decoder = Decoder(model, make_cache(model, lambda: RoomyLayer(room)), vocab_size=size)
    parts = pad_left([text.prompt for text in texts], width, 0)
    ids, padding, position = (part.to(model.device) for part in parts)
    mask = (torch.arange(room, device=model.device) >= padding).long()
    answers = torch.tensor([text.response for text in texts], device=model.device)
    rows, found = list(range(len(texts))), [[] for _ in texts]
    hidden = decoder.hidden(ids, mask[:, :width], position, prompts=True)[:, -1:]
    position, before = position[:, -1:] + 1, 0
    for place, tokens in enumerate((*fed, 0)):
        logits = decoder.logits(hidden.flatten(0, 1))[:, :size].clone()
        for row, of_row in zip(rows, logits.unflatten(0, hidden.shape[:2]), strict=True):
            found[row].append(of_row)
        if not tokens:
            break
        if place + 1 == len(fed):
            kept = torch.tensor([1], device=model.device)
            decoder.keep(kept)
            rows, mask, position, answers = [1], mask[kept], position[kept], answers[kept]
        after = before + tokens
        ahead = torch.arange(before, after, device=model.device)
        hidden = decoder.hidden(answers[:, before:after], mask[:, : width + after], position + ahead, prompts=False)
        hidden, before = hidden[:, -tokens:], after
    return [torch.cat(one) for one in found]


def _copied(model: PreTrainedModel, texts: list[TokenSequence], size: int) -> list[Tensor]:  # (tokens, size) each
    """The logits of answers of which the first two are to one prompt, after a row of its cache was copied."""
    prompts, tokens = [texts[0].prompt, texts[-1].prompt], len(texts[0].response)
    width = max(map(len, prompts))
    room = width + tokens
    decoder = Decoder(model, make_cache(model, lambda: RoomyLayer(room)), vocab_size=size)
    ids, padding, position = (part.to(model.device) for part in pad_left(prompts, width, 0))
    mask = (torch.arange(room, device=model.device) >= padding).long()
    logits = decoder.forward(ids, mask[:, :width], position)[:, :size]
    copies = torch.tensor([0, 0, 1], device=model.device)
    decoder.keep(copies)
    found, mask, position = [logits[copies].clone()], mask[copies], position[copies, -1:] + 1
    answers = torch.tensor([text.response for text in texts], device=model.device)
    for place in range(tokens - 1):
        fed = answers[:, place : place + 1]
        found.append(decoder.forward(fed, mask[:, : width + place + 1], position + place)[:, :size].clone())
    return list(torch.stack(found, 1))


def _refilled(model: PreTrainedModel, texts: list[TokenSequence], size: int) -> list[Tensor]:  # (tokens, size) each
    """The logits of three answers as the growing loop has them."""
    prompts, found = [text.prompt for text in texts], [[] for _ in texts]
    column = len(prompts[0])  # where the next tokens go
    room = column + sum(len(text.response) for text in texts)
    decoder = Decoder(model, make_cache(model, lambda: RoomyLayer(room)), vocab_size=size)

    def read(prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        width = max(map(len, prompts))
        ids, padding, position = (part.to(model.device) for part in pad_left(prompts, width, 0))
        return ids, (torch.arange(width, device=model.device) >= padding).long(), position

    def keep(logits: Tensor, rows: list[int]) -> None:
        for row, of_row in zip(rows, logits[:, :size].clone(), strict=True):
            found[row].append(of_row)

    rows = [0, 1]
    first = torch.tensor([[column - len(prompts[row])] for row in rows], device=model.device)
    keep(decoder.forward(*read(prompts[:2])), rows)
    while len(found[1]) < len(texts[1].response):
        if len(found[0]) == len(texts[0].response) and rows[0] == 0:
            rows[0], first[0] = 2, column - len(prompts[2])
            ahead, logits = decoder.read(*read(prompts[2:]))
            keep(logits, [2])
            place = torch.tensor([0], device=model.device)
            decoder.refill(place, ahead, place, len(prompts[2]))
        elif first.min() > 0:
            unused = int(first.min())
            decoder.drop_columns(unused)
            column, first = column - unused, first - unused
        tokens = torch.tensor([[texts[row].response[len(found[row]) - 1]] for row in rows], device=model.device)
        mask = (torch.arange(column + 1, device=model.device) >= first).long()
        keep(decoder.forward(tokens, mask, column - first), rows)
        column += 1
    return [torch.stack(one) for one in found]
