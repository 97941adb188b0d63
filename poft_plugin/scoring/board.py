"""A notice board for the processes of one launch: what each found in its share of the rows, and when it has scored it.

Scores travel through files alone, without collectives. A process that waits for another's rows cannot tell a slow
process from a cache folder that the two do not share; the board tells it. It is the launcher's own key-value store,
which torchrun, accelerate and DeepSpeed all have; without one, processes wait.
"""

import hashlib
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pyarrow as pa
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from poft_plugin.data.preparation import RunContext
from poft_plugin.scoring.identity import Identity

CONNECT = timedelta(seconds=10)

GATHER_SECONDS, GATHER_POLL_SECONDS = 60.0, 0.05
"""Processes prepare shares of like size at the same time."""


@dataclass(frozen=True)
class Board:
    """The board for one scorer and one set of rows.

    Args:
        store: the launcher's key-value store, or None.
        name: what the notices are about.
    """

    store: Any
    name: str

    def announce(self, share: int | None) -> None:
        """Says that the rows of a share are all in this process's cache, and on which machine that is."""
        if self.store is not None and share is not None:
            self.store.set(self._key(share), socket.gethostname())

    def machine_of(self, share: int) -> str | None:
        """The machine whose cache has a share's rows, as far as was announced."""
        if self.store is None or not self.store.check([self._key(share)]):
            return None
        return str(self.store.get(self._key(share)).decode())

    def post(self, share: int | None, text: str) -> None:
        """Leaves a text for the others, until it is gathered."""
        if self.store is not None and share is not None:
            self.store.set(f"{self._key(share)}/text", text)

    def gather(self, shares: int) -> list[str]:
        """The texts of all shares, or of those that have left one when others took too long; none without a store."""
        if self.store is None:
            return []
        keys = [f"{self._key(share)}/text" for share in range(shares)]
        deadline = time.monotonic() + GATHER_SECONDS
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(GATHER_POLL_SECONDS)
        there = [key for key in keys if self.store.check([key])]
        texts = [self.store.get(key).decode() for key in there]
        for key in there:  # the launch may score these rows once more
            self.store.delete_key(key)
        return texts

    def _key(self, share: int) -> str:
        return f"poft_plugin/{self.name}/{share}"


def open_board(run: RunContext, identity: Identity, keys: pa.ChunkedArray) -> Board:
    """The board of this launch; one that says nothing where a process is alone, or no store answers.

    Args:
        run: this process.
        identity: whose scores.
        keys: every row key of the run, the same for all processes.
    """
    rows = hashlib.sha256("".join(keys.to_pylist()).encode()).hexdigest()[:16]
    return Board(_store() if run.world_size > 1 else None, f"{identity.digest}/{rows}")


def _store() -> Any:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (host and port):
        return None
    try:
        return TCPStore(host, int(port), is_master=False, timeout=CONNECT, wait_for_workers=False)
    except (RuntimeError, ValueError):  # nobody answers: torch raises subclasses of these
        return None
