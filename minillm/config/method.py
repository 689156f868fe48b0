"""`method`: the objective. One class for each method; the formulas are in minillm/methods/NAME.py."""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from minillm import UserError
from minillm.config.checks.packages import is_installed
from minillm.config.data import TaskKeys
from minillm.config.functions import load_function
from minillm.config.keys import ModelPath, Strict
from minillm.config.lora import LoraConfig
from minillm.config.needs import Needs, TermNeeds, UndeclaredNeeds
from minillm.config.preference_keys import PreferenceKeys

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]

# Differences between a preset and the defaults below. The defaults are the published formulas with the settings that were
# ahead of the published ones on both measured pairs of models (benchmarks/results/evidence.md).
PAPER = dict(ppo_epochs=4)
LMOPS = dict(
    ppo_epochs=4,
    gamma=0.95,
    return_from="current",
    whiten="all",
    importance_weight_in_clip=True,
    single_step_weighted=False,
    reduction="tokens",
    reward_scaling=0.5,
    cliprange_reward=100.0,
    pt_kd_ratio=0.5,
)
PRESETS = {"measured": {}, "paper": PAPER, "lmops": LMOPS}


class MethodConfig(Strict):
    """The keys of one method, and what the method needs. A subclass that does not define `needs` is refused."""

    summary: ClassVar[str]  # for the model card: what the student was trained by
    # Metrics of the method's steps that have a panel of their own in the report's picture: key -> (title, unit).
    panels: ClassVar[dict[str, tuple[str, str]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "needs" not in vars(cls) or "summary" not in vars(cls):
            raise UndeclaredNeeds(
                f"{cls.__name__} must define `needs`, what the method samples, reads and trains (minillm.config.needs.Needs), "
                "and `summary`, a phrase for the model card"
            )

    @classmethod
    def panels_of(cls, keys: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """The panels of a method with these keys, as a file has them."""
        return cls.panels

    def needs(self) -> Needs:
        """The needs of the method with these keys."""
        raise NotImplementedError

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Contradictions between the method's own keys: (key, message, the other keys that it comes from)."""
        return iter(())

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        """Keys that another key leaves without effect: (key, message, that other key)."""
        return iter(())

    def unset_value(self, key: str) -> Any:
        """The value that a key has where nobody gives one."""
        return type(self).model_fields[key].default

    def value_without(self, need: str) -> Any:
        """The value of the key behind a need (Needs.because) at which the method no longer has it.

        Tried are the bounds and the choices of the key; None where none of them does away with the need.
        """
        key = self.needs().because[need]
        for value in _extremes(type(self).model_fields[key]):
            if not getattr(self.model_copy(update={key: value}).needs(), need):
                return value
        return None


def _extremes(field: FieldInfo) -> Iterator[Any]:
    for bound in ("ge", "le"):
        yield from (getattr(mark, bound) for mark in field.metadata if hasattr(mark, bound))
    if field.annotation is bool:
        yield from (False, True)
    if get_origin(field.annotation) is Literal:
        yield from get_args(field.annotation)


class MiniLLM(MethodConfig):
    """MiniLLM (arXiv 2306.08543): policy gradient of the sequence-level reverse KL on the student's own samples."""

    name: Literal["minillm"]
    preset: Literal["measured", "paper", "lmops"] = Field(
        "measured",
        description="measured: the published formulas with settings that measured better; paper: with the published "
        "settings; lmops: the computation of the released code. Keys that are given override it",
    )
    alpha: Probability = Field(
        0.2, description="Mixture weight of the teacher in the sampling distribution alpha p + (1 - alpha) q"
    )
    gamma: Annotated[float, Field(ge=0.0, le=1.0)] = Field(1.0, description="Discount of later rewards")
    return_from: Literal["next", "current"] = Field(
        "next", description="The first reward in a token's return: that of the next token, or its own (current)"
    )
    length_norm: bool = Field(True, description="Divide a return by the number of its rewards")
    whiten: Literal["none", "valid", "all"] = Field(
        "none", description="Standardise advantages over response tokens (valid) or over padding as well (all)"
    )
    cliprange: Annotated[float, Field(gt=0.0)] | None = Field(
        0.2, description="PPO's clip range of the ratio; null: no clip"
    )
    importance_weight_in_clip: bool = Field(
        True, description="Clip q/p~ (true) or the ratio to the sampling student alone, weighted outside (false)"
    )
    importance_weight: Literal["token", "per_decision", "sequence"] = Field(
        "token",
        description="token: the paper's q/p~ of each token alone; per_decision and sequence: the products that make "
        "the gradient exact, at a higher variance",
    )
    single_step_weighted: bool = Field(True, description="Weight the single-step term by q/p~")
    single_step: bool = Field(True, description="The exact one-token reverse KL; false is the paper's ablation")
    reduction: Literal["sequences", "tokens"] = Field(
        "sequences", description="Sum over tokens divided by the number of sequences, or by the number of tokens"
    )
    ppo_epochs: Annotated[int, Field(ge=1)] = Field(
        2,
        description="Passes over each buffer of answers (published: 4); fewer learn more per token, and sample more",
    )
    reward_scaling: Annotated[float, Field(gt=0.0)] | None = Field(None, description="Rewards are divided by this")
    cliprange_reward: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Rewards are then clipped to +- this"
    )
    lm_coef: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Weight of the pre-training loss on data.corpus")
    pt_kd_ratio: Probability = Field(
        0.0, description="Weight of the forward KL to the teacher in the pre-training loss"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[preset], **values} if preset in PRESETS else values

    summary: ClassVar[str] = "MiniLLM: policy gradient of the sequence-level reverse KL on the student's own samples"

    def needs(self) -> Needs:
        terms = [TermNeeds("policy", ("answers",), teacher=True)]
        if self.lm_coef > 0:
            terms.append(TermNeeds("pretraining", ("corpus",), teacher=self.pt_kd_ratio > 0))
        sampler = {0.0: "student", 1.0: "teacher"}.get(self.alpha, "mixture")
        return Needs(
            tuple(terms),
            corpus=self.lm_coef > 0,
            samples=(sampler,),
            buffered=True,
            inner_epochs=self.ppo_epochs,
            neutral_sampling=True,
            teacher=True,
            teacher_abilities=frozenset() if sampler == "student" else frozenset({"sample"}),
            because={"corpus": "lm_coef"},
        )

    def unset_value(self, key: str) -> Any:
        return PRESETS[self.preset].get(key, super().unset_value(key))

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if self.lm_coef == 0:
            yield "pt_kd_ratio", "has no effect: with lm_coef 0 there is no pre-training loss", "lm_coef"
        if not self.single_step:
            yield "single_step_weighted", "has no effect: with single_step false there is no such term", "single_step"
        if self.cliprange is None:
            yield "importance_weight_in_clip", "has no effect: with cliprange null nothing is clipped", "cliprange"
        if self.alpha == 0:
            own = "has no effect: with alpha 0 the student samples alone, and every importance weight is 1"
            for key in ("importance_weight", "importance_weight_in_clip", "single_step_weighted"):
                yield key, own, "alpha"


class SFT(MethodConfig):
    """Supervised fine-tuning on the references."""

    name: Literal["sft"]
    summary: ClassVar[str] = "supervised fine-tuning on reference answers"

    def needs(self) -> Needs:
        return Needs((TermNeeds("supervised", ("references",)),), references=True)


class KD(MethodConfig):
    """Word-level distillation on the references: (1 - ce_ratio) divergence + ce_ratio cross-entropy."""

    name: Literal["kd"]
    divergence: Divergence = Field("forward_kl", description="Of student and teacher at every token of the reference")
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="jsd: mixture weight of the teacher")
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="skew KLs: mixture weight of the other model"
    )
    ce_ratio: Probability = Field(0.5, description="Weight of the cross-entropy on the reference")
    summary: ClassVar[str] = "word-level distillation on reference answers"

    def needs(self) -> Needs:
        term = TermNeeds("distillation", ("references",), teacher=self.ce_ratio < 1)
        return Needs((term,), references=True, teacher=True)

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        for key, having in (("beta", ("jsd",)), ("skew", ("skew_forward_kl", "skew_reverse_kl"))):
            if self.divergence not in having:
                message = f"has no effect on divergence {self.divergence}; it is for {' and '.join(having)}"
                yield key, message, "divergence"
        if self.ce_ratio == 1:
            for key in ("divergence", "beta", "skew"):
                yield key, "has no effect: with ce_ratio 1 the loss is the cross-entropy alone", "ce_ratio"


class SeqKD(MethodConfig):
    """Sequence-level distillation: the teacher answers every prompt once, and the student is trained on these answers."""

    name: Literal["seqkd"]
    temperature: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Of the teacher's answers; 0 is greedy")
    kd_ratio: Probability = Field(
        0.0, description="Weight of the forward KL to the teacher (the released scripts: 0.5)"
    )
    summary: ClassVar[str] = "sequence-level distillation: training on the teacher's answers"

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("distillation", ("answers",), teacher=self.kd_ratio > 0),),
            samples=("teacher",),
            written_once=True,
            temperature_key="method.temperature",
            teacher=True,
            teacher_abilities=frozenset({"sample"}),
        )


class GKD(MethodConfig):
    """Generalised knowledge distillation (arXiv 2306.13649): JSD on the student's samples or on references."""

    name: Literal["gkd"]
    on_policy: Probability = Field(0.5, description="lambda: the fraction of steps on the student's own answers")
    beta: Probability = Field(0.5, description="Generalised JSD; 0 is the forward KL and 1 the reverse KL")
    summary: ClassVar[str] = "generalised knowledge distillation"

    def needs(self) -> Needs:
        rows = ("answers",) * (self.on_policy > 0) + ("references",) * (self.on_policy < 1)
        return Needs(
            (TermNeeds("distillation", rows, teacher=True),),
            references=self.on_policy < 1,
            samples=("student",) if self.on_policy > 0 else (),
            teacher=True,
            because={"references": "on_policy"},
        )


class TAID(MethodConfig):
    """Temporally adaptive interpolated distillation (arXiv 2501.16937): the target moves from the student to the teacher."""

    name: Literal["taid"]
    steps: Annotated[int, Field(ge=1)] = Field(
        description="Steps over which the least t rises from t_start to t_end in a line (published: all of the stage)"
    )
    t_start: Probability = Field(0.4, description="The teacher's part t of the target at first (published: 0.4 or 0.2)")
    t_end: Probability = Field(1.0, description="The greatest t; 1 is the teacher alone")
    adaptive: bool = Field(
        True, description="t may run ahead of the line where the loss falls; false: t is on the line"
    )
    alpha: Probability = Field(5e-4, description="The part of the way to 1 that t goes in a step, at most")
    beta: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.99, description="Momentum of the relative change of the loss, which sets the pace of t"
    )
    summary: ClassVar[str] = "temporally adaptive interpolated distillation (TAID) on reference answers"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "interpolation": ("Teacher's part t of the target", "0 student, 1 teacher")
    }

    def needs(self) -> Needs:
        return Needs((TermNeeds("distillation", ("references",), teacher=True),), references=True, teacher=True)

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        if self.t_start > self.t_end:
            message = f"{self.t_start:g} is above t_end {self.t_end:g}: t rises; lower t_start or raise t_end"
            yield "t_start", message, ("t_end",)

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if not self.adaptive:
            for key in ("alpha", "beta"):
                yield key, "has no effect: with adaptive false t rises in a line", "adaptive"
        if self.t_start == self.t_end:
            for key in ("adaptive", "alpha", "beta"):
                yield key, "has no effect: with t_start equal to t_end t never moves", "t_start"


class OPD(MethodConfig):
    """On-policy distillation: policy gradient of the reverse KL at the student's own tokens, each with its own reward."""

    name: Literal["opd"]
    cliprange: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="PPO's clip range of the ratio to the student that sampled; null (published): no clip"
    )
    task_reward: str | None = Field(
        None,
        description="A function of yours, package.module:function or file.py:function, which is imported and called as "
        "f(prompt_text, answer_text, record) for every answer, on rank 0; the number that it returns is added to the "
        "advantage of every token of the answer. record is {index, references} of the prompt. null: none",
    )
    task_reward_weight: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="Weight of the task reward beside the log-ratios, in nats; 0 only measures it"
    )
    summary: ClassVar[str] = "on-policy distillation: policy gradient of the reverse KL at sampled tokens"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "sampled_reverse_kl_nats": ("Reverse KL of sampled tokens", "nats/token"),
        "task_reward": ("Task reward", "mean over answers"),
    }

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("policy", ("answers",), teacher=True),),
            samples=("student",),
            buffered=True,
            neutral_sampling=True,
            teacher=True,
        )

    def task_reward_function(self) -> Callable[[str, str, dict[str, Any]], float] | None:
        """The function that `task_reward` names, imported; None without one. Raises UserError where that fails."""
        if self.task_reward is None:
            return None
        return load_function(self.task_reward, "prompt_text", "answer_text", "record")

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        try:
            self.task_reward_function()
        except UserError as problem:
            yield "task_reward", str(problem), ()

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if self.task_reward is None:
            yield "task_reward_weight", "has no effect: there is no task_reward", "task_reward"


class DPKD(PreferenceKeys, MethodConfig):
    """Direct preference knowledge distillation (arXiv 2406.19774): the teacher's choice is preferred to the student's."""

    name: Literal["dpkd"]
    pairs: Literal["sequence", "token_argmax"] = Field(
        "sequence",
        description="sequence: sampled answers of teacher and student (the paper); token_argmax: their likeliest ids at "
        "every token of the references (the released code)",
    )
    ce_coef: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="token_argmax: weight of the cross-entropy on the references"
    )
    lm_coef: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Weight of the pre-training loss on data.corpus")
    pt_kd_ratio: Probability = Field(
        0.0, description="Weight of the forward KL to the teacher in the pre-training loss (released: 0.5)"
    )
    summary: ClassVar[str] = (
        "direct preference knowledge distillation (DPKD): the teacher's choice before the student's"
    )
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "margin": ("Margin of the teacher's choice over the student's", "reward")
    }

    def needs(self) -> Needs:
        token = self.pairs == "token_argmax"
        compared = not self.reference_free
        first = (
            TermNeeds("preference", ("references",), teacher=True, labels=2 + (self.ce_coef > 0), scored=True)
            if token
            else TermNeeds("preference", ("answers",), teacher=compared, sequences=2)
        )
        pretraining = TermNeeds("pretraining", ("corpus",), teacher=self.pt_kd_ratio > 0)
        return Needs(
            (first, pretraining) if self.lm_coef > 0 else (first,),
            references=token,
            corpus=self.lm_coef > 0,
            samples=() if token else ("teacher", "student"),
            teacher=True,
            teacher_abilities=frozenset() if token else frozenset({"sample"}),
            because={"corpus": "lm_coef", "references": "pairs"},
        )

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        yield from self.preference_findings()

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        yield from self.idle_preference_keys()
        if self.pairs == "token_argmax":
            yield "length_norm", "has no effect on pairs token_argmax: every token is a pair of its own", "pairs"
        else:
            yield "ce_coef", "has no effect on pairs sequence; it is for token_argmax", "pairs"
        if self.lm_coef == 0:
            yield "pt_kd_ratio", "has no effect: with lm_coef 0 there is no pre-training loss", "lm_coef"


class DistiLLM(MethodConfig):
    """DistiLLM (arXiv 2402.03898): a skew KL, with a replay buffer of the student's answers and an adaptive threshold."""

    name: Literal["distillm"]
    steps: Annotated[int, Field(ge=1)] = Field(
        description="Steps over which new answers give way to the replay buffer (published: all of the stage)"
    )
    divergence: Literal["skew_forward_kl", "skew_reverse_kl"] = Field(
        "skew_forward_kl", description="Of student and teacher at every response token"
    )
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.1, description="Mixture weight of the other model")
    replay_size: Annotated[int, Field(ge=1)] = Field(1000, description="Answers that the replay buffer holds")
    threshold_start: Probability = Field(0.0, description="The fraction of steps on the student's answers at first")
    threshold_step: Probability = Field(
        0.1, description="That fraction rises by this where an evaluation's loss_nats has risen; 0: it stays as it is"
    )
    tolerance: Annotated[float, Field(ge=0.0)] = Field(0.1, description="The least rise of the loss that counts, nats")
    lm_coef: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Weight of the pre-training loss on data.corpus")
    summary: ClassVar[str] = "DistiLLM: a skew KL on references and on the student's own answers, with replay"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "threshold": ("Threshold of sampled answers", "0 to 1"),
        "fresh_share": ("New answers, part of the steps", "%"),
        "replayed_share": ("Replayed answers, part of the steps", "%"),
    }

    def needs(self) -> Needs:
        answers, references = self._adapts or self.threshold_start > 0, self._adapts or self.threshold_start < 1
        terms = [TermNeeds("distillation", ("answers",) * answers + ("references",) * references, teacher=True)]
        if self.lm_coef > 0:
            terms.append(TermNeeds("pretraining", ("corpus",)))
        return Needs(
            tuple(terms),
            references=references,
            corpus=self.lm_coef > 0,
            samples=("student",) if answers else (),
            teacher=True,
            evaluations=self._adapts,
            because={"corpus": "lm_coef", "evaluations": "threshold_step"},
        )

    @property
    def _adapts(self) -> bool:
        return self.threshold_step > 0 and self.threshold_start < 1

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if self.threshold_start == 1:
            yield "threshold_step", "has no effect: with threshold_start 1 it cannot rise", "threshold_start"
            yield "tolerance", "has no effect: with threshold_start 1 the threshold cannot rise", "threshold_start"
        elif self.threshold_step == 0:
            yield "tolerance", "has no effect: with threshold_step 0 the threshold never moves", "threshold_step"
            if self.threshold_start == 0:
                for key in ("steps", "replay_size"):
                    yield key, "has no effect: with threshold_step 0 no answer is ever sampled", "threshold_step"


class DistiLLM2(MethodConfig):
    """Contrastive distillation (arXiv 2503.07067): a skew KL on the teacher's answers, a skew reverse KL on the student's."""

    name: Literal["distillm2"]
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="alpha of both: KL(p || alpha p + (1 - alpha) q) and KL(q || (1 - alpha) p + alpha q)"
    )
    student_weight: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="Weight of the loss on the student's answers beside that on the teacher's (released: 1)"
    )
    summary: ClassVar[str] = "contrastive distillation on the teacher's answers and the student's (DistiLLM-2)"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "skew_forward_kl_nats": ("Skew KL on the teacher's answers", "nats/token"),
        "skew_reverse_kl_nats": ("Skew reverse KL on the student's answers", "nats/token"),
    }

    def needs(self) -> Needs:
        return Needs(
            tuple(TermNeeds(name, ("answers",), teacher=True) for name in ("teacher_answers", "student_answers")),
            samples=("teacher", "student"),
            teacher=True,
            teacher_abilities=frozenset({"sample"}),
        )


class OKD(MethodConfig):
    """Online knowledge distillation (arXiv 2409.12512, reconstructed): adapters in the teacher learn with the student."""

    name: Literal["okd"]
    lora: LoraConfig = Field(
        LoraConfig(r=8, alpha=16), description="The teacher's adapters; its own weights are frozen"
    )
    student_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="Of the student to the adapted teacher, which is a constant there"
    )
    student_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="jsd: mixture weight of the teacher")
    student_kd_ratio: Probability = Field(
        0.5, description="lambda: weight of the divergence in the student's loss; the rest is cross-entropy"
    )
    teacher_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="Of the adapted teacher to the student, which is a constant there: KL(q || p) is forward",
    )
    teacher_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="jsd: mixture weight of the student")
    teacher_kd_ratio: Probability = Field(
        0.5, description="mu: weight of the divergence in the adapters' loss; the rest is cross-entropy"
    )
    teacher_learning_rate: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Highest learning rate of the adapters; null: train.learning_rate"
    )
    anchor: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="Weight of KL(p_0 || p), from the unadapted to the adapted teacher; 0: none"
    )
    summary: ClassVar[str] = (
        "online distillation (OKD, reconstructed) with adapters in the teacher on reference answers"
    )
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "teacher_drift_nats": ("KL of the adapted from the unadapted teacher", "nats/token"),
        "loss/student": ("Loss of the student", "nats/token"),
        "loss/teacher": ("Loss of the teacher's adapters", "nats/token"),
    }

    def needs(self) -> Needs:
        terms = [TermNeeds(name, ("references",), teacher=True) for name in ("student", "teacher")]
        if self.anchor > 0:
            terms.append(TermNeeds("anchor", ("references",), teacher=True))
        return Needs(
            tuple(terms),
            references=True,
            teacher=True,
            teacher_abilities=frozenset({"hidden", "train"}),
            trains=("student", "teacher"),
        )

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        if not is_installed("peft"):
            yield "lora", "needs peft, which is not installed: pip install -e '.[lora]' in minillm's folder", ()

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        for side in ("student", "teacher"):
            if getattr(self, f"{side}_kd_ratio") == 0:
                message = f"has no effect: with {side}_kd_ratio 0 the loss is the cross-entropy alone"
                for key in (f"{side}_divergence", f"{side}_beta"):
                    yield key, message, f"{side}_kd_ratio"
            elif getattr(self, f"{side}_divergence") != "jsd":
                message = f"has no effect on divergence {getattr(self, f'{side}_divergence')}; it is for jsd"
                yield f"{side}_beta", message, f"{side}_divergence"


class Task(TaskKeys):
    """One of the tasks of a student that learns several from every record."""

    weight: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="Of the mean over the tokens of the task's answers"
    )


class StepByStep(MethodConfig):
    """Distilling step by step (arXiv 2305.02301): labels and the rationales behind them, each a task of its own."""

    name: Literal["step_by_step"]
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], Task] = Field(
        {
            "label": Task(prefix="predict: ", answer="{label}"),
            "rationale": Task(prefix="explain: ", answer="{rationale}"),
        },
        min_length=1,
        description="The tasks by name, of letters, digits and _; those that are given take the place of both",
    )
    summary: ClassVar[str] = "distilling step by step: labels and rationales as separate tasks"

    @classmethod
    def panels_of(cls, keys: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        names = list(keys.get("tasks") or cls.model_fields["tasks"].default)
        losses = {f"cross_entropy_nats/{name}": (f"Cross-entropy of task {name}", "nats/token") for name in names}
        return losses | {f"unanswered_percent/{name}": (f"Records without a {name}", "%") for name in names}

    def needs(self) -> Needs:
        return Needs(tuple(TermNeeds(name, ("references",)) for name in self.tasks), tasks=dict(self.tasks))


class LM(MethodConfig):
    """Pre-training on the packed blocks of a corpus: (1 - kd_ratio) cross-entropy + kd_ratio forward KL to the teacher."""

    name: Literal["lm"]
    kd_ratio: Probability = Field(
        0.0, description="Weight of the forward KL to the teacher (word-level distillation as in MiniPLM's tables: 0.5)"
    )
    summary: ClassVar[str] = "pre-training on plain text"
    panels: ClassVar[dict[str, tuple[str, str]]] = {"cross_entropy_nats": ("Cross-entropy on the text", "nats/token")}

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("pretraining", ("corpus",), teacher=self.kd_ratio > 0),),
            prompts=False,
            corpus=True,
            teacher=self.kd_ratio > 0,
            because={"teacher": "kd_ratio"},
        )


class MiniPLM(MethodConfig):
    """A corpus chosen by a teacher and a weaker reference model (MiniPLM, arXiv 2410.17215); the student is not touched."""

    name: Literal["miniplm"]
    reference: ModelPath = Field(
        description="The weaker model that the teacher is compared to, with the teacher's tokenizer: as teacher.path, mostly "
        "the stage:NAME of an lm. It is read in teacher.dtype"
    )
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5,
        description="The part of all documents that is kept: floor(ratio * documents), counted as the number is written",
    )
    summary: ClassVar[str] = "nothing: documents were chosen by how much likelier the teacher finds them (MiniPLM)"

    def needs(self) -> Needs:
        return Needs(
            (),
            prompts=False,
            corpus=True,
            whole_documents=True,
            teacher=True,
            reference=self.reference,
            trains=(),
        )


Method = Annotated[
    MiniLLM | SFT | KD | SeqKD | GKD | TAID | OPD | DPKD | DistiLLM | DistiLLM2 | OKD | StepByStep | LM | MiniPLM,
    Field(discriminator="name"),
]
