"""The log-probabilities that a frozen reference gives to the answers of pairs, each computed once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.data.pairs import AnswerPair
from minillm.distributed import collectives
from minillm.losses import linear_token_stats
from minillm.models.batch import collate
from minillm.teachers.pair import Models


class ReferenceScores:
    """sum_t log p(y_t | y_<t, x) of the chosen and the rejected answer of every pair that was asked for.

    The teacher reads a pair before the first step that has it, and never again: in later passes through the data it does
    not run. It is a part of the method's state, so that a resumed run has the same numbers.
    """

    def __init__(self):
        self._sums: dict[int, tuple[float, float]] = {}  # key of a pair -> its two sums, nats

    def add(self, pairs: Sequence[AnswerPair], models: Models, *, batch_size: int) -> None:
        """Score the pairs that are new, dealt over the ranks; all ranks call it together with the same pairs.

        Args: batch_size: pairs side by side.
        """
        missing = list({pair.key: pair for pair in pairs if pair.key not in self._sums}.values())
        if not missing:
            return
        mine, found = collectives.even_rank_slice(len(missing)), []
        with models.reading("teacher"):
            for start in range(0, len(mine), batch_size):
                chosen = [missing[place] for place in mine[start : start + batch_size]]
                sums = answer_logprobs(chosen, models)  # (P, 2)
                found += [[pair.key, *row] for pair, row in zip(chosen, sums.tolist(), strict=True)]
        for rows in collectives.gather(found):
            self._sums.update({key: (chosen, rejected) for key, chosen, rejected in rows})

    def of(self, pairs: Sequence[AnswerPair]) -> Tensor:  # (P, 2) float64
        """The sums of pairs that were added."""
        return torch.tensor([self._sums[pair.key] for pair in pairs], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        keys = torch.tensor(list(self._sums), dtype=torch.int64)
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        return {"keys": keys, "sums": sums.view(-1, 2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = dict(zip(state["keys"].tolist(), map(tuple, state["sums"].tolist()), strict=True))


def answer_logprobs(pairs: Sequence[AnswerPair], models: Models) -> Tensor:  # (P, 2) float64, on the CPU
    """The teacher's log-probability of each answer, over the ids that it shares with the student, in nats."""
    batch = collate([one for pair in pairs for one in (pair.chosen, pair.rejected)], models.pad_id).to(models.device)
    with models.teacher.rows(batch).for_losses() as (hidden, head):
        stats = linear_token_stats(
            hidden, head, None, None, batch.labels, fields=("student_logprob",), vocab_size=models.vocab_size
        )
    return torch.stack([one.sum() for one in batch.split(stats.student_logprob.cpu().double())]).view(-1, 2)
