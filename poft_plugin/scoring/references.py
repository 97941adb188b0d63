"""PoFT's dataset preprocessor: the mean reward of the references for every row, from the cache or scored now."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel

from poft_plugin.config import PoftConfig, ReferenceConfig
from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.data.rows import RowError
from poft_plugin.report.scores import print_summary, summarise
from poft_plugin.scoring.cache import Lookup, ScoreCache, cache_folder
from poft_plugin.scoring.causal_lm import CausalLMScorer
from poft_plugin.scoring.checkpoints import MissingCheckpointError, resolve_checkpoint
from poft_plugin.scoring.exchange import ImportedScores, imported_scores, read_score_file
from poft_plugin.scoring.run import accelerator, score_missing, share_of, wait_for_others


@dataclass(frozen=True)
class Reference:
    """A reference and where its scores come from.

    Args:
        settings: its config entry.
        scorer: the model, where it is there.
        imported: scores made elsewhere, where there are some.
    """

    settings: ReferenceConfig
    scorer: CausalLMScorer | None
    imported: ImportedScores | None

    def lookup(self, rows: Rows, cache: ScoreCache) -> Lookup:
        """What is known of the rows without scoring any; imported scores come first."""
        if self.imported is None:
            assert self.scorer is not None
            return cache.lookup(self.scorer.identity, rows.keys)
        known = self.imported.lookup(rows.keys)
        if self.scorer is None:
            return known
        own, missing = cache.lookup(self.scorer.identity, rows.keys), known.missing
        return Lookup(np.where(missing, own.rewards, known.rewards), np.where(missing, own.num_tokens, known.num_tokens))


def reference_rewards(rows: Rows, settings: BaseModel, run: RunContext) -> Prepared:
    """Attaches `reference_logp`, the mean of the references' rewards `(1/M) sum_j r_j(x, y)` (Eq. 4 to 6).

    Args:
        rows: unique rows.
        settings: the block `poft:`.
        run: this process; scoring is shared among all, without collectives.

    Raises:
        ValueError: for a reference that cannot be used, rows that cannot be scored, or scores that are missing where
            nothing may be scored.
    """
    assert isinstance(settings, PoftConfig)
    cache = ScoreCache(cache_folder(settings.score_cache))
    references = open_references(settings, cache)
    if run.rank == 0:
        check_revisions(references, cache, update=run.purpose in ("preprocess", "score"))
    lookups = [_rewards(reference, rows, cache, settings, run) for reference in references]
    dropped = _long_rows(references, rows, lookups)
    kept = ~np.isin(np.asarray(rows.keys.to_pylist()), sorted(dropped)) if dropped else np.ones(len(rows), bool)
    rewards = np.stack([lookup.rewards for lookup in lookups])
    summary = summarise([reference.settings.label for reference in references], rewards[:, kept], rows.sources[kept])
    if run.rank == 0:
        print_summary(summary)
    return Prepared({REFERENCE_LOGP: rewards.mean(axis=0)}, frozenset(dropped), summary.statistics())


def open_references(settings: PoftConfig, cache: ScoreCache) -> list[Reference]:
    """Finds every reference, and checks its template and tokenizer, without loading weights."""
    return [_open(reference, settings, cache) for reference in settings.references]


def check_revisions(references: Sequence[Reference], cache: ScoreCache, *, update: bool) -> None:
    """Stops where a hub revision has moved since its scores were made.

    Args:
        references: opened references.
        cache: remembers the commit that each `model@revision` was scored at.
        update: take the new commit (`preprocess`, `score`) instead of stopping (`train`).

    Raises:
        ValueError: naming both commits and the remedy.
    """
    known = cache.read_note("revisions")
    fresh: dict[str, str] = {}
    for reference in references:
        scorer = reference.scorer
        if scorer is None or scorer.checkpoint.commit is None:
            continue
        model, revision = reference.settings.model, reference.settings.revision or "main"
        address, commit = f"{model}@{revision}", scorer.checkpoint.commit
        before = known.get(address, commit)
        if before != commit and not update:
            raise ValueError(
                f"reference {model}: revision {revision!r} was {before} when it was scored and is {commit} now. Pin it "
                f"with `revision: {before}`, or score with the new one: `axolotl poft score`"
            )
        fresh[address] = commit
    if fresh.items() - known.items():
        cache.update_note("revisions", fresh)


def _open(reference: ReferenceConfig, settings: PoftConfig, cache: ScoreCache) -> Reference:
    if reference.scores is not None:
        return Reference(reference, None, read_score_file(reference.scores, reference.source))
    imported = imported_scores(cache, reference.source)
    assert reference.model is not None
    try:
        checkpoint = resolve_checkpoint(reference.model, reference.revision, cache)
    except MissingCheckpointError:
        if imported is None:
            raise
        return Reference(reference, None, imported)
    scorer = CausalLMScorer(reference, checkpoint, settings.include_end_of_turn)
    _ = scorer.renderer  # refuses a missing template or a slow tokenizer now
    return Reference(reference, scorer, imported if imported and imported.identity is None else None)


def _rewards(reference: Reference, rows: Rows, cache: ScoreCache, settings: PoftConfig, run: RunContext) -> Lookup:
    lookup = reference.lookup(rows, cache)
    missing = int(lookup.missing.sum())
    label = reference.settings.label
    if run.rank == 0:
        print(f"reference {label}: {len(rows) - missing} rows cached, {missing} to score", flush=True)
    if not missing:
        return lookup
    scorer = reference.scorer
    first = rows.where(int(np.flatnonzero(lookup.missing)[0]))
    if scorer is None:
        raise ValueError(
            f"reference {label!r}: its imported scores lack {missing} of {len(rows)} rows, the first {first}, and the "
            "model itself is not here. Score them elsewhere (`axolotl poft export --rows` lists them) and import again"
        )
    if run.purpose == "evaluate" or (run.purpose == "train" and settings.missing_scores == "error"):
        why = "`axolotl evaluate` scores nothing" if run.purpose == "evaluate" else "missing_scores: error"
        raise ValueError(
            f"reference {label!r}: {missing} of {len(rows)} rows have no cached score ({why}), the first {first}. "
            "Run `axolotl poft score` first"
        )
    unscored = Rows(rows.table.filter(lookup.missing), {})
    share, device = share_of(run, scorer.devices), accelerator(run, scorer.devices)
    score_missing(scorer, unscored, cache, share=share, device=device, batch_tokens=settings.batch_tokens)
    wait_for_others(scorer, unscored, cache)
    return reference.lookup(rows, cache)


def _long_rows(references: Sequence[Reference], rows: Rows, lookups: Sequence[Lookup]) -> set[str]:
    """Keys of rows that a reference cannot read and that its config drops; an error where it does not."""
    dropped: set[str] = set()
    for reference, lookup in zip(references, lookups, strict=True):
        long = np.flatnonzero(lookup.too_long)
        if not len(long):
            continue
        worst = int(long[np.argmin(lookup.num_tokens[long])])
        message = (
            f"reference {reference.settings.label!r}: {len(long)} of {len(rows)} rows are longer than its context, the "
            f"longest {rows.where(worst)} with {-int(lookup.num_tokens[worst])} tokens"
        )
        if reference.settings.on_long_row != "drop":
            raise RowError(f"{message}. Set `on_long_row: drop` or `truncate` for it, or remove the rows")
        print(f"{message}: dropped", flush=True)
        dropped |= {rows.keys[int(index)].as_py() for index in long}
    return dropped
