"""Bytes of one rank by part and phase: the simulated moments, sharded, with the host's memory counted by itself."""

from dataclasses import dataclass, field, replace

import torch

from minillm.planning.ledger import PARTS
from minillm.planning.places import HOME, HOST
from minillm.planning.sharding import Sharding
from minillm.planning.simulate import Simulation
from minillm.planning.work import Decoding, Forward, Work

VECTOR_BYTES = 7 * 4  # of a response token: three log-probabilities, a divergence and three weights, fp32


@dataclass(frozen=True)
class PhaseMemory:
    """The worst moment of a phase on one rank."""

    phase: str
    device: dict[str, int]  # part -> bytes on the device
    host: dict[str, int]  # part -> bytes in the host's memory, where the device is another
    beside: dict[str, dict[str, int]] = field(default_factory=dict)  # GPU of a teacher -> part -> bytes

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def peaks(self) -> dict[str, int]:
        """The bytes on each device: HOME is the student's."""
        return {HOME: self.device_bytes} | {place: sum(parts.values()) for place, parts in self.beside.items()}

    @property
    def most_bytes(self) -> int:
        """The bytes on the device that has most of them."""
        return max(self.peaks.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    def at(self, place: str) -> "PhaseMemory":
        """This phase where all that it has on the student's device is on another one, on which there is nothing yet."""
        if place == HOME:
            return self
        nothing = dict.fromkeys(self.device, 0)
        if place == HOST:
            host = {part: size + self.device[part] for part, size in self.host.items()}
            return replace(self, device=nothing, host=host)
        return replace(self, device=nothing, beside={**self.beside, place: self.device})


def memory_of(simulation: Simulation, work: Work, sharding: Sharding, device: torch.device) -> list[PhaseMemory]:
    """Return the worst moment of every phase, in the order in which they run."""
    student = simulation.student
    one_memory = device.type == "cpu"
    factors, host_factors = sharding.factors(), sharding.host_factors()
    buffer, waiting = _teacher_rows(simulation, work, sharding.world_size)
    # scores of answers that are drawn by coins come with them
    filling = ("rollout", "scoring") if any(one.teacher_share is not None for one in work.decodings) else ("scoring",)
    result = []
    for phase, timeline in simulation.phases.items():
        added = dict.fromkeys(PARTS, 0)
        host = dict.fromkeys(PARTS, 0)
        here = added if one_memory else host
        # the last buffer lives until the next one is complete
        here["rollout buffer"] += buffer * (2 if work.buffered and phase in filling else 1)
        here["checkpoint copy"] += _copy(simulation, work, sharding, buffer)
        if phase == "update" or phase == "scoring" and not work.buffered:
            added["teacher hidden states"] += waiting[False]
            here["teacher hidden states"] += waiting[False] * (simulation.steps_kept - one_memory)
        if phase == "update":
            here["teacher hidden states"] += waiting[True]
            added["communication buckets"] += sharding.buckets(
                student.trained + simulation.projectors, student.itemsize
            )
        added["gathered weights"] += _gathered(phase, simulation, work, sharding)
        on_device = timeline.peak(factors, added)
        everything = timeline.peak({}, {})
        for part, fraction in host_factors.items():
            host[part] += int(everything[part] * fraction)
        for part, size in timeline.peak_beside(HOST).items():
            host[part] += size
        beside = {place: timeline.peak_beside(place) for place in simulation.places if place != HOST}
        result.append(PhaseMemory(phase, on_device, host, beside))
    return result


def _gathered(phase: str, simulation: Simulation, work: Work, sharding: Sharding) -> int:
    """Bytes of sharded weights that are gathered at the same time."""
    student, teacher = simulation.student, simulation.teacher
    if phase == "update":
        total = sharding.layers(student) if sharding.gathers("student") else 0
        if teacher is not None and any(term.teacher for term in work.terms) and sharding.gathers("teacher"):
            total += teacher.head * teacher.itemsize  # all that the update reads of it
        return total
    passes = {"rollout": work.decodings, "scoring": work.scorings, "evaluation": work.evaluation}[phase]
    return max(_gathered_for(one, simulation, sharding) for one in passes)


def _gathered_for(forward: Decoding | Forward, simulation: Simulation, sharding: Sharding) -> int:
    sizes = {"student": simulation.student, "teacher": simulation.teacher}
    gathered = [sizes[name] for name in forward.models if sharding.gathers(name)]
    if forward.reads_heads and not sharding.by_layers:
        return sum(size.parameters * size.itemsize for size in gathered)
    heads = sum(size.head * size.itemsize for size in gathered) if forward.reads_heads else 0
    return sum(map(sharding.layers, gathered)) + heads


def _copy(simulation: Simulation, work: Work, sharding: Sharding, buffer: int) -> int:
    """Bytes of what rank 0 writes while steps are taken, from a copy: all of the weights, and its shard of the optimiser."""
    if work.written is None:
        return 0
    weights = simulation.student.stored_bytes
    if work.written == "weights":
        return weights
    held = next(iter(simulation.phases.values()))
    states = held.most("optimizer states")
    if sharding.stage:  # DeepSpeed's exact weights too, and twice for a moment: their state is a copy itself
        states += 2 * 4 * simulation.student.trained
    # a buffer that has been used up meanwhile, and its tensors as they go to the file
    return weights + int(states * sharding.states_shard) + 2 * buffer


def _teacher_rows(simulation: Simulation, work: Work, world_size: int) -> tuple[int, dict[bool, int]]:
    """Bytes of a rollout buffer, of which a rank has all vectors and its own slice of the hidden states; and bytes of the
    teacher's hidden states that wait for a step, by whether they come from the buffer."""
    if simulation.teacher is None:
        return 0, {False: 0, True: 0}
    row = simulation.row_bytes
    tokens = 0 if not work.buffered else work.buffered * max(one.rows // one.batch for one in work.scorings)
    waiting = {flag: work.waiting_rows(from_buffer=flag) * row for flag in (False, True)}
    return tokens * row // world_size + tokens * VECTOR_BYTES, waiting
