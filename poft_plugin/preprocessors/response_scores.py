"""Scores of responses, and the order that follows from them: a reward model's, or what came with the data."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from poft_plugin.config import DeftConfig, RankingConfig, RewardModelConfig
from poft_plugin.data.columns import CONVERSATION, DROPPABLE, ORDER, RANKS, ROW_KEY, ROW_NUMBER, SCORES, SOURCE
from poft_plugin.data.groups import ragged
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.data.ranked import RankedSample, dense_ranks
from poft_plugin.data.rows import dump_conversation, row_key
from poft_plugin.scorers.reward_model import RewardModelScorer
from poft_plugin.scoring.cache import ScoreCache, cache_folder
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.sources import Source, check_revisions, open_source, score_all

KIND = "reward model"


def response_scores(rows: Rows, settings: BaseModel, run: RunContext) -> Prepared:
    """Attaches `ranks`, and where anything depends on them `scores` (and `order`), one number per response.

    Args:
        rows: unique ranked rows. Evaluation rows are graded by nothing: scores that do not make the order are not
            asked for there.
        settings: the block `deft:`.
        run: this process; scoring is shared among all, without collectives.

    Raises:
        ValueError: for a reward model that cannot be used, responses that cannot be scored, or scores that are missing
            where nothing may be scored.
    """
    assert isinstance(settings, RankingConfig)
    samples = [rows.sample(index) for index in range(len(rows))]
    by_label = [list(sample.ranks) for sample in samples]
    # `axolotl evaluate` grades nothing, not even the training rows
    needed = rows_to_score(rows, settings) & (run.purpose != "evaluate" or _order_needs_scores(settings))
    wanted = np.flatnonzero(needed)
    if not len(wanted):
        return Prepared({RANKS: ragged(by_label)})
    asked, subset = [samples[index] for index in wanted], Rows(rows.table.take(pa.array(wanted)), {})
    if settings.reward_model is None:
        found, dropped = _scores_of_the_data(asked, subset), frozenset[str]()
    else:
        found, dropped = _scores_of_the_model(asked, subset, settings, run)
    scores = np.full(len(rows), None, dtype=object)
    scores[wanted] = ragged(found)
    if settings.rank_by == "label":
        return Prepared({SCORES: scores, RANKS: ragged(by_label)}, dropped)
    order = [sorted(range(len(row)), key=lambda index, row=row: -row[index]) for row in found]  # type: ignore[misc]
    return Prepared(
        {SCORES: scores, RANKS: ragged([list(dense_ranks(row)) for row in found]), ORDER: ragged(order)}, dropped
    )


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


def open_reward_model(settings: RewardModelConfig, cache: ScoreCache) -> Source:
    """Finds a reward model, and checks its head, tokenizer and template, without loading weights."""

    def make(checkpoint: Checkpoint) -> RewardModelScorer:
        scorer = RewardModelScorer(settings, checkpoint)
        scorer.check()
        return scorer

    return open_source(settings, make, cache, kind=KIND)


def response_rows(samples: Sequence[RankedSample], rows: Rows) -> tuple[Rows, list[list[str]]]:
    """Every response after its prompt as a row of its own, known by its content.

    Args:
        samples: the rows' samples.
        rows: where they come from, for messages.

    Returns:
        Unique rows, and the key of each sample's each response.
    """
    keys: list[list[str]] = []
    texts: dict[str, tuple[str, int]] = {}
    strict, droppable = set[str](), rows.droppable
    for number, sample in enumerate(samples):
        conversations = [sample.conversation(index) for index in range(len(sample.responses))]
        keys.append([row_key(conversation) for conversation in conversations])
        for key, conversation in zip(keys[-1], conversations, strict=True):
            texts.setdefault(key, (dump_conversation(conversation), number))
            strict.update([key] if not droppable[number] else [])
    first = pa.array([number for _, number in texts.values()], pa.int64())
    table = pa.table(
        {
            ROW_KEY: pa.array(list(texts), pa.string()),
            CONVERSATION: pa.array([text for text, _ in texts.values()], pa.string()),
            SOURCE: rows.table[SOURCE].take(first),
            ROW_NUMBER: rows.table[ROW_NUMBER].take(first),
            DROPPABLE: pa.array([key not in strict for key in texts], pa.bool_()),
        }
    )
    return Rows(table, {}), keys


def _order_needs_scores(settings: RankingConfig) -> bool:
    return settings.rank_by == "reward" or settings.pro_temperature == "reward"


def _open_if_needed(settings: RankingConfig) -> None:
    if settings.reward_model is not None and needs_scores(settings):
        open_reward_model(settings.reward_model, ScoreCache(cache_folder(settings.score_cache)))


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
    samples: Sequence[RankedSample], rows: Rows, settings: RankingConfig, run: RunContext
) -> tuple[list[list[float]], frozenset[str]]:
    """Scores, and the keys of rows that are to be left out, since the model cannot read them."""
    assert settings.reward_model is not None
    cache = ScoreCache(cache_folder(settings.score_cache))
    source = open_reward_model(settings.reward_model, cache)
    if run.rank == 0:
        check_revisions([source], cache, update=run.purpose in ("preprocess", "score"))
    responses, keys = response_rows(samples, rows)
    (lookup,) = score_all([source], responses, cache, settings=settings, run=run)
    reward_of = dict(zip(responses.keys.to_pylist(), lookup.rewards.tolist(), strict=True))
    refused = set(responses.keys.filter(pa.array(lookup.refused)).to_pylist())
    scores = [[reward_of[key] for key in row] for row in keys]
    dropped = {index: rows.keys[index].as_py() for index, row in enumerate(keys) if refused & {*row}}
    for index, row in enumerate(scores):
        if index not in dropped and not np.isfinite(row).all():
            raise ValueError(f"{rows.where(index)}: the {KIND} {source.label!r} gives the scores {row}; not finite")
    if dropped and run.rank == 0:
        print(
            f"{len(dropped)} of {len(rows)} rows left out (on_unusable_row: drop), which the {KIND} {source.label!r} "
            f"cannot read; the first: {rows.where(min(dropped))}",
            flush=True,
        )
    return scores, frozenset(dropped.values())
