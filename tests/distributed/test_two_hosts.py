"""Two hosts under torchrun: the steps of two ranks of one; where a host or the cable is lost, the other host says so.

The hosts are namespaces of the network, of process ids and of the hostname on one machine. Nothing of them has a name
in the system: they are gone as soon as their first process is, and that one dies with ours.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.runs import TRAIN

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

CABLE = "cable0"
ADDRESSES = ("10.213.0.1", "10.213.0.2")
SILENT = "10"  # seconds, of 30, after which a rank is lost
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}")
TOOLS = ("ip", "unshare", "setpriv", "nsenter", "hostname")
# waits for its cable, then runs what it is given; it stays the first process of its namespace, whose end ends them all
_BOOT = f'read address; ip address add "$address/24" dev {CABLE}; ip link set lo up; ip link set {CABLE} up; "$@"'


class Host:
    """A machine that runs one command as soon as it is plugged in."""

    def __init__(self, name: str, address: str, command: Sequence[str], environment: dict[str, str]):
        self.name, self.address = name, address
        self._network: int | None = None
        self.output: IO[str] = tempfile.TemporaryFile("w+")
        isolated = ["unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *isolated, "sh", "-c", f"hostname {name}; {_BOOT}", name, *command],
            env={**os.environ, **environment, "GLOO_SOCKET_IFNAME": CABLE},
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def first_process(self) -> int:
        """The id of its first process outside the namespace."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        deadline = time.monotonic() + 10
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        return int(found[0])

    def boot(self) -> None:
        # keeps the network, and so the other host's end of the cable, when all processes here are gone
        self._network = os.open(f"/proc/{self.first_process}/ns/net", os.O_RDONLY)
        self._process.stdin.write(f"{self.address}\n")
        self._process.stdin.flush()

    def unplug(self) -> None:
        """Pull the cable out of this host: nothing arrives any more, and nobody is told."""
        enter = ["nsenter", "--net", f"--target={self.first_process}"]
        subprocess.run([*enter, "ip", "link", "set", CABLE, "down"], check=True)

    def kill(self) -> None:
        """SIGKILL every process of this host: the first goes with the one that we see, and all others with the first."""
        self._process.kill()
        self._process.wait(10)

    def remove(self) -> None:
        self.kill()
        if self._network is not None:
            os.close(self._network)
            self._network = None

    def wait(self, timeout: float) -> int:
        """The exit status of its command."""
        return self._process.wait(timeout)

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()


def plug_in(first: Host, second: Host) -> None:
    """Lay the cable between two hosts, and let them begin."""
    ends = [["name", CABLE, "netns", str(host.first_process)] for host in (first, second)]
    subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
    first.boot()
    second.boot()


def why_not() -> str | None:
    """The reason for which hosts cannot be made here; None where they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: iproute2, util-linux, hostname)"
    tried = ["unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork"]
    laid = ["ip", "link", "add", CABLE, "type", "veth", "peer", "name", "cable1"]
    result = subprocess.run([*tried, *laid], capture_output=True, text=True)
    return None if result.returncode == 0 else f"no network namespaces: {result.stderr.strip()}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    document = small_run(folder, layers=1)
    document["eval"] = {"sets": {}}
    document["train"]["max_steps"] = 1
    document["stages"] = {
        "teacher": {},
        "distil": {
            "teacher": {"path": "stage:teacher"},
            "method": {"name": "minillm", "ppo_epochs": 1},
            "train": {"max_steps": 10},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture
def start_hosts() -> Iterator[Callable[..., list[Host]]]:
    """A function that starts a run on two hosts; whatever happens, both are gone afterwards."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    made: list[Host] = []

    def start(recipe: Path, folder: Path, *flags: str) -> list[Host]:
        train = [str(Path(__file__).with_name("impatient.py")), SILENT, str(recipe), f"output_dir={folder}"]
        keys = ["engine.type=deepspeed", "engine.stage=3", *flags]
        hosts = [
            Host(f"host-{name}", address, [sys.executable, *TORCHRUN, f"--node-rank={place}", *train, *keys],
                 {"OMP_NUM_THREADS": "1"})
            for place, (name, address) in enumerate(zip("ab", ADDRESSES, strict=True))
        ]  # fmt: skip
        made.extend(hosts)
        plug_in(*hosts)
        return hosts

    yield start
    for host in made:
        host.remove()


def wait_for(path: Path, hosts: list[Host]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, [host.said()[-3000:] for host in hosts]
        time.sleep(0.02)


def steps(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_a_host_that_is_lost_ends_the_run_and_two_hosts_go_on_as_two_ranks_of_one(recipe, start, finish, start_hosts):
    unbroken, broken = (recipe.with_name(name) for name in ("unbroken", "broken"))
    # as one process would: test_two_ranks.py
    finish(start(2, *TRAIN, str(recipe), f"output_dir={unbroken}", "engine.type=deepspeed"))
    assert len(steps(unbroken)) == 11

    first, second = start_hosts(recipe, broken)
    wait_for(broken / "checkpoint-3", [first, second])
    second.kill()
    assert first.wait(60) != 0
    assert "on host-b) has given no sign of life for 10 s; the others stop" in first.said(), first.said()[-3000:]

    first, second = start_hosts(recipe, broken, "--resume")
    wait_for(broken / "checkpoint-6", [first, second])
    second.unplug()
    for host, told in (
        (first, "on host-b) has given no sign of life for 10 s"),
        (second, "on host-a) cannot be reached"),
    ):
        assert host.wait(60) != 0
        assert told in host.said(), host.said()[-3000:]
    assert not (broken / "final").exists()

    finish(start(2, *TRAIN, str(recipe), f"output_dir={broken}", "engine.type=deepspeed", "--resume"))
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (broken, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [step["loss"] for step in steps(broken)] == [step["loss"] for step in steps(unbroken)]
