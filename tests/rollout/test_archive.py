"""The archive: the same answers whether the writing was interrupted or not, and never answers of another kind."""

import json

import pytest

from minillm.rollout.archive import AnswerArchive
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling

KEYS = [11, 3, 8, 5, 40, 2, 7]


class Killed(BaseException):
    pass


@pytest.fixture
def write(make_models, prompts, tmp_path):
    models = make_models(eos_ids=tuple(range(0, 61, 8)))
    rollouts = LocalRollouts(models)

    def write(name: str = "answers.jsonl", *, count: int = 7, sampling=None, prompts=prompts, **options):
        archive = AnswerArchive(write.folder / name)
        settings = {"keys": KEYS[:count], "seed": 4, "batch_size": 2, "teacher": {"path": "large"}}
        settings |= {"vocab_size": models.vocab_size, **options}
        archive.write(rollouts, prompts[:count], sampling or Sampling(9), **settings)
        return archive

    write.rollouts, write.folder = rollouts, tmp_path / "deep"
    return write


def test_holds_what_the_teacher_samples(write, prompts):
    archive = write()
    options = {"keys": KEYS, "seed": 4, "who": "teacher", "batch_size": 7}
    expected = write.rollouts.sample(prompts, Sampling(9), **options)
    assert archive.read() == {key: answer.response for key, answer in zip(KEYS, expected, strict=True)}
    assert AnswerArchive(archive.path.with_name("other.jsonl")).read() == {}


@pytest.mark.parametrize("torn", [b"", b'{"key": 2, "prompt_crc": 99, "respon'])
def test_a_kill_loses_the_batch_in_hand_alone(write, monkeypatch, torn):
    whole = write("whole.jsonl").read()
    calls, sample = [], write.rollouts.sample

    def dying(*arguments, **options):
        calls.append(options["keys"])
        if len(calls) == 3:
            raise Killed
        return sample(*arguments, **options)

    monkeypatch.setattr(write.rollouts, "sample", dying)
    with pytest.raises(Killed):
        write()
    archive = AnswerArchive(write.folder / "answers.jsonl")
    with archive.path.open("ab") as file:
        file.write(torn)
    written = archive.read()
    assert len(written) == 4 and written.items() <= whole.items()
    seen = []
    write(progress=seen.append)
    assert archive.read() == whole and seen == [6, 7]
    assert sorted(key for keys in calls[3:] for key in keys) == sorted(set(KEYS) - set(written))


def test_prompts_that_are_added_later(write):
    first = write(count=3).read()
    assert set(first) == set(KEYS[:3])
    both = write().read()
    assert both == write("whole.jsonl").read() and first.items() <= both.items()


def test_nothing_is_done_twice(write, monkeypatch):
    before = write().path.read_bytes()
    monkeypatch.setattr(write.rollouts, "sample", None)
    assert write().path.read_bytes() == before


def test_answers_of_another_kind(write, prompts):
    write()
    with pytest.raises(ValueError, match="another sampling.*'max_new_tokens': 9.*Delete the file"):
        write(sampling=Sampling(10))
    with pytest.raises(ValueError, match="another seed"):
        write(seed=5)
    with pytest.raises(ValueError, match="another vocab_size"):
        write(vocab_size=60)
    with pytest.raises(ValueError, match="another teacher: .*large.*, now .*larger"):
        write(teacher={"path": "larger"})
    with pytest.raises(ValueError, match="key 11 was written to another prompt"):
        write(prompts=[[1, 2, 3], *prompts[1:]])
    with pytest.raises(ValueError, match="different keys"):
        write(keys=[1] * 7)


def test_a_file_of_something_else(tmp_path, write):
    path = tmp_path / "notes.jsonl"
    path.write_text("these are notes\n")
    with pytest.raises(ValueError, match="not an archive"):
        AnswerArchive(path).read()


def test_a_kill_before_the_first_answer(write, monkeypatch):
    def dying(*arguments, **options):
        raise Killed

    monkeypatch.setattr(write.rollouts, "sample", dying)
    with pytest.raises(Killed):
        write()
    monkeypatch.undo()
    assert len(write().read()) == 7


def test_lines_are_plain_json(write):
    header, *records = [json.loads(line) for line in write().path.read_text().splitlines()]
    assert header["seed"] == 4 and header["sampling"]["max_new_tokens"] == 9
    assert {record["key"] for record in records} == set(KEYS)
    ends = set(write.rollouts.models.eos_ids)
    assert all(record["ended"] == (record["response"][-1] in ends) for record in records)
