"""Rationales and labels that a teacher has written, read from its answers, with a summary that reports show."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from minillm.config.few_shot import FewShot
from minillm.data.answer_parsers import Reasoned, parse_answer
from minillm.storage.atomic import write_text

SUMMARY = "rationales.json"  # beside the answers
SHOWN, SHOWN_CHARACTERS = 3, 2000


def read_answer(text: str, config: FewShot) -> Reasoned:
    """The rationale and the label of a teacher's answer, which ends before the first of config.stop."""
    ends = [place for stop in config.stop if (place := text.find(stop)) >= 0]
    return parse_answer(text[: min(ends, default=len(text))], config.parser)


def write_summary(
    folder: Path, prompts: Sequence[str], answers: Sequence[str], parts: Sequence[Reasoned], config: FewShot
) -> None:
    """Write how many answers have neither rationale nor label, or no label alone, and some of either kind.

    Args:
        folder: of the answers.
        prompts: the questions, without the solved examples, one for each answer.
    """
    labelled = [place for place, part in enumerate(parts) if part.label is not None]
    unlabelled = [place for place, part in enumerate(parts) if part.label is None]

    def sample(place: int) -> Mapping[str, str | None]:
        part = parts[place]
        texts = {"question": prompts[place], "answer": answers[place], "rationale": part.rationale, "label": part.label}
        return {name: text and text[:SHOWN_CHARACTERS] for name, text in texts.items()}

    content = {
        "parser": config.parser,
        "answers": len(parts),
        "without_rationale": sum(not part.rationale for part in parts),
        "without_label": len(unlabelled),
        "samples": {
            "labelled": [sample(place) for place in labelled[:SHOWN]],
            "unlabelled": [sample(place) for place in unlabelled[:SHOWN]],
        },
    }
    write_text(folder / SUMMARY, json.dumps(content, indent=1, ensure_ascii=False))
