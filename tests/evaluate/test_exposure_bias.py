"""Excess accumulated error against sums done by hand."""

import math

import pytest
import torch

from minillm.evaluate.exposure_bias import accumulated_error

STUDENT = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0])]  # the second answer ends after one token
TEACHER = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0, 2.0])]


def test_sums_run_from_the_first_token_over_all_answers():
    error = accumulated_error(STUDENT, TEACHER, 4)
    assert error.on_student.tolist() == [2.0, 3.0, 5.0, 5.0]
    assert error.on_teacher.tolist() == [1.0, 1.5, 2.5, 2.5]
    assert [error.excess(length) for length in (1, 2, 3, 4)] == [100.0, 100.0, 100.0, 100.0]
    assert error.on_student.dtype == torch.float64


def test_answers_longer_than_asked_are_cut_and_equal_prefixes_have_no_excess():
    error = accumulated_error(STUDENT, STUDENT, 2)
    assert error.on_student.tolist() == [2.0, 3.0] and error.excess(2) == 0.0


def test_a_student_that_is_its_teacher_has_no_ratio():
    nothing = [torch.zeros(2)]
    assert math.isnan(accumulated_error(nothing, nothing, 2).excess(2))
    with pytest.raises(ValueError, match="no answers"):
        accumulated_error([], nothing, 2)
