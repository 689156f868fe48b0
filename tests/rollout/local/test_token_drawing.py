"""Answers as they are written token by token, and prompts that end in the same column."""

from types import SimpleNamespace

import pytest
import torch

from minillm import UserError
from minillm.rollout.local.token_drawing import PartialAnswers, choose, pad_left
from minillm.rollout.rollouts import Sampling

EOS, OTHER_END, PAD = 2, 5, 9
MODELS = SimpleNamespace(pad_id=PAD, vocab_size=10, eos_ids=(EOS, OTHER_END), device=torch.device("cpu"))


def writing(batch: int = 3, steps: int = 4) -> PartialAnswers:
    return PartialAnswers(MODELS, ("student",), batch, steps)


def write(answers: PartialAnswers, columns: list[list[int]], rows: list[int] | None = None) -> None:
    """A token a row for each column; its log-probability is minus the token."""
    rows = torch.tensor(range(len(columns[0])) if rows is None else rows)
    for place, tokens in enumerate(columns):
        token = torch.tensor(tokens)
        answers.put(rows, answers.places[place : place + 1], token, -token.double())


def test_an_answer_ends_with_its_first_end_and_keeps_it():
    answers = writing()
    write(answers, [[1, EOS, 1], [3, EOS, 4], [OTHER_END, 1, 6], [EOS, 7, 7]])
    first, second, third = answers.answers([[10], [11, 12], [13]])
    assert (first.response, first.ended, first.prompt) == ([1, 3, OTHER_END], True, [10])
    assert (second.response, second.ended, second.prompt) == ([EOS], True, [11, 12])
    assert (third.response, third.ended) == ([1, 4, 6, 7], False)
    assert first.logprobs.tolist() == [-1.0, -3.0, -5.0] and first.logprobs.dtype == torch.float32


def test_look_counts_the_answers_that_go_on():
    answers = writing()
    write(answers, [[1, EOS, 1]])
    assert answers.look(0, 1) == 2
    write(answers, [[1, 1, 1], [EOS, 1, EOS]])
    assert answers.look(1, 2) == 0


def test_rows_that_left_are_not_written_to():
    answers = writing()
    write(answers, [[1, EOS, 1]])
    answers.put(torch.tensor([0, 2]), answers.places[1:2], torch.tensor([3, EOS]), torch.tensor([-3.0, -2.0]).double())
    assert [one.response for one in answers.answers([[1]] * 3)] == [[1, 3, PAD, PAD], [EOS], [1, EOS]]


def test_cleared_answers_are_as_new_and_rows_beyond_them_have_ended():
    answers = writing()
    write(answers, [[EOS, EOS, EOS]])
    answers.clear(2)
    assert answers.look(0, 0) == 2 and answers.ended.tolist() == [False, False, True]
    write(answers, [[1, 1, 1], [EOS, 1, 1]])
    assert [one.response for one in answers.answers([[1], [1]])] == [[1, EOS], [1, 1, *answers.tokens[1, 2:].tolist()]]
    assert answers.lengths.tolist() == [2, 4, 0]


def test_logits_that_are_not_finite_are_named_by_token_and_count():
    answers = writing()
    answers.put(
        torch.arange(3), answers.places[:1], torch.tensor([1, EOS, 1]), torch.tensor([-1.0, -1.0, -1.0]).double()
    )
    answers.put(
        torch.arange(3), answers.places[1:2], torch.tensor([1, 1, 1]), torch.tensor([torch.nan, torch.nan, -1]).double()
    )
    assert answers.look(0, 1) == 2
    with pytest.raises(UserError, match=r"logits at token 1 of 1 answer.* the weights of student hold NaN"):
        answers.look(0, 2)  # the second answer had ended before: what is drawn behind its end is nobody's


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_token_is_drawn_at_the_temperature(temperature):
    logits = torch.full((1, 128), -torch.inf)
    logits[0, :2] = torch.tensor([0.0, -1.0])
    first = torch.sigmoid(torch.tensor(1.0 / temperature)).item()
    for uniform, token in ((first - 1e-3, 0), (first + 1e-3, 1)):
        drawn, logprob = choose([logits.clone()], [1.0], Sampling(1, temperature), torch.tensor([uniform]).double())
        assert drawn.item() == token
        assert logprob.exp().item() == pytest.approx(first if token == 0 else 1 - first, rel=1e-5)


def test_prompts_end_in_the_last_column_and_positions_begin_at_their_first_token():
    ids, padding, positions = pad_left([[4, 5, 6], [7]], 3, PAD)
    assert ids.tolist() == [[4, 5, 6], [PAD, PAD, 7]] and padding.tolist() == [[0], [2]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
