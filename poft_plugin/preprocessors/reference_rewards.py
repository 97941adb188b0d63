"""PoFT's dataset preprocessor: the mean reward of the references for every row, from the cache or scored now."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from poft_plugin.config import PoftConfig, ReferenceConfig
from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.report.scores import print_summary, summarise
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring.cache import Lookup, ScoreCache, cache_folder
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.exchange import read_score_file
from poft_plugin.scoring.sources import Source, check_revisions, open_source, score_all

KIND = "reference"


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
    lookups = score_all(references, rows, cache, settings=settings, run=run)
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


def open_references(settings: PoftConfig, cache: ScoreCache) -> list[Source]:
    """Finds every reference, and checks its template and tokenizer, without loading weights."""
    return [_open(reference, settings, cache) for reference in settings.references]


def _open(reference: ReferenceConfig, settings: PoftConfig, cache: ScoreCache) -> Source:
    if reference.scores is not None:
        return Source(KIND, reference, None, read_score_file(reference.scores, reference.source))

    def make(checkpoint: Checkpoint) -> CausalLMScorer:
        scorer = CausalLMScorer(reference, checkpoint, settings.include_end_of_turn)
        scorer.check()
        return scorer

    return open_source(reference, make, cache, kind=KIND)


def _long_rows(rows: Rows, lookups: Sequence[Lookup]) -> set[str]:
    """Keys of rows that some reference cannot read: they are left out for all."""
    long = np.any([lookup.too_long | lookup.refused for lookup in lookups], axis=0)
    return {rows.keys[int(index)].as_py() for index in np.flatnonzero(long)}
