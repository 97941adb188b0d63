"""PoFT's dataset preprocessor: the mean reward of the references for every row, from the cache or scored now."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel

from poft_plugin.config import PoftConfig, ReferenceConfig
from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.report.scores import print_summary, summarise
from poft_plugin.scoring.cache import Lookup, ScoreCache, cache_folder
from poft_plugin.scoring.causal_lm import CausalLMScorer
from poft_plugin.scoring.checkpoints import MissingCheckpointError, resolve_checkpoint
from poft_plugin.scoring.exchange import ImportedScores, imported_scores, read_score_file
from poft_plugin.scoring.run import (
    accelerator,
    prepare_missing,
    refuse_long_rows,
    score_prepared,
    share_of,
    wait_for_others,
)
from poft_plugin.scoring.scorer import Identity


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
        return Lookup(
            np.where(missing, own.rewards, known.rewards), np.where(missing, own.num_tokens, known.num_tokens)
        )


def reference_rewards(rows: Rows, settings: BaseModel, run: RunContext) -> Prepared:
    """Attaches `reference_logp`, the mean of the references' rewards `(1/M) sum_j r_j(x, y)` (Eq. 5 and 6).

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
    lookups = _score_all(references, rows, cache, settings, run)
    dropped = _long_rows(rows, lookups)
    kept = ~np.isin(np.asarray(rows.keys.to_pylist()), sorted(dropped)) if dropped else np.ones(len(rows), bool)
    rewards = np.stack([lookup.rewards for lookup in lookups])
    summary = summarise([reference.settings.label for reference in references], rewards[:, kept], rows.sources[kept])
    if run.rank == 0:
        print_summary(summary)
    return Prepared({REFERENCE_LOGP: rewards.mean(axis=0)}, frozenset(dropped), summary.statistics())


def check_references(settings: BaseModel) -> None:
    """Finds every reference, its tokenizer and its template, before any data is read.

    Raises:
        ValueError: for a reference that cannot be used, with the remedy.
    """
    assert isinstance(settings, PoftConfig)
    open_references(settings, ScoreCache(cache_folder(settings.score_cache)))


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
    if imported is None or imported.identity is None:
        if imported is not None:
            print(
                f"reference {reference.label}: imported scores come before the model's own (to forget them, take its "
                f"entry out of {cache.folder / 'imports.json'})",
                flush=True,
            )
        return Reference(reference, scorer, imported)
    _note_difference(reference, imported.identity, scorer.identity)
    return Reference(reference, scorer, None)


def _note_difference(reference: ReferenceConfig, imported: Identity, here: Identity) -> None:
    """Says why imported scores do not serve: the model that made them is not the one that is here."""
    differing = sorted(k for k in here.fields if here.fields[k] != imported.fields.get(k))
    if differing:
        print(
            f"reference {reference.label}: its imported scores were made with other settings ({', '.join(differing)}) "
            "than the model here has; they are not used",
            flush=True,
        )


def _score_all(
    references: Sequence[Reference], rows: Rows, cache: ScoreCache, settings: PoftConfig, run: RunContext
) -> list[Lookup]:
    """Every reference's scores. All rows are prepared for all references before the first model is loaded."""
    unscored = [_unscored(reference, rows, cache, settings, run) for reference in references]
    shares = [share_of(run, reference.settings.devices) for reference in references]
    prepared = [
        prepare_missing(reference.scorer, todo, cache, share) if reference.scorer is not None and len(todo) else []
        for reference, todo, share in zip(references, unscored, shares, strict=True)
    ]
    for reference, todo, ready in zip(references, unscored, prepared, strict=True):
        if reference.scorer is None or not len(todo):
            continue
        if ready:
            device = accelerator(run, reference.scorer.devices)
            score_prepared(reference.scorer, ready, todo, cache, device=device, batch_tokens=settings.batch_tokens)
        wait_for_others(reference.scorer, todo, cache)
    return [reference.lookup(rows, cache) for reference in references]


def _unscored(reference: Reference, rows: Rows, cache: ScoreCache, settings: PoftConfig, run: RunContext) -> Rows:
    """The rows that a reference has to score now; an error where it may not, or cannot."""
    lookup, label = reference.lookup(rows, cache), reference.settings.label
    missing, long = int(lookup.missing.sum()), np.flatnonzero(lookup.too_long)
    if run.rank == 0:
        print(f"reference {label}: {len(rows) - missing} rows cached, {missing} to score", flush=True)
    if len(long):
        lengths = {rows.keys[int(i)].as_py(): -int(lookup.num_tokens[i]) for i in long}
        refuse_long_rows(label, rows, lengths, drop=reference.settings.on_long_row == "drop")
    if not missing:
        return Rows(rows.table.slice(0, 0), {})
    first = rows.where(int(np.flatnonzero(lookup.missing)[0]))
    if reference.scorer is None:
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
    return Rows(rows.table.filter(lookup.missing), {})


def _long_rows(rows: Rows, lookups: Sequence[Lookup]) -> set[str]:
    """Keys of rows that some reference cannot read: they are left out for all."""
    long = np.any([lookup.too_long for lookup in lookups], axis=0)
    return {rows.keys[int(index)].as_py() for index in np.flatnonzero(long)}
