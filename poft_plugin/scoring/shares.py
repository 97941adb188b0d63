"""Which rows a process scores."""

from dataclasses import dataclass

from poft_plugin.data.preparation import RunContext


@dataclass(frozen=True)
class Share:
    """Which rows this process scores: those whose key leaves the remainder `index`; none without an index.

    A function of the row alone. Processes look into the cache at different times and see different rows missing; had
    they divided the missing ones among them, some rows would be nobody's.
    """

    index: int | None
    count: int

    def holds(self, key: str) -> bool:
        """Whether the row of this key is this process's."""
        return self.index is not None and int(key, 16) % self.count == self.index


def share_of(run: RunContext, devices: int) -> Share:
    """The share of a process: where a copy takes several accelerators, only some processes hold one."""
    workers = max(1, run.local_world_size // devices)
    machines = run.world_size // run.local_world_size
    machine = run.rank // run.local_world_size
    index = machine * workers + run.local_rank if run.local_rank < workers else None
    return Share(index, machines * workers)
