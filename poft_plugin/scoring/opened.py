"""An opened job: its model was found and checked, not loaded; or scores made elsewhere stand in for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from poft_plugin.scoring.cache import Lookup, ScoreCache
from poft_plugin.scoring.checkpoints import MissingCheckpointError, resolve_checkpoint
from poft_plugin.scoring.exchange import ImportedScores, imported_scores, read_score_file
from poft_plugin.scoring.identity import Identity
from poft_plugin.scoring.jobs import Job
from poft_plugin.scoring.scorer import Scorer


@dataclass(frozen=True)
class OpenedJob:
    """A job with what its scores come from.

    Args:
        job: what is to be scored.
        scorer: the model, where it is there.
        imported: scores made elsewhere, where there are some.
    """

    job: Job
    scorer: Scorer | None
    imported: ImportedScores | None

    @property
    def label(self) -> str:
        """The model's name in tables."""
        return self.job.settings.label

    @property
    def title(self) -> str:
        """The model in messages."""
        return f"{self.job.kind} {self.label!r}"

    @property
    def identity(self) -> Identity | None:
        """What the scores depend on; None where a file does not say."""
        if self.scorer is not None:
            return self.scorer.identity
        return self.imported.identity if self.imported else None

    def lookup(self, cache: ScoreCache) -> Lookup:
        """What is known of the job's rows without scoring any; imported scores come first."""
        return self.lookup_of(self.job.rows.keys, cache)

    def lookup_of(self, keys: pa.ChunkedArray, cache: ScoreCache) -> Lookup:
        """The same, of other rows."""
        if self.imported is None:
            assert self.scorer is not None
            return cache.lookup(self.scorer.identity, keys)
        known = self.imported.lookup(keys)
        if self.scorer is None:
            return known
        own, missing = cache.lookup(self.scorer.identity, keys), known.missing
        return Lookup(np.where(missing, own.values, known.values), np.where(missing, own.num_tokens, known.num_tokens))


def open_job(job: Job, cache: ScoreCache) -> OpenedJob:
    """Finds a job's model and what was imported for it, without loading weights.

    Args:
        job: what is to be scored.
        cache: where imported scores are.

    Raises:
        MissingCheckpointError: if neither the model nor imported scores are there.
        ValueError: for a model that cannot be scored with, or a file of scores that cannot be read.
    """
    if job.scores is not None:
        return OpenedJob(job, None, read_score_file(job.scores, job.name, highest=job.highest))
    imported, settings = imported_scores(cache, job.name), job.settings
    assert settings.model is not None
    try:
        checkpoint = resolve_checkpoint(settings.model, settings.revision, cache, what=job.kind)
    except MissingCheckpointError:
        if imported is None:
            raise
        return OpenedJob(job, None, imported)
    scorer = job.make(checkpoint)
    if imported is None or imported.identity is None:
        if imported is not None:
            print(
                f"{job.kind} {settings.label}: imported scores come before the model's own (to forget them, take the "
                f"entry {job.name!r} out of {cache.folder / 'imports.json'})",
                flush=True,
            )
        return OpenedJob(job, scorer, imported)
    _note_difference(job, imported.identity, scorer.identity)
    return OpenedJob(job, scorer, None)


def check_revisions(jobs: Sequence[OpenedJob], cache: ScoreCache, *, update: bool) -> None:
    """Stops where a hub revision has moved since its scores were made.

    Args:
        jobs: opened jobs.
        cache: remembers the commit that each `model@revision` was scored at.
        update: take the new commit (`preprocess`, `score`) instead of stopping (`train`).

    Raises:
        ValueError: naming both commits and the remedy.
    """
    known = cache.read_note("revisions")
    fresh: dict[str, str] = {}
    for opened in jobs:
        scorer = opened.scorer
        if scorer is None or scorer.checkpoint.commit is None:
            continue
        model, revision = opened.job.settings.model, opened.job.settings.revision or "main"
        address, commit = f"{model}@{revision}", scorer.checkpoint.commit
        before = known.get(address, commit)
        if before != commit and not update:
            raise ValueError(
                f"{opened.job.kind} {model}: revision {revision!r} was {before} when it was scored and is {commit} "
                f"now. Pin it with `revision: {before}`, or score with the new one: `axolotl poft score`"
            )
        fresh[address] = commit
    if fresh.items() - known.items():
        cache.update_note("revisions", fresh)


def _note_difference(job: Job, imported: Identity, here: Identity) -> None:
    """Says why imported scores do not serve: the model that made them is not the one that is here."""
    differing = sorted(k for k in here.fields if here.fields[k] != imported.fields.get(k))
    if differing:
        print(
            f"{job.kind} {job.settings.label}: its imported scores were made with other settings "
            f"({', '.join(differing)}) than the model here has; they are not used",
            flush=True,
        )
