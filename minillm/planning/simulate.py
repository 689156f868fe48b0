"""The phases of a stage on fake tensors: the allocations of the real modules, moment by moment.

rollout   prompts, then the last token, through the models that sample, with the caches of minillm.rollout
scoring   forward passes without a gradient; a collection's, or those of the teacher before each step
update    forward, loss and backward of every term, with checkpointing and autocast as configured; then the optimiser
evaluation    between steps: answers of student and teacher, and forward passes over them
"""

import importlib
import traceback
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import PreTrainedConfig

import minillm
from minillm import UserError
from minillm.losses import LMHead
from minillm.models.access import REFUSALS, forward_layers, lm_head, rows_of
from minillm.models.modes import sampling_mode
from minillm.planning.cached_teacher import TeacherHead
from minillm.planning.few_layers import few_trained_layers
from minillm.planning.known_values import VALUES_NEEDED, KnownValues
from minillm.planning.ledger import Ledger, Timeline
from minillm.planning.loss import LossShape, LossTwin, sorting_shape, standardized_twin, statistics_twin
from minillm.planning.places import HOME, kind_of
from minillm.planning.setting import Setting
from minillm.planning.several_teachers import Several, together
from minillm.planning.shown_pictures import ShownPictures
from minillm.planning.simulated_decoding import SimulatedDecoding
from minillm.planning.simulated_models import SimulatedModels
from minillm.planning.simulated_texts import SimulatedTexts
from minillm.planning.sizes import ModelSize, size_of, weight_count
from minillm.planning.work import Decoding, Forward, TermShape, Work

PHASES = ("rollout", "scoring", "update", "evaluation")


@dataclass(frozen=True)
class Simulation:
    """The moments of every phase as one rank would have them if nothing were sharded."""

    phases: dict[str, Timeline]  # of PHASES those that the stage has
    student: ModelSize
    teacher: ModelSize | None
    vocab_size: int  # ids that both heads have
    losses: dict[str, LossShape]  # by term, and of the phases without a gradient
    projectors: int = 0  # weights that are trained beside the student
    shown: ShownPictures | None = None  # the pictures of every prompt
    teachers: dict[str, ModelSize] = field(default_factory=dict)  # each of several, which `teacher` has together
    row_bytes: int = 0  # of what is kept of the teacher's word on a row
    asked: float = 1.0  # the part of `teacher` that judges a record
    masked: frozenset[str] = frozenset()  # of student and teacher those that compare all tokens of a batch
    steps_kept: int = 1  # steps of which the teacher's word is there at a time
    places: tuple[str, ...] = ()  # devices beside the student's that hold a teacher


_DONE: dict[tuple, Simulation] = {}  # stages of a run, and what advice tries, often differ in nothing that counts here


def simulate(
    setting: Setting,
    work: Work,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig | None,
    device: torch.device,
    *,
    head: TeacherHead | None = None,
    several: Several | None = None,
    phases: tuple[str, ...] = PHASES,
) -> Simulation:
    """Run the phases on fake tensors, or remember them from before in this process. `head` is of a teacher without weights here;
    `several` has the teachers beside the first.

    Raises UserError for an architecture that cannot be built or run without values.
    """
    texts = [None if one is None else one.to_json_string() for one in (student, teacher)]
    key = (repr(setting), work, *texts, device.type, head, several, phases)
    if key not in _DONE:
        try:
            sees = setting.shown is not None
            if setting.lora is not None or setting.teacher_lora is not None:
                importlib.import_module("peft")  # inside, the tables that it brings would be fake, and counted
            with FakeTensorMode(allow_non_fake_inputs=sees), Ledger() as ledger:
                models = SimulatedModels(setting, work, student, teacher, ledger, head, several)
                with KnownValues() if sees else nullcontext():
                    _DONE[key] = _Simulator(setting, work, models, device, ledger).run(phases)
        except VALUES_NEEDED as error:
            types = sorted({one.model_type for one in (student, teacher) if one is not None})
            raise UserError(
                f"no plan for {' and '.join(types)}: the architecture's code asks for values ({error}), and a plan has "
                "nothing but shapes"
            ) from error
        except UserError:
            raise
        except REFUSALS as error:
            if not _in_transformers(error):
                raise
            types = sorted({one.model_type for one in (student, teacher) if one is not None})
            raise UserError(
                f"no plan for {' and '.join(types)}: the architecture's code refuses what a plan does with it "
                f"({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error
    return _DONE[key]


def _in_transformers(error: Exception) -> bool:
    """True for an error that an architecture's code raised, or had torch raise, and not ours, which it may have called.

    The ledger's dispatch lies between torch and every operation, whoever asked for that, so it says nothing.
    """
    packages = [str(Path(module.__file__).parent) for module in (transformers, minillm)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.name == "__torch_dispatch__":
            continue
        for package in packages:
            if Path(frame.filename).is_relative_to(package):
                return package == packages[0]
    return False


class _Simulator:
    def __init__(self, setting: Setting, work: Work, simulated: SimulatedModels, device: torch.device, ledger: Ledger):
        self.setting, self.work, self.simulated, self.device, self.ledger = setting, work, simulated, device, ledger
        self.models, self.student, self.several = simulated.by_name, simulated.student, simulated.several
        self.trained, self.projectors, self.vocab_size = simulated.trained, simulated.projectors, simulated.vocab_size
        self.losses: dict[str, LossShape] = {}
        self.texts = SimulatedTexts(setting, self.models)
        self.decoding = SimulatedDecoding(simulated, self.texts, device, ledger, self.losses)

    def run(self, wanted: Collection[str]) -> Simulation:
        ledger, work, phases = self.ledger, self.work, {}
        dtype = torch.float32 if self.setting.master_weights else None  # None: each weight's own
        with ledger.part("optimizer states"):
            states = [room for _ in range(2) for room in self._beside_weights(dtype)]
        with ledger.part("fp32 master weights"):
            if self.setting.master_weights:
                states.append(_room(self.trained, torch.float32))
        with self._gradients() if self.setting.gradients_stay else nullcontext():
            ledger.take()
            for phase, passes in (
                ("rollout", work.decodings),
                ("scoring", work.scorings),
                ("evaluation", work.evaluation),
            ):
                if passes and phase in wanted:
                    self._run_without_gradient(passes, phase)
                    phases[phase] = ledger.take()
        if work.terms and "update" in wanted:
            self._update()
            phases["update"] = ledger.take()
        del states
        phases = {phase: phases[phase] for phase in PHASES if phase in phases}
        sizes = self.simulated.teacher_sizes()
        several = self.several
        return Simulation(
            phases,
            size_of(self.student, self.simulated.kv_bytes["student"], self.simulated.shown),
            together(list(sizes.values())) if several else next(iter(sizes.values()), None),
            self.vocab_size,
            self.losses,
            weight_count(self.projectors),
            self.setting.shown,
            sizes,
            several.row_bytes(list(sizes.values()))
            if several
            else sum(one.hidden_size * one.itemsize for one in sizes.values()),
            several.asked if several else 1.0,
            self.setting.masked,
            several.turn_steps or 1 if several else 1,
            tuple(sorted({*self.simulated.places.values()} - {HOME})),
        )

    def _beside_weight(self, parameter: nn.Parameter) -> Tensor:
        """Room as large as a trained weight, on its device."""
        with self.ledger.at(self.simulated.place_of_weight(parameter)):
            return torch.empty_like(parameter)

    def _beside_weights(self, dtype: torch.dtype | None) -> list[Tensor]:
        """Room as large as all trained weights, of each device in one: it comes and goes at one moment."""
        by_place: dict[str, list[nn.Parameter]] = {}
        for parameter in self.trained:
            by_place.setdefault(self.simulated.place_of_weight(parameter), []).append(parameter)
        rooms = []
        for place, weights in by_place.items():
            with self.ledger.at(place):
                rooms.append(_room(weights, dtype))
        return rooms

    def _at(self, name: str) -> AbstractContextManager[None]:
        return self.ledger.at(self.simulated.place(name))

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        with self.ledger.part("gradients"):
            gradients = _room(self.trained, None)
        yield
        del gradients

    def _run_without_gradient(self, passes: tuple[Decoding | Forward, ...], phase: str) -> None:
        for one in passes:
            if isinstance(one, Decoding):
                self.decoding.take(one)
            else:
                self._score(one, phase)

    def _score(self, forward: Forward, phase: str) -> None:
        simulated = self.simulated
        names = [name for one in forward.models for name in simulated.of_role(one)]
        models = [self.models[name] for name in names]
        few = simulated.few_layers(names) if forward.layers == (-1,) else nullcontext()
        divided = self.several is not None and self.several.divided
        with sampling_mode(models), few:
            hidden = []
            for name, model in zip(names, models, strict=True):
                with self._at(name):
                    batch = self.texts.batch(
                        name, forward, forward.length_of("teacher" if name.startswith("teacher") else name)
                    )
                    _, states = forward_layers(model, batch, forward.layers if name == "teacher" else (-1,))
                teaches = name in simulated.of_role("teacher")
                if divided and teaches:  # one of them reads a record: the worst is the largest
                    hidden.clear()
                with self._at(name):
                    said = [rows_of(state, batch) for state in states.values()]
                del states
                hidden += said if self.simulated.place(name) == HOME else [torch.empty_like(one) for one in said]
                del said
                if teaches:
                    self.ledger.relabel(hidden, "teacher hidden states")
            if simulated.head is not None and "teacher" in forward.kept or simulated.beside_heads and not divided:
                with self.ledger.part("teacher hidden states"):
                    hidden.append(simulated.rows_of_heads(forward.rows))
            if forward.statistics:
                shape = LossShape(forward.rows, self.vocab_size, len(forward.models) + len(forward.kept), self.device)
                known = self.losses.get(phase, shape)  # of several the largest
                self.losses[phase] = max(known, shape, key=lambda one: one.rows)
                with self.ledger.part("loss buffers"):
                    statistics_twin(hidden[0], shape)

    def _update(self) -> None:
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: self.ledger.relabel([p.grad], "gradients"))
            for parameter in self.trained
        ]
        if self.work.micro_batches > 1 or self.setting.gradients_stay:  # the worst micro-batch is one that finds them
            with self.ledger.part("gradients"):
                for parameter in self.trained:
                    parameter.grad = self._beside_weight(parameter)
        for term in self.work.terms:
            with self._at(term.trains):
                self._term(term)
        with self.ledger.part("gradients"):
            for parameter in self.simulated.beside_the_text():
                parameter.grad = torch.empty_like(parameter)
        self._optimizer_step()
        for hook in hooks:
            hook.remove()
        for parameter in self.trained:
            parameter.grad = None

    def _term(self, term: TermShape) -> None:
        here = bool(self.simulated.of_role("teacher"))
        logits = here or any(not one.k for one in self.simulated.heads)  # a teacher with some of its own
        full = term.teacher and not term.summed and not term.sorts and not term.standardizes and logits
        teachers = 1 + len(self.several.beside) if self.several is not None and term.teacher else 1
        divided = teachers > 1 and self.several.divided
        device = kind_of(self.simulated.place(term.trains), self.device)
        shape = LossShape(term.rows, self.vocab_size, 2 if full else 1, device)
        self.losses[term.name] = shape
        copy = None
        if term.teacher and self.simulated.place(term.trains) != HOME:  # what it learns from is the student's head
            with self.ledger.part("student weights"):
                copy = torch.empty_like(lm_head(self.student).weight)
        bf16 = self.setting.autocast
        batch = self.texts.batch(term.trains, term, term.length)
        teacher = None
        if term.teacher and term.from_buffer and self.device.type == "cuda":
            with self.ledger.part("teacher hidden states"):  # and of the micro-batch that is copied ahead
                teacher = [self.simulated.teacher_rows(term.rows) for _ in range(min(2, self.work.micro_batches))]
        model = self.models[term.trains]
        # features are compared in the layers that a few would leave out
        with nullcontext() if term.features else few_trained_layers(model, self.ledger):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                _, states = forward_layers(model, batch, [-1, *(layer for layer, _ in term.features)])
                hidden = rows_of(states[-1], batch)
                compute = torch.bfloat16 if bf16 else hidden.dtype
                with self.ledger.part("loss buffers"):
                    # the worst batch is nearly all one teacher's
                    own = [hidden, *[hidden[:1] if divided else hidden] * (teachers - 1)]
                    own = [one.clone() for one in own] if divided else own
                    weight = lm_head(model).weight
                    losses = [LossTwin.apply(one, weight, compute, shape, self.ledger) for one in own]
                    loss = sum(losses[1:], start=losses[0])
                    del own
                    if term.sorts:
                        sorting = sorting_shape(term.rows, *self.simulated.vocab_sizes, self.device)
                        loss = loss + LossTwin.apply(hidden, lm_head(model).weight, compute, sorting, self.ledger)
                    if term.standardizes:
                        loss = loss + self._standardized_loss(term, hidden, lm_head(model), compute)
                loss = loss + self._feature_losses(term, states)
            del hidden, states
            loss.backward()
        del teacher, copy

    def _standardized_loss(self, term: TermShape, hidden: Tensor, head: LMHead, compute: torch.dtype) -> Tensor:
        """minillm.methods.standardized, with the teacher's hidden states that are counted elsewhere."""
        shape = LossShape(term.rows, self.vocab_size, 2, self.device)
        self.losses[f"{term.name}, standardized"] = shape
        theirs = self.simulated.teacher_head()
        said = torch.empty((), dtype=theirs.weight.dtype).expand(term.rows, theirs.weight.shape[1])
        return standardized_twin(hidden, head, said, theirs, compute, shape, self.ledger)

    def _feature_losses(self, term: TermShape, states: dict[int, Tensor]) -> Tensor | float:
        """minillm.methods.features, with targets that are counted elsewhere: those of all micro-batches wait for the step."""
        losses, places = [], torch.zeros(term.feature_rows, dtype=torch.int64)
        for projector, (layer, _) in zip(self.projectors if term.features else (), term.features, strict=True):
            projected = projector(states[layer].flatten(0, 1).index_select(0, places))
            target = torch.empty((), dtype=self.models["teacher"].dtype).expand_as(projected)
            losses.append((projected.float() - target.float()).square().mean(-1).sum())
        if term.affinity_rows:
            compared = states[-1].flatten(0, 1).index_select(0, torch.zeros(term.affinity_rows, dtype=torch.int64))
            losses.append(functional.normalize(compared.float(), dim=-1).sum())
        return sum(losses)

    def _optimizer_step(self) -> None:
        """Allocate what the optimiser does: nothing for a fused AdamW; DeepSpeed gathers its gradients in fp32 before it."""
        if self.setting.master_weights:
            with self.ledger.part("gradients"):
                together = _room(self.trained, torch.float32)
            del together


def _room(weights: Collection[Tensor], dtype: torch.dtype | None) -> Tensor:
    """The memory of copies of weights, in `dtype` or in their own."""
    return torch.empty(sum(one.numel() * (dtype or one.dtype).itemsize for one in weights), dtype=torch.uint8)
