"""Scores of responses, and the order that follows from them: a reward model's, or what came with the data."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from poft_plugin.config import DeftConfig, RankingConfig, RewardModelConfig
from poft_plugin.data.columns import CONVERSATION, DROPPABLE, ORDER, PART, RANKS, ROW_KEY, ROW_NUMBER, SCORES, SOURCE
from poft_plugin.data.groups import ragged
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.data.ranked import RankedSample, dense_ranks
from poft_plugin.data.rows import dump_conversation, row_key
from poft_plugin.scorers.reward_model import RewardModelScorer
from poft_plugin.scoring.cache import Lookup, ScoreCache, cache_folder
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.jobs import Job, Preparation, preprocessor
from poft_plugin.scoring.opened import open_job

KIND = "reward model"


@preprocessor(reads=RankingConfig, columns=(SCORES, RANKS, ORDER))
def response_scores(rows: Rows, settings: BaseModel, context: RunContext) -> Prepared | Preparation:
    """Attaches `ranks`, and where anything depends on them `scores` (and `order`), one number per response.

    Args:
        rows: unique ranked rows. Evaluation rows are graded by nothing: scores that do not make the order are not
            asked for there.
        settings: the block `deft:`.
        context: this process.

    Raises:
        ValueError: for rows without scores, where they need some and no reward model is named; and, of `attach`, for a
            score that is not finite.
    """
    assert isinstance(settings, RankingConfig)
    # `axolotl evaluate` grades nothing, not even the training rows
    needed = rows_to_score(rows, settings) & (context.purpose != "evaluate" or _order_needs_scores(settings))
    wanted = np.flatnonzero(needed)
    samples = [rows.sample(index) for index in range(len(rows))]
    if not len(wanted):
        return Prepared({RANKS: ragged([list(sample.ranks) for sample in samples])})
    asked, subset = [samples[index] for index in wanted], Rows(rows.table.take(pa.array(wanted)), {})
    if settings.reward_model is None:
        return _in_order(samples, wanted, _scores_of_the_data(asked, subset), settings)
    responses, keys = response_rows(asked, subset)
    job = reward_model_job(settings.reward_model, responses)

    def attach(lookups: Sequence[Lookup]) -> Prepared:
        (lookup,) = lookups
        found, dropped = _scores_of_the_model(subset, responses, keys, lookup)
        if dropped and context.rank == 0:
            _report_dropped(subset, dropped, job)
        _check_finite(found, dropped, subset, job)
        left_out = frozenset(subset.keys[index].as_py() for index in dropped)
        return replace(_in_order(samples, wanted, found, settings), dropped=left_out, scored_by={SCORES: job.name})

    return Preparation((job,), attach)


def rows_to_score(rows: Rows, settings: RankingConfig) -> np.ndarray:
    """`(n,)` booleans: the rows whose responses need scores; the training rows alone unless scores make the order."""
    if _order_needs_scores(settings):
        return np.ones(len(rows), dtype=bool)
    return rows.training & needs_scores(settings)


def needs_scores(settings: RankingConfig) -> bool:
    """Whether anything depends on scores: the order, the temperature, levels, or the distribution reward."""
    return _order_needs_scores(settings) or (isinstance(settings, DeftConfig) and settings.grades)


def check_ranking(settings: BaseModel) -> None:
    """Finds the reward model of plain `pro` or `rrhf`, before any data is read.

    Raises:
        ValueError: for a reward model that nothing asks for, or that cannot be used.
    """
    assert isinstance(settings, RankingConfig)
    if settings.reward_model is not None and not needs_scores(settings):
        raise ValueError(
            "deft.reward_model: nothing reads its scores here; set `rank_by: reward` (or `pro_temperature: reward`), "
            "or remove it"
        )
    _open_if_needed(settings)


def check_deft(settings: BaseModel) -> None:
    """Finds the reward model of an `rl: deft_...`, before any data is read.

    Raises:
        ValueError: for an omega that is not known, or a reward model that cannot be used.
    """
    assert isinstance(settings, DeftConfig)
    if settings.omega is None:
        raise ValueError(
            "deft.omega: missing; the paper names it for deft_dpo (2.5e-6) and deft_pro (2.5e-5) alone. Set it: the "
            "log's deft/weighted_distribution_reward says how much of the loss it is (0 turns it off)"
        )
    _open_if_needed(settings)


def reward_model_job(settings: RewardModelConfig, responses: Rows) -> Job:
    """A reward model over responses, each after its prompt: the logit of its one label."""

    def make(checkpoint: Checkpoint) -> RewardModelScorer:
        scorer = RewardModelScorer(settings, checkpoint)
        scorer.check()
        return scorer

    return Job(settings.source, KIND, settings, responses, make)


def response_rows(samples: Sequence[RankedSample], rows: Rows) -> tuple[Rows, list[list[str]]]:
    """Every response after its prompt as a row of its own, known by its content.

    Args:
        samples: the rows' samples.
        rows: where they come from, for messages.

    Returns:
        Unique rows, and the key of each sample's each response.
    """
    keys: list[list[str]] = []
    texts: dict[str, tuple[str, int, str]] = {}
    strict, droppable = set[str](), rows.droppable
    for number, sample in enumerate(samples):
        conversations = [sample.conversation(index) for index in range(len(sample.responses))]
        keys.append([row_key(conversation) for conversation in conversations])
        for key, conversation, part in zip(keys[-1], conversations, _parts(len(keys[-1])), strict=True):
            texts.setdefault(key, (dump_conversation(conversation), number, part))
            strict.update([key] if not droppable[number] else [])
    first = pa.array([number for _, number, _ in texts.values()], pa.int64())
    table = pa.table(
        {
            ROW_KEY: pa.array(list(texts), pa.string()),
            CONVERSATION: pa.array([text for text, _, _ in texts.values()], pa.string()),
            PART: pa.array([part for _, _, part in texts.values()], pa.string()),
            SOURCE: rows.table[SOURCE].take(first),
            ROW_NUMBER: rows.table[ROW_NUMBER].take(first),
            DROPPABLE: pa.array([key not in strict for key in texts], pa.bool_()),
        }
    )
    return Rows(table, {}), keys


def _parts(count: int) -> list[str]:
    return ["chosen", "rejected"] if count == 2 else [f"response {number + 1} of {count}" for number in range(count)]


def _order_needs_scores(settings: RankingConfig) -> bool:
    return settings.rank_by == "reward" or settings.pro_temperature == "reward"


def _open_if_needed(settings: RankingConfig) -> None:
    if settings.reward_model is not None and needs_scores(settings):
        open_job(reward_model_job(settings.reward_model, Rows.none()), ScoreCache(cache_folder(settings.score_cache)))


def _in_order(
    samples: Sequence[RankedSample], wanted: np.ndarray, found: list[list[float]], settings: RankingConfig
) -> Prepared:
    """The columns that follow from the scores of the rows that are wanted."""
    scores = np.full(len(samples), None, dtype=object)
    scores[wanted] = ragged(found)
    if settings.rank_by == "label":
        return Prepared({SCORES: scores, RANKS: ragged([list(sample.ranks) for sample in samples])})
    order = [sorted(range(len(row)), key=lambda index, row=row: -row[index]) for row in found]  # type: ignore[misc]
    return Prepared({SCORES: scores, RANKS: ragged([list(dense_ranks(row)) for row in found]), ORDER: ragged(order)})


def _scores_of_the_data(samples: Sequence[RankedSample], rows: Rows) -> list[list[float]]:
    without = [index for index, sample in enumerate(samples) if sample.scores is None]
    if without:
        raise ValueError(
            f"{rows.where(without[0])}: no scores in the row ({len(without)} such rows), and no `deft.reward_model` to "
            "make them. Name a reward model, or the scores (`field_scores: scores`, or `field_scores: [score_chosen, "
            "score_rejected]`), or set `train_on: all` and `omega: 0`"
        )
    return [list(sample.scores or ()) for sample in samples]


def _scores_of_the_model(
    rows: Rows, responses: Rows, keys: list[list[str]], lookup: Lookup
) -> tuple[list[list[float]], list[int]]:
    """Scores, and which rows are to be left out, since the model cannot read them."""
    score_of = dict(zip(responses.keys.to_pylist(), lookup.values.tolist(), strict=True))
    refused = set(responses.keys.filter(pa.array(lookup.refused)).to_pylist())
    return [[score_of[key] for key in row] for row in keys], [i for i, row in enumerate(keys) if refused & {*row}]


def _check_finite(found: list[list[float]], dropped: list[int], rows: Rows, job: Job) -> None:
    for index, scores in enumerate(found):
        if index not in dropped and not np.isfinite(scores).all():
            raise ValueError(
                f"{rows.where(index)}: the {KIND} {job.settings.label!r} gives the scores {scores}; not finite"
            )


def _report_dropped(rows: Rows, dropped: list[int], job: Job) -> None:
    print(
        f"{len(dropped)} of {len(rows)} rows left out (on_unusable_row: drop), which the {KIND} "
        f"{job.settings.label!r} cannot read; the first: {rows.where(dropped[0])}",
        flush=True,
    )
