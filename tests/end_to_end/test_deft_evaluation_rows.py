"""Evaluation rows of preference methods on the host: they need no scores, and messages name the right set."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
from graded import TYPES, Row, config, entry, prepare, raw_rows

RAW = {"pairs": raw_rows()["pairs"]}


def bare(count: int, words: int = 1) -> list[Row]:
    """Pairs without scores."""
    rows = tiny.pair_rows(count, seed=9)
    for row in rows:
        row["messages"][0]["content"] = "test " * words + row["messages"][0]["content"]
        del row["scores"]
    return rows


def with_test_set(folder: Path, models: SimpleNamespace, rows: list[Row], **settings: Any) -> Path:
    test_sets = [{**entry(folder, "test", TYPES["pairs"]), "split": "train"}]
    return config(folder, models, {**RAW, "test": rows}, test_datasets=test_sets, **settings)


def test_evaluation_rows_without_scores(models: SimpleNamespace, tmp_path: Path) -> None:
    """Training rows are graded by theirs; evaluation has a loss, and no column of scores."""
    settings = {"deft": {"train_on": "A"}, "rl": "deft_pro", "eval_strategy": "epoch"}
    run = hosting.train(with_test_set(tmp_path, models, bare(3), **settings))
    assert run.trainer.train_dataset["scores"]
    assert "scores" not in run.trainer.eval_dataset.column_names
    assert len(run.trainer.eval_dataset) == 3
    assert run.evaluations[-1]["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"test\.jsonl train row 0 .*no scores in the row \(3 such rows\)"):
        prepare(with_test_set(tmp_path, models, bare(3), deft={"pro_temperature": "reward"}))


def test_evaluation_rows_are_not_scored_in_vain(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deft = {"reward_model": {"model": str(tiny.reward_model(tmp_path / "grader"))}}
    prepare(with_test_set(tmp_path, models, bare(5), deft=deft))
    assert f"0 rows cached, {2 * len(RAW['pairs'])} to score" in capsys.readouterr().out
    run = prepare(with_test_set(tmp_path, models, bare(5), deft={**deft, "rank_by": "reward"}))
    assert f"{2 * len(RAW['pairs'])} rows cached, 10 to score" in capsys.readouterr().out
    assert all(len(row["scores"]) == 2 for row in run.evaluation)


def test_a_set_without_rows_is_named(models: SimpleNamespace, tmp_path: Path) -> None:
    remedy = r"with (\d+) tokens\. Set `sequence_len: \1` or more, or shorten the rows$"
    message = (
        r"no rows left to evaluate on: all 3 of test_datasets were left out for a sequence over sequence_len 128, "
    )
    with pytest.raises(ValueError, match=rf"^{message}the longest test\.jsonl train row \d \(key .*\) {remedy}"):
        prepare(with_test_set(tmp_path, models, bare(3, words=200), sequence_len=128))
    with pytest.raises(ValueError, match=rf"^no rows left to train on: all 14 of datasets were .*{remedy}"):
        prepare(config(tmp_path, models, RAW, sequence_len=8))
    message = r"no rows left to train on: all 14 of datasets were left out that are evaluation rows$"
    with pytest.raises(ValueError, match=f"^{message}"):
        prepare(with_test_set(tmp_path, models, RAW["pairs"]))
