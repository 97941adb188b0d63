"""A stage: the preprocessors of one scope over their rows. What they ask to be scored is known before anything is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from poft_plugin.config import ScoringBlock
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.scoring.cache import ScoreCache, cache_folder
from poft_plugin.scoring.engines import Engine, score_jobs
from poft_plugin.scoring.jobs import Job, Preparation, Preprocessor, check_names
from poft_plugin.scoring.opened import OpenedJob, open_job


@dataclass(frozen=True)
class AskedJob:
    """A job with the block that asks for it.

    Args:
        job: what is to be scored.
        settings: where the cache is, how many tokens a batch has, what may be scored when.
    """

    job: Job
    settings: ScoringBlock

    @property
    def cache(self) -> ScoreCache:
        """Where its scores are."""
        return ScoreCache(cache_folder(self.settings.score_cache))

    def open(self) -> OpenedJob:
        """As `open_job`."""
        return open_job(self.job, self.cache)


@dataclass(frozen=True)
class Stage:
    """What the preprocessors of one scope answered.

    Args:
        answers: columns, or jobs that they come from, each with the block that was read.
        context: this process.
    """

    answers: tuple[tuple[Prepared | Preparation, BaseModel], ...]
    context: RunContext

    @classmethod
    def of(cls, asked: Iterable[tuple[Preprocessor, BaseModel]], rows: Rows, context: RunContext) -> "Stage":
        """Asks preprocessors for their columns or jobs.

        Args:
            asked: preprocessors, each with the block that it reads.
            rows: what the stage's scope says.
            context: this process.

        Raises:
            ValueError: for two jobs of one name, or as the preprocessors.
        """
        stage = cls(tuple((each(rows, settings, context), settings) for each, settings in asked), context)
        check_names([asked.job for asked in stage.jobs])
        return stage

    @property
    def jobs(self) -> Sequence[AskedJob]:
        """What is to be scored before columns can be attached."""
        return [AskedJob(job, _scoring(settings)) for answer, settings in self.answers for job in _jobs(answer)]

    def prepared(self, engine: Engine | None = None) -> Prepared:
        """The columns; what the cache lacks is scored now.

        Raises:
            ValueError: as `score_jobs`, or as the preprocessors.
        """
        return Prepared.merged([self._columns(answer, settings, engine) for answer, settings in self.answers])

    def _columns(self, answer: Prepared | Preparation, settings: BaseModel, engine: Engine | None) -> Prepared:
        if isinstance(answer, Prepared):
            return answer
        return answer.attach(score_jobs(answer.jobs, _scoring(settings), self.context, engine))


def _jobs(answer: Prepared | Preparation) -> Sequence[Job]:
    return answer.jobs if isinstance(answer, Preparation) else ()


def _scoring(settings: BaseModel) -> ScoringBlock:
    """The keys about scoring; the defaults where a block that asks for jobs has none."""
    return settings if isinstance(settings, ScoringBlock) else ScoringBlock.model_validate({})
