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


def scoring_ranks(run: RunContext, devices: int) -> list[int]:
    """The process of each share: where a copy takes several accelerators, only some processes hold one."""
    workers = max(1, run.local_world_size // devices)
    machines = range(run.world_size // run.local_world_size)
    return [machine * run.local_world_size + local for machine in machines for local in range(workers)]


def share_of(run: RunContext, devices: int) -> Share:
    """The share of a process."""
    ranks = scoring_ranks(run, devices)
    return Share(ranks.index(run.rank) if run.rank in ranks else None, len(ranks))
