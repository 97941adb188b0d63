"""What is to be scored, said once: a job is one model over some rows, and everything that scores loops over jobs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.scoring.cache import Lookup
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.scorer import Scorer

Scope = Literal["all", "training", "kept"]
"""Which rows a preprocessor sees, and so when it runs:

- `all`: every training and evaluation row once, first of all;
- `training`: the training rows as they are, with the columns of the first stage (grading);
- `kept`: once each, the training rows that filters have left, and the evaluation rows.
"""

SCOPES: tuple[Scope, ...] = ("all", "training", "kept")


class ModelSettings(Protocol):
    """A config entry that names a model to score with."""

    @property
    def label(self) -> str:
        """Its name in tables."""
        ...

    @property
    def source(self) -> str:
        """What stands for the model in files of scores that were made before jobs had names."""
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
class Job:
    """What one model is to score.

    Args:
        name: unique in the run; stands for the job in exported and imported files and in the cache's notes.
        kind: what messages call the model: `reference`, `reward model`.
        settings: the model's config entry.
        rows: unique rows, as the scorer reads them.
        make: the scorer of the resolved checkpoint, not loaded; it refuses what cannot be scored with. Called late: a
            job can be listed where its model is not.
        highest: no score can be above it (0 for a log-probability); None where any number is possible.
        scores: a parquet file of scores made elsewhere, in the model's stead.
    """

    name: str
    kind: str
    settings: ModelSettings
    rows: Rows
    make: Callable[[Checkpoint], Scorer]
    highest: float | None = None
    scores: str | None = None

    def over(self, rows: Rows) -> "Job":
        """The same model over other rows."""
        return replace(self, rows=rows)


@dataclass(frozen=True)
class Preparation:
    """A preprocessor's answer where models have to score first.

    Args:
        jobs: what is to be scored.
        attach: makes columns of the scores, one `Lookup` per job, aligned with the job's rows. It may close over
            whatever was made for the jobs, row keys for instance.
    """

    jobs: tuple[Job, ...]
    attach: Callable[[Sequence[Lookup]], Prepared]


@dataclass(frozen=True)
class Preprocessor:
    """Attaches columns to rows before training; made by the decorator `preprocessor`.

    Args:
        prepare: `prepare(rows, settings, context)` gives the columns at once, or the jobs that they come from.
        reads: the class of the config block that it reads, or a base of it.
        scope: which rows it gets.
        columns: columns that it attaches, as far as row filters could ask for them.
        start_policy: whether its jobs score with the policy's start weights; the policy is then trained as it is
            scored, without dropout.
    """

    prepare: Callable[[Rows, Any, RunContext], Prepared | Preparation]
    reads: type[BaseModel]
    scope: Scope = "all"
    columns: tuple[str, ...] = ()
    start_policy: bool = False

    def __call__(self, rows: Rows, settings: BaseModel, context: RunContext) -> Prepared | Preparation:
        """The columns for these rows, or the jobs that they come from."""
        assert isinstance(settings, self.reads), (type(settings), self.reads)
        return self.prepare(rows, settings, context)


def preprocessor(
    *, reads: type[BaseModel], scope: Scope = "all", columns: tuple[str, ...] = (), start_policy: bool = False
) -> Callable[[Callable[[Rows, Any, RunContext], Prepared | Preparation]], Preprocessor]:
    """Declares a function as a preprocessor: what block it reads, and which rows it gets.

    Args:
        reads: as `Preprocessor`.
        scope: as `Preprocessor`.
        columns: as `Preprocessor`.
        start_policy: as `Preprocessor`.

    Raises:
        ValueError: for a scope that there is not.

    Examples:
        >>> @preprocessor(reads=BaseModel)
        ... def nothing(rows, settings, context):
        ...     return Prepared({})
        >>> nothing.scope
        'all'
    """
    if scope not in SCOPES:
        raise ValueError(f"preprocessor: scope: {scope!r} is none of {', '.join(SCOPES)}")

    def declared(prepare: Callable[[Rows, Any, RunContext], Prepared | Preparation]) -> Preprocessor:
        return Preprocessor(prepare, reads, scope, columns, start_policy)

    return declared


def check_names(jobs: Sequence[Job]) -> None:
    """Refuses two jobs of one name.

    Raises:
        ValueError: naming it.
    """
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.name, job)
        if other is not job:
            raise ValueError(
                f"two jobs are called {job.name!r}: a {other.kind} ({other.settings.label}) and a {job.kind} "
                f"({job.settings.label}); the name of each has to be its own"
            )
