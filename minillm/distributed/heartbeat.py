"""Heartbeats between the ranks of a run: a rank that died or fell silent is noticed, named, and stops the others.

Every rank writes its heartbeat to the group's store every HEARTBEAT_SECONDS and reads those of the others. It does so
over a connection and from a thread of its own, so that a main thread that computes, saves or waits in a collective
neither delays it nor is delayed. A rank is lost when its heartbeat has not changed for SILENT_SECONDS or, on the same
machine, as soon as its process is gone. Where the store no longer answers, rank 0 is lost, whose host keeps it.

Silence is counted in readings of the store, not by the clock: a process that was itself stopped for a while holds that
time against nobody when it wakes up.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

HEARTBEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
GRACE_SECONDS = 10.0  # for a rank to stop by itself after another one is gone
LAST_WORDS_SECONDS = 5.0  # for the store to say what a dead rank left in it
_LAST_WORDS = 300  # characters of an error that the other ranks are told


@dataclass(frozen=True)
class Peer:
    """One rank's process, and where it runs."""

    rank: int
    pid: int
    host: str
    machine: str  # the same for processes that can look each other up by their id

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """This process, as a rank."""
        host = socket.gethostname()
        return cls(rank, os.getpid(), host, _machine() or f"{host}/{os.getpid()}")

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass(frozen=True)
class Heartbeat:
    """One message of a rank to all others: a number that grows, and what it knows."""

    number: int = 0
    error: str | None = None  # the error that ends this rank: its last words
    lost: str | None = None  # another rank that is gone, and how, in words


@dataclass(frozen=True)
class LostRank:
    """One or more ranks that died or fell silent."""

    text: str  # which ones, and what is known of their end
    explained: bool  # whether they have said themselves which error ended them

    @property
    def message(self) -> str:
        """The line that the remaining ranks print."""
        return f"{self.text}; the others stop. Start again with --resume to go on from the last checkpoint"


class HeartbeatMonitor:
    """Sends one rank's heartbeat and reads those of all others, from `start` to `end`.

    Args:
        rank: this rank's number.
        peers: all ranks in their order, this one among them.
        run: a name that no other run in the same store has.
        stop: ends this process with a message; called where a rank is lost and the main thread goes on waiting for it.

    Raises torch.distributed.DistNetworkError where the store that MASTER_ADDR and MASTER_PORT name does not answer.
    """

    def __init__(self, rank: int, peers: Sequence[Peer], run: str, stop: Callable[[str], None]):
        self._me, self._others = peers[rank], [peer for peer in peers if peer.rank != rank]
        self._first, self._stop = peers[0], stop
        self._address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        # a client of its own: requests of one client wait for each other
        client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=SILENT_SECONDS),
        )
        self._store = dist.PrefixStore(f"minillm/{run}", client)
        self._heard = {peer.rank: Heartbeat() for peer in self._others}
        self._changes = {peer.rank: 0 for peer in self._others}  # of its heartbeat, seen so far
        self._unchanged = {peer.rank: 0 for peer in self._others}  # readings since the last change
        self._unanswered = 0.0  # seconds since the store's last answer
        self._broken = False  # the connection to the store
        self._asked = self._answered = 0  # readings of the store that began, and the last one that ended
        self._asked_at_death: int | None = None
        self._number, self._error, self._lost = 0, None, None
        self._ended, self._due = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        self._send()

    def start(self) -> None:
        """Begin to read and to write; every rank must have made its monitor before."""
        self._thread.start()
        threading.Thread(target=self._guard, daemon=True).start()

    def end(self) -> None:
        """Send no more heartbeats, and take no rank for lost any more."""
        self._ended.set()
        self._due.set()
        self._thread.join(HEARTBEAT_SECONDS)

    def lost(self) -> LostRank | None:
        """The lost rank that was noticed first; None where all ranks are there."""
        self._lost = self._lost or self._find_lost()
        return self._lost

    def lost_behind(self, error: Exception) -> LostRank | None:
        """The lost rank that an error of this rank comes from; None where the error is this rank's own.

        Waits until every other rank has given a sign of life after the error (and so heard of it), or one is lost. A
        lost rank that has said itself which error ended it is added to `error` as a note, and None is returned.
        """
        self._error = f"{type(error).__name__}: {error}"[:_LAST_WORDS]
        self._due.set()
        before = dict(self._changes)
        # what is read first may have been written before the error; what changes after that was not
        while self.lost() is None and any(self._changes[rank] - before[rank] < 2 for rank in before):
            time.sleep(0.2)
        if self._lost is not None:
            time.sleep(2 * HEARTBEAT_SECONDS)  # the store may go with this process: the others must hear of it before
            if self._lost.explained:
                error.add_note(self._lost.text)
        return None if self._lost is None or self._lost.explained else self._lost

    def _find_lost(self) -> LostRank | None:
        gone = {peer: "was killed or crashed" for peer in self._others if self._died(peer)}
        if gone and not self._last_words_are_read():
            return None
        told = next((heartbeat.lost for heartbeat in self._heard.values() if heartbeat.lost), None)
        if not gone and told is not None:
            return LostRank(told, explained=False)
        if not gone:
            how = f"has given no sign of life for {SILENT_SECONDS:.0f} s"
            gone = {
                peer: how for peer in self._others if self._unchanged[peer.rank] * HEARTBEAT_SECONDS >= SILENT_SECONDS
            }
        if not gone and (self._broken or self._unanswered >= SILENT_SECONDS):
            how = f"cannot be reached: the store of the group at {self._address} does not answer any more"
            gone = {self._first: how}
        if not gone:
            return None
        words = {peer: self._heard[peer.rank].error for peer in gone if peer in self._others}
        text = ", ".join(
            f"{peer} stopped with {words[peer]}" if words.get(peer) else f"{peer} {how}" for peer, how in gone.items()
        )
        return LostRank(text, explained=all(words.get(peer) for peer in gone))

    def _last_words_are_read(self) -> bool:
        """True where the store was read after a death was noticed, or cannot be: the words of the dead may be in it."""
        if self._asked_at_death is None:
            self._asked_at_death = self._asked
            self._due.set()
        return self._answered > self._asked_at_death or self._broken or self._unanswered >= LAST_WORDS_SECONDS

    def _died(self, peer: Peer) -> bool:
        return peer.machine == self._me.machine and not _alive(peer.pid)

    def _exchange(self) -> None:
        try:
            while not self._ended.is_set():
                self._hear()
                self._send()
                self._due.wait(HEARTBEAT_SECONDS)
                self._due.clear()
        except RuntimeError:  # the store is gone; connecting again would not bring back what it knew
            self._broken = True

    def _send(self) -> None:
        self._number += 1
        heartbeat = Heartbeat(self._number, self._error, None if self._lost is None else self._lost.text)
        self._store.set(str(self._me.rank), json.dumps(asdict(heartbeat)))

    def _hear(self) -> None:
        self._asked += 1
        texts = self._store.multi_get([str(peer.rank) for peer in self._others])
        self._unanswered = 0.0
        for peer, text in zip(self._others, texts, strict=True):
            heartbeat = Heartbeat(**json.loads(text))
            changed = heartbeat != self._heard[peer.rank]
            self._heard[peer.rank] = heartbeat
            self._changes[peer.rank] += changed
            self._unchanged[peer.rank] = 0 if changed else self._unchanged[peer.rank] + 1
        self._answered = self._asked

    def _guard(self) -> None:
        """End this process where another one is gone and the main thread waits for it."""
        while not self._ended.wait(1.0):
            self._unanswered += 1.0
            lost = self.lost()
            if lost is None:
                continue
            if not self._ended.wait(GRACE_SECONDS):
                self._stop(lost.message)
            return


def _machine() -> str | None:
    """The boot of the kernel and the namespace in which a process has its id; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")
