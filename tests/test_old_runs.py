"""Runs that an earlier version began, and that were stopped, go on bit for bit from what it left on the disk.

tests/old_runs/make.py has made them. Each is resumed, and compared with a run that the code under test trains from the
start, and with one that the earlier version trained to the end. All that is used of minillm is its command line and the
files of a run.
"""

import importlib.util
import json
import shutil
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.old_runs.trains import Train, Trains
from tests.runs import records

HERE = Path(__file__).with_name("old_runs")
CODE = Path(importlib.util.find_spec("minillm").origin).parents[1]
# Where two machines round in different ways, of a metric and of a tensor's largest number. AVX2 and AVX-512 differ by
# 1.4e-5 at most from what the old runs' machine was told to compute like.
NEAR = 1e-4
# In trainer.json: times, places in files whose lines hold times, configurations with all keys of their version, and the
# order in which a step is cut into micro-batches, which an old run keeps.
OF_ONE_RUN = {"seconds", "stage_seconds", "log", "config", "stage_configs", "started", "by_length"}


@dataclass(frozen=True)
class OldRun:
    """One of them, whose optimiser is called `calls` times a step on each rank."""

    name: str
    needs: str | None = None  # a package
    ranks: int = 1
    calls: int = 1


RUNS = [
    OldRun("minillm"),
    OldRun("gkd", needs="peft"),
    OldRun("seqkd"),
    OldRun("two_ranks", needs="deepspeed", ranks=2, calls=2),
]


@pytest.fixture(scope="module")
def trains() -> Iterator[Trains]:
    with Trains(CODE) as trains:
        yield trains


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_an_old_run_goes_on_as_if_it_had_never_stopped(run, trains, tmp_path):
    if run.needs is not None and importlib.util.find_spec(run.needs) is None:
        pytest.skip(f"{run.needs} is not installed")
    left, old, new = tmp_path / "left", tmp_path / "old", tmp_path / "new"
    unpack(run, left, old, new)
    (checkpoint,) = (left / run.name).glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    words = [
        "common.yaml",
        f"{run.name}.yaml",
        "save.steps=1",
        "save.keep=99",
        "rollout.shared_coins=false",
        "--resume",
    ]
    # the calls of the first step after the checkpoint
    calls = {old: range(1, 1 + run.calls), new: range(1 + run.calls * step, 1 + run.calls * (step + 1))}
    for folder in (old, new):
        trains.train(Train(str(folder), run.name, words, run.ranks, looks=tuple(calls[folder])))

    check_what_was_there_is_kept(checkpoint, old / run.name)
    check_the_buffer(checkpoint, old / run.name / f"checkpoint-{step + 1}")
    ours, theirs = (
        [torch.load(folder / f"{run.name}-rank-{rank}.pt", weights_only=True) for rank in range(run.ranks)]
        for folder in (old, new)
    )
    for rank, held in enumerate(ours):
        check_what_was_loaded(checkpoint, held, f"-{rank}-of-{run.ranks}" if run.ranks > 1 else "")
    ours, theirs = ([(rank["weights"], rank["moments"]) for rank in ranks] for ranks in (ours, theirs))
    # from the same bits to the same bits; an unbroken run that has come to others is on a machine that rounds otherwise
    exact = digests(ours) == digests(theirs)
    if not exact:
        warnings.warn(f"{run.name}: other bits than on the old run's machine; compared within {NEAR}", stacklevel=1)
    assert_alike(ours, theirs, exact=exact)
    check_what_followed(step, old / run.name, new / run.name, exact=exact)
    recorded = [json.loads(line) for line in (HERE / f"{run.name}.jsonl").read_text().splitlines()]
    assert_alike(with_keys_of(records(old / run.name), recorded), recorded, exact=exact)
    assert_alike(tensors(old / run.name / "final"), tensors(left / "unbroken" / run.name / "final"), exact=exact)


def unpack(run: OldRun, left: Path, old: Path, new: Path) -> None:
    """What the earlier version left; in `old` the run to resume, in `new` what the same run starts with."""
    for archive in {"minillm.tar.xz", f"{run.name}.tar.xz"}:
        with tarfile.open(HERE / archive) as file:
            file.extractall(left, filter="data")
    for folder in (old, new):
        folder.mkdir()
        for path in HERE.iterdir():
            if path.suffix in (".yaml", ".jsonl", ".txt"):
                shutil.copy(path, folder)
        shutil.copytree(left / "minillm" / "stages" / "teacher", folder / "teacher")
        for kept, place in (("bases/main", "start"), ("written", f"{run.name}/written")):
            if (left / run.name / kept).exists():
                shutil.copytree(left / run.name / kept, folder / place)
    shutil.copytree(left / run.name, old / run.name, dirs_exist_ok=True)
    start = old / "start" / "model.safetensors"
    if start.exists():  # what the frozen weights were read from is another model by now
        save_file({name: one + 1 for name, one in load_file(start).items()}, start, metadata={"format": "pt"})


def check_what_was_there_is_kept(checkpoint: Path, after: Path) -> None:
    """The lines up to the checkpoint, with the times that no other run has, and what is made once."""
    before = checkpoint.parent
    for name, length in progress(checkpoint)["log"].items():
        assert (after / name).read_bytes()[:length] == (before / name).read_bytes()[:length], name
    for name in ("stages", "bases", "written"):
        for path in (before / name).rglob("*"):
            assert path.is_dir() or (after / path.relative_to(before)).read_bytes() == path.read_bytes(), path


def check_what_was_loaded(checkpoint: Path, held: dict, rank: str) -> None:
    """Before its first step a rank holds, bit for bit, what the checkpoint's files do."""
    saved = torch.load(checkpoint / "state" / f"engine{rank}.pt", weights_only=True)
    optimizer = saved["optimizer"].get("optimizer_state_dict", saved["optimizer"])
    weights = saved.get("weights") or tensors(checkpoint / "adapter") or tensors(checkpoint / "model.safetensors")
    assert Counter(digests(held["weights"])) == Counter(digests(weights))
    assert digests(held["moments"]) == digests([state for _, state in sorted(optimizer["state"].items())])
    assert digests(held["cpu_rng"]) == digests(saved["cpu_rng"])
    assert held["groups"] == [{**group, "params": None} for group in optimizer["param_groups"]]


def check_the_buffer(checkpoint: Path, following: Path) -> None:
    """The next step was taken from the same buffer, so that its checkpoint has every tensor of it."""
    for path in checkpoint.glob("state/buffer*.safetensors"):
        assert not Counter(digests(tensors(path))) - Counter(digests(tensors(following / "state"))), path.name


def check_what_followed(step: int, after: Path, unbroken: Path, *, exact: bool) -> None:
    """The streams one step later, all later records and samples, and the models that the runs left."""
    ours, theirs = (progress(run / f"checkpoint-{step + 1}") for run in (after, unbroken))
    assert (ours["by_length"], theirs["by_length"]) == (False, True)
    assert_alike(*({key: one[key] for key in one.keys() - OF_ONE_RUN} for one in (ours, theirs)), exact=exact)
    for read in (records, samples):
        ours, theirs = ([record for record in read(run) if record["step"] > step] for run in (after, unbroken))
        assert theirs
        assert_alike(ours, theirs, exact=exact)
    for folder in ("final", "best"):
        assert_alike(tensors(after / folder), tensors(unbroken / folder), exact=exact)


def progress(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state" / "trainer.json").read_text())["progress"]


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def tensors(place: Path) -> dict[str, Tensor]:
    """Those of a file, or of all files in a folder."""
    files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
    return {f"{path.name} {name}": one for path in files for name, one in load_file(path).items()}


def digests(content: Any) -> list[str]:
    """One of each tensor in nested lists and dictionaries, of its dtype, shape and bits."""
    if isinstance(content, Tensor):
        bits = content.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [sha256(f"{content.dtype} {tuple(content.shape)} ".encode() + bits).hexdigest()]
    parts = [content[key] for key in sorted(content)] if isinstance(content, dict) else content
    return [digest for part in parts for digest in digests(part)]


def assert_alike(ours: Any, theirs: Any, *, exact: bool, where: str = "") -> None:
    """The same bits; without `exact`, numbers that are NEAR to each other, and the same of everything else."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
    if isinstance(theirs, dict | list | tuple):
        assert len(ours) == len(theirs), where
        for key in theirs if isinstance(theirs, dict) else range(len(theirs)):
            assert_alike(ours[key], theirs[key], exact=exact, where=f"{where} {key}")
    elif exact and isinstance(theirs, Tensor):
        assert digests(ours) == digests(theirs), where
    elif isinstance(theirs, Tensor) and theirs.is_floating_point():
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=NEAR * float(theirs.abs().max()), msg=f"{where}: {{}}".format
        )
    elif isinstance(theirs, float) and not exact:
        assert ours == pytest.approx(theirs, rel=NEAR, abs=NEAR), where
    else:
        assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs, where


def with_keys_of(ours: Any, theirs: Any) -> Any:
    """`ours` without keys that `theirs` does not have: a later version measures more."""
    if isinstance(ours, list):
        return [with_keys_of(one, other) for one, other in zip(ours, theirs, strict=True)]
    return {key: with_keys_of(ours[key], theirs[key]) for key in theirs} if isinstance(theirs, dict) else ours
