"""The rollout benchmark: both sides do the same work, and what is written is what was measured."""

import argparse
import csv

import pytest
import torch

from minillm.benchmarks.rollout import COLUMNS, best_occupancy, main
from minillm.benchmarks.rollout_providers import (
    ALPHA,
    PROVIDERS,
    TeacherMixing,
    make_model,
    make_prompts,
    prepare,
    why_not,
)
from minillm.rollout.local import local_rollouts
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models

SMALL = argparse.Namespace(prompts=3, batch_size=2, prompt_tokens=6, tokens=5, vocab=40, seed=0, answers_per_prompt=1)


@pytest.fixture(scope="module")
def models() -> Models:
    student, teacher = (make_model(16, 1, SMALL.vocab, seed) for seed in (0, 1))
    return Models(student, LocalTeacher(teacher), None, SMALL.vocab, (), 0, torch.device("cpu"))


@pytest.mark.parametrize("mode", ["student", "mixture"])
def test_all_write_as_many_tokens(models, monkeypatch, mode):
    monkeypatch.setattr(local_rollouts, "CudaGraphs", lambda device: lambda step: step() or step)
    monkeypatch.setattr(local_rollouts, "require_cuda_graphs", lambda models: None)
    prompts = make_prompts(SMALL)
    drawn = [prepare(name, mode, models, prompts, SMALL)(1) for name in PROVIDERS]
    assert all(one.lengths == [5, 5, 5] and one.tokens == 15 for one in drawn)
    assert {one.prompt_tokens for one in drawn} == {sum(map(len, prompts))}


def test_several_answers_read_a_prompt_once(models):
    arguments = argparse.Namespace(**{**vars(SMALL), "answers_per_prompt": 4})
    prompts = make_prompts(arguments)
    assert prompts == make_prompts(SMALL) * 4
    once, each = (prepare(name, "student", models, prompts, arguments) for name in ("ours", "ours-unshared"))
    assert once(1).lengths == each(1).lengths and 4 * once(1).prompt_tokens == each(1).prompt_tokens


def test_rows_are_filled_as_soon_as_one_is_free():
    assert best_occupancy([5, 5, 5, 5], 2) == 1.0
    # rows of three and one steps; the third answer begins in the second one after its step
    assert best_occupancy([4, 2, 4], 2) == 7 / (2 * 4)


def test_graphs_are_skipped_where_there_can_be_none():
    for device, several, missing in (
        ("cpu", 1, ["ours-unshared", "ours-graphs"]),
        ("cuda:1", 1, ["ours-unshared"]),
        ("cuda:1", 4, ["ours-coins", "ours-graphs"]),
    ):
        assert [name for name in PROVIDERS if why_not(name, torch.device(device), several) is not None] == missing


@torch.no_grad()
def test_the_peers_processor_is_the_mixture(models):
    """Left-padded, and a second token fed through the teacher's cache."""
    prompts = [[3, 4, 5, 6], [7, 8]]
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]])
    mixing = TeacherMixing(models.teacher.model, (torch.arange(4) >= torch.tensor([[0], [2]])).long(), ALPHA)
    for fed in (ids, torch.cat([ids, torch.tensor([[9], [10]])], 1)):
        whole = [prompt + fed[row, 4:].tolist() for row, prompt in enumerate(prompts)]
        student, teacher = (
            torch.stack([model(torch.tensor([one])).logits[0, -1] for one in whole])
            for model in (models.student, models.teacher.model)
        )
        expected = (ALPHA * teacher.softmax(-1) + (1 - ALPHA) * student.softmax(-1)).log()
        torch.testing.assert_close(mixing(fed, student), expected, atol=1e-5, rtol=1e-5)


def test_prompts_are_of_half_to_the_whole_length():
    lengths = [len(prompt) for prompt in make_prompts(argparse.Namespace(prompts=50, prompt_tokens=8, vocab=9, seed=0))]
    assert lengths[0] == 8 and set(lengths) == set(range(4, 9))


def test_results_are_written(tmp_path, capsys):
    threads = torch.get_num_threads()
    words = "--device cpu --shapes 16x1 --vocab 40 --prompts 3 --batch-size 2 --prompt-tokens 6 --tokens 5 --repeats 1 --threads 1 --output"
    assert main([*words.split(), str(tmp_path / "out")]) == 0
    assert torch.get_num_threads() == threads
    with (tmp_path / "out" / "rollout.csv").open() as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    run = ("ours", "ours-batches", "generate", "generate-static")
    names = {"student": run, "mixture": ("ours", "ours-coins", *run[1:])}  # nothing is mixed for the student alone
    assert [tuple(row[3:6]) for row in rows] == [
        (mode, answers, PROVIDERS[name]) for mode in names for answers in ("full", "ending") for name in names[mode]
    ]
    assert all(float(value) > 0 for row in rows for value in row[6:9])
    assert all(float(row[7]) > float(row[6]) for row in rows), "prompts are read too"
    assert all(row[8] == "1.00" for row in rows if row[5] == PROVIDERS["generate"])
    assert all((row[9] == "") == (row[4] == "full") for row in rows)
    assert all(float(row[10]) >= 0 for row in rows)
    page = (tmp_path / "out" / "rollout.md").read_text()
    assert "2 rows is free" in page
    assert page in capsys.readouterr().out and all(f"| {' | '.join(row)} |" in page for row in rows)
    assert "| skipped: minillm, CUDA graphs | needs a GPU |" in page


def test_a_wrong_shape_is_explained(capsys):
    with pytest.raises(SystemExit):
        main(["--shapes", "128"])
    assert "'128' is not HIDDENxLAYERS" in capsys.readouterr().err
