"""What is installed is whole: a built wheel imports without the repository, and its losses with torch and triton alone."""

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minillm.cli.failures import TRAINER_PACKAGES

ROOT = Path(__file__).parents[1]
MIB = 2**20

BACKWARD = """
import os, sys, torch

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
torch.nn.functional.cross_entropy(hidden @ weight.t(), torch.arange(6)).backward()  # torch's own first time
before = resident()
import minillm.losses
loss = minillm.losses.linear_divergence(hidden, weight, torch.randn(6, 8), torch.randn(50, 8), labels=torch.arange(6))
loss.backward()
assert loss > 0 and weight.grad.abs().sum() > 0
print(resident() - before, minillm.losses.__file__, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, cwd=folder)
    (built,) = folder.glob("minillm-*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """A function that runs Python with the wheel, torch, triton and what those two need, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    wheel.extractall(folder)
    for name in needed("torch", "triton"):
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [sys.executable, "-S", *arguments],  # -S: without the folder of installed packages
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment | {"PYTHONPATH": str(folder)},
        )

    return run


def needed(*names: str) -> set[str]:
    """These distributions and, in turn, all that they need where they are installed."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop().lower()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        if name not in found:
            found.add(name)
            waiting += [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return found


def test_a_wheel_carries_every_package_and_says_that_it_has_types(wheel):
    carried = set(wheel.namelist())
    assert "minillm/py.typed" in carried
    for path in [*ROOT.glob("minillm/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        name = name if name.startswith("minillm/") else f"minillm/{name}"
        assert name in carried, f"{name} is not in the wheel: name its package in setup.py"


def test_the_losses_need_torch_and_triton_and_the_trainer_what_a_missing_package_is_named_by(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist")
    always = [line for line in lines if "extra ==" not in line]
    assert [re.match(r"\w+", line)[0] for line in always] == ["torch", "triton"]
    trainer = {re.match(r"[\w-]+", line)[0].lower() for line in lines if re.search(r"extra == .train.", line)}
    assert trainer == set(TRAINER_PACKAGES.values())


def test_the_losses_train_with_torch_and_triton_alone_in_thirty_mebibytes(wheel, bare):
    assert sum(entry.file_size for entry in wheel.infolist()) < 30 * MIB
    result = bare("-c", BACKWARD)
    assert result.returncode == 0, result.stderr
    grown, file, *loaded = result.stdout.split()
    assert not file.startswith(str(ROOT))
    assert not set(TRAINER_PACKAGES) & set(loaded)
    assert int(grown) < 30 * MIB


def test_a_verb_without_the_trainer_says_which_command_installs_it(bare):
    result = bare("-m", "minillm", "validate", "run.yaml")
    assert result.returncode == 2
    assert re.fullmatch(
        r"minillm: `minillm validate` needs \w+, which is not installed: pip install -e '\.\[train\]' in .*\n",
        result.stderr,
    )
