"""`eval`: held-out prompts, the answers to them, and the distances to the teacher."""

from typing import Annotated, Literal

from pydantic import Field

from minillm.config.analysis_keys import ExposureBias, Labels, Preference
from minillm.config.data import Pairs, Parser, Prompts
from minillm.config.keys import Seed, Strict

Metric = Literal[
    "rouge_l",
    "exact_match",
    "label_accuracy",
    "reverse_kl_nats",
    "sequence_reverse_kl_nats",
    "forward_kl_nats",
    "loss_nats",
]


class LabelAccuracy(Strict):
    """The percentage of answers whose label is right, and of those without one. A set's own parser is for its references."""

    parser: Parser | None = Field(
        None, description="Takes the label out of an answer of the model; null: the answer is the label"
    )
    compare: Literal["text", "equation"] = Field(
        "text",
        description="text: as exact_match does; equation: by the exact value of numbers, + - * / and parentheses, so that "
        "(8 - 3) is 5.0",
    )


class EvalConfig(Strict):
    """The measurements of a stage, and when they are made.

    Where there are sets, a stage is evaluated at its end, and at its start unless the stage before it has just evaluated
    the same student.
    """

    steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The number of steps between evaluations; null: at the start and the end alone"
    )
    sets: dict[str, Prompts] = Field({}, description="Named held-out prompts")
    metric: Metric = Field(
        "rouge_l", description="The metric that chooses the best checkpoint, as its mean over the sets"
    )
    seeds: list[Seed] = Field(
        [10],
        min_length=1,
        description="One set of answers is sampled for each seed; the results are means and deviations",
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        16, description="Answers that are decoded and scored side by side on one device"
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(
        256, description="Tokens of the longest answer, its end included"
    )
    temperature: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Of the scored answers; 0 is greedy")
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="Of the scored answers; 0: all tokens")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="Of the scored answers; 1: all tokens")
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Length of n-grams that no scored answer repeats; 0: none (the released MiniLLM code evaluates with 6)",
    )
    distinct: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="Lengths of n-grams, for the percentage of all answers' n-grams that are distinct (the paper: 4)",
    )
    bits_per_byte: bool = Field(
        False,
        description="Give the loss on references in bits for a byte of their text too, in which models with different "
        "tokenizers can be compared",
    )
    length_buckets: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="Limits, in tokens of the reference, between which Rouge-L is also given separately (the paper: 5, 10)",
    )
    label_accuracy: LabelAccuracy | None = Field(
        None, description="Compare the labels that answers end in with those of the references; null: do not"
    )
    exposure_bias: ExposureBias | None = Field(
        None, description="An analysis that `minillm eval` and `minillm experiment` make, never training"
    )
    calibration: dict[str, Labels] = Field(
        {}, description="Named classification sets, for an analysis that `minillm eval` and `minillm experiment` make"
    )
    preference: Preference | None = Field(
        None,
        description="Margins of held-out pairs of answers, an analysis that `minillm eval` and `minillm experiment` make",
    )
    teacher: bool = Field(True, description="Measure the divergences to the teacher, where there is one")
    samples: Annotated[int, Field(ge=0)] = Field(
        4, description="Number of answers from each set that samples.jsonl and the report show"
    )

    @property
    def held_out_pairs(self) -> dict[str, Pairs]:
        """The named pairs of `preference`."""
        return {} if self.preference is None else self.preference.pairs

    @property
    def measures_without_sets(self) -> bool:
        """True where an analysis has data of its own, so that there need not be prompts to answer."""
        return bool(self.calibration or self.held_out_pairs)
