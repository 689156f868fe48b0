"""Lost ranks as a monitor notices them: dead, silent, or behind a store that no longer answers."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from minillm.distributed import heartbeat
from minillm.distributed.heartbeat import HeartbeatMonitor, LostRank, Peer


@pytest.fixture
def store(monkeypatch):
    """The store of a group, where the monitors of this process look for it; heartbeats are quick."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 3.0)
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=10), wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


@pytest.fixture
def monitors(store):
    """A function that makes the monitors of ranks, each started or silent, and ends them after the test."""
    made: list[HeartbeatMonitor] = []

    def make(peers: list[Peer], silent: tuple[int, ...] = (), stop: Callable[[str], None] = pytest.fail):
        ranks = [HeartbeatMonitor(peer.rank, peers, "run", stop) for peer in peers]
        made.extend(monitor for monitor in ranks if monitor._me.rank not in silent)
        for monitor in made:
            monitor.start()
        return ranks

    yield make
    for monitor in made:
        monitor.end()


def peers(*pids: int, machines: str = "aa") -> list[Peer]:
    return [Peer(rank, pid, f"host-{machines[rank]}", machines[rank]) for rank, pid in enumerate(pids)]


def wait_for(found: Callable[[], LostRank | None]) -> LostRank:
    deadline = time.monotonic() + 20
    while (lost := found()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return lost


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_ranks_that_send_heartbeats_are_not_lost(monitors):
    ranks = monitors(peers(os.getpid(), os.getpid()))
    time.sleep(4.0)  # longer than a rank may be silent
    assert [monitor.lost() for monitor in ranks] == [None, None]


def test_an_error_is_a_ranks_own_once_the_others_have_heard_of_it(monitors):
    first, second = monitors(peers(os.getpid(), os.getpid()))
    assert first.lost_behind(KeyError("x")) is None
    assert second.lost() is None
    assert second._heard[0].error == "KeyError: 'x'"


def test_a_process_that_is_gone_is_lost_at_once_on_its_own_machine(monitors):
    pid = dead_process()
    first, _ = monitors(peers(os.getpid(), pid), silent=(1,))
    lost = wait_for(first.lost)
    assert lost.text == f"rank 1 (process {pid} on host-a) was killed or crashed" and not lost.explained
    assert lost.message.startswith(lost.text) and "--resume" in lost.message


def test_a_rank_of_another_machine_is_lost_when_it_falls_silent(monitors):
    """Its process id means nothing here."""
    first, _ = monitors(peers(os.getpid(), dead_process(), machines="ab"), silent=(1,))
    assert first.lost() is None
    lost = wait_for(first.lost)
    assert "on host-b) has given no sign of life for 3 s" in lost.text


def test_the_last_words_of_a_dead_rank_explain_its_end(monitors):
    pid = dead_process()
    first, second = monitors(peers(os.getpid(), pid), silent=(1,))
    second._error = "ValueError: the disk is full"
    second._send()
    error = RuntimeError("connection closed by peer")
    assert first.lost_behind(error) is None
    assert error.__notes__ == [f"rank 1 (process {pid} on host-a) stopped with ValueError: the disk is full"]


def test_what_one_rank_has_noticed_the_others_believe(monitors):
    ranks = monitors(peers(os.getpid(), os.getpid(), dead_process(), machines="aba"), silent=(2,))
    wait_for(ranks[0].lost)
    assert "was killed or crashed" in wait_for(ranks[1].lost).text  # which rank 1 cannot see for itself


def test_a_lost_rank_ends_a_process_that_goes_on_waiting(monitors, monkeypatch):
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.1)
    said: list[str] = []
    monitors(peers(os.getpid(), dead_process()), silent=(1,), stop=said.append)
    wait_for(lambda: said or None)
    assert "was killed or crashed; the others stop" in said[0]


def test_a_store_that_does_not_answer_is_the_loss_of_rank_0(monitors, store, monkeypatch):
    _, second = monitors(peers(os.getpid(), os.getpid(), machines="ab"), silent=(0,))
    second._broken = True
    lost = wait_for(second.lost)
    assert f"rank 0 (process {os.getpid()} on host-a) cannot be reached" in lost.text and str(store.port) in lost.text
