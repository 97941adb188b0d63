"""PoFT's dataset preprocessor: the mean reward of the references for every row."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from poft_plugin.config import PoftConfig, ReferenceConfig
from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.data.render import EndOfTurn
from poft_plugin.report.scores import print_summary, summarise
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring.cache import Lookup, ScoreCache, cache_folder
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.jobs import Job, Preparation, preprocessor
from poft_plugin.scoring.opened import open_job

KIND = "reference"


@preprocessor(reads=PoftConfig, columns=(REFERENCE_LOGP,))
def reference_rewards(rows: Rows, settings: BaseModel, context: RunContext) -> Preparation:
    """Attaches `reference_logp`, the mean of the references' rewards `(1/M) sum_j r_j(x, y)` (Eq. 5 and 6).

    Rows that some reference cannot read are left out for all.

    Args:
        rows: unique rows.
        settings: the block `poft:`.
        context: this process.
    """
    assert isinstance(settings, PoftConfig)

    def attach(lookups: Sequence[Lookup]) -> Prepared:
        unread = np.any([lookup.too_long | lookup.refused for lookup in lookups], axis=0)
        dropped = frozenset(rows.keys[int(index)].as_py() for index in np.flatnonzero(unread))
        rewards = np.stack([lookup.values for lookup in lookups])
        labels = [reference.label for reference in settings.references]
        summary = summarise(labels, rewards[:, ~unread], rows.sources[~unread])
        if context.rank == 0:
            print_summary(summary)
        return Prepared({REFERENCE_LOGP: rewards.mean(axis=0)}, dropped, summary.statistics())

    jobs = tuple(reference_job(reference, rows, settings.include_end_of_turn) for reference in settings.references)
    return Preparation(jobs, attach)


def reference_job(reference: ReferenceConfig, rows: Rows, include_end_of_turn: EndOfTurn = "auto") -> Job:
    """A reference over rows: the mean log-probability per response token, nats."""

    def make(checkpoint: Checkpoint) -> CausalLMScorer:
        scorer = CausalLMScorer(reference, checkpoint, include_end_of_turn)
        scorer.check()
        return scorer

    return Job(reference.source, KIND, reference, rows, make, highest=0.0, scores=reference.scores)


def check_references(settings: BaseModel) -> None:
    """Finds every reference, its tokenizer and its template, before any data is read.

    Raises:
        ValueError: for a reference that cannot be used, with the remedy.
    """
    assert isinstance(settings, PoftConfig)
    cache = ScoreCache(cache_folder(settings.score_cache))
    for reference in settings.references:
        open_job(reference_job(reference, Rows.none(), settings.include_end_of_turn), cache)
