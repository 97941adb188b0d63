"""What scoring would cost, before any weights are loaded."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.data.rows import RowError
from poft_plugin.scoring.cache import Lookup, ScoreCache
from poft_plugin.scoring.run import accelerator, batches_for, default_batch_tokens
from poft_plugin.scoring.scorer import PreparedRow, Scorer
from poft_plugin.scoring.sources import Source

UTILISATION = 0.4
"""Share of the machine's matmul rate that a scoring run is assumed to reach."""

BYTES_PER_SCORE = 60
"""A score on disk: a 32-digit key, a float64, an int32, parquet's overhead."""


@dataclass(frozen=True)
class ScoringPlan:
    """One model's line of the plan.

    Args:
        name: its short name.
        location: hub id with commit, folder, or file of scores.
        rows: unique rows of the run.
        cached: rows with a score.
        to_score: rows without one that fit its context.
        too_long: rows that do not fit.
        tokens: tokens of the rows to score.
        response_tokens: of these, the response's.
        parameters: of the model.
        flops: of one forward over the rows to score.
    """

    name: str
    location: str
    rows: int
    cached: int
    to_score: int = 0
    too_long: int = 0
    tokens: int = 0
    response_tokens: int = 0
    parameters: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Probe:
    """What a few batches took.

    Args:
        rows_per_second: rows of the probed batches over their time.
        tokens_per_second: their tokens over their time.
    """

    rows_per_second: float
    tokens_per_second: float


def plan_reference(source: Source, rows: Rows, cache: ScoreCache) -> tuple[ScoringPlan, list[PreparedRow]]:
    """Counts what a reference or reward model still has to score.

    Args:
        source: opened, so that access, revision and template were checked.
        rows: unique rows.
        cache: the score cache.

    Returns:
        The plan, and the prepared rows that it would score.

    Raises:
        RowError: for a row that it cannot render.
    """
    lookup, scorer = source.lookup(rows, cache), source.scorer
    if scorer is not None:
        return plan_scoring(scorer, rows, lookup)
    missing, known_long = int(lookup.missing.sum()), int(lookup.too_long.sum())
    cached = len(rows) - missing - known_long
    location = f"{source.settings.source} (scores made elsewhere)"
    return ScoringPlan(source.label, location, len(rows), cached, too_long=known_long), []


def plan_scoring(scorer: Scorer, rows: Rows, lookup: Lookup) -> tuple[ScoringPlan, list[PreparedRow]]:
    """Counts what a model still has to score.

    Args:
        scorer: not loaded.
        rows: unique rows.
        lookup: what is known of them already.

    Returns:
        The plan, and the prepared rows that it would score.

    Raises:
        RowError: for a row that it cannot render, unless its data set leaves such rows out.
    """
    known_long, known_refused, droppable = int(lookup.too_long.sum()), lookup.refused & rows.droppable, rows.droppable
    missing = np.flatnonzero(lookup.missing | (lookup.refused & ~droppable))
    prepared = []
    for index in map(int, missing):
        try:
            prepared.append(scorer.prepare_row(rows, index))
        except RowError:
            if not droppable[index]:
                raise
    context = scorer.context_length
    fitting = [row for row in prepared if context is None or len(row) <= context]
    tokens, response = sum(map(len, fitting)), int(sum(row.counted.sum() for row in fitting))
    plan = ScoringPlan(
        name=scorer.name,
        location=_location(scorer),
        rows=len(rows),
        cached=len(rows) - len(missing) - known_long - int(known_refused.sum()),
        to_score=len(fitting),
        too_long=known_long + len(prepared) - len(fitting),
        tokens=tokens,
        response_tokens=response,
        parameters=scorer.num_parameters()[0],
        flops=scorer.flops(tokens, response),
    )
    return plan, fitting


def probe(
    scorer: Scorer, prepared: Sequence[PreparedRow], *, count: int, batch_tokens: int | None, run: RunContext
) -> Probe:
    """Scores `count` batches spread over all lengths, and throws the scores away.

    Args:
        scorer: loaded and unloaded here.
        prepared: the rows to score.
        count: batches to time, after one that is not timed.
        batch_tokens: as in scoring.
        run: this process.
    """
    device = accelerator(run, scorer.devices)
    scorer.load(device)
    every = list(batches_for(scorer, prepared, batch_tokens or default_batch_tokens(device)))
    picked = [every[int(i)] for i in np.unique(np.linspace(0, len(every) - 1, count).astype(int))]
    scorer.score(picked[0])
    start = time.perf_counter()
    for batch in picked:
        scorer.score(batch)
    seconds = time.perf_counter() - start
    scorer.unload()
    rows, tokens = sum(map(len, picked)), sum(len(row) for batch in picked for row in batch)
    return Probe(rows / seconds, tokens / seconds)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a square matrix product on this machine: best of three."""
    size = 4096 if device != "cpu" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def print_plan(plans: Sequence[ScoringPlan], rates: Sequence[float], cache: ScoreCache, console: Console) -> None:
    """The plan as a table.

    Args:
        plans: one per model.
        rates: matmul rate for each, FLOP per second (unused where nothing is to be scored).
        cache: for the disk check.
        console: where it is printed.
    """
    table = Table(title="Scoring plan (nothing is loaded)")
    for heading in ("model", "rows", "tokens", "cached", "to score", "too long", "parameters", "FLOPs", "hours"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for plan, rate in zip(plans, rates, strict=True):
        hours = plan.flops / (UTILISATION * rate) / 3600 if plan.to_score else 0.0
        table.add_row(
            plan.name, f"{plan.rows:,}", f"{plan.tokens:,}", f"{plan.cached:,}", f"{plan.to_score:,}",
            f"{plan.too_long:,}", f"{plan.parameters:,}", f"{plan.flops:.2e}", f"{hours:.2g}",
        )  # fmt: skip
    console.print(table)
    for plan in plans:
        console.print(f"{plan.name}: {plan.location}", highlight=False)
    console.print(f"hours: at {UTILISATION:.0%} of this machine's own matmul rate, one process")
    _print_disk(plans, cache, console)


def _print_disk(plans: Sequence[ScoringPlan], cache: ScoreCache, console: Console) -> None:
    folder = cache.folder.absolute()
    existing: Path = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, needed = shutil.disk_usage(existing).free, sum(plan.to_score for plan in plans) * BYTES_PER_SCORE
    console.print(f"score cache {folder}: needs about {needed / 2**20:.1f} MiB, {free / 2**30:.1f} GiB free")
    if needed > free:
        raise ValueError(
            f"score_cache {folder}: {free} bytes free, {needed} needed; free some or choose another folder"
        )


def _location(scorer: Scorer) -> str:
    file = scorer.checkpoint.gguf
    where = scorer.checkpoint.location if file is None else f"{scorer.checkpoint.location}/{file}"
    local = "local folder" if file is None else "local file"
    pinned = f"commit {scorer.checkpoint.commit}" if scorer.checkpoint.commit else local
    context = "" if scorer.context_length is None else f", context {scorer.context_length}"
    return f"{where} ({pinned}), {str(scorer.dtype).removeprefix('torch.')}{context}"
