"""`rollout`: the sampling of answers for training."""

from typing import Annotated

from pydantic import Field

from minillm.config.keys import Strict


class RolloutConfig(Strict):
    """Sampling for training. Some methods accept only neutral sampling: temperature 1, top_k 0, top_p 1."""

    buffer_size: Annotated[int, Field(ge=1)] = Field(
        256, description="Methods with a buffer: answers that are sampled at a time, on all ranks together"
    )
    answers_per_prompt: Annotated[int, Field(ge=1)] = Field(
        1,
        description="Answers that are sampled to each prompt. They are separate draws: each has random numbers of its own, and "
        "none depends on another. The prompt is read once for those that a device decodes side by side. A buffer or a step keeps "
        "its number of answers, and has as many fewer prompts. For methods minillm, opd, seqkd, and gkd with on_policy 1",
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        32,
        description="Answers that are decoded side by side on one device. Where one ends the next prompt takes its row, if the "
        "models can read it there; a run says where they cannot, and then batches follow one another. Prompts that wait are read "
        "a quarter of so many at a time, and their keys and values kept until a row ends",
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(
        256, description="Tokens of the longest answer, its end included"
    )
    temperature: Annotated[float, Field(gt=0.0)] = Field(1.0, description="Logits are divided by it")
    top_k: Annotated[int, Field(ge=0)] = Field(
        0, description="Sample from so many of the likeliest tokens; 0: from all"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Sample from the likeliest tokens that together have this probability; 1: from all"
    )
    shared_coins: bool | None = Field(
        None,
        description="Mixtures of teacher and student: a coin a position, the same for all answers of a draw, says which of "
        "the two writes the next token, and the other one catches up in blocks; scoring then runs no teacher. Every answer "
        "has the law of the mixture, but those of a draw depend on each other, and batches follow one another. false: both models "
        "run for every token. null: true, unless cuda_graphs or answers_per_prompt above 1 ask for loops that need both",
    )
    cuda_graphs: bool = Field(
        False,
        description="On a GPU, replay a captured CUDA graph for every token, in evaluation too. Memory for the longest "
        "answers is kept from the start, and a row that has ended runs on until the host looks, every few tokens. Models with sliding "
        "windows or recurrent layers, and flash attention, are refused; answers under no_repeat_ngram_size are sampled without graphs. Not measured on a "
        "GPU yet",
    )

    @property
    def by_coins(self) -> bool:
        """True where mixtures are drawn by shared coins."""
        if self.shared_coins is None:
            return not self.cuda_graphs and self.answers_per_prompt == 1
        return self.shared_coins
