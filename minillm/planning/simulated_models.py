"""The models of a stage on fake tensors: built, made ready for what the configuration does with them, and measured."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from minillm.losses import LMHead
from minillm.models.access import checkpoint_activations, lm_head
from minillm.models.adapters import add_adapters
from minillm.models.loading import without_dropout
from minillm.models.packing import pack_batches
from minillm.models.parts import train_parts, weights_of
from minillm.models.projectors import make_projectors
from minillm.planning.cached_teacher import TeacherHead
from minillm.planning.few_layers import FEW, left_out_of
from minillm.planning.ledger import Ledger
from minillm.planning.places import HOME
from minillm.planning.quantized_layers import quantize
from minillm.planning.setting import Setting
from minillm.planning.several_teachers import BesideTeacher, Several
from minillm.planning.sizes import ModelSize, build, decoder_layers, size_of
from minillm.planning.work import TermShape, Work


class SimulatedModels:
    """Student, teachers and projectors, whose weights are parts of the ledger.

    Args: `teacher`, `head` and `several` as minillm.planning.simulate.simulate takes them.

    Raises UserError for an architecture that cannot be built.
    """

    def __init__(
        self,
        setting: Setting,
        work: Work,
        student: PreTrainedConfig,
        teacher: PreTrainedConfig | None,
        ledger: Ledger,
        head: TeacherHead | None,
        several: Several | None,
    ):
        self.head, self.several, self.beside_heads, self._head_weights = head, several, {}, []
        with ledger.part("student weights"):
            self.student = _build_student(setting, student, trains=bool(work.terms))
        self.by_name = {"student": self.student}
        self.places = {"teacher": setting.teacher_place}  # model -> its device where that is not HOME
        if teacher is not None:
            with ledger.part("teacher weights"), ledger.at(setting.teacher_place):
                self.by_name["teacher"] = _build_teacher(setting, teacher)
        for one in () if several is None else several.beside:
            self.places[f"teacher {one.name}"] = one.place
            with ledger.part("teacher weights"), ledger.at(one.place):
                self._add_beside(one)
        if several is not None and several.turn_steps is not None:
            self._leave_the_largest(ledger)
        with ledger.part("teacher weights"):
            self._head_weights += self._head_copies(work)
        attentions = {"student": setting.student_attention, "teacher": setting.teacher_attention}
        attentions |= {f"teacher {one.name}": one.attention for one in (() if several is None else several.beside)}
        for name, model in self.by_name.items():
            pack_batches(model, setting.masks_pairs(attentions[name]))
        self.shown = None if setting.shown is None else setting.shown.inputs
        self.projectors = nn.ModuleList()
        for term in work.terms:
            with ledger.part("student weights"):
                self.projectors.extend(self._projectors(term))
        if head is not None:
            with ledger.part("teacher weights"):
                self._head_weights.append(torch.empty(head.size.stored_bytes, dtype=torch.uint8))
        training = [self.student] if setting.teacher_lora is None else [self.student, self.by_name["teacher"]]
        if setting.checkpointing:
            for model in training:  # no random state to preserve: there is no dropout
                checkpoint_activations(model, preserve_rng_state=False)
        parameters = [one for module in (*training, self.projectors) for one in module.parameters()]
        self.trained = [one for one in parameters if one.requires_grad]
        of_models = [lm_head(model).weight.shape[0] for model in self.by_name.values()]
        of_heads = [one.vocab_size for one in self.heads if one.vocab_size is not None]
        self.vocab_sizes = *of_models, *of_heads
        self.vocab_size = min(self.vocab_sizes)
        if any(term.sorts for term in work.terms):  # each model has ids of its own
            self.vocab_size = self.vocab_sizes[0]
        self.kv_bytes = dict.fromkeys(self.by_name, 0)  # of a token, once a decoding has said it

    @property
    def heads(self) -> list[TeacherHead]:
        """Those of the teachers without weights here."""
        return [one for one in (self.head, *self.beside_heads.values()) if one is not None]

    def of_role(self, role: str) -> list[str]:
        """The models that are run where the student is, or the teacher: each of several."""
        return [name for name in self.by_name if name == role or name.startswith(f"{role} ")]

    def place(self, name: str) -> str:
        """The device of a model of `by_name`."""
        return self.places.get(name, HOME)

    def place_of_weight(self, parameter: nn.Parameter) -> str:
        """The device of one of the trained weights: of adapters in a teacher, the teacher's."""
        adapted = self.by_name.get("teacher")
        there = self.place("teacher") if adapted is not None else HOME
        return there if there and any(one is parameter for one in adapted.parameters()) else HOME

    def teacher_sizes(self) -> dict[str, ModelSize]:
        """The teachers by the names that a plan calls them, the first of several first."""
        names = [name for name in self.by_name if name.startswith("teacher")]
        sizes = {name: size_of(self.by_name[name], self.kv_bytes[name], self.shown) for name in names}
        if self.head is not None:
            sizes = {"teacher": self.head.size, **sizes}
        sizes |= {f"teacher {name}": head.size for name, head in self.beside_heads.items()}
        first = "teacher" if self.several is None else f"teacher {self.several.first}"
        return {first if name == "teacher" else name: size for name, size in sizes.items()}

    @contextmanager
    def few_layers(self, names: Collection[str]) -> Iterator[dict[str, int]]:
        """Let models whose layers are alike run a few of them, which without a gradient have the same worst moment.

        Yields the number of layers that are left out, by model.
        """
        left_out, replaced = {}, []
        for name in names:
            parent, attribute, layers = decoder_layers(self.by_name[name])
            left_out[name] = left_out_of(self.by_name[name], layers)
            if left_out[name]:
                replaced.append((parent, attribute, layers))
                setattr(parent, attribute, layers[:FEW])
        try:
            yield left_out
        finally:
            for place in replaced:
                setattr(*place)

    def rows_of_heads(self, rows: int) -> Tensor:
        """The room of what teachers without weights here say of so many rows, on the device."""
        widths = [one.size.hidden_size * one.size.itemsize for one in self.heads]
        together = max if self.several is not None and self.several.divided else sum
        return torch.empty(rows, together(widths), dtype=torch.uint8)

    def teacher_rows(self, rows: int) -> Tensor:
        """The room of what a teacher says of so many rows, on the device."""
        if self.several is not None:
            sizes = self.teacher_sizes().values()
            return torch.empty(rows, self.several.row_bytes(list(sizes)), dtype=torch.uint8)
        if self.head is not None:
            return self.rows_of_heads(rows)
        head = lm_head(self.by_name["teacher"]).weight
        return torch.empty(rows, head.shape[1], dtype=head.dtype)

    def teacher_head(self) -> LMHead:
        """The head of the one teacher of a stage; of one whose weights are not here its shape alone, which is counted already."""
        if "teacher" in self.by_name:
            return lm_head(self.by_name["teacher"])
        size, dtype = self.head, {one.itemsize: one for one in (torch.bfloat16, torch.float32)}[self.head.itemsize]
        return LMHead(torch.empty((), dtype=dtype).expand(size.vocab_size, size.hidden_size))

    def beside_the_text(self) -> list[nn.Parameter]:
        """The trained weights of a student's vision tower and projector that have no gradient yet: a plan shows no pictures."""
        parts = weights_of(self.student)
        return [
            one for part in ("projector", "vision") for one in parts[part] if one.requires_grad and one.grad is None
        ]

    def _add_beside(self, one: BesideTeacher) -> None:
        """A teacher beside the first of several, as `by_name` or `beside_heads` have it by its name."""
        if one.head is not None:
            self.beside_heads[one.name] = one.head
            self._head_weights.append(torch.empty(one.head.size.stored_bytes, dtype=torch.uint8))
            return
        model = build(one.architecture, one.dtype, one.attention)
        if one.quantization is not None:
            quantize(model, one.quantization)
        self.by_name[f"teacher {one.name}"] = model.eval().requires_grad_(False)

    def _leave_the_largest(self, ledger: Ledger) -> None:
        """Of teachers that are in memory one at a time count the weights of the largest on each device, and the heads of the
        others, which for a teacher of another device than the student's are counted with the copies."""
        local = [(self.place(name), self.by_name[name]) for name in self.of_role("teacher")]
        local.sort(key=lambda one: sum(weight.numel() * weight.itemsize for weight in one[1].parameters()))
        largest = {place: model for place, model in local}.values()
        for place, model in local:
            if all(model is not one for one in largest):
                head = model.get_output_embeddings().weight
                ledger.forget(one for one in model.parameters() if place != HOME or one is not head)

    def _head_copies(self, work: Work) -> list[Tensor]:
        """The heads of teachers on other devices, where the losses or the draws from a mixture read them."""
        passes = (*work.decodings, *work.scorings, *work.evaluation)
        together = ({*one.models, *getattr(one, "kept", ())} for one in passes if one.reads_heads)
        read = any(term.teacher for term in work.terms) or any({"student", "teacher"} <= models for models in together)
        away = [name for name in self.of_role("teacher") if self.place(name) != HOME]
        return [torch.empty_like(lm_head(self.by_name[name]).weight) for name in away] if read else []

    def _projectors(self, term: TermShape) -> Iterable[nn.Module]:
        """The projectors that a method trains beside the student for the features of a term."""
        return make_projectors(self.student, self.by_name["teacher"], term.features, seed=0) if term.features else ()


def _build_student(setting: Setting, architecture: PreTrainedConfig, *, trains: bool) -> PreTrainedModel:
    model = build(architecture, setting.student_dtype, setting.student_attention)
    if setting.student_quantization is not None:
        quantize(model, setting.student_quantization)
    student = without_dropout(model).train()
    if not trains:
        student.requires_grad_(False)
    if setting.trained_parts is not None:
        train_parts(student, setting.trained_parts, vision_from_layer=setting.vision_from_layer)
        if setting.shown is None:  # as their embeddings do, which no pass of a plan reads then
            student.get_input_embeddings().register_forward_hook(_with_gradient)
    if setting.lora is not None:
        add_adapters(student, setting.lora, seed=0)
    if setting.master_weights:  # DeepSpeed casts adapters like every other weight
        for parameter in student.parameters():
            parameter.data = parameter.data.to(getattr(torch, setting.student_dtype))
    return student


def _build_teacher(setting: Setting, architecture: PreTrainedConfig) -> PreTrainedModel:
    model = build(architecture, setting.teacher_dtype, setting.teacher_attention)
    if setting.teacher_quantization is not None:
        quantize(model, setting.teacher_quantization)
    teacher = model.eval().requires_grad_(False)
    if setting.teacher_lora is not None:
        add_adapters(without_dropout(model).train(), setting.teacher_lora, seed=0)
    return teacher


def _with_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output
