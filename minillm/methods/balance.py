"""The balance loss of a mixture of experts, added to the terms of whatever method trains it."""

from collections.abc import Sequence
from dataclasses import replace

from minillm.config.needs import Needs
from minillm.methods.protocol import Term


def add_balance(terms: Sequence[Term], coefficient: float, needs: Needs) -> list[Term]:
    """The terms of a micro-batch with `coefficient` times the student's balance loss among them, counted once.

    Each of the n terms that train the student has an n-th of it, from its own forward pass: what is added to the loss of a
    step is the coefficient times the mean over these terms.
    """
    if not coefficient:
        return list(terms)
    students = sum(term.trains == "student" for term in needs.terms)
    return [
        replace(term, auxiliary=coefficient / (students * term.weight))  # the engine multiplies the term by its weight
        if term.trains == "student" and term.weight
        else term
        for term in terms
    ]
