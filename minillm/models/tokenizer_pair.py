"""The tokenizers of a student and of a teacher that has another one: which ids mean the same, and which tokens the same bytes."""

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from minillm.models.byte_alignment import TokenGroup, align, token_bytes
from minillm.models.spelling import Spelling, spelling_of
from minillm.models.tokenizers import end_of_turn
from minillm.models.vocabulary_map import vocabulary_map


class TokenizerPair:
    """See the module."""

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase):
        self.student, self.teacher = student, teacher

    @cached_property
    def spellings(self) -> tuple[Spelling, Spelling]:
        """Of student and teacher."""
        return spelling_of(self.student), spelling_of(self.teacher)

    @cached_property
    def matches(self) -> dict[int, int]:
        """The student's ids that mean just what an id of the teacher does: that id. No two of them have the same one."""
        others = vocabulary_map(*self.spellings, nearest=False).ids.tolist()
        of_bytes = self.spellings[0].bytes
        # What ends an answer comes first: padding and the like may go to the same id. What stands for a byte comes last: the
        # token of that text is used wherever there is one.
        end = self.student.eos_token_id
        order = sorted(range(len(others)), key=lambda index: (index != end, index in of_bytes, index))
        taken: dict[int, int] = {}
        for index in order:
            if others[index] >= 0:
                taken.setdefault(others[index], index)
        return {index: other for other, index in taken.items()}

    @cached_property
    def pad_id(self) -> int:
        """The id that pads the teacher's texts."""
        return self.teacher.eos_token_id if self.teacher.pad_token_id is None else self.teacher.pad_token_id

    @cached_property
    def ends(self) -> tuple[frozenset[int], frozenset[int]]:
        """The ids that end an answer, of student and teacher."""
        return _ends(self.student), _ends(self.teacher)

    def text(self, side: int, ids: Sequence[int]) -> bytes:
        """The bytes that ids of the student (side 0) or the teacher (1) stand for; special ones stand for none."""
        return b"".join(token or b"" for token in token_bytes(self.spellings[side], ids))

    def groups(self, student: Sequence[int], teacher: Sequence[int]) -> list[TokenGroup]:
        """The groups of two answers with the same text; their ends, where both have one, are the last group."""
        answers = [list(student), list(teacher)]
        ended = all(ids and ids[-1] in ends for ids, ends in zip(answers, self.ends, strict=True))
        texts = [ids[:-1] if ids and ids[-1] in ends else ids for ids, ends in zip(answers, self.ends, strict=True)]
        groups = align(*(token_bytes(spelling, ids) for spelling, ids in zip(self.spellings, texts, strict=True)))
        if ended:
            groups.append(TokenGroup(*((len(ids) - 1, len(ids)) for ids in answers)))
        return groups

    def rows(self, answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[str, str, str]]:
        """The rows of the preflight table: ids that match, and how the given answers (student's, teacher's) are aligned."""
        count = len(self.matches)
        of = [len(spelling.names) for spelling in self.spellings]
        rows = [("ids that match", *(f"{count:,} of {size:,} ({count / max(size, 1):.0%})" for size in of))]
        grouped = [self.groups(*pair) for pair in answers]
        groups = sum(map(len, grouped))
        if not groups:
            return [*rows, ("bytes aligned", "none", "none")]
        shares, a_token = [], []
        for side, name in enumerate(("student", "teacher")):
            total = aligned = tokens = 0
            for pair, found in zip(answers, grouped, strict=True):
                sizes = [len(token or b"") for token in token_bytes(self.spellings[side], pair[side])]
                total, tokens = total + sum(sizes), tokens + len(sizes)
                aligned += sum(sum(sizes[slice(*getattr(group, name))]) for group in found)
            shares.append(f"{aligned / max(total, 1):.1%}")
            a_token.append(f"{groups / tokens:.2f}")
        return [*rows, ("bytes aligned", *shares), ("groups a token", *a_token)]


def _ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(end for end in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if end is not None)
