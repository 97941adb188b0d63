"""A notice board for the processes of one launch: what each found in its share of the rows, and when it has scored it.

Scores travel through files alone, without collectives. A process that waits for another's rows cannot tell a slow
process from a dead one, or from a cache folder that the two do not share; the board tells it. It is the launcher's own
key-value store, which torchrun, accelerate and DeepSpeed all have; without one, processes wait.
"""

import hashlib
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from poft_plugin.scoring.heartbeat import ATTEMPT, Pulse
from poft_plugin.scoring.identity import Identity

GATHER_SECONDS, GATHER_POLL_SECONDS = 60.0, 0.05
"""Processes prepare shares of like size at the same time."""


@dataclass(frozen=True)
class Board:
    """The board for one scorer and one set of rows.

    Args:
        pulse: how this process talks to the others.
        name: what the notices are about.
        ranks: the process of each share.
        round: how many boards of this name the process has had before: every process of a launch has the same.
    """

    pulse: Pulse
    name: str
    ranks: Sequence[int]
    round: int = 0

    def announce(self, share: int | None) -> None:
        """Says that the rows of a share are all in this process's cache, and on which machine that is."""
        if share is not None:
            self.pulse.post(self._key(share), socket.gethostname())

    def machine_of(self, share: int) -> str | None:
        """The machine whose cache has a share's rows, as far as was announced."""
        return self.pulse.read(self._key(share))

    def check(self, shares: Iterable[int]) -> None:
        """Looks whether the processes of these shares still work, but for those that have finished them.

        Raises:
            ProcessLostError: for one that has failed, is gone or hangs.
        """
        self.pulse.check([self.ranks[share] for share in shares if self.machine_of(share) is None])

    @property
    def reaches(self) -> bool:
        """Whether there is somebody to talk to."""
        return self.pulse.reaches

    def post(self, share: int | None, text: str) -> None:
        """Leaves a text for the others."""
        if share is not None:
            self.pulse.post(self._text_key(share), text)

    def gather(self, shares: int) -> list[str]:
        """The texts of all shares, or of those that have left one when others took too long; none without a store.

        Raises:
            ProcessLostError: for a process that has failed, is gone or hangs.
        """
        keys = [self._text_key(share) for share in range(shares)]
        deadline = time.monotonic() + GATHER_SECONDS
        while True:
            texts = [self.pulse.read(key) for key in keys]
            late = [self.ranks[share] for share, text in enumerate(texts) if text is None]
            if not late or not self.reaches or time.monotonic() > deadline:
                return [text for text in texts if text is not None]
            self.pulse.check(late)
            time.sleep(GATHER_POLL_SECONDS)

    def _text_key(self, share: int) -> str:
        return f"{ATTEMPT}/{self.name}/{share}/text/{self.round}"

    def _key(self, share: int) -> str:
        return f"poft_plugin/{self.name}/{share}"


def open_board(pulse: Pulse, identity: Identity, keys: pa.ChunkedArray, ranks: Sequence[int]) -> Board:
    """The board of this launch; one that says nothing where a process is alone, or no store answers.

    Args:
        pulse: how this process talks to the others.
        identity: whose scores.
        keys: every row key of the run, the same for all processes.
        ranks: the process of each share.
    """
    rows = hashlib.sha256("".join(keys.to_pylist()).encode()).hexdigest()[:16]
    name = f"{identity.digest}/{rows}"
    return Board(pulse, name, ranks, pulse.next_round(name))
