"""What must hold between `rollout` and the method, the batches and the engine."""

from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found
from minillm.config.method import Method
from minillm.config.rollout import RolloutConfig
from minillm.config.training import Engine, TrainConfig
from minillm.distributed.launcher import launched_size


def neutral_sampling(facts: Facts, rollout: RolloutConfig, method: Method) -> Iterator[Found]:
    """minillm samples from the models' own distributions."""
    if method.name != "minillm":
        return
    for key, neutral in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)):
        value = getattr(rollout, key)
        if value != neutral:
            yield Found(
                f"rollout.{key}",
                f"must be {neutral:g} for minillm, not {value:g}: its gradient weighs every sampled token by q/p~, the "
                "models' own distributions, and is wrong for samples from any other",
                ("method.name",),
            )


def one_temperature(facts: Facts, rollout: RolloutConfig, method: Method) -> Iterator[Found]:
    """The temperature of seqkd's answers is a key of the method."""
    if method.name == "seqkd" and rollout.temperature != 1.0:
        message = "has no effect on seqkd: the temperature of the teacher's answers is method.temperature"
        yield Found("rollout.temperature", message, ("method.name",))


def whole_batches(facts: Facts, rollout: RolloutConfig, train: TrainConfig, method: Method) -> Iterator[Found]:
    """A buffer is used up in whole steps."""
    ranks = launched_size()
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
    of_ranks = f" x {ranks} ranks" if ranks > 1 else ""
    if method.name == "minillm" and rollout.buffer_size % step:
        yield Found(
            "rollout.buffer_size",
            f"{rollout.buffer_size} answers do not divide into steps of {step} (per_device_train_batch_size "
            f"{train.per_device_train_batch_size} x gradient_accumulation_steps {train.gradient_accumulation_steps}{of_ranks}); "
            f"the nearest that do: {_multiples_around(rollout.buffer_size, step)}",
            ("train.per_device_train_batch_size", "train.gradient_accumulation_steps", "method.name"),
        )


def _multiples_around(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} and {below + step}" if below else str(step)


def cuda_graphs_usable(facts: Facts, rollout: RolloutConfig, engine: Engine) -> Iterator[Found]:
    """CUDA graphs are asked for where there can be any. Whether `device: auto` finds a GPU is known when the run starts."""
    if not rollout.cuda_graphs:
        return
    if engine.type != "torch":
        message = f"is for engine.type torch: a graph holds addresses, and weights that {engine.type} gathers lie elsewhere each time"
        yield Found("rollout.cuda_graphs", message, ("engine.type",))
    elif engine.device == "cpu":
        yield Found("rollout.cuda_graphs", "needs a GPU, but engine.device is cpu", ("engine.device",))
