"""`eval`: held-out prompts, answers and the distances to the teacher."""

from typing import Annotated, Literal

from pydantic import Field

from minillm.config.analysis_keys import ExposureBias, Labels
from minillm.config.data import Prompts
from minillm.config.keys import Seed, Strict

Metric = Literal[
    "rouge_l", "exact_match", "reverse_kl_nats", "sequence_reverse_kl_nats", "forward_kl_nats", "loss_nats"
]


class EvalConfig(Strict):
    """What is measured, on what and when. Where there are sets it always is at the end of a stage, and at its start but
    where the stage before has just measured the same student."""

    steps: Annotated[int, Field(ge=1)] | None = Field(None, description="Evaluate every so many steps as well")
    sets: dict[str, Prompts] = Field({}, description="Named held-out prompts")
    metric: Metric = Field("rouge_l", description="What the best checkpoint is chosen by, as the mean over the sets")
    seeds: list[Seed] = Field([10], min_length=1, description="One set of sampled answers a seed; mean and deviation")
    batch_size: Annotated[int, Field(ge=1)] = Field(
        16, description="Answers decoded and scored side by side on a device"
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(256, description="The longest answer, its end included")
    temperature: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Of the scored answers; 0 is greedy")
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="Of the scored answers; 0: all tokens")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="Of the scored answers; 1: all tokens")
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = Field(
        0, description="Ban repeated n-grams in the scored answers (the released MiniLLM code evaluates with 6)"
    )
    distinct: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="n of n-grams: the share of those of all answers that are different (the paper: 4)"
    )
    length_buckets: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="Rouge-L by tokens of the reference as well, up to each of these and above (the paper: 5, 10)"
    )
    exposure_bias: ExposureBias | None = Field(
        None, description="Measured by `minillm eval` and `minillm experiment`, never while training"
    )
    calibration: dict[str, Labels] = Field(
        {}, description="Named classification sets, measured by `minillm eval` and `minillm experiment` alone"
    )
    teacher: bool = Field(True, description="Measure the divergences to the teacher, where there is one")
    samples: Annotated[int, Field(ge=0)] = Field(
        4, description="Answers of each set that samples.jsonl and the report show"
    )
