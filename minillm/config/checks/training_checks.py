"""Conditions between the keys of `train`: training ends, weights keep its updates, and the schedule has its arguments."""

from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found, Idle, architecture_keys
from minillm.config.checks.place_checks import stage_problem
from minillm.config.methods import Method
from minillm.config.models import StudentConfig
from minillm.config.training import SCHEDULES, DeepSpeedEngine, TorchEngine, TrainConfig
from minillm.config.upcycle import SPARSE_FORMS

LIMITS = ("train.max_steps", "train.num_train_epochs", "train.max_seconds", "train.max_student_tokens")


def length_of_training(facts: Facts, train: TrainConfig) -> Iterator[Found]:
    """Training ends, where the stage trains at all."""
    method = facts.groups.get("method")
    if method is not None and not method.needs().takes_steps:
        return
    name = train.lr_scheduler_type
    if train.max_steps is None and train.num_train_epochs is None:
        if train.max_seconds is None and train.max_student_tokens is None:
            message = "missing: how long to train; or num_train_epochs, max_seconds or max_student_tokens"
            yield Found("train.max_steps", message, LIMITS)
        elif SCHEDULES[name].counts_steps:
            message = f"{name} must know how many steps there will be: give max_steps or num_train_epochs as well"
            yield Found("train.lr_scheduler_type", message, LIMITS)
    if isinstance(train.max_seconds, str):
        problem = stage_problem(train.max_seconds, facts)
        if problem is not None:
            yield Found("train.max_seconds", problem)


def trainable_weights(
    facts: Facts, student: StudentConfig, method: Method, train: TrainConfig, engine: TorchEngine | DeepSpeedEngine
) -> Iterator[Found]:
    """The weights that are trained keep small updates: 16 bits round them away, unless the engine has fp32 masters."""
    needs = method.needs()
    trained = needs.takes_steps and "student" in needs.trains and student.lora is None
    masters = engine.type == "deepspeed" and train.bf16
    if trained and student.dtype != "float32" and not masters:
        message = (
            f"weights in {student.dtype} lose the updates of training to rounding; write float32, with train.bf16: true to "
            "compute in bfloat16, or train adapters over them (student.lora)"
        )
        yield Found("student.dtype", message, ("train.bf16", "student.lora"))


def balance_added_once(facts: Facts, method: Method, train: TrainConfig) -> Iterator[Found]:
    """The balance loss of a mixture of experts is not added by the method and by `train` at once."""
    if method.needs().auxiliary and train.router_aux_loss_coef:
        message = f"method {method.name} adds the balance loss itself, so that it would count twice; leave this at 0"
        yield Found("train.router_aux_loss_coef", message, ("method.name",))


def experts_to_balance(facts: Facts, student: StudentConfig, train: TrainConfig) -> Iterator[Found]:
    """A balance loss is for a student that is a mixture of experts, as far as its architecture is known here."""
    kind = architecture_keys(facts, "student").get("model_type")
    if train.router_aux_loss_coef and kind in SPARSE_FORMS:
        message = f"the student, a {kind}, has no experts to balance; leave this at 0, or upcycle it (student.init)"
        yield Found("train.router_aux_loss_coef", message, ("student.init", "student.path", "student.config"))


def schedule_arguments(facts: Facts, train: TrainConfig) -> Iterator[Found]:
    """The schedule has its arguments, and no others."""
    schedule, name = SCHEDULES[train.lr_scheduler_type], train.lr_scheduler_type
    for key in train.lr_scheduler_kwargs:
        if key not in schedule.takes:
            known = f"; it takes {', '.join(schedule.takes)}" if schedule.takes else "; it takes none"
            path = ("train", "lr_scheduler_kwargs", key)
            yield Found(path, f"no argument of {name}{known}", ("train.lr_scheduler_type",))
    if schedule.needs_one_of and not set(schedule.needs_one_of) & set(train.lr_scheduler_kwargs):
        needed = " or ".join(schedule.needs_one_of)
        yield Found("train.lr_scheduler_kwargs", f"missing: {name} needs {needed}", ("train.lr_scheduler_type",))
    if not schedule.warms_up:
        message = f"has no effect on the schedule {name}; {name}_with_warmup has a warm-up"
        yield Idle("train.warmup_steps", message, ("train.lr_scheduler_type",))
