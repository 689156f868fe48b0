"""The keys of method llavadi; the formulas are in minillm/methods/llavadi.py."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import Divergence, MethodConfig
from minillm.config.needs import Needs, TermNeeds

Tokens = Literal["answers", "text", "all"]
LayerPair = Annotated[list[int], Field(min_length=2, max_length=2)]
Coefficient = Annotated[float, Field(ge=0.0)]
LAST = [-1, -1]
# what a coefficient of 0 leaves without effect
OF_COEFFICIENT = {
    "logits_coef": ("divergence", "beta", "skew", "logits_tokens", "standardize"),
    "features_coef": ("features_loss", "features_tokens", "layers"),
}


class LLAVADI(MethodConfig):
    """Cross-entropy, the teacher's distribution, its hidden states and its affinities, each with a weight (LLAVADI)."""

    name: Literal["llavadi"]
    ce_coef: Coefficient = Field(1.0, description="Weight of the cross-entropy on the reference")
    logits_coef: Coefficient = Field(1.0, description="Weight of the divergence of student and teacher")
    divergence: Divergence = Field("forward_kl", description="Of student and teacher at every token")
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="jsd: mixture weight of the teacher")
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="skew KLs: mixture weight of the other model"
    )
    logits_tokens: Tokens = Field(
        "answers",
        description="answers: where a token of the answer is predicted; text: those and the prompt, but for the places of its "
        "pictures; all: those as well",
    )
    standardize: bool = Field(
        False,
        description="The divergence is of logits that are standardised row by row: less their mean, over their standard deviation "
        "(released: true). It takes two products more of each head, with itself",
    )
    features_coef: Coefficient = Field(
        1.0, description="Weight of the distance of projected hidden states to the teacher's"
    )
    features_loss: Literal["mse", "cosine"] = Field(
        "mse", description="The distance: mean squared error, or 1 less the cosine"
    )
    features_tokens: Tokens = Field("all", description="Whose hidden states: as logits_tokens")
    layers: Annotated[list[LayerPair], Field(min_length=1)] = Field(
        [LAST],
        description="Pairs of a layer of the student and one of the teacher, each with a projector of its own: 0 is what the "
        "first layer reads, n what the n-th gives, -1 what the head reads",
    )
    affinity_coef: Coefficient = Field(
        0.0, description="Weight of the distance of the cosines between pictures' and answers' last hidden states"
    )
    summary: ClassVar[str] = "distillation of logits and features (LLAVADI) on reference answers"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "features_loss": ("Distance of the projected features", "mse, or 1 - cosine"),
        "affinity_loss": ("Distance of the affinities", "mean squared error"),
    }

    @property
    def reads_prompts(self) -> bool:
        """True where hidden states of the teacher at prompts are read, and not at the predictions of answers alone."""
        logits, features = self.logits_coef and self.logits_tokens, self.features_coef and self.features_tokens
        return bool(self.affinity_coef) or {logits, features} & {"text", "all"} != set()

    @property
    def standardizes(self) -> bool:
        """True where standardised logits are compared."""
        return self.standardize and self.logits_coef > 0

    def needs(self) -> Needs:
        features = tuple((student, teacher) for student, teacher in self.layers) if self.features_coef else ()
        term = TermNeeds(
            "distillation",
            ("references",),
            teacher=bool(self.logits_coef or features or self.affinity_coef),
            standardizes=self.standardizes,
            prompts=bool(self.logits_coef) and self.logits_tokens != "answers",
            features=features,
            features_prompts=bool(features) and self.features_tokens != "answers",
            affinity=self.affinity_coef > 0,
        )
        return Needs(
            (term,),
            references=True,
            images=self.affinity_coef > 0,
            teacher=True,
            teacher_abilities=frozenset(
                {"layers"} if features or self.reads_prompts else {"hidden"} if self.standardizes else ()
            ),
            trains=("student", "projector") if features else ("student",),
            because={"images": "affinity_coef"},
        )

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        if not (self.logits_coef or self.features_coef or self.affinity_coef):
            message = "nothing of the teacher is imitated: set one of them above 0, or use method sft"
            yield "logits_coef", message, ("features_coef", "affinity_coef")
        if len({tuple(pair) for pair in self.layers}) < len(self.layers):
            yield "layers", f"{self.layers} names a pair twice; leave one of them out", ()

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        for coefficient, keys in OF_COEFFICIENT.items():
            if not getattr(self, coefficient):
                for key in keys:
                    yield key, f"has no effect: {coefficient} is 0", coefficient
        if self.logits_coef:
            for key, having in (("beta", ("jsd",)), ("skew", ("skew_forward_kl", "skew_reverse_kl"))):
                if self.divergence not in having:
                    message = f"has no effect on divergence {self.divergence}; it is for {' and '.join(having)}"
                    yield key, message, "divergence"


KEYS = LLAVADI
