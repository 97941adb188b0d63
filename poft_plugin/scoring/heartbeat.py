"""Signs of life between the processes of one launch: whoever waits for another's scores sees that it is gone.

Each process has a thread that says every few seconds that it lives, how far its work is, and how long the next step of
the work may take at most. So a process that was killed shows (it says nothing), and one that hangs, too (it says the
same for longer than it allowed itself). Only the thread talks to the launcher's store: a store on a machine that hangs
would hang whoever asks it.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from poft_plugin.data.preparation import RunContext

CONNECT = timedelta(seconds=10)
BEAT_SECONDS = 2.0

DEAD_SECONDS = 90.0
"""Silence after which a process, or the store, counts as gone."""

ABSENT_SECONDS = 600.0
"""How long the start of a process may take: imports from a slow disk."""

LOADING_SECONDS = 1800.0
"""How long a model may load."""

FIRST_SECONDS = 600.0
"""How long a process's first batch may take, of which nothing is known."""

SLOWEST_BATCHES = 10
"""A batch may take as long as this many of the slowest before, and as `DEAD_SECONDS` in any case."""

RESTART = "Scored rows stay in the cache: start the run again, and it goes on from there"


ATTEMPT = f"poft_plugin/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
"""A launcher that starts its processes again keeps its store, with the words of those that failed."""
_FAILED = f"{ATTEMPT}/failed"


class ProcessLostError(ValueError):
    """Another process of this launch has failed, is gone, or hangs."""


@dataclass(frozen=True)
class Sign:
    """What a process says of itself.

    Args:
        process: its rank, its machine, its number there.
        beat: grows as long as the process lives.
        step: grows as its work goes on.
        within: seconds until the next step at most, or None where nobody can tell.
        doing: what it does.
    """

    process: str
    beat: int = 0
    step: int = 0
    within: float | None = None
    doing: str = "preparing rows"


@dataclass
class _Watched:
    """Another process's last sign, and for how many seconds of ours nothing new was in it."""

    sign: Sign | None = None
    silent: float = 0.0
    idle: float = 0.0

    def update(self, sign: Sign | None, elapsed: float) -> None:
        before, self.sign = self.sign, sign
        self.silent = 0.0 if sign and (not before or sign.beat != before.beat) else self.silent + elapsed
        self.idle = 0.0 if sign and (not before or sign.step != before.step) else self.idle + elapsed

    def complaint(self, rank: int) -> str | None:
        """What is wrong with it, if anything is."""
        if self.sign is None:
            late = self.silent > ABSENT_SECONDS
            return f"rank {rank} has not begun to prepare its rows after {self.silent:.0f} s" if late else None
        if self.silent > DEAD_SECONDS:
            return f"{self.sign.process} gives no sign of life for {self.silent:.0f} s (the last: {self.sign.doing})"
        if self.sign.within is not None and self.idle > self.sign.within:
            return f"{self.sign.process} hangs: {self.sign.doing}, without any progress for {self.idle:.0f} s"
        return None


class Pulse:
    """What a process says to the others of its launch, and hears of them.

    Args:
        rank: this process.
        address: host and port of the launcher's store. Without one nothing is said or heard.
    """

    def __init__(self, rank: int, address: tuple[str, str] | None = None) -> None:
        self._sign = Sign(f"rank {rank} on {socket.gethostname()} (process {os.getpid()})")
        self._rank, self._address, self._beats = rank, address, 0
        self._posts: dict[str, str] = {}
        self._notices: dict[str, str | None] = {_FAILED: None}
        self._watched: dict[int, _Watched] = {}
        self._answered: bool = False
        self._unanswered, self._asked = 0.0, time.monotonic()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._talk, name="poft heartbeat", daemon=True)
        if address is not None:
            self._thread.start()

    def step(self, doing: str, within: float | None = None) -> None:
        """Says that the work goes on.

        Args:
            doing: what comes next.
            within: how many seconds that may take at most; None where nobody can tell.

        Raises:
            ProcessLostError: if another process has failed: what is scored from here on would be for nobody.
        """
        self._sign = replace(self._sign, step=self._sign.step + 1, doing=doing, within=within)
        self._check_failures()

    @property
    def reaches(self) -> bool:
        """Whether the launcher's store answers, as far as is known."""
        return self._thread.is_alive()

    def next_round(self, name: str) -> int:
        """Counts how often something of this name began."""
        key = (self._address, self._rank, name)
        _ROUNDS[key] += 1
        return _ROUNDS[key] - 1

    def post(self, key: str, text: str) -> None:
        """Puts up a notice."""
        self._posts[key] = text
        self._wake.set()

    def read(self, key: str) -> str | None:
        """A notice, as far as it has been heard of; asked for from the first time on."""
        return self._notices.setdefault(key, None)

    def check(self, ranks: Collection[int]) -> None:
        """Looks whether processes that are waited for still work.

        Args:
            ranks: of the processes.

        Raises:
            ProcessLostError: for one that has failed, is gone or hangs, and where the store itself is gone.
        """
        self._check_failures()
        self._check_store()
        self._watched = {rank: self._watched.get(rank, _Watched()) for rank in ranks}
        for rank, watched in self._watched.items():
            if complaint := watched.complaint(rank):
                raise ProcessLostError(f"{complaint}, and the rows of its share are not scored. {RESTART}")

    def close(self, failure: str | None) -> None:
        """Says the last words.

        Args:
            failure: the error that the process ends with, if any.
        """
        self._sign = replace(self._sign, step=self._sign.step + 1, doing=failure or "finished", within=None)
        if failure is not None:
            self._posts[_FAILED] = f"{self._sign.process} ended with an error: {failure}"
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=CONNECT.total_seconds())

    def _check_failures(self) -> None:
        failed = self._notices[_FAILED]
        if failed is not None and not failed.startswith(f"{self._sign.process} "):
            raise ProcessLostError(f"{failed}\nScored rows stay in the cache")

    def _check_store(self) -> None:
        """Adds up our own waiting: a job that was suspended as a whole has not waited."""
        now = time.monotonic()
        self._unanswered += min(now - self._asked, 2 * BEAT_SECONDS)
        self._asked = now
        if self._answered and self._unanswered > DEAD_SECONDS:
            raise ProcessLostError(
                f"the launcher's store at {':'.join(self._address or ())} is gone or does not answer for "
                f"{self._unanswered:.0f} s: the process or machine that has it is lost. {RESTART}"
            )

    def _talk(self) -> None:
        store = _connect(*(self._address or ("", "")))
        before = time.monotonic()
        while store is not None:
            closing, now = self._closing.is_set(), time.monotonic()
            try:
                self._say(store)
                self._hear(store, min(now - before, 2 * BEAT_SECONDS))
            except RuntimeError:  # the connection is gone: torch raises subclasses of it
                return
            self._answered, self._unanswered, before = True, 0.0, now
            if closing:
                return
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _say(self, store: Any) -> None:
        self._beats += 1
        store.set(_sign_key(self._rank), json.dumps(asdict(replace(self._sign, beat=self._beats))))
        for key in list(self._posts):
            store.set(key, self._posts.pop(key))

    def _hear(self, store: Any, elapsed: float) -> None:
        for key, known in list(self._notices.items()):
            self._notices[key] = _get(store, key) if known is None else known
        for rank, watched in list(self._watched.items()):
            text = _get(store, _sign_key(rank))
            watched.update(None if text is None else Sign(**json.loads(text)), elapsed)


_ROUNDS: Counter[tuple[object, ...]] = Counter()

ALONE = Pulse(0)
"""The pulse of a process that nobody waits for."""

_PULSES: dict[tuple[str, ...], Pulse] = {}


@contextlib.contextmanager
def beating(run: RunContext) -> Iterator[Pulse]:
    """Signs of life while the block runs; within another such block, that one's.

    Args:
        run: this process. One that is alone, or has no launcher, says nothing.
    """
    address = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if run.world_size == 1 or not all(address):
        yield ALONE
        return
    name = (*address, str(run.rank))
    if name in _PULSES:
        yield _PULSES[name]
        return
    pulse = _PULSES[name] = Pulse(run.rank, address)

    def end(kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        del _PULSES[name]
        echo = isinstance(error, ProcessLostError)  # said already, by the process itself or by its silence
        pulse.close(None if error is None or echo else _first_line(error))

    with contextlib.ExitStack() as stack:
        stack.push(end)
        yield pulse


def batch_limit(slowest: float) -> float:
    """Seconds that a batch may take.

    Args:
        slowest: seconds of the slowest batch so far.
    """
    return max(DEAD_SECONDS, SLOWEST_BATCHES * slowest)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sign_key(rank: int) -> str:
    return f"{ATTEMPT}/sign/{rank}"


def _get(store: Any, key: str) -> str | None:
    return str(store.get(key).decode()) if store.check([key]) else None


def _connect(host: str, port: str) -> Any:
    try:
        return TCPStore(host, int(port), is_master=False, timeout=CONNECT, wait_for_workers=False)
    except (RuntimeError, ValueError):  # nobody answers: torch raises subclasses of these
        return None
