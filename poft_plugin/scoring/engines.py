"""Ways to do jobs. This one: every process of the launcher scores its share, without collectives; or one alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from poft_plugin.config import ScoringBlock
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.scoring.board import Board, open_board
from poft_plugin.scoring.cache import Lookup, ScoreCache, cache_folder
from poft_plugin.scoring.findings import Findings, long_rows_error, long_rows_line, say, with_long_rows
from poft_plugin.scoring.heartbeat import Pulse, beating
from poft_plugin.scoring.jobs import Job, check_names
from poft_plugin.scoring.opened import OpenedJob, check_revisions, open_job
from poft_plugin.scoring.run import (
    accelerator,
    prepare_missing,
    score_prepared,
    wait_for_others,
)
from poft_plugin.scoring.scorer import PreparedRow
from poft_plugin.scoring.shares import Share, scoring_ranks, share_of


class Engine(Protocol):
    """A way to do jobs."""

    def score(
        self, jobs: Sequence[OpenedJob], cache: ScoreCache, settings: ScoringBlock, context: RunContext
    ) -> list[Lookup]:
        """Every job's scores, aligned with its rows; what the cache lacks is scored now.

        Args:
            jobs: opened jobs.
            cache: where scores are looked up and written.
            settings: the block that they come from.
            context: this process.

        Raises:
            ValueError: for scores that are missing where nothing may be scored, or as the scorers.
        """
        ...


class ProcessEngine:
    """Each process of one launch scores its share; a process without a launcher all of it."""

    def score(
        self, jobs: Sequence[OpenedJob], cache: ScoreCache, settings: ScoringBlock, context: RunContext
    ) -> list[Lookup]:
        """As `Engine.score`. All rows are prepared for all models before the first one is loaded."""
        with beating(context) as pulse:
            _score_missing(jobs, cache, settings=settings, context=context, pulse=pulse)
        return [opened.lookup(cache) for opened in jobs]


def _score_missing(
    jobs: Sequence[OpenedJob], cache: ScoreCache, *, settings: ScoringBlock, context: RunContext, pulse: Pulse
) -> None:
    unscored = [rows_to_score(opened, cache, settings, context) for opened in jobs]
    shares = [share_of(context, opened.scorer.devices) if opened.scorer else None for opened in jobs]
    boards = [_board(opened, context, pulse) for opened in jobs]
    prepared = [_prepared_share(*each, cache) for each in zip(jobs, unscored, shares, boards, strict=True)]
    for opened, todo, ready, share, board in zip(jobs, unscored, prepared, shares, boards, strict=True):
        if opened.scorer is None or share is None or board is None:
            continue
        if ready:
            device, tokens = accelerator(context, opened.scorer.devices), settings.batch_tokens
            score_prepared(opened.scorer, ready, todo, cache, device=device, batch_tokens=tokens, pulse=pulse)
        board.announce(share.index)
        if len(todo):
            wait_for_others(opened.scorer, todo, cache, shares=share.count, board=board)


def _board(opened: OpenedJob, context: RunContext, pulse: Pulse) -> Board | None:
    if opened.scorer is None:
        return None
    ranks = scoring_ranks(context, opened.scorer.devices)
    return open_board(pulse, opened.scorer.identity, opened.job.rows.keys, ranks)


def _prepared_share(
    opened: OpenedJob, todo: Rows, share: Share | None, board: Board | None, cache: ScoreCache
) -> list[PreparedRow]:
    """This process's rows, tokenized. Who has none says so: the others add up what all have found."""
    if opened.scorer is None or share is None:
        return []
    if len(todo):
        return prepare_missing(opened.scorer, todo, cache, share, board=board)
    say(opened.scorer, Findings(), share, board)
    return []


@dataclass(frozen=True)
class ShareEngine:
    """One share by hand: of a machine, say, that no launcher reaches. Nobody waits for the others.

    Args:
        share: which rows.
    """

    share: Share

    def score(
        self, jobs: Sequence[OpenedJob], cache: ScoreCache, settings: ScoringBlock, context: RunContext
    ) -> list[Lookup]:
        """As `Engine.score`, of the rows of this share alone; the others' scores may be missing."""
        check_revisions(jobs, cache, update=True)
        for opened in jobs:
            if opened.scorer is None:
                continue
            unscored = Rows(opened.job.rows.table.filter(opened.lookup(cache).missing), {})
            prepared = prepare_missing(opened.scorer, unscored, cache, self.share)
            device = accelerator(context, opened.scorer.devices)
            score_prepared(opened.scorer, prepared, unscored, cache, device=device, batch_tokens=settings.batch_tokens)
            share = f"shard {self.share.index} of {self.share.count}"
            print(f"{opened.label}: {share}: {len(prepared)} rows scored", flush=True)
        return [opened.lookup(cache) for opened in jobs]


def score_jobs(
    jobs: Sequence[Job], settings: ScoringBlock, context: RunContext, engine: Engine | None = None
) -> list[Lookup]:
    """Opens jobs and does them.

    Args:
        jobs: what is to be scored, each of its own name.
        settings: the block that they come from: where the cache is, and what may be scored when.
        context: this process.
        engine: how; None: `ProcessEngine`.

    Returns:
        Every job's scores, aligned with its rows.

    Raises:
        ValueError: for a model that cannot be used, a hub revision that has moved, or as `Engine.score`.
    """
    check_names(jobs)
    cache = ScoreCache(cache_folder(settings.score_cache))
    opened = [open_job(job, cache) for job in jobs]
    if context.rank == 0:
        check_revisions(opened, cache, update=context.purpose in ("preprocess", "score"))
    return (engine or ProcessEngine()).score(opened, cache, settings, context)


def rows_to_score(opened: OpenedJob, cache: ScoreCache, settings: ScoringBlock, context: RunContext) -> Rows:
    """The rows that a job has to score now.

    Args:
        opened: the job.
        cache: what is known.
        settings: its block.
        context: this process.

    Raises:
        ValueError: where there are some, and none may be scored here, or the model is not there.
    """
    job, lookup, rows = opened.job, opened.lookup(cache), opened.job.rows
    unknown = lookup.missing | (lookup.refused & ~rows.droppable)
    missing, long = int(unknown.sum()), np.flatnonzero(lookup.too_long)
    if context.rank == 0:
        print(f"{job.kind} {opened.label}: {len(rows) - missing} rows cached, {missing} to score", flush=True)
    if len(long):
        lengths = {rows.keys[int(i)].as_py(): -int(lookup.num_tokens[i]) for i in long}
        drops = opened.scorer is not None and opened.scorer.drops_long_rows
        found = with_long_rows(Findings(), rows, lengths)
        if not drops:
            raise long_rows_error(opened.label, found, what=job.kind)
        if context.rank == 0:
            print(f"{long_rows_line(opened.label, job.kind, found)}: dropped", flush=True)
    if not missing:
        return Rows(rows.table.slice(0, 0), {})
    first = rows.where(int(np.flatnonzero(unknown)[0]))
    if opened.scorer is None:
        raise ValueError(
            f"{opened.title}: its imported scores lack {missing} of {len(rows)} rows, the first {first}, and the model "
            "itself is not here. Score them elsewhere (`axolotl poft export --rows` lists them) and import again"
        )
    if context.purpose == "evaluate" or (context.purpose == "train" and settings.missing_scores == "error"):
        why = "`axolotl evaluate` scores nothing" if context.purpose == "evaluate" else "missing_scores: error"
        raise ValueError(
            f"{opened.title}: {missing} of {len(rows)} rows have no cached score ({why}), the first {first}. "
            "Run `axolotl poft score` first"
        )
    return Rows(rows.table.filter(unknown), {})
