"""`minillm bench kernels --like MODEL`: what full logits, a loss on them, and ours cost at the shapes of a user's model.

Of the model only the shape of its head is read, without weights: the memory and the time of a loss depend on that and on
the number of tokens alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minillm import UserError
from minillm.benchmarks.cases import Case
from minillm.benchmarks.tables import Row

LOSSES = ("cross_entropy", "reverse_kl")
TOKENS = 4096
FULL, CURRENT = "full_logits", "eager"
OURS = {"cpu": ("minillm_torch",), "cuda": ("minillm_triton", "minillm_tiled")}
NAMES = {
    FULL: "full logits and their gradient, no loss",
    CURRENT: "loss on full logits",
    "minillm_torch": "minillm",
    "minillm_triton": "minillm",
    "minillm_tiled": "minillm, backend='tiled'",
}
MIB = 2**20

CROSS_ENTROPY = """\
from minillm.losses import LMHead, linear_cross_entropy

hidden = model.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
loss = linear_cross_entropy(hidden[:, :-1], LMHead.of(model), labels[:, 1:])
"""
DIVERGENCE = """\
from minillm.integrations import distillation_loss

batch = {{"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}}
loss = distillation_loss(student, teacher, batch, divergence="{divergence}"{options})
"""


class Heads(NamedTuple):
    """The heads of a student and its teacher."""

    student_hidden: int
    teacher_hidden: int
    student_vocab: int
    teacher_vocab: int
    dtype: str

    @property
    def vocab(self) -> int:
        """The ids that both have."""
        return min(self.student_vocab, self.teacher_vocab)


def heads_of(like: str, teacher: str | None = None) -> Heads:
    """The heads of a configuration's last stage, or of a model that is named; its teacher has the same where none is.

    Raises UserError where an architecture is not known.
    """
    if like.endswith((".yaml", ".yml")):
        if teacher is not None:
            raise UserError(f"--teacher goes with a model; {like} says which teacher it has")
        return _of_configuration(Path(like))
    student = _architecture(like)
    mine = _head(student)
    other = mine if teacher is None else _head(_architecture(teacher))
    dtype = str(student.get_text_config().dtype or student.dtype or "float32").removeprefix("torch.")
    return Heads(mine[1], other[1], mine[0], other[0], dtype)


def _of_configuration(file: Path) -> Heads:
    from minillm.config.loader.run_plan import load_run
    from minillm.planning.architectures import Architectures

    plan = load_run([file])
    stage, known = plan.stages[-1], Architectures(plan)
    mine, other = _head(known.student(stage)), known.teacher(stage)
    other = mine if other is None else _head(other)
    dtype = "bfloat16" if stage.config.train.bf16 else stage.config.student_side.dtype
    return Heads(mine[1], other[1], mine[0], other[0], dtype)


def _architecture(name: str):
    """The configuration of a model's folder, of a config.json, or of a hub name."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--like and --teacher take a model's folder, its config.json, a hub name or a .yaml file of minillm; {name}: "
            f"{reason}"
        ) from error


def _head(architecture) -> tuple[int, int]:
    """(V, H) of an architecture's LM head, whose weights are not made."""
    from minillm.planning.sizes import build

    head = build(architecture, "bfloat16", "eager").get_output_embeddings()
    if head is None:
        raise UserError(f"{architecture.model_type} has no LM head; name a model that answers in text")
    return tuple(head.weight.shape)


def cases_of(
    heads: Heads, losses: Sequence[str], tokens: Sequence[int], dtype: str | None, ignored: Sequence[float]
) -> list[Case]:
    """A case for each loss, number of tokens and part of ignored ones."""
    shape = heads.student_hidden, heads.teacher_hidden, heads.vocab
    return [
        Case(loss, count, *shape, dtype or heads.dtype, part) for loss in losses for count in tokens for part in ignored
    ]


def as_text(name: str, heads: Heads, device: str, rows: list[Row], skipped: dict[str, dict[str, str]]) -> str:
    """The tables, what is saved, what to paste, and the command that measures beside other libraries."""
    lines, losses = [], []
    for case in dict.fromkeys(row.case for row in rows):
        here = {row.provider: row for row in rows if row.case == case and row.mode == "full"}
        lines += [
            f"{case.loss} like {name}: {case.kept:,} tokens x {case.vocab:,} ids, hidden {case.student_hidden}"
            + (f" and {case.teacher_hidden} of the teacher" if case.needs_teacher else "")
            + f", {case.dtype}; forward and backward",
            "",
            "| | ms | MiB |",
            "|---|--:|--:|",
        ]
        for provider in (FULL, CURRENT, *OURS[device]):
            reason = skipped.get(provider, {}).get(case.name)
            if provider in here:
                lines.append(f"| {NAMES[provider]} | {here[provider].milliseconds[0]:,.1f} | {_mib(here[provider])} |")
            elif reason is not None:
                lines.append(f"| {NAMES[provider]} | does not run: {reason} | |")
        lines += ["", *_saved(here, device)]
        losses.append(case.loss)
    options = f", vocab_size={heads.vocab:_}" if heads.student_vocab != heads.teacher_vocab else ""
    for loss in dict.fromkeys(losses):
        lines += [f"To have {loss} without full logits, paste:", ""]
        text = CROSS_ENTROPY if loss == "cross_entropy" else DIVERGENCE.format(divergence=loss, options=options)
        lines += [f"    {line}".rstrip() for line in text.splitlines()] + [""]
    return "\n".join(lines)


def _mib(row: Row) -> str:
    return "" if row.peak_bytes is None else f"{row.peak_bytes / MIB:,.0f}"


def _saved(here: dict[str, Row], device: str) -> list[str]:
    """The saving of the first of our backends over the loss on full logits, in a sentence."""
    ours, theirs = here.get(OURS[device][0]), here.get(CURRENT)
    if ours is None or theirs is None:
        return []
    speed = theirs.milliseconds[0] / ours.milliseconds[0]
    words = [f"{speed:.2f} times the speed of the loss on full logits"]
    if ours.peak_bytes is not None and theirs.peak_bytes:
        saved = theirs.peak_bytes - ours.peak_bytes
        words.insert(0, f"{saved / MIB:,.0f} MiB saved, {saved / theirs.peak_bytes:.0%} of its memory")
    return ["; ".join(words) + ".", ""]


def command(cases: list[Case]) -> str:
    """The command that measures the same cases beside every peer that is installed."""
    first = cases[0]
    given = {
        "losses": dict.fromkeys(case.loss for case in cases),
        "tokens": dict.fromkeys(case.tokens for case in cases),
        "shape": (first.student_hidden, first.teacher_hidden, first.vocab),
        "dtype": (first.dtype,),
    }
    if any(case.ignored for case in cases):
        given["ignored"] = dict.fromkeys(case.ignored for case in cases)
    return " ".join(["minillm bench kernels", *(f"--{key} {' '.join(map(str, one))}" for key, one in given.items())])
