"""The three stages of a run's rows: all of them; the training rows, graded; what filters left.

Everything that a run does with rows walks through them, and each is made when it is first asked for. A stage's jobs are
known before anything is scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

from poft_plugin.data.preparation import Columns, Prepared, Rows, RunContext
from poft_plugin.hosts.axolotl.host_rows import HostRows, join, load_host_rows, selected, unique_rows
from poft_plugin.hosts.axolotl.ranked_datasets import not_in_evaluation
from poft_plugin.hosts.axolotl.run import MethodRun, later_column
from poft_plugin.plugins import later_columns, registry
from poft_plugin.scoring.checkpoints import MissingCheckpointError
from poft_plugin.scoring.engines import Engine
from poft_plugin.scoring.stages import Stage

LOG = get_logger("axolotl.poft_plugin")  # the host shows messages of its own namespace only

FEW_ROWS = 50
"""Training rows below which filters have hardly left what was meant."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage as far as it is known before everything is scored.

    Args:
        stage: its jobs.
        at_most: its rows are counted before grades and filters.
    """

    stage: Stage
    at_most: bool = False


class RunStages:
    """The stages of one run.

    Args:
        cfg: the host's config.
        run: the method.
        context: this process.
        engine: how jobs are done; None: by the processes of this launch.
    """

    def __init__(self, cfg: DictDefault, run: MethodRun, context: RunContext, engine: Engine | None = None) -> None:
        self._cfg, self._run, self._context, self._engine = cfg, run, context, engine

    @cached_property
    def loaded(self) -> list[HostRows]:
        """The training rows, and the evaluation rows where there are some, as the host prepares them."""
        train, evaluation, _ = load_host_rows(self._cfg)
        if evaluation is None:
            return [train]
        if self._run.method.ranked:
            train = selected(train, not_in_evaluation(train.rows, evaluation.rows), "that are evaluation rows")
        return [train, evaluation]

    @cached_property
    def rows(self) -> Rows:
        """Every row of both sets once."""
        return unique_rows(self.loaded[0], *self.loaded[1:])

    @cached_property
    def first(self) -> Stage:
        """Preprocessors of all rows."""
        return Stage.of(self._run.preprocessors("all"), self.rows, self._context)

    @cached_property
    def second(self) -> Stage:
        """Preprocessors of the training rows together; the first stage is over."""
        return Stage.of(self._run.preprocessors("training"), self._joined[0][0].rows, self._context)

    @cached_property
    def graded(self) -> list[HostRows]:
        """All training rows with their columns, before any is left out, and the evaluation rows with theirs."""
        train, *others = self._joined[0]
        return [train.attach(self._second_prepared.columns), *others]

    @cached_property
    def third(self) -> Stage:
        """Preprocessors of what filters left, and of the evaluation rows."""
        return Stage.of(self._run.preprocessors("kept"), self._kept[1], self._context)

    @cached_property
    def kept(self) -> tuple[list[HostRows], Prepared]:
        """The rows to train and to evaluate on with all columns, and what preprocessors made besides."""
        parts, unique = self._kept
        prepared = self.third.prepared(self._engine)
        made = Prepared.merged([self._joined[1], self._second_prepared, prepared])
        return [join(part, unique, prepared) for part in parts], made

    @property
    def scored_by(self) -> dict[str, str]:
        """For columns of graded rows that hold one model's scores: the name of its job."""
        return dict(self._joined[1].scored_by)

    def planned(self) -> Iterator[PlannedStage]:
        """The stages in order; a stage that is behind missing scores as far as it can be known, or not at all."""
        yield PlannedStage(self.first)
        complete = is_complete(self.first)
        if complete:
            yield PlannedStage(self.second)
            complete = is_complete(self.second)
        yield PlannedStage(self.third) if complete else PlannedStage(self.third_at_most, bool(self._run.filters))

    @cached_property
    def third_at_most(self) -> Stage:
        """The third stage, were no row left out."""
        return Stage.of(self._run.preprocessors("kept"), self.rows, self._context)

    def importable(self) -> list[Stage]:
        """Stages over every row that scores may be there for: evaluation rows may have some that nothing asks for."""
        everything = replace(self.rows, in_training=None)
        return [Stage.of(self._run.preprocessors(scope), everything, self._context) for scope in ("all", "kept")]

    @cached_property
    def _joined(self) -> tuple[list[HostRows], Prepared]:
        prepared = self.first.prepared(self._engine)
        return [join(part, self.rows, prepared) for part in self.loaded], prepared

    @cached_property
    def _second_prepared(self) -> Prepared:
        return self.second.prepared(self._engine)

    @cached_property
    def _kept(self) -> tuple[list[HostRows], Rows]:
        train, *others = self.graded
        parts = [_filtered(self._run, train), *others]
        return parts, unique_rows(parts[0], *parts[1:])


def is_complete(stage: Stage) -> bool:
    """Whether nothing is left to score; it is not where a model is not there."""
    try:
        return not any(asked.open().lookup(asked.cache).missing.any() for asked in stage.jobs)
    except MissingCheckpointError:
        return False


class _Attached(dict[str, np.ndarray]):
    """Columns as a filter sees them; one that comes later is an error that says so."""

    def __init__(self, columns: Columns, later: dict[str, str], name: str) -> None:
        super().__init__(columns)
        self._later, self._name = later, name

    def __missing__(self, column: str) -> np.ndarray:
        if column in self._later:
            raise ValueError(later_column(self._name, column, self._later[column]))
        raise KeyError(column)


def _filtered(run: MethodRun, part: HostRows) -> HostRows:
    later = later_columns(run.method)
    for name, settings in run.filters:
        rows = replace(part.rows, attached=_Attached(part.rows.attached, later, name))
        keep = registry().row_filters[name](rows, **settings)
        part = selected(part, np.asarray(keep, dtype=bool), f"by the filter {name}")
    if run.filters and len(part.rows) < FEW_ROWS:
        LOG.warning(f"only {len(part.rows)} rows are left to train on by {', '.join(name for name, _ in run.filters)}")
    return part
