"""The preference of a student for the first of two answers, on held-out pairs.

The score of an answer y of T tokens is the reward of DPO (arXiv 2305.18290) and of DPKD (2406.19774) without its factor
beta, with the teacher p as the reference of the student q:

    s(y) = sum_t log q(y_t | y_<t, x) / p(y_t | y_<t, x), divided by T with length_norm; p is left out with reference_free
    margin_nats = mean over the pairs of s(w) - s(l), w the chosen answer and l the rejected one
    preferred_share = the share of the pairs with s(w) > s(l)

Where w is sampled by the teacher and l by the student itself, the expectation of the margin without length_norm is
-(KL(p || q) + KL(q || p)) over sequences: it rises to 0 as the student comes nearer to its teacher. On given pairs it has
no limit, and is 0 for a student that is its teacher.
"""

from collections.abc import Sequence

from torch import Tensor

from minillm.config.analysis_keys import Preference
from minillm.data.pairs import AnswerPair
from minillm.evaluate.token_statistics import token_statistics
from minillm.teachers.pair import Models


def pair_margins(models: Models, pairs: Sequence[AnswerPair], keys: Preference, *, batch_size: int) -> dict[str, float]:
    """`margin_nats` and `preferred_share`; see the module.

    Args:
        models: the student, and the teacher unless keys.reference_free.
        pairs: one at least. An answer without tokens has score 0.
        batch_size: answers that are scored side by side.
    """
    fields = ("student_logprob",) if keys.reference_free else ("student_logprob", "teacher_logprob")
    sequences = [one for pair in pairs for one in (pair.chosen, pair.rejected)]
    stats = token_statistics(models, sequences, fields, batch_size=batch_size)
    reference = [None] * len(sequences) if keys.reference_free else stats["teacher_logprob"]
    scores = [_score(*one, keys.length_norm) for one in zip(stats["student_logprob"], reference, strict=True)]
    margins = [chosen - rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
    return {
        "margin_nats": sum(margins) / len(margins),
        "preferred_share": sum(margin > 0 for margin in margins) / len(margins),
    }


def _score(student: Tensor, reference: Tensor | None, length_norm: bool) -> float:  # (T,) each
    ratio = student.double() if reference is None else student.double() - reference.double()
    return ratio.sum().item() / (max(len(ratio), 1) if length_norm else 1)
