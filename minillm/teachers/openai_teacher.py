"""A teacher on servers of vLLM's form of the OpenAI protocol, known by its likeliest ids; nothing of its weights is here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm import UserError
from minillm.config.models import ServedTeacherConfig
from minillm.losses import LMHead
from minillm.models.batch import TokenSequence
from minillm.models.tokenizers import end_of_turn
from minillm.teachers.openai_servers import COMPLETIONS, OpenAIServers, probe_difference
from minillm.teachers.openai_wire import LogprobsRequest, TooFewIds
from minillm.teachers.remote import RemoteTeacher
from minillm.teachers.wire import JSON, BadMessage

ATTEMPTS = 6  # at rows with enough ids that student and teacher share


class OpenAITeacher(RemoteTeacher):
    """See the module; the protocol is minillm.teachers.teacher.Teacher.

    Args:
        device: of the student, where rows are put.
        tokenizer: the teacher's, which its servers do not send.

    Raises UserError where no server answers, and as OpenAIServers does.
    """

    pool: OpenAIServers

    def __init__(self, config: ServedTeacherConfig, device: torch.device, tokenizer: PreTrainedTokenizerBase):
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1  # of its head no more is known
        super().__init__(config, device, OpenAIServers(config, self.vocab_size))
        ends = (tokenizer.eos_token_id, end_of_turn(tokenizer))
        self.end_ids = tuple(dict.fromkeys(one for one in ends if one is not None))

    @property
    def fingerprint(self) -> str:
        """The model's name: of its weights, nothing is known that is the same wherever they are served."""
        return self.described["model"]

    @property
    def summary(self) -> tuple[str, str, str]:
        """(name, size, form) for the preflight table."""
        longest = self.described["longest"]
        most = "" if longest is None else f", of texts of {longest:,} tokens at most"
        return f"served {self.described['model']}", self.servers, f"{self.config.k} likeliest ids{most}"

    @property
    def identity(self) -> dict[str, Any]:
        return {key: self.described[key] for key in ("model", "probe")}

    def difference(self, before: Mapping[str, Any]) -> str | None:
        return probe_difference(before.get("probe", ()), self.described["probe"])

    def require_length(self, name: str, longest: int) -> None:
        most = self.described["longest"]
        if most is not None and longest > most:
            raise UserError(
                f"{name}: a text may have {longest:,} tokens, and the teacher's servers read {most:,}: start them with "
                f"--max-model-len {longest + 1}, or make texts shorter (max_prompt_length, max_response_length, max_new_tokens)"
            )

    @contextmanager
    def head(self) -> Iterator[LMHead]:
        raise UserError("servers of protocol openai send no hidden states that a head could read")
        yield

    def _asked(self, sequences: tuple[TokenSequence, ...], pad_id: int) -> LogprobsRequest:
        return LogprobsRequest.of(sequences, self.config.k)

    def _read(self, asked: LogprobsRequest) -> dict[str, Tensor]:
        if not asked.count:
            return {"ids": torch.empty((0, asked.k), dtype=torch.int64), "logprobs": torch.empty((0, asked.k))}
        more = 0  # ids, in the place of those that only the teacher knows
        for _ in range(ATTEMPTS):
            body = asked.body(self.described["model"], more=more)
            said = self.pool.read(self.pool.request("POST", COMPLETIONS, body=body, content_type=JSON))
            try:
                ids, logprobs = asked.read(said, size=self.shared_ids or self.vocab_size)
            except TooFewIds as error:
                more = 2 * more + error.lacking
            else:
                return {"ids": ids, "logprobs": logprobs}
        raise BadMessage(
            f"of the teacher's likeliest ids so many are unknown to the student that even {asked.k + more} do not hold "
            f"{asked.k} which both know: ask for fewer with teacher.k"
        )
