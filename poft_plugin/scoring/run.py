"""Scoring the rows that the cache does not know: shares, batches, progress, resumption. No collectives.

Each process takes its share of the missing rows, prepares all of it before any weights are loaded, writes its scores
every now and then (so that little is lost when it is stopped), and then waits until the others' shares have come in.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.report.console import progress
from poft_plugin.scoring.cache import Lookup, ScoreCache
from poft_plugin.scoring.scorer import PreparedRow, Score, Scorer

FLUSH_SECONDS = 30.0
POLL_SECONDS = 1.0
REMINDER_SECONDS = 120.0


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


def score_missing(
    scorer: Scorer, rows: Rows, cache: ScoreCache, *, share: Share, device: str, batch_tokens: int
) -> int:
    """Scores this process's share of the rows that the cache lacks, and writes them.

    Args:
        scorer: not yet loaded; it is loaded only if there is something to score, and unloaded afterwards.
        rows: unique rows.
        cache: where scores are looked up and written.
        share: this process's part.
        device: where the model goes.
        batch_tokens: tokens of a batch, padding included; a longer row makes a batch of its own.

    Returns:
        The number of rows that were scored.

    Raises:
        RowError: for a row that cannot be scored, before the model is loaded.
        ValueError: for a reward that is not finite, naming the row; what was scored before stays in the cache.
    """
    missing = np.flatnonzero(cache.lookup(scorer.identity, rows.keys).missing)
    mine = [int(index) for index in missing if share.holds(rows.keys[int(index)].as_py())]
    prepared = [_prepare(scorer, rows, index) for index in progress(mine, description=f"{scorer.name}: tokens")]
    fitting, long = _by_context(prepared, scorer.context_length)
    if long:
        cache.write(scorer.identity, [Score(row.key, float("nan"), -len(row)) for row in long])
    if fitting:
        where = {rows.keys[i].as_py(): rows.where(i) for i in mine}
        _score(scorer, fitting, cache, device=device, batch_tokens=batch_tokens, where=where)
    return len(fitting)


def wait_for_others(scorer: Scorer, rows: Rows, cache: ScoreCache) -> Lookup:
    """The scores of all rows, once every process has written its share."""
    reminded = time.monotonic()
    while (lookup := cache.lookup(scorer.identity, rows.keys)).missing.any():
        if time.monotonic() - reminded > REMINDER_SECONDS:
            reminded = time.monotonic()
            print(
                f"{scorer.name}: waiting for {int(lookup.missing.sum())} rows that other processes score "
                f"(score_cache: {cache.folder.absolute()}; it must be one folder for all of them)",
                flush=True,
            )
        time.sleep(POLL_SECONDS)
    return lookup


def accelerator(run: RunContext, devices: int) -> str:
    """The device of this process's copy.

    Raises:
        ValueError: if a copy is to take several accelerators and they are not there.
    """
    available = torch.cuda.device_count()
    if devices > max(available, 1):
        raise ValueError(f"references: `devices: {devices}`, but this machine has {available} GPUs")
    return f"cuda:{run.local_rank * devices}" if available else "cpu"


def batches(rows: Sequence[PreparedRow], batch_tokens: int) -> Iterator[list[PreparedRow]]:
    """Batches of rows of like length, longest first, `rows x longest` within the budget.

    Examples:
        >>> row = lambda n: PreparedRow(str(n), np.zeros(n, np.int32), np.zeros(n, bool))
        >>> [[len(r) for r in batch] for batch in batches([row(2), row(9), row(3), row(4)], 8)]
        [[9], [4, 3], [2]]
    """
    batch: list[PreparedRow] = []
    for row in sorted(rows, key=lambda row: (-len(row), row.key)):
        if batch and len(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _prepare(scorer: Scorer, rows: Rows, index: int) -> PreparedRow:
    return scorer.prepare(rows.keys[index].as_py(), rows.conversation(index), rows.where(index))


def _by_context(rows: Sequence[PreparedRow], context: int | None) -> tuple[list[PreparedRow], list[PreparedRow]]:
    if context is None:
        return list(rows), []
    return [row for row in rows if len(row) <= context], [row for row in rows if len(row) > context]


def _score(
    scorer: Scorer,
    rows: Sequence[PreparedRow],
    cache: ScoreCache,
    *,
    device: str,
    batch_tokens: int,
    where: dict[str, str],
) -> None:
    scorer.load(device)
    done: list[Score] = []
    flushed = time.monotonic()
    try:
        with progress(total=len(rows), description=f"{scorer.name}: scores") as bar:
            for batch in batches(rows, batch_tokens):
                scores = scorer.score(batch)
                _check_finite(scorer, scores, where)
                done += scores
                bar.update(len(batch))
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    cache.write(scorer.identity, done)
                    done, flushed = [], time.monotonic()
    finally:
        if done:
            cache.write(scorer.identity, done)
        scorer.unload()


def _check_finite(scorer: Scorer, scores: Sequence[Score], where: dict[str, str]) -> None:
    for score in scores:
        if not np.isfinite(score.reward):
            raise ValueError(
                f"{where[score.key]}: reference {scorer.name!r} gives the reward {score.reward}; its weights or dtype "
                "overflow. Try `dtype: bfloat16` or `float32` for it"
            )
