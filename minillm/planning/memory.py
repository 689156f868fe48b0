"""Bytes of one rank by part and phase: the simulated moments, sharded, with what lies in the host's memory apart."""

from dataclasses import dataclass

import torch

from minillm.planning.ledger import PARTS
from minillm.planning.sharding import Sharding
from minillm.planning.simulate import Simulation
from minillm.planning.work import Work

VECTOR_BYTES = 7 * 4  # of a response token: three log-probabilities, a divergence and three weights, fp32


@dataclass(frozen=True)
class PhaseMemory:
    """The worst moment of a phase on one rank."""

    phase: str
    device: dict[str, int]  # part -> bytes on the device
    host: dict[str, int]  # part -> bytes in the host's memory, where the device is another

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def memory_of(
    simulation: Simulation, work: Work, sharding: Sharding, device: torch.device, *, whole_rollout: bool = False
) -> list[PhaseMemory]:
    """Every phase's worst moment, in the order in which they run.

    With `whole_rollout` sharded models are gathered once for a rollout, else layer by layer for every token.
    """
    student, teacher = simulation.student, simulation.teacher
    one_memory = device.type == "cpu"
    factors, host_factors = sharding.factors(), sharding.host_factors()
    buffer, waiting = _teacher_rows(simulation, work)
    result = []
    for phase, timeline in simulation.phases.items():
        added = dict.fromkeys(PARTS, 0)
        host = dict.fromkeys(PARTS, 0)
        here = added if one_memory else host
        # the last buffer lives until the next one is whole
        here["rollout buffer"] += buffer * (2 if phase == "scoring" and work.buffered else 1)
        if phase == "update" or phase == "scoring" and not work.buffered:
            added["teacher hidden states"] += waiting[False]
        if phase == "update":
            here["teacher hidden states"] += waiting[True]
            added["communication buckets"] += sharding.buckets(student.parameters, student.itemsize)
        reads = {"rollout": work.decoding and work.decoding.models, "scoring": work.scoring and work.scoring.models}
        models = reads.get(phase) or ("student",)
        if "student" in models:
            added["gathered layers"] += sharding.gathered(
                student.parameters,
                max(student.largest_layer, student.head),
                student.itemsize,
                sharded=sharding.stage == 3,
            )
        if teacher is not None and ("teacher" in models or phase == "update" and any(t.teacher for t in work.terms)):
            # the update reads the teacher's head alone
            whole = teacher.parameters if "teacher" in models else teacher.head
            added["gathered layers"] += sharding.gathered(
                whole,
                max(teacher.largest_layer, teacher.head) if whole > teacher.head else teacher.head,
                teacher.itemsize,
                sharded=sharding.teacher != "replicated",
            )
        if phase == "rollout" and whole_rollout and added["gathered layers"]:
            sizes = {"student": student, "teacher": teacher}
            added["gathered layers"] = sum(
                sizes[name].parameters * sizes[name].itemsize for name in models if sharding.is_sharded(name)
            )
        on_device = timeline.peak(factors, added)
        everything = timeline.peak({}, {})
        for part, share in host_factors.items():
            host[part] += int(everything[part] * share)
        result.append(PhaseMemory(phase, on_device, host))
    return result


def _teacher_rows(simulation: Simulation, work: Work) -> tuple[int, dict[bool, int]]:
    """Bytes of a rollout buffer; and of the teacher's hidden states that wait for a step, from the buffer or not."""
    if simulation.teacher is None:
        return 0, {False: 0, True: 0}
    row = simulation.teacher.hidden_size * simulation.teacher.itemsize
    answers = 0 if not work.buffered else work.buffered * work.decoding.answer
    waiting = {flag: work.waiting_rows(from_buffer=flag) * row for flag in (False, True)}
    return answers * (row + VECTOR_BYTES), waiting
