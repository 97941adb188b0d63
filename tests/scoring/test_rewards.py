"""Scores of responses: whose they are, when they are asked for, and the order that follows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny

from poft_plugin.config import DeftConfig, RankingConfig
from poft_plugin.data.columns import DROPPABLE, ORDER, RANKS, SCORES
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.data.ranked import RankedSample, ranked_list
from poft_plugin.data.rows import RowError, Turn, load_conversation
from poft_plugin.preprocessors.response_scores import (
    check_deft,
    check_ranking,
    needs_scores,
    response_rows,
    response_scores,
    reward_model_job,
    rows_to_score,
)
from poft_plugin.scorers.reward_model import RewardModelScorer
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.opened import open_job
from poft_plugin.scoring.plan import plan_job
from scoring.ranked_support import plain_score, ranked
from scoring.support import prepared

TRAIN = RunContext("train")
EVALUATE = RunContext("evaluate")
PROMPT = (Turn("user", "alpha?"),)


def sample(*scores: float, prompt: str = "alpha?") -> RankedSample:
    """Responses `one`, `two`, ... in the order of the data, whatever their scores."""
    texts = tuple("one two three four five".split()[: len(scores)])
    return RankedSample((Turn("user", prompt),), texts, tuple(range(len(scores))), tuple(scores))


SAMPLES = [sample(0.5, 0.75), sample(-1.0, 2.0, prompt="beta?"), sample(0.25, 1.0, 0.25, 1.0)]
DEFT = DeftConfig(top_percent=50)


def lists(values: Any) -> list[list[float]]:
    return [list(row) for row in values]


@pytest.fixture(scope="module")
def grader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.reward_model(tmp_path_factory.mktemp("grader"))


def by_model(grader: Path, cache: Path, **settings: Any) -> DeftConfig:
    return DeftConfig.model_validate({"reward_model": {"model": str(grader)}, "score_cache": str(cache), **settings})


def test_scores_of_the_data_in_the_order_of_the_labels() -> None:
    made = prepared(response_scores, ranked(SAMPLES), DEFT, TRAIN)
    assert made.columns.keys() == {SCORES, RANKS}
    assert lists(made.columns[SCORES]) == [list(s.scores or ()) for s in SAMPLES]
    assert lists(made.columns[RANKS]) == [[0, 1], [0, 1], [0, 1, 2, 3]]


def test_scores_may_make_the_order() -> None:
    """Highest first, equal ones in the order of the data and of one rank; columns stay in the order of the data."""
    made = prepared(response_scores, ranked(SAMPLES), DeftConfig(rank_by="reward"), TRAIN)
    assert lists(made.columns[ORDER]) == [[1, 0], [1, 0], [1, 3, 0, 2]]
    assert lists(made.columns[RANKS]) == [[1, 0], [1, 0], [1, 0, 1, 0]]
    assert lists(made.columns[SCORES]) == [list(s.scores or ()) for s in SAMPLES]


@pytest.mark.parametrize(
    ("settings", "asked", "asked_in_evaluation"),
    [
        (RankingConfig(), False, False),
        (RankingConfig(rank_by="reward"), True, True),
        (RankingConfig(pro_temperature="reward"), True, True),
        (DeftConfig(), True, False),
        (DeftConfig(omega=0), True, False),
        (DeftConfig(train_on="all", omega=0.5), True, False),
        (DeftConfig(train_on="all", omega=0), False, False),
        (DeftConfig(train_on="all", omega=0, rank_by="reward"), True, True),
        (DeftConfig(pro_temperature="reward"), True, True),
    ],
)
def test_when_scores_are_asked_for(settings: RankingConfig, asked: bool, asked_in_evaluation: bool) -> None:
    assert needs_scores(settings) is asked
    rows = ranked(SAMPLES)
    assert rows_to_score(rows, settings).tolist() == [asked] * 3
    evaluated = replace(rows, in_training=np.zeros(3, dtype=bool))
    for given, expected in ((rows, asked), (evaluated, asked_in_evaluation)):
        assert (SCORES in prepared(response_scores, given, settings, TRAIN).columns) is expected
    bare = ranked([*SAMPLES, RankedSample(PROMPT, ("b", "a"), (0, 1))])
    if asked:
        with pytest.raises(ValueError, match=r"data\.jsonl row 3 \(key .*no scores in the row \(1 such rows\)"):
            prepared(response_scores, bare, settings, TRAIN)


def test_evaluation_rows_need_no_scores() -> None:
    """Beside training rows that have some: they get none, unless scores make the order."""
    bare = RankedSample(PROMPT, ("b", "a"), (0, 1))
    rows = replace(ranked([*SAMPLES, bare]), in_training=np.array([True, False, True, False]))
    found = prepared(response_scores, rows, DEFT, TRAIN).columns
    assert found[SCORES].tolist() == [[0.5, 0.75], None, [0.25, 1.0, 0.25, 1.0], None]
    assert lists(found[RANKS]) == [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1]]
    with pytest.raises(ValueError, match=r"row 3 .*no scores in the row \(1 such rows\)"):
        prepared(response_scores, rows, DeftConfig(rank_by="reward"), TRAIN)


def test_a_model_scores_training_rows_alone(grader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = replace(ranked(SAMPLES), in_training=np.array([True, False, False]))
    columns = prepared(response_scores, rows, by_model(grader, tmp_path), TRAIN).columns
    assert "0 rows cached, 2 to score" in capsys.readouterr().out
    assert [row is None for row in columns[SCORES]] == [False, True, True]
    prepared(response_scores, rows, by_model(grader, tmp_path, pro_temperature="reward"), TRAIN)
    assert "2 rows cached, 4 to score" in capsys.readouterr().out


def with_system(sample: RankedSample) -> RankedSample:
    """The reward model's template refuses system turns."""
    return replace(sample, prompt=(Turn("system", "be"), *sample.prompt))


def droppable(samples: list[RankedSample], *flags: bool) -> Rows:
    rows = ranked(samples)
    return replace(rows, table=rows.table.append_column(DROPPABLE, pa.array(flags)))


def test_rows_that_the_reward_model_refuses_are_left_out_where_asked(
    grader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are noted in the cache, and named again wherever a data set does not leave such rows out."""
    samples, settings = [SAMPLES[0], with_system(SAMPLES[1])], by_model(grader, tmp_path)
    refusal = r"data\.jsonl row 1 .*refuses the turns \['system', 'user', 'assistant'\].*\(2 of 4 rows cannot be used\)"
    with pytest.raises(RowError, match=refusal):
        prepared(response_scores, ranked(samples), settings, TRAIN)
    for said in ("0 rows cached, 4 to score", "4 rows cached, 0 to score"):
        made = prepared(response_scores, droppable(samples, True, True), settings, TRAIN)
        assert made.dropped == {samples[1].key}
        shown = capsys.readouterr().out
        assert said in shown
        assert "1 of 2 rows left out (on_unusable_row: drop), which the reward model" in shown
    with pytest.raises(RowError, match=r"data\.jsonl row 1 .*\(2 of 2 rows cannot be used\)"):
        prepared(response_scores, droppable(samples, True, False), settings, TRAIN)


def test_the_plan_knows_rows_that_are_left_out(grader: Path, tmp_path: Path) -> None:
    settings, cache = by_model(grader, tmp_path), ScoreCache(tmp_path)
    assert settings.reward_model is not None
    rows = droppable([SAMPLES[0], with_system(SAMPLES[1])], True, True)
    responses, _ = response_rows([rows.sample(0), rows.sample(1)], rows)
    for count in (2, 0):
        plan, _ = plan_job(open_job(reward_model_job(settings.reward_model, responses), cache), cache)
        assert (plan.rows, plan.cached, plan.to_score) == (4, 2 - count, count)
        prepared(response_scores, rows, settings, TRAIN)
    strict = ranked([with_system(SAMPLES[1])])
    refused, _ = response_rows([strict.sample(0)], strict)
    with pytest.raises(RowError, match="refuses the turns"):
        plan_job(open_job(reward_model_job(settings.reward_model, refused), cache), cache)


def test_a_model_scores_each_response_once(
    grader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scores replace the data's; a response after the same prompt is one row, wherever it comes."""
    shared = RankedSample(PROMPT, ("two", "six"), (0, 1))
    rows = ranked([*SAMPLES, shared])
    made = prepared(response_scores, rows, by_model(grader, tmp_path), TRAIN)
    assert "reward model grader0: 0 rows cached, 7 to score" in capsys.readouterr().out.replace(grader.name, "grader0")
    for index, scores in enumerate(lists(made.columns[SCORES])):
        found = rows.sample(index)
        expected = [plain_score(grader, found.conversation(number)) for number in range(len(found.responses))]
        assert scores == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert made.columns[SCORES][3][0] == made.columns[SCORES][0][1]
    monkeypatch.setattr(RewardModelScorer, "load", lambda *_: pytest.fail("it was loaded"))
    again = prepared(response_scores, rows, by_model(grader, tmp_path, rank_by="reward"), TRAIN)
    assert lists(again.columns[SCORES]) == lists(made.columns[SCORES])
    for order, scores in zip(again.columns[ORDER], again.columns[SCORES], strict=True):
        assert [scores[position] for position in order] == sorted(scores, reverse=True)


def test_missing_scores(grader: Path, tmp_path: Path) -> None:
    settings = by_model(grader, tmp_path, rank_by="reward", missing_scores="error")
    with pytest.raises(
        ValueError, match=r"reward model '.*': 7 of 7 rows have no cached score \(missing_scores: error"
    ):
        prepared(response_scores, ranked([*SAMPLES[:2], sample(1, 2, 3, prompt="gamma?")]), settings, TRAIN)
    with pytest.raises(ValueError, match=r"8 rows have no cached score \(`axolotl evaluate` scores nothing\)"):
        prepared(response_scores, ranked([*SAMPLES[:2], sample(1, 2, 3, 4, prompt="gamma?")]), settings, EVALUATE)


def test_plain_methods_score_where_the_environment_says(
    grader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POFT_SCORE_CACHE", str(tmp_path / "cache"))
    settings = RankingConfig.model_validate({"rank_by": "reward", "reward_model": {"model": str(grader)}})
    check_ranking(settings)
    assert ORDER in prepared(response_scores, ranked(SAMPLES), settings, TRAIN).columns
    assert list(tmp_path.glob("cache/*/scores-*.parquet"))


def test_plain_methods_score_as_their_block_says(grader: Path, tmp_path: Path) -> None:
    """The keys of scoring are those of every block that scores."""
    raw = {"rank_by": "reward", "reward_model": {"model": str(grader)}, "score_cache": str(tmp_path)}
    with pytest.raises(ValueError, match=r"6 of 6 rows have no cached score \(missing_scores: error\)"):
        prepared(
            response_scores, ranked(SAMPLES), RankingConfig.model_validate({**raw, "missing_scores": "error"}), TRAIN
        )
    one_by_one = RankingConfig.model_validate({**raw, "batch_tokens": 1})
    with pytest.MonkeyPatch.context() as patch:
        sizes, original = [], RewardModelScorer.score
        patch.setattr(RewardModelScorer, "score", lambda self, rows: [sizes.append(len(rows)), original(self, rows)][1])
        assert ORDER in prepared(response_scores, ranked(SAMPLES), one_by_one, TRAIN).columns
    assert sizes == [1] * 6
    assert list(tmp_path.glob("*/scores-*.parquet"))


def test_rows_of_responses() -> None:
    rows = ranked(SAMPLES)
    responses, keys = response_rows([rows.sample(index) for index in range(3)], rows)
    assert [len(row) for row in keys] == [2, 2, 4]
    assert len(responses) == len({key for row in keys for key in row}) == 6  # `one`, `two` after `alpha?` come twice
    assert keys[0] == keys[2][:2]
    for index, key in enumerate(responses.keys.to_pylist()):
        turns = responses.conversation(index)
        assert (turns[-1].role, turns[-1].counted) == ("assistant", True)
        assert not any(turn.counted for turn in turns[:-1])
        assert any(key in row for row in keys)
    assert responses.where(2).startswith("data.jsonl row 1 ")
    assert load_conversation(responses.table["conversation"][3].as_py())[0].content == "beta?"


def test_checks_before_data(grader: Path, tmp_path: Path) -> None:
    model = {"reward_model": {"model": str(grader)}}
    with pytest.raises(ValueError, match=r"deft\.reward_model: nothing reads its scores here; set `rank_by: reward`"):
        check_ranking(RankingConfig.model_validate(model))
    with pytest.raises(ValueError, match=r"deft\.omega: missing"):
        check_deft(by_model(grader, tmp_path))
    check_deft(by_model(grader, tmp_path, omega=0.5))
    gone = by_model(tmp_path / "gone", tmp_path, omega=0.5)
    with pytest.raises(ValueError, match=r"reward model .*gone: no such folder"):
        check_deft(gone)
    check_deft(gone.model_copy(update={"train_on": "all", "omega": 0}))  # nothing asks for it


def test_a_list_goes_by_its_scores() -> None:
    """What the reader of lists has sorted stays: rank_by is of no account for scores of the data."""
    rows: Rows = ranked([ranked_list(PROMPT, ["a", "b", "c"], scores=[1.0, 3.0, 1.0], where="row 0")])
    plain, by_reward = (
        prepared(response_scores, rows, DeftConfig(rank_by=kind), TRAIN) for kind in ("label", "reward")
    )
    assert lists(plain.columns[RANKS]) == lists(by_reward.columns[RANKS]) == [[0, 1, 1]]
    assert lists(by_reward.columns[ORDER]) == [[0, 1, 2]]
