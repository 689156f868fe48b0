"""Label accuracy: the label that an answer ends in is the one that its reference ends in, whatever led to it."""

from collections.abc import Sequence

from minillm import UserError
from minillm.config.evaluation import LabelAccuracy
from minillm.data.answer_parsers import parse_answer
from minillm.data.instructions import PromptSet
from minillm.evaluate.equations import evaluate_equation
from minillm.evaluate.exact_match import exact_match

Scores = dict[str, list[float | None]]


class LabelScorer:
    """Scores the answers to one set of prompts by their labels.

    A reference gives its label to the parser of its set, or is one itself. With compare: text, labels are compared as
    exact_match compares answers; with compare: equation, by their exact values.
    """

    def __init__(self, config: LabelAccuracy, prompts: PromptSet, name: str):
        """Raises UserError where no reference of the set has a label, or one has a label without a value.

        Args: name: the key of the set, for errors.
        """
        self.config = config
        self.expected = [_labels(example.references, prompts.parser) for example in prompts.examples]
        if not any(self.expected):
            how = "there are no references" if prompts.parser is None else f"the parser {prompts.parser} finds none"
            raise UserError(f"{name}: no label to compare with, which eval.label_accuracy asks for: {how}")
        for example, labels in zip(prompts.examples, self.expected, strict=True):
            unvalued = [label for label in labels if evaluate_equation(label) is None]
            if config.compare == "equation" and unvalued:
                raise UserError(
                    f"{name}: the label {unvalued[0][:80]!r} of prompt {example.index + 1} is no equation that has a value; use "
                    "eval.label_accuracy.compare: text"
                )

    def score(self, texts: Sequence[str]) -> Scores:
        """An answer's `label_accuracy`, 100 or 0, and its `unlabelled_share`, 1 where it has no label; None without a reference's."""
        scores: Scores = {"label_accuracy": [], "unlabelled_share": []}
        for text, expected in zip(texts, self.expected, strict=True):
            label = _label(text, self.config.parser)
            if label is not None and self.config.compare == "equation" and evaluate_equation(label) is None:
                label = None
            right = label is not None and self._same(label, expected)
            scores["label_accuracy"].append(100.0 * right if expected else None)
            scores["unlabelled_share"].append(float(label is None) if expected else None)
        return scores

    def _same(self, label: str, expected: Sequence[str]) -> bool:
        if self.config.compare == "equation":
            return evaluate_equation(label) in {evaluate_equation(one) for one in expected}
        return bool(expected) and exact_match(label, expected) > 0


def _label(text: str, parser: str | None) -> str | None:
    return (text.strip() or None) if parser is None else parse_answer(text, parser).label


def _labels(references: Sequence[str], parser: str | None) -> list[str]:
    return [label for reference in references if (label := _label(reference, parser)) is not None]
