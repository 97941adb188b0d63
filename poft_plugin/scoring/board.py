"""A notice board for the processes of one launch: each writes there when its share of the rows is in its cache.

Scores travel through files alone, without collectives. A process that waits for another's rows cannot tell a slow
process from a dead one, or from a cache folder that the two do not share; the board tells it. It is the launcher's own
key-value store, which torchrun, accelerate and DeepSpeed all have; without one, processes wait.
"""

import hashlib
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from poft_plugin.data.preparation import RunContext
from poft_plugin.scoring.heartbeat import Pulse
from poft_plugin.scoring.scorer import Identity


@dataclass(frozen=True)
class Board:
    """The board for one scorer and one set of rows.

    Args:
        pulse: how this process talks to the others.
        name: what the notices are about.
        ranks: the process of each share.
    """

    pulse: Pulse
    name: str
    ranks: Sequence[int]

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

    def _key(self, share: int) -> str:
        return f"poft_plugin/{self.name}/{share}"


def scoring_ranks(run: RunContext, devices: int) -> list[int]:
    """The process of each share: where a copy takes several accelerators, only some processes hold one."""
    workers = max(1, run.local_world_size // devices)
    machines = range(run.world_size // run.local_world_size)
    return [machine * run.local_world_size + local for machine in machines for local in range(workers)]


def open_board(pulse: Pulse, identity: Identity, keys: pa.ChunkedArray, ranks: Sequence[int]) -> Board:
    """The board of this launch; one that says nothing where a process is alone, or no store answers.

    Args:
        pulse: how this process talks to the others.
        identity: whose scores.
        keys: every row key of the run, the same for all processes.
        ranks: the process of each share.
    """
    rows = hashlib.sha256("".join(keys.to_pylist()).encode()).hexdigest()[:16]
    return Board(pulse, f"{identity.digest}/{rows}", ranks)
