"""Scoring the rows that the cache does not know: shares, batches, progress, resumption. No collectives.

Each process takes its share of the missing rows, prepares all of it before any weights are loaded, writes its scores
every now and then (so that little is lost when it is stopped), and then waits until the others' shares have come in.
"""

import socket
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import torch

from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.data.rows import RowError, raise_row_errors
from poft_plugin.report.console import progress
from poft_plugin.scoring.board import Board
from poft_plugin.scoring.cache import REFUSED, Lookup, ScoreCache
from poft_plugin.scoring.findings import Findings, long_rows_error, say, with_long_rows
from poft_plugin.scoring.heartbeat import ALONE, DEAD_SECONDS, FIRST_SECONDS, LOADING_SECONDS, Pulse, batch_limit
from poft_plugin.scoring.identity import Score
from poft_plugin.scoring.packs import pack_batches
from poft_plugin.scoring.scorer import PreparedRow, Scorer
from poft_plugin.scoring.shares import Share

FLUSH_SECONDS = 30.0
POLL_SECONDS = 1.0
REMINDER_SECONDS = 120.0

OWNERS_OF = 1000
"""Missing rows whose processes are looked after: keys are hashes, so that these are nearly all that work."""

GRACE_SECONDS = 60.0
"""How long files may take from one machine to another on a shared file system."""


def prepare_missing(
    scorer: Scorer, rows: Rows, cache: ScoreCache, share: Share, *, board: Board | None = None
) -> list[PreparedRow]:
    """Tokenizes this process's share of the rows that the cache lacks: all that can go wrong without weights does now.

    Args:
        scorer: not loaded.
        rows: unique rows.
        cache: where scores are looked up; rows that are too long, or left out because they cannot be read, are noted
            there.
        share: this process's part.
        board: sums what is to be said over the processes, and tells them that the work goes on.

    Returns:
        The rows that fit the scorer's context.

    Raises:
        RowError: for a row that cannot be scored, or that is too long, where such rows are not to be dropped.
    """
    pulse = ALONE if board is None else board.pulse
    lookup = cache.lookup(scorer.identity, rows.keys)
    missing = np.flatnonzero(lookup.missing | (lookup.refused & ~rows.droppable))
    mine = [int(index) for index in missing if share.holds(rows.keys[int(index)].as_py())]
    prepared, errors, droppable = [], {}, rows.droppable
    for index in progress(mine, description=f"{scorer.name}: tokens"):
        pulse.step(f"preparing rows for {scorer.name}", DEAD_SECONDS)
        try:
            prepared.append(scorer.prepare_row(rows, index))
        except RowError as error:
            errors[index] = str(error)
    pulse.step(f"prepared rows for {scorer.name}")
    raise_row_errors([text for index, text in errors.items() if not droppable[index]], len(mine))
    if errors:
        refused = [rows.keys[index].as_py() for index in errors]
        cache.write(scorer.identity, [Score(key, float("nan"), REFUSED) for key in refused])
    context = scorer.context_length
    long = [row for row in prepared if context is not None and len(row) > context]
    found = Findings(scorer.tally(prepared), len(errors), next(iter(errors.values()), ""))
    if long:
        cache.write(scorer.identity, [Score(row.key, float("nan"), -len(row)) for row in long])
        found = with_long_rows(found, rows, {row.key: len(row) for row in long})
        if not scorer.drops_long_rows:
            raise long_rows_error(scorer.name, found, what=scorer.kind)
    say(scorer, found, share, board)
    return [row for row in prepared if context is None or len(row) <= context]


def score_prepared(
    scorer: Scorer,
    prepared: Sequence[PreparedRow],
    rows: Rows,
    cache: ScoreCache,
    *,
    device: str,
    batch_tokens: int | None,
    pulse: Pulse = ALONE,
) -> None:
    """Scores prepared rows and writes the scores, every now and then.

    Args:
        scorer: loaded and unloaded here, if there is anything to score.
        prepared: rows that fit its context.
        rows: the rows they come from, for messages.
        cache: where the scores go.
        device: where the model goes.
        batch_tokens: tokens of a batch, padding included; a longer row makes a batch of its own. None for
            `default_batch_tokens`.
        pulse: tells the other processes that the work goes on.

    Raises:
        ValueError: for a reward that is not finite, or above what the scorer can give, naming the row; what was scored
            before stays in the cache.
    """
    if not prepared:
        return
    pulse.step(f"loading {scorer.name}", LOADING_SECONDS)
    scorer.load(device)
    done: list[Score] = []
    flushed = began = time.monotonic()
    slowest, scoring = 0.0, f"scoring with {scorer.name}"
    try:
        pulse.step(scoring, FIRST_SECONDS)
        with progress(total=len(prepared), description=f"{scorer.name}: scores") as bar:
            for batch in batches_for(scorer, prepared, batch_tokens or default_batch_tokens(device)):
                scores = scorer.score(batch)
                _check_possible(scorer, scores, rows)
                done += scores
                bar.update(len(batch))
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    cache.write(scorer.identity, done)
                    done, flushed = [], time.monotonic()
                slowest, began = max(slowest, time.monotonic() - began), time.monotonic()
                pulse.step(scoring, batch_limit(slowest))
    finally:
        if done:
            cache.write(scorer.identity, done)
        scorer.unload()
    pulse.step(f"scored its rows with {scorer.name}")


def wait_for_others(
    scorer: Scorer, rows: Rows, cache: ScoreCache, *, shares: int = 1, board: Board | None = None
) -> Lookup:
    """The scores of all rows, once every process has written its share.

    Args:
        scorer: whose scores.
        rows: the rows that were missing.
        cache: where they appear.
        shares: how many processes score.
        board: where the others say that they have finished.

    Raises:
        ValueError: if a process that has finished wrote to another folder than this one reads.
        ProcessLostError: if a process whose rows are missing has failed, is gone or hangs.
    """
    reminded = finished = time.monotonic()
    while (lookup := cache.lookup(scorer.identity, rows.keys)).missing.any():
        first = np.flatnonzero(lookup.missing)[:OWNERS_OF]
        owners = [int(rows.keys[int(index)].as_py(), 16) % shares for index in first]
        owner, machine = owners[0], board and board.machine_of(owners[0])
        if board is not None:
            board.check(set(owners))
        if machine is None:
            finished = time.monotonic()
        elif time.monotonic() - finished > GRACE_SECONDS:
            raise ValueError(
                f"score_cache is not shared between nodes {machine} and {socket.gethostname()}: the process of share "
                f"{owner} has all its scores, and {cache.folder.absolute()} lacks {int(lookup.missing.sum())} of them "
                "here. Set `score_cache:` (or $POFT_SCORE_CACHE) to one folder that every process reaches"
            )
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


def default_batch_tokens(device: str) -> int:
    """Tokens of a scoring batch where none were asked for: a GPU wants many, a CPU's caches few."""
    return 1024 if device == "cpu" else 8192


def batches_for(scorer: Scorer, rows: Sequence[PreparedRow], batch_tokens: int) -> Iterator[list[PreparedRow]]:
    """Batches as a loaded scorer reads them: rows that fit its packs by what they begin with, others by length.

    Rows of different groups of the scorer are not in one batch, for a row's score is that of the row alone.
    """
    packable = scorer.pack_length
    yield from batches([row for row in rows if len(row) > packable], batch_tokens, scorer.batch_group)
    groups: dict[Hashable, list[PreparedRow]] = {}
    for row in rows:
        if len(row) <= packable:
            groups.setdefault(scorer.batch_group(len(row)), []).append(row)
    for _, group in sorted(groups.items(), reverse=True):
        yield from pack_batches(group, batch_tokens)


def batches(
    rows: Sequence[PreparedRow], batch_tokens: int, group: Callable[[int], Hashable]
) -> Iterator[list[PreparedRow]]:
    """Batches of rows of like length, longest first, `rows x longest` within the budget.

    Args:
        rows: to be divided.
        batch_tokens: the budget; a longer row makes a batch of its own.
        group: of a length; rows of different groups are not in one batch, for a row's score is that of the row alone.

    Examples:
        >>> row = lambda n: PreparedRow(str(n), np.zeros(n, np.int32), np.zeros(n, bool))
        >>> rows = [row(2), row(9), row(3), row(4)]
        >>> [[len(r) for r in batch] for batch in batches(rows, 8, lambda length: 0)]
        [[9], [4, 3], [2]]
        >>> [[len(r) for r in batch] for batch in batches(rows, 99, lambda length: length > 3)]
        [[9, 4], [3, 2]]
    """
    batch: list[PreparedRow] = []
    for row in sorted(rows, key=lambda row: (-len(row), row.key)):
        full = len(batch) > 0 and len(batch[0]) * (len(batch) + 1) > batch_tokens
        if full or (batch and group(len(row)) != group(len(batch[0]))):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _check_possible(scorer: Scorer, scores: Sequence[Score], rows: Rows) -> None:
    for score in scores:
        if not np.isfinite(score.value):
            raise ValueError(
                f"{rows.where_key(score.key)}: {scorer.kind} {scorer.name!r} gives the reward {score.value}; its "
                "weights or dtype overflow. Try `dtype: bfloat16` or `float32` for it"
            )
        if score.value > scorer.identity.bound:
            raise ValueError(
                f"{rows.where_key(score.key)}: {scorer.kind} {scorer.name!r} gives the reward {score.value}, above "
                f"{scorer.identity.highest:g}, which no log-probability is. Try `dtype: float32` for it"
            )
