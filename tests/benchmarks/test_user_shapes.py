"""`minillm bench kernels --like`: the shapes of a model's head, the page, and the snippets, which are run as they are printed."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from minillm import UserError
from minillm.benchmarks import kernels, measure, user_shapes
from minillm.benchmarks.cases import Case
from tests.conftest import tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A student, and a teacher whose head is padded to more ids."""
    folder = tmp_path_factory.mktemp("like")
    tiny_llama().config.save_pretrained(folder / "student")
    tiny_llama(vocab_size=320, hidden_size=48, tie=True).config.save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def here(monkeypatch):
    """Measures in this process, as those of its own do; returns the jobs."""
    jobs = []

    def process(job, arguments, scratch):
        jobs.append(job)
        results = []
        for entry in job["cases"]:
            case = Case(**entry)
            found = measure.measure(job, case, torch.device("cpu"), scratch / "none")
            results += [{"case": case.name, "provider": job["provider"], **one} for one in found]
        return results

    monkeypatch.setattr(kernels, "_process", process)
    return jobs


def test_heads_are_those_of_models_and_configurations(folder):
    student, teacher = str(folder / "student"), str(folder / "teacher")
    assert user_shapes.heads_of(student) == (32, 32, 300, 300, "float32")
    assert user_shapes.heads_of(f"{student}/config.json", teacher) == (32, 48, 300, 320, "float32")
    run = user_shapes.heads_of(str(ROOT / "configs" / "tiny.yaml"))  # its last stage, the teacher an earlier stage's
    assert run[:2] == (64, 128) and run.vocab == 257
    with pytest.raises(UserError, match="--like and --teacher take a model's folder.*no/such/model"):
        user_shapes.heads_of("no/such/model")


def test_a_page_says_what_full_logits_a_loss_on_them_and_ours_cost(folder, here, tmp_path, capsys):
    command = ["--like", str(folder / "student"), "--teacher", str(folder / "teacher"), "--tokens", "64"]
    options = ["--dtype", "float32", "--device", "cpu", "--repeats", "1", "--runs", "1", "--output", str(tmp_path)]
    assert kernels.main([*command, *options]) == 0
    page = capsys.readouterr().out
    assert {job["provider"] for job in here} == {"full_logits", "eager", "minillm_torch"}
    for loss, hidden in (("cross_entropy", "32"), ("reverse_kl", "32 and 48 of the teacher")):
        table = page.partition(f"{loss} like {folder}/student: 64 tokens x 300 ids, hidden {hidden}, float32")[2]
        rows = re.findall(r"^\| (.*) \| ([\d,.]+) \| ([\d,]+) \|$", table.partition("To have")[0], re.M)[:3]
        assert [name for name, *_ in rows] == [
            "full logits and their gradient, no loss",
            "loss on full logits",
            "minillm",
        ]
    assert len(re.findall(r"MiB saved, .* of its memory; [\d.]+ times the speed of the loss on full logits", page)) == 2
    repeated = "minillm bench kernels --losses cross_entropy reverse_kl --tokens 64 --shape 32 48 300 --dtype float32"
    assert repeated in page

    ids = torch.randint(1, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    student, teacher = tiny_llama(), tiny_llama(vocab_size=320, hidden_size=48, tie=True)
    names = {"model": student, "student": student, "teacher": teacher, "input_ids": ids}
    names |= {"attention_mask": torch.ones_like(ids), "labels": ids}
    log_q = student(ids).logits[:, :-1].log_softmax(-1)
    log_p = teacher(ids).logits[:, :-1, :300].log_softmax(-1)
    expected = student(ids, labels=ids).loss, (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    for loss, value in zip(("cross_entropy", "reverse_kl"), expected, strict=True):
        snippet = re.search(rf"To have {loss} without full logits, paste:\n\n((?:    .*\n|\n)+)", page)[1]
        exec(textwrap.dedent(snippet), names)
        torch.testing.assert_close(names["loss"], value, rtol=1e-5, atol=0)


def test_what_does_not_run_says_why_and_nothing_is_said_to_be_saved(folder, here, tmp_path, capsys, monkeypatch):
    """As where full logits do not fit."""

    def without_memory(inputs):
        raise RuntimeError("out of memory: tried to allocate 80 GiB\nand more")

    monkeypatch.setitem(measure.PROVIDERS, "eager", without_memory)
    command = ["--like", str(folder / "student"), "--tokens", "64", "--losses", "jsd", "--device", "cpu"]
    assert kernels.main([*command, "--repeats", "1", "--runs", "1", "--output", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert (
        "| loss on full logits | does not run: failed: RuntimeError: out of memory: tried to allocate 80 GiB | |"
        in page
    )
    assert "saved" not in page and 'divergence="jsd")' in page


def test_options_that_say_something_else_are_refused(folder, tmp_path):
    like = ["--like", str(folder / "student"), "--output", str(tmp_path)]
    for more, words in (
        ([*like, "--shape", "1", "2", "3", "--top-k", "4"], "leave --shape and --top-k out"),
        (["--teacher", "x"], "--teacher is that of a model named by --like"),
        (["--like", str(ROOT / "configs" / "tiny.yaml"), "--teacher", "x"], "tiny.yaml says which teacher it has"),
    ):
        with pytest.raises(UserError, match=words):
            kernels.main(more)
