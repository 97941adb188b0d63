"""Where scores come from: a model that is here, scores made elsewhere, or both; and scoring what is missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from poft_plugin.config import ScoringBlock
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.scoring.board import open_board, scoring_ranks
from poft_plugin.scoring.cache import Lookup, ScoreCache
from poft_plugin.scoring.checkpoints import Checkpoint, MissingCheckpointError, resolve_checkpoint
from poft_plugin.scoring.exchange import ImportedScores, imported_scores
from poft_plugin.scoring.heartbeat import Pulse, beating
from poft_plugin.scoring.run import (
    accelerator,
    prepare_missing,
    refuse_long_rows,
    score_prepared,
    share_of,
    wait_for_others,
)
from poft_plugin.scoring.scorer import Identity, Scorer


class ModelSettings(Protocol):
    """A config entry that names a model to score with."""

    @property
    def label(self) -> str:
        """Its name in tables."""
        ...

    @property
    def source(self) -> str:
        """What stands for it in exported files."""
        ...

    @property
    def model(self) -> str | None:
        """Hub id or local folder."""
        ...

    @property
    def revision(self) -> str | None:
        """Hub revision."""
        ...


@dataclass(frozen=True)
class Source:
    """One source of scores.

    Args:
        kind: what messages call it: `reference`, `reward model`.
        settings: its config entry.
        scorer: the model, where it is there.
        imported: scores made elsewhere, where there are some.
    """

    kind: str
    settings: ModelSettings
    scorer: Scorer | None
    imported: ImportedScores | None

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.settings.label

    @property
    def identity(self) -> Identity | None:
        """What the scores depend on; None where a file does not say."""
        if self.scorer is not None:
            return self.scorer.identity
        return self.imported.identity if self.imported else None

    def lookup(self, rows: Rows, cache: ScoreCache) -> Lookup:
        """What is known of the rows without scoring any; imported scores come first."""
        if self.imported is None:
            assert self.scorer is not None
            return cache.lookup(self.scorer.identity, rows.keys)
        known = self.imported.lookup(rows.keys)
        if self.scorer is None:
            return known
        own, missing = cache.lookup(self.scorer.identity, rows.keys), known.missing
        return Lookup(
            np.where(missing, own.rewards, known.rewards), np.where(missing, own.num_tokens, known.num_tokens)
        )


def open_source(
    settings: ModelSettings, make: Callable[[Checkpoint], Scorer], cache: ScoreCache, *, kind: str
) -> Source:
    """Finds a model and what was imported for it, without loading weights.

    Args:
        settings: its config entry.
        make: the scorer of a checkpoint; it may refuse what cannot be scored with.
        cache: where imported scores are.
        kind: what messages call it.

    Raises:
        ValueError: if neither the model nor imported scores are there.
    """
    imported = imported_scores(cache, settings.source)
    assert settings.model is not None
    try:
        checkpoint = resolve_checkpoint(settings.model, settings.revision, cache, what=kind)
    except MissingCheckpointError:
        if imported is None:
            raise
        return Source(kind, settings, None, imported)
    scorer = make(checkpoint)
    if imported is None or imported.identity is None:
        if imported is not None:
            print(
                f"{kind} {settings.label}: imported scores come before the model's own (to forget them, take its "
                f"entry out of {cache.folder / 'imports.json'})",
                flush=True,
            )
        return Source(kind, settings, scorer, imported)
    _note_difference(settings.label, imported.identity, scorer.identity, kind=kind)
    return Source(kind, settings, scorer, None)


def check_revisions(sources: Sequence[Source], cache: ScoreCache, *, update: bool) -> None:
    """Stops where a hub revision has moved since its scores were made.

    Args:
        sources: opened sources.
        cache: remembers the commit that each `model@revision` was scored at.
        update: take the new commit (`preprocess`, `score`) instead of stopping (`train`).

    Raises:
        ValueError: naming both commits and the remedy.
    """
    known = cache.read_note("revisions")
    fresh: dict[str, str] = {}
    for source in sources:
        scorer = source.scorer
        if scorer is None or scorer.checkpoint.commit is None:
            continue
        model, revision = source.settings.model, source.settings.revision or "main"
        address, commit = f"{model}@{revision}", scorer.checkpoint.commit
        before = known.get(address, commit)
        if before != commit and not update:
            raise ValueError(
                f"{source.kind} {model}: revision {revision!r} was {before} when it was scored and is {commit} now. "
                f"Pin it with `revision: {before}`, or score with the new one: `axolotl poft score`"
            )
        fresh[address] = commit
    if fresh.items() - known.items():
        cache.update_note("revisions", fresh)


def score_all(
    sources: Sequence[Source], rows: Rows, cache: ScoreCache, *, settings: ScoringBlock, run: RunContext
) -> list[Lookup]:
    """Every source's scores of the rows; what is missing is scored now.

    All rows are prepared for all sources before the first model is loaded.

    Args:
        sources: opened sources.
        rows: unique rows.
        cache: where scores are looked up and written.
        settings: the block that they come from.
        run: this process; it scores its share, without collectives.

    Raises:
        ValueError: for scores that are missing where nothing may be scored, or as the scorer.
    """
    with beating(run) as pulse:
        _score_missing(sources, rows, cache, settings=settings, run=run, pulse=pulse)
    return [source.lookup(rows, cache) for source in sources]


def _score_missing(
    sources: Sequence[Source], rows: Rows, cache: ScoreCache, *, settings: ScoringBlock, run: RunContext, pulse: Pulse
) -> None:
    unscored = [_unscored(source, rows, cache, settings, run) for source in sources]
    shares = [share_of(run, source.scorer.devices) if source.scorer else None for source in sources]
    prepared = [
        prepare_missing(source.scorer, todo, cache, share, pulse=pulse) if source.scorer and share and len(todo) else []
        for source, todo, share in zip(sources, unscored, shares, strict=True)
    ]
    for source, todo, ready, share in zip(sources, unscored, prepared, shares, strict=True):
        if source.scorer is None or share is None:
            continue
        devices = source.scorer.devices
        board = open_board(pulse, source.scorer.identity, rows.keys, scoring_ranks(run, devices))
        if ready:
            device, tokens = accelerator(run, devices), settings.batch_tokens
            score_prepared(source.scorer, ready, todo, cache, device=device, batch_tokens=tokens, pulse=pulse)
        board.announce(share.index)
        if len(todo):
            wait_for_others(source.scorer, todo, cache, shares=share.count, board=board)


def _note_difference(label: str, imported: Identity, here: Identity, *, kind: str) -> None:
    """Says why imported scores do not serve: the model that made them is not the one that is here."""
    differing = sorted(k for k in here.fields if here.fields[k] != imported.fields.get(k))
    if differing:
        print(
            f"{kind} {label}: its imported scores were made with other settings ({', '.join(differing)}) "
            "than the model here has; they are not used",
            flush=True,
        )


def _unscored(source: Source, rows: Rows, cache: ScoreCache, settings: ScoringBlock, run: RunContext) -> Rows:
    """The rows that a source has to score now; an error where it may not, or cannot."""
    lookup, label = source.lookup(rows, cache), source.label
    unknown = lookup.missing | (lookup.refused & ~rows.droppable)
    missing, long = int(unknown.sum()), np.flatnonzero(lookup.too_long)
    if run.rank == 0:
        print(f"{source.kind} {label}: {len(rows) - missing} rows cached, {missing} to score", flush=True)
    if len(long):
        lengths = {rows.keys[int(i)].as_py(): -int(lookup.num_tokens[i]) for i in long}
        drops = source.scorer is not None and source.scorer.drops_long_rows
        refuse_long_rows(label, rows, lengths, drop=drops, what=source.kind)
    if not missing:
        return Rows(rows.table.slice(0, 0), {})
    first = rows.where(int(np.flatnonzero(unknown)[0]))
    if source.scorer is None:
        raise ValueError(
            f"{source.kind} {label!r}: its imported scores lack {missing} of {len(rows)} rows, the first {first}, and "
            "the model itself is not here. Score them elsewhere (`axolotl poft export --rows` lists them) and import "
            "again"
        )
    if run.purpose == "evaluate" or (run.purpose == "train" and settings.missing_scores == "error"):
        why = "`axolotl evaluate` scores nothing" if run.purpose == "evaluate" else "missing_scores: error"
        raise ValueError(
            f"{source.kind} {label!r}: {missing} of {len(rows)} rows have no cached score ({why}), the first {first}. "
            "Run `axolotl poft score` first"
        )
    return Rows(rows.table.filter(unknown), {})
