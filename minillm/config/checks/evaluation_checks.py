"""Conditions between the keys of `eval`, and between `eval` and the teacher."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from minillm.config.checks.facts import Facts, Found, Idle
from minillm.config.evaluation import EvalConfig
from minillm.config.methods import Method
from minillm.config.models import TeacherSide
from minillm.config.training import TrainConfig

ANALYSES = ("exposure_bias", "calibration", "preference")  # that take too long for the evaluations of a run


def measurable(facts: Facts, eval: EvalConfig, teacher: TeacherSide | None) -> Iterator[Found]:
    """All that is asked for can be measured."""
    why = "there is no teacher" if teacher is None else None if eval.teacher else "eval.teacher is false"
    if why is None and "read" not in teacher.abilities:
        why = f"{teacher.called} cannot read the answers of the student"
    if eval.sets and eval.metric == "forward_kl_nats" and why is None and "sample" not in teacher.abilities:
        why = f"{teacher.called} cannot answer prompts, and this one is over the teacher's answers"
    if eval.sets and "_kl_" in eval.metric and why is not None:
        yield Found("eval.metric", f"{eval.metric} is a distance to the teacher, and {why}", ("eval.teacher",))
    if eval.sets and eval.metric == "label_accuracy" and eval.label_accuracy is None:
        yield Found(
            "eval.metric", "label_accuracy is not measured here; set eval.label_accuracy", ("eval.label_accuracy",)
        )
    if why is None and "sample" not in teacher.abilities:
        why = f"{teacher.called} cannot answer prompts"
    if eval.exposure_bias is not None and why is not None:
        yield Found("eval.exposure_bias", f"is measured against the teacher, and {why}", ("eval.teacher",))
    yield from _measurable_preference(eval, teacher)
    if any(low >= high for low, high in pairwise(eval.length_buckets)):
        yield Found("eval.length_buckets", f"must rise from one to the next, not {eval.length_buckets}")
    repeated = [str(seed) for seed, count in Counter(eval.seeds).items() if count > 1]
    if repeated:
        yield Found("eval.seeds", f"names {', '.join(repeated)} more than once, which would measure the same twice")


def _measurable_preference(eval: EvalConfig, teacher: TeacherSide | None) -> Iterator[Found]:
    asked = eval.preference
    if asked is None:
        return
    if not asked.pairs and not asked.sampled:
        message = "there is nothing to compare: name held-out pairs, or set eval.preference.sampled"
        yield Found("eval.preference.pairs", message, ("eval.preference.sampled",))
    if asked.sampled and not eval.sets:
        yield Found("eval.preference.sampled", "needs prompts to answer: name some in eval.sets", ("eval.sets",))
    for name in sorted({*asked.pairs} & {*eval.sets}) if asked.sampled else ():
        message = "is also a set of eval.sets, whose sampled pairs have their margins under that name; choose another"
        yield Found(("eval", "preference", "pairs", name), message, ("eval.preference.sampled",))
    why = "there is no teacher" if teacher is None else None if eval.teacher else "eval.teacher is false"
    if why is None and "read" not in teacher.abilities:
        why = f"{teacher.called} cannot read answers of the moment"
    if not asked.reference_free and why is not None:
        message = f"compares with the teacher, and {why}; set eval.preference.reference_free to do without"
        yield Found("eval.preference", message, ("eval.teacher",))
    if why is None and "sample" not in teacher.abilities:
        why = f"{teacher.called} cannot answer prompts"
    if asked.sampled and why is not None:
        yield Found("eval.preference.sampled", f"is over the teacher's answers, and {why}", ("eval.teacher",))


def comparable(facts: Facts, eval: EvalConfig, method: Method) -> Iterator[Found]:
    """A distance to the teacher is asked for where both models read the same ids."""
    if eval.sets and "_kl_" in eval.metric and method.needs().other_tokenizer:
        message = (
            f"{eval.metric} is a distance at every token, and in method {method.name} each model has tokens of its own"
        )
        yield Found("eval.metric", message, ("method.name",))


def evaluation_keys_used(facts: Facts, eval: EvalConfig) -> Iterator[Found]:
    """Keys of `eval` are for an evaluation that takes place, and those of sampling for one that samples."""
    if not eval.sets and not eval.measures_without_sets:
        for key in EvalConfig.model_fields:
            if key not in ("sets", *ANALYSES):
                yield Idle(f"eval.{key}", "has no effect without eval.sets: nothing is evaluated", ("eval.sets",))
    elif eval.temperature == 0:
        for key in ("top_k", "top_p"):
            message = "has no effect: at temperature 0 every token is the likeliest one"
            yield Idle(f"eval.{key}", message, ("eval.temperature",))


def measured_after_training(facts: Facts, eval: EvalConfig, train: TrainConfig) -> Iterator[Found]:
    """Analyses that take too long for the evaluations of a run are asked for where they are made."""
    for key in ANALYSES:
        message = "has no effect on training: it is measured by `minillm eval` and `minillm experiment`"
        yield Idle(f"eval.{key}", message, ("eval",))
