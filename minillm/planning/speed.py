"""FLOPs of a step, and an estimate of its time on a GPU.

For each token a matrix of P weights costs 2 P FLOPs forward and 4 P backward, 2 P where it is frozen below adapters, and
attention 4 L H in each layer. The fused loss takes three GEMMs with the student's head, two where it is frozen, and one
with the teacher's, over the tokens that count. Pictures cost what a pass of vision tower and projector over them does, and
twice as much again where the tower is trained. Decoding takes whichever is longer: its FLOPs, or reading weights and caches
once per token.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from minillm.planning.gpus import BANDWIDTH_USE, LINK_USE, MFU, Gpu
from minillm.planning.sharding import Sharding
from minillm.planning.simulate import ModelSize, Simulation
from minillm.planning.work import Decoding, Forward, TermShape, Work

TERA, GIGA = 1e12, 1e9
ADAM_TRAFFIC = 7  # words that are read and written per weight: weight 2, gradient 1, moments 4


@dataclass(frozen=True)
class Speed:
    """The cost of one optimiser step on one rank, with its part of the collection that it uses."""

    rollout_flops: float
    scoring_flops: float
    update_flops: float
    seconds: dict[str, float] | None  # rollout, scoring, update, communication; None where the device is not known

    @property
    def flops(self) -> float:
        return self.rollout_flops + self.scoring_flops + self.update_flops


def speed_of(
    simulation: Simulation,
    work: Work,
    sharding: Sharding,
    gpu: Gpu,
    *,
    bf16: bool,
    checkpointing: bool,
) -> Speed:
    """Estimate a step with the longest prompts and answers."""
    sizes = {"student": simulation.student, "teacher": simulation.teacher}
    used = 1.0 / work.steps_per_collection if work.buffered else 1.0  # by this step, of a collection
    decoded = [(one, _decoding_flops(one, sizes, used)) for one in work.decodings if one.total]
    scored = Counter()  # model -> FLOPs
    for scoring in work.scorings:
        for name in scoring.models:
            rows = scoring.total * (scoring.rows // scoring.batch) if scoring.statistics else 0
            length = scoring.length_of(name)
            body = forward_flops(sizes[name], scoring.total * length, _context(simulation, name, scoring.batch, length))
            seen = scoring.total * scoring.prompted * sizes[name].pictures
            scored[name] += used * (body + rows * 2 * sizes[name].head + seen)
        for name in scoring.kept:
            scored[name] += used * scoring.total * (scoring.rows // scoring.batch) * 2 * sizes[name].head
    for term in work.judged_in_the_step:
        tokens = work.micro_batches * term.batch * term.length
        context = _context(simulation, "teacher", term.batch, term.length)
        scored["teacher"] += forward_flops(sizes["teacher"], tokens, context)
        scored["teacher"] += work.micro_batches * term.batch * term.prompted * sizes["teacher"].pictures
    scored["teacher"] *= simulation.asked  # of several teachers
    rollout_flops = sum(sum(models.values()) for _, models in decoded)
    update_flops = _update_flops(simulation, work, checkpointing)
    seconds = None
    if gpu.bf16_tflops is not None:
        # train.bf16 is for the update: answers are sampled and scored in the dtype of the weights
        rates = {name: _flops_per_s(gpu, bf16=size is not None and size.itemsize == 2) for name, size in sizes.items()}

        def calculating(flops: Mapping[str, float]) -> float:
            return sum(amount / rates[name] for name, amount in flops.items())

        update = update_flops / _flops_per_s(gpu, bf16=bf16 or simulation.student.itemsize == 2)
        seconds = {
            "rollout": sum(
                max(calculating(models), used * _reading_seconds(one, sizes, gpu)) for one, models in decoded
            ),
            "scoring": calculating(scored),
            "update": update + _optimizer_seconds(simulation.student, sharding, gpu),
            "communication": _communication_seconds(sizes, work, sharding, gpu, used),
        }
    return Speed(rollout_flops, sum(scored.values()), update_flops, seconds)


def _decoding_flops(decoding: Decoding, sizes: Mapping[str, ModelSize | None], used: float) -> dict[str, float]:
    width = decoding.prompt + decoding.answer - 1
    prompts = decoding.total / decoding.per_prompt  # that are read, with their pictures
    tokens = prompts * decoding.prompt + decoding.total * (decoding.answer - 1)
    predictions = decoding.total * decoding.answer
    # by coins: of the asked model for a token, and of both for what is known of the answers afterwards
    known = 0.0 if decoding.teacher_share is None else 1.0
    heads = {name: decoding.asked_share(name) + known for name in decoding.models}
    return {
        name: used
        * (
            forward_flops(sizes[name], tokens, width / 2)
            + heads[name] * predictions * 2 * sizes[name].head
            + prompts * sizes[name].pictures
        )
        for name in decoding.models
    }


def _context(simulation: Simulation, model: str, batch: int, length: int) -> int:
    """Return the tokens with which the attention of a model compares each one of a batch."""
    return batch * length if model in simulation.masked else length


def flops_per_token(simulation: Simulation, forward: Forward) -> float:
    """Return the FLOPs that forward passes over texts of that length take for each token that is fed, heads included."""
    sizes = {"student": simulation.student, "teacher": simulation.teacher}
    total = 0.0
    for name in forward.models:
        total += forward_flops(sizes[name], 1, _context(simulation, name, forward.batch, forward.length))
        if forward.statistics:
            total += 2.0 * sizes[name].head * forward.rows / (forward.batch * forward.length)
        total += forward.prompted * sizes[name].pictures / forward.length
    return total


def _flops_per_s(gpu: Gpu, *, bf16: bool) -> float:
    return (gpu.bf16_tflops if bf16 else gpu.fp32_tflops) * TERA * MFU


def forward_flops(size: ModelSize, tokens: float, context: float) -> float:
    """Return the FLOPs of one forward pass below the head: matrices, and attention over `context` tokens."""
    matrices = size.parameters - size.idle - size.embeddings - size.head
    return tokens * (2.0 * matrices + 4.0 * context * size.hidden_size * size.layers)


def _update_flops(simulation: Simulation, work: Work, checkpointing: bool) -> float:
    total = 0.0
    for term in work.terms:
        size = simulation.student if term.trains == "student" else simulation.teacher
        frozen = size.frozen
        # forward, backward once for the inputs and once for the weights, and forward again
        passes = 3 - frozen + checkpointing
        context = _context(simulation, term.trains, term.batch, term.length)
        total += passes * forward_flops(size, term.batch * term.length, context)
        total += term.rows * (3 - frozen) * 2.0 * size.head
        looks = 1 if size.pictures_frozen else 3 + checkpointing
        total += looks * term.batch * term.prompted * size.pictures
        if term.standardizes:
            total += _standardizing_flops(term, size, simulation.teacher)
        if term.teacher:
            total += simulation.asked * term.rows * 2.0 * simulation.teacher.head
    return total * work.micro_batches


def _standardizing_flops(term: TermShape, student: ModelSize, teacher: ModelSize) -> float:
    """Return the FLOPs of a product of each head with itself, of that of the student's gradient, and of another pass over its
    head for the divergence."""
    squares = sum(2.0 * size.head * size.hidden_size for size in (student, student, teacher))
    return squares + term.rows * (3 - student.frozen) * 2.0 * student.head


def _optimizer_seconds(student: ModelSize, sharding: Sharding, gpu: Gpu) -> float:
    words = student.trained / (sharding.world_size if sharding.stage else 1) * ADAM_TRAFFIC
    return words * 4 / (gpu.memory_gb_per_s * GIGA * BANDWIDTH_USE)


def _reading_seconds(decoding: Decoding, sizes: Mapping[str, ModelSize | None], gpu: Gpu) -> float:
    """Seconds in which weights and half-full caches are read once per token that a model is asked for."""
    batches = -(-decoding.total // decoding.batch)
    total = 0.0
    for name in decoding.models:
        size, share = sizes[name], decoding.asked_share(name)
        weights = size.stored_bytes - size.embeddings * size.itemsize
        caches = decoding.batch * (decoding.prompt + decoding.answer / 2) * size.kv_bytes_per_token
        total += share * (weights + caches)
    return batches * decoding.answer * total / (gpu.memory_gb_per_s * GIGA * BANDWIDTH_USE)


def _communication_seconds(
    sizes: Mapping[str, ModelSize | None], work: Work, sharding: Sharding, gpu: Gpu, used: float
) -> float:
    """Seconds of gathers and reductions that nothing hides: a sharded model's weights once per pass or collection."""
    if sharding.world_size == 1:
        return 0.0
    student, teacher = sizes["student"], sizes["teacher"]
    body = student.parameters * student.itemsize
    moved = student.trained * student.itemsize * 2.0  # gradients: a reduction and its counterpart
    if sharding.is_sharded("student"):
        moved += body * 2 * work.micro_batches * len(work.terms)  # forward and backward
    if teacher is not None and sharding.is_sharded("teacher"):
        heads = work.micro_batches * sum(term.teacher for term in work.terms)
        moved += teacher.head * teacher.itemsize * heads
        moved += teacher.parameters * teacher.itemsize * work.micro_batches * len(work.judged_in_the_step)
    for collection in (*work.decodings, *work.scorings):
        decodes = isinstance(collection, Decoding)
        passes = -(-collection.total // collection.batch) * (collection.answer if decodes else 1)
        if not passes:
            continue
        if collection.reads_heads and not sharding.by_layers:
            passes = 1
        for name in collection.models:
            if sharding.is_sharded(name):
                moved += used * passes * sizes[name].parameters * sizes[name].itemsize
    remote = (sharding.world_size - 1) / sharding.world_size
    return moved * remote / (gpu.link_gb_per_s * GIGA * LINK_USE)
