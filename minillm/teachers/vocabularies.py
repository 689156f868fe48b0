"""The ids that student and teacher share, by the use that is made of them.

Reserved tokens are renamed from one release of a family to the next (Llama 3 and 3.1), others are added at the end (Qwen 2,
2.5 and 3), and some have no row in the head (Gemma 3 1B). None of these is in a text unless somebody writes it there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from minillm import UserError
from minillm.models.tokenizers import end_of_turn

Names = tuple[str | None, str | None]  # what student and teacher call an id; None where there is no such id


class PreflightError(UserError):
    """A pair of models that cannot be distilled as it is."""


@dataclass(frozen=True)
class SharedVocabulary:
    """The ids below `size`, but for those that mean something else to the other model."""

    size: int
    unshared: Mapping[int, Names] = field(default_factory=dict)

    def require(self, name: str, texts: Iterable[Sequence[int]]) -> None:
        """Raises UserError, which names the token, for texts with an id that is not shared.

        Args:
            name: what errors call them.
            texts: the ids of each.
        """
        if not self.unshared:
            return
        for ids in texts:
            found = self.unshared.keys() & set(ids)
            if found:
                index = min(found)
                ours, theirs = (repr(one) if one is not None else "nothing" for one in self.unshared[index])
                meaning = (
                    f"which has no row in the models' heads, {self.size:,} of which are shared"
                    if index >= self.size and ours == theirs
                    else f"which is {ours} for the student and {theirs} for the teacher"
                )
                raise UserError(
                    f"{name}: a text holds id {index}, {meaning}. Take that token out of the data or its template, or use "
                    "models that share it"
                )

    def described(self) -> Names | None:
        """The ids that are not shared, for the preflight table: the student's and the teacher's."""
        if not self.unshared:
            return None
        return _few([ours for ours, _ in self.unshared.values()]), _few(
            [theirs for _, theirs in self.unshared.values()]
        )


def shared_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, *, rows: Sequence[int]
) -> SharedVocabulary:
    """The ids that two tokenizers and all heads know.

    Args:
        teacher: its tokenizer, None where there is none to compare with.
        rows: of each head: the student's, and the teacher's where there is one.

    Raises PreflightError where the two differ in what ordinary text is made of or in what ends an answer, or where that
    has no row in a head.
    """
    unshared = require_same_tokenizer(student, teacher) if teacher is not None else {}
    ours, theirs = _by_id(student), _by_id(teacher or student)
    both = max(ours.keys() & theirs.keys(), default=-1)
    size = min([*rows, *(index for index in unshared if index > both)])
    beyond = [index for index in sorted({*ours, *theirs}) if index >= size]
    added = student.added_tokens_decoder
    needed = [index for index in beyond if index in ours and (index not in added or index in _ends(student))]
    if any(index not in unshared for index in needed):
        counts = " (student {}{})".format(*[f"{rows[0]:,}", f", teacher {rows[1]:,}" if len(rows) > 1 else ""])
        raise PreflightError(
            f"the tokenizer has {len(student):,} tokens, but the heads share only {size:,} rows{counts}; use the tokenizer "
            "these models were trained with"
        )
    return SharedVocabulary(size, {**unshared, **{index: (ours.get(index), theirs.get(index)) for index in beyond}})


def require_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, reference: str | None = None
) -> dict[int, Names]:
    """The ids of added tokens that only one of the two has, or that they call otherwise.

    Raises PreflightError where an id of ordinary text, or one that ends answers, means one thing to one of them and
    another to the other. `reference` is the path of the reference model, where it is that which stands on the student's
    side.
    """
    side = "student" if reference is None else "reference"
    ours, theirs = _by_id(student), _by_id(teacher)
    differing = sorted(index for index in {*ours, *theirs} if ours.get(index) != theirs.get(index))
    if not differing:
        return {}
    added = (student.added_tokens_decoder.keys() | _missing(differing, ours)) & (
        teacher.added_tokens_decoder.keys() | _missing(differing, theirs)
    )
    ends = {side: _ends(student), "teacher": _ends(teacher)}
    for index in differing:
        names = ours.get(index), theirs.get(index)
        who = next((who for who, ids in ends.items() if index in ids), None)
        if index not in added or who is not None:
            use = "" if index not in added else f", and ends answers of the {who}"
            remedy = (
                "Token-level distillation needs one tokenizer: choose a student of the teacher's family, or prune the teacher "
                "(student.init=prune). Methods uld and gold learn from a teacher with another one"
                if reference is None
                else "Both must read the same ids: choose a reference of the teacher's family, or train one with the teacher's "
                f"tokenizer in the place of {reference} (student.tokenizer)"
            )
            raise PreflightError(
                f"{side} and teacher have different tokenizers: id {index} is {names[0]!r} for the {side} and "
                f"{names[1]!r} for the teacher{use}. {remedy}"
            )
    return {index: (ours.get(index), theirs.get(index)) for index in differing}


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _missing(ids: Iterable[int], names: Mapping[int, str]) -> set[int]:
    return {index for index in ids if index not in names}


def _ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {end for end in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if end is not None}


def _few(names: Sequence[str | None]) -> str:
    there = [repr(name) for name in names if name is not None]
    if not there:
        return f"{len(names)} ids, not there"
    shown = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
    return f"{len(there)}: {shown}"
