"""The keys of a stage that change the simulated shapes, beside its architectures and sizes."""

from dataclasses import dataclass

from minillm.config.lora import LoraConfig
from minillm.config.models import Part, Quantization, TeacherConfig, teachers_of
from minillm.config.root import StageConfig
from minillm.models.packing import attention_by_sequence
from minillm.planning.places import HOME, place_of
from minillm.planning.shown_pictures import ShownPictures


@dataclass(frozen=True)
class Setting:
    """Dtypes, attention and engine of one stage."""

    student_dtype: str
    teacher_dtype: str
    student_attention: str
    teacher_attention: str
    teacher_quantization: Quantization | None
    autocast: bool  # bf16, over weights of another dtype
    master_weights: bool  # the optimiser has an fp32 copy of the weights, and fp32 moments
    gradients_stay: bool  # from one step to the next
    checkpointing: bool
    lora: LoraConfig | None
    teacher_lora: LoraConfig | None
    student_quantization: Quantization | None = None  # of a teacher that is the only model
    trained_parts: tuple[Part, ...] | None = None  # of the student; None: all of it
    vision_from_layer: int | None = None
    shown: ShownPictures | None = None  # the pictures of every prompt
    teacher_place: str = HOME  # minillm.planning.places.place_of, of several teachers the first
    packed: bool = False  # train.packing: on, which takes a mask of all pairs where attention has no other way

    def masks_pairs(self, attention: str) -> bool:
        """True where a model with an attention implementation reads its batches packed, under a mask of all pairs of their
        tokens. Packed without one, the longest batch is what it is padded: it has no padding."""
        return self.packed and not attention_by_sequence(attention)

    @property
    def masked(self) -> frozenset[str]:
        """Of student and teacher those that `masks_pairs`."""
        of_role = {"student": self.student_attention, "teacher": self.teacher_attention}
        return frozenset(role for role, attention in of_role.items() if self.masks_pairs(attention))

    @classmethod
    def of(
        cls, config: StageConfig, *, checkpointing: bool, shown: ShownPictures | None = None, kind: str = "cuda"
    ) -> "Setting":
        """Read a configuration, with `checkpointing` in the place of train.gradient_checkpointing.

        Args:
            shown: the pictures of its prompts.
            kind: of the student's device, cuda or cpu.
        """
        needs = config.method.needs()
        local = [one for one in teachers_of(config.teacher_side).values() if isinstance(one, TeacherConfig)]
        teacher = local[0] if local else None  # of several the first; minillm.planning.several_teachers has the others
        student = teacher if needs.alone else config.student_side
        deepspeed = config.engine.type == "deepspeed" and needs.takes_steps
        mixed = deepspeed and config.train.bf16  # DeepSpeed casts the weights, torch's autocast each use of them
        beside = teacher or student
        return cls(
            student_dtype="bfloat16" if mixed else student.dtype,
            teacher_dtype=beside.dtype,
            student_attention=student.attn_implementation,
            teacher_attention=beside.attn_implementation,
            teacher_quantization=None if teacher is None else teacher.quantization,
            autocast=config.train.bf16 and not mixed,
            master_weights=deepspeed,
            gradients_stay=deepspeed,
            checkpointing=checkpointing,
            lora=None if needs.alone else student.lora,
            teacher_lora=needs.teacher_lora,
            student_quantization=teacher.quantization if needs.alone else None,
            trained_parts=None if needs.alone else student.trained_parts,
            vision_from_layer=None if needs.alone else student.vision_from_layer,
            shown=shown,
            teacher_place=HOME if needs.alone else place_of(teacher, config.engine, kind),
            packed=config.train.packing == "on",
        )
