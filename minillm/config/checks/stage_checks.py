"""What must hold between the keys of a stage, beyond the type of each. All of it without loading a model.

A check is a function of the facts and of the groups that its other parameters are called after. It is left out where
one of these groups is itself in error, and what it finds is not said where a key that it reads is.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from minillm.config.checks.facts import Facts, Found
from minillm.config.checks.length_checks import answers_fit, corpus_fits, evaluation_fits
from minillm.config.checks.model_checks import (
    adapters,
    deepspeed_usable,
    installed,
    pruned_layers,
    quantized,
    student_form,
)
from minillm.config.checks.place_checks import places_exist, stage_problem
from minillm.config.checks.rollout_checks import cuda_graphs_usable, neutral_sampling, one_temperature, whole_batches
from minillm.config.data import DataConfig
from minillm.config.errors import Finding
from minillm.config.evaluation import EvalConfig
from minillm.config.method import Method
from minillm.config.models import TeacherConfig
from minillm.config.shape import KeyPath, walk
from minillm.config.training import SCHEDULES, TrainConfig


def material(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """What a method trains on is given."""
    if data.prompts is None:
        yield Found("data.prompts", f"missing: method {method.name} trains on prompts")
    if method.name == "minillm" and method.lm_coef > 0 and data.corpus is None:
        message = f"missing: method.lm_coef is {method.lm_coef:g}; give plain text here or set method.lm_coef to 0"
        yield Found("data.corpus", message, ("method.lm_coef",))


def teacher_needed(facts: Facts, teacher: TeacherConfig | None, method: Method) -> Iterator[Found]:
    """All methods but one need a teacher."""
    if teacher is None and method.name != "sft":
        yield Found("teacher", f"missing: method {method.name} needs one")


def divergence_options(facts: Facts, method: Method) -> Iterator[Found]:
    """A parameter is written only for the divergence that has it."""
    if method.name == "kd":
        for key, having in (("beta", ("jsd",)), ("skew", ("skew_forward_kl", "skew_reverse_kl"))):
            changed = getattr(method, key) != type(method).model_fields[key].default
            if changed and method.divergence not in having:
                message = f"has no effect on divergence {method.divergence}; it is for {' and '.join(having)}"
                yield Found(f"method.{key}", message, ("method.divergence",))


def length_of_training(facts: Facts, train: TrainConfig) -> Iterator[Found]:
    """Training ends, and the schedule has what it needs."""
    limits = ("train.max_steps", "train.num_train_epochs", "train.max_seconds", "train.max_student_tokens")
    schedule, name = SCHEDULES[train.lr_scheduler_type], train.lr_scheduler_type
    if train.max_steps is None and train.num_train_epochs is None:
        if train.max_seconds is None and train.max_student_tokens is None:
            message = "missing: how long to train; or num_train_epochs, max_seconds or max_student_tokens"
            yield Found("train.max_steps", message, limits)
        elif schedule.counts_steps:
            message = f"{name} must know how many steps there will be: give max_steps or num_train_epochs as well"
            yield Found("train.lr_scheduler_type", message, limits)
    if isinstance(train.max_seconds, str):
        problem = stage_problem(train.max_seconds, facts)
        if problem is not None:
            yield Found("train.max_seconds", problem)
    for key in train.lr_scheduler_kwargs:
        if key not in schedule.takes:
            known = f"; it takes {', '.join(schedule.takes)}" if schedule.takes else "; it takes none"
            yield Found(
                ("train", "lr_scheduler_kwargs", key), f"no argument of {name}{known}", ("train.lr_scheduler_type",)
            )
    if schedule.needs_one_of and not set(schedule.needs_one_of) & set(train.lr_scheduler_kwargs):
        needed = " or ".join(schedule.needs_one_of)
        yield Found("train.lr_scheduler_kwargs", f"missing: {name} needs {needed}", ("train.lr_scheduler_type",))


def measurable(facts: Facts, eval: EvalConfig, teacher: TeacherConfig | None) -> Iterator[Found]:
    """The metric that chooses the best checkpoint can be measured."""
    if eval.sets and "_kl_" in eval.metric and (teacher is None or not eval.teacher):
        why = "there is no teacher" if teacher is None else "eval.teacher is false"
        yield Found("eval.metric", f"{eval.metric} is a distance to the teacher, and {why}", ("eval.teacher",))
    if eval.exposure_bias is not None and (teacher is None or not eval.teacher):
        why = "there is no teacher" if teacher is None else "eval.teacher is false"
        yield Found("eval.exposure_bias", f"is measured against the teacher, and {why}", ("eval.teacher",))
    if any(low >= high for low, high in pairwise(eval.length_buckets)):
        yield Found("eval.length_buckets", f"must rise from one to the next, not {eval.length_buckets}")
    repeated = [str(seed) for seed, count in Counter(eval.seeds).items() if count > 1]
    if repeated:
        yield Found("eval.seeds", f"names {', '.join(repeated)} more than once, which would measure the same twice")


CHECKS = (
    places_exist,
    student_form,
    pruned_layers,
    adapters,
    installed,
    quantized,
    deepspeed_usable,
    material,
    teacher_needed,
    divergence_options,
    neutral_sampling,
    one_temperature,
    whole_batches,
    cuda_graphs_usable,
    answers_fit,
    corpus_fits,
    evaluation_fits,
    length_of_training,
    measurable,
)


def check_stage(facts: Facts) -> list[Finding]:
    """Everything that the checks find in a stage."""
    in_error = [finding.path for finding in facts.findings]
    meant = [finding.instead for finding in facts.findings if finding.instead is not None]
    in_error += [path for path in meant if walk(None, facts.data, path)[1] is None]  # else it is there as well
    findings = []
    for check in CHECKS:
        groups = list(inspect.signature(check).parameters)[1:]
        if any(name not in facts.groups for name in groups):
            continue
        for found in check(facts, *(facts.groups[name] for name in groups)):
            key, *reads = (_path(key) for key in (found.key, *found.reads))
            if not any(_overlap(path, wrong) for path in (key, *reads) for wrong in in_error):
                findings.append(Finding(key, found.message))
    return findings


def _path(key: str | KeyPath) -> KeyPath:
    return tuple(key.split(".")) if isinstance(key, str) else key


def _overlap(one: KeyPath, other: KeyPath) -> bool:
    length = min(len(one), len(other))
    return one[:length] == other[:length]
