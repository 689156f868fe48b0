"""Conditions between `rollout` and the method, the batches and the engine."""

from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found, Idle
from minillm.config.methods import Method
from minillm.config.models import CachedTeacherConfig, ServedTeacherConfig, TeacherSide
from minillm.config.rollout import RolloutConfig
from minillm.config.training import Engine, TrainConfig
from minillm.distributed.launcher import launched_size

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the values that leave a model's distribution as it is


def neutral_sampling(facts: Facts, rollout: RolloutConfig, method: Method) -> Iterator[Found]:
    """A method that weighs samples by the models' own distributions samples from these."""
    needs = method.needs()
    if not needs.neutral_sampling:
        return
    for key, neutral in NEUTRAL.items():
        value = getattr(rollout, key)
        weighed = key == "temperature" and needs.weighs_temperature
        if value != neutral and not weighed:
            yield Found(
                f"rollout.{key}",
                f"must be {neutral:g} for method {method.name}, not {value:g}: its gradient weighs every sampled token by "
                "the models' own distributions (q/p~), and is wrong for samples from any other",
                ("method.name",),
            )


def one_temperature(facts: Facts, rollout: RolloutConfig, method: Method) -> Iterator[Found]:
    """Only one key sets the temperature of the answers."""
    needs = method.needs()
    if needs.samples and needs.temperature_key != "rollout.temperature" and rollout.temperature != 1.0:
        message = f"has no effect on method {method.name}: the temperature of its answers is {needs.temperature_key}"
        yield Found("rollout.temperature", message, ("method.name",))


def whole_batches(facts: Facts, rollout: RolloutConfig, train: TrainConfig, method: Method) -> Iterator[Found]:
    """A buffer is used up in whole steps."""
    ranks = launched_size()
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
    of_ranks = f" x {ranks} ranks" if ranks > 1 else ""
    if method.needs().buffered and rollout.buffer_size % step:
        yield Found(
            "rollout.buffer_size",
            f"{rollout.buffer_size} answers do not divide into steps of {step} (per_device_train_batch_size "
            f"{train.per_device_train_batch_size} x gradient_accumulation_steps {train.gradient_accumulation_steps}{of_ranks}); "
            f"the nearest that do: {_multiples_around(rollout.buffer_size, step)}",
            ("train.per_device_train_batch_size", "train.gradient_accumulation_steps", "method.name"),
        )


def several_answers(facts: Facts, rollout: RolloutConfig, train: TrainConfig, method: Method) -> Iterator[Found]:
    """Several answers to a prompt are for methods that take them, and divide what is decoded and trained on at a time."""
    needs, answers, key = method.needs(), rollout.answers_per_prompt, "rollout.answers_per_prompt"
    if answers == 1 or not needs.samples:
        return
    if not needs.several_answers:
        message = f"must be 1: method {method.name} with these keys takes one answer to each prompt"
        yield Found(key, message, ("method.name",))
        return
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * launched_size()
    divided = {"rollout.batch_size": rollout.batch_size}
    if needs.buffered:
        divided["rollout.buffer_size"] = rollout.buffer_size
    for name, size in divided.items():
        if size % answers:
            around = _multiples_around(size, answers)
            message = f"{size} answers are not {answers} to each of some prompts; the nearest that are: {around}"
            yield Found(name, message, (key,))
    if not needs.buffered and step % answers:
        around = _multiples_around(step, answers)
        message = f"{answers} answers to each prompt do not fill steps of {step}; the nearest that they do: {around}"
        yield Found(key, message, ("train.per_device_train_batch_size", "train.gradient_accumulation_steps"))
    for other in ("cuda_graphs", "shared_coins"):
        if getattr(rollout, other):
            yield Found(
                key, f"must be 1: the loop of rollout.{other} reads a prompt for every answer", (f"rollout.{other}",)
            )


def shared_prompts_read(facts: Facts, rollout: RolloutConfig, method: Method, engine: Engine) -> Iterator[Found]:
    """A prompt is read once for several answers, which a gathering of layers rules out."""
    layers = engine.type == "deepspeed" and engine.stage == 3 and engine.gather == "layers"
    if rollout.answers_per_prompt > 1 and method.needs().several_answers and layers:
        message = "must be 1: with engine.gather layers all ranks read as many prompts, one for every answer"
        yield Found("rollout.answers_per_prompt", message, ("engine.gather",))


def written_several_times(
    facts: Facts, rollout: RolloutConfig, method: Method, teacher: TeacherSide | None
) -> Iterator[Found]:
    """A teacher that writes several answers to a prompt is here."""
    needs = method.needs()
    if rollout.answers_per_prompt == 1 or not needs.several_answers or needs.samples != ("teacher",):
        return
    if isinstance(teacher, CachedTeacherConfig | ServedTeacherConfig):
        message = f"must be 1: a teacher of type {teacher.type} gives one answer to each prompt"
        yield Found("rollout.answers_per_prompt", message, ("teacher.type",))


def _multiples_around(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} and {below + step}" if below else str(step)


def sampling_keys_used(facts: Facts, rollout: RolloutConfig, method: Method) -> Iterator[Found]:
    """Keys of `rollout` are used with a method that samples, and the buffer's with a method that has one."""
    needs = method.needs()
    if not needs.samples:
        for key in ("buffer_size", "answers_per_prompt", "batch_size", "max_new_tokens", *NEUTRAL):
            yield Idle(f"rollout.{key}", f"has no effect: method {method.name} samples no answers", ("method.name",))
    elif not needs.buffered:
        yield Idle("rollout.buffer_size", f"has no effect: method {method.name} keeps no buffer", ("method.name",))


def cuda_graphs_usable(facts: Facts, rollout: RolloutConfig, engine: Engine) -> Iterator[Found]:
    """CUDA graphs are asked for where they are possible.

    Only the run itself will know whether `device: auto` finds a GPU.
    """
    if not rollout.cuda_graphs:
        return
    if engine.type != "torch":
        message = f"is for engine.type torch: a graph holds addresses, and weights that {engine.type} gathers lie elsewhere each time"
        yield Found("rollout.cuda_graphs", message, ("engine.type",))
    elif engine.device == "cpu":
        yield Found("rollout.cuda_graphs", "needs a GPU, but engine.device is cpu", ("engine.device",))


def mixture_in_one_graph(
    facts: Facts, rollout: RolloutConfig, engine: Engine, method: Method, teacher: TeacherSide | None
) -> Iterator[Found]:
    """A step that is captured as a CUDA graph runs both models of a mixture on one GPU."""
    if not rollout.cuda_graphs or engine.type != "torch" or "mixture" not in method.needs().samples:
        return
    device = getattr(teacher, "device", None)
    first = ("auto", "cuda", "cuda:0")
    if device is not None and device != engine.device and not {device, engine.device} <= {*first}:
        message = f"a step of a mixture would run on two devices, and a graph is of one: teacher.device is {device}"
        yield Found("rollout.cuda_graphs", message, ("teacher.device", "engine.device"))


def shared_coins_usable(facts: Facts, rollout: RolloutConfig, method: Method) -> Iterator[Found]:
    """Coins decide where there are two models to choose from, and steps have no fixed shapes."""
    if not rollout.shared_coins:
        return
    if "mixture" not in method.needs().samples:
        message = f"has no effect: method {method.name} samples from no mixture of teacher and student"
        yield Idle("rollout.shared_coins", message, ("method.name",))
    elif rollout.cuda_graphs:
        message = "has no step of fixed shapes, which rollout.cuda_graphs needs: set one of the two to false"
        yield Found("rollout.shared_coins", message, ("rollout.cuda_graphs",))
