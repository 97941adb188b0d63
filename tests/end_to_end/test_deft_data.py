"""Grading on the host: which rows are graded, counted and trained on, recomputed from the raw rows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import numpy as np
import oracles
import pytest
import tiny
from graded import (
    BOTTOM,
    TOP,
    TYPES,
    Row,
    as_list,
    assert_discrepancy,
    config,
    count_by_hand,
    entry,
    levels_by_hand,
    levels_of,
    name_of,
    names,
    ordered,
    prepare,
    raw_rows,
    responses_of,
    rewards_by_hand,
    saved_discrepancy,
    texts_of,
)
from transformers import AutoTokenizer


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Any:
    """The host prepares data in this process: a worker of its own would import everything again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXOLOTL_DATASET_NUM_PROC", "0")
        yield


@pytest.fixture(scope="module")
def tokenizer(models: SimpleNamespace) -> Any:
    return AutoTokenizer.from_pretrained(models.policy)


RAW = raw_rows()
EVERY = [row for rows in RAW.values() for row in rows]
BY_NAME = {name_of(row): row for row in EVERY}
FILES = [f"{name}.jsonl" for name, rows in RAW.items() for _ in rows]


@pytest.fixture(scope="module")
def whole(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All rows trained on, none held out, graded within their data sets."""
    return prepare(config(tmp_path_factory.mktemp("whole"), models, RAW))


def test_columns_are_right(whole: SimpleNamespace, tokenizer: Any) -> None:
    found = names(whole.train, tokenizer)
    assert sorted(found) == sorted(BY_NAME)
    assert levels_of(whole, tokenizer) == levels_by_hand(EVERY, FILES)
    for name, row in zip(found, whole.train, strict=True):
        texts, scores = zip(*ordered(BY_NAME[name]), strict=True)
        assert responses_of(row, tokenizer) == list(texts)
        assert row["scores"] == list(scores)
        assert row["ranks"] == list(range(len(texts)))
        assert row["position_ids"] == [t for length in row["sequence_lengths"] for t in range(length)]
        assert not {"conversation", "ranked_input_ids", "ranked_labels"} & row.keys()


def test_the_discrepancy_is_counted_from_every_row(whole: SimpleNamespace, tokenizer: Any) -> None:
    counts = count_by_hand(EVERY, levels_by_hand(EVERY, FILES), tokenizer)
    assert_discrepancy(whole.discrepancy, counts)
    assert not np.any(whole.discrepancy[tokenizer.all_special_ids])
    numbers = whole.grading["counts"]
    assert (numbers["tokens_positive"], numbers["tokens_negative"]) == (sum(counts.positive), sum(counts.negative))
    assert (numbers["middle_uncounted"], numbers["middle_contradictory"]) == (counts.uncounted, counts.contradictory)


def test_the_summary_is_right(whole: SimpleNamespace) -> None:
    for name, line in zip(RAW, whole.grading["groups"], strict=True):
        rows = RAW[name]
        a, c = oracles.ceil_percent(TOP, len(rows)), oracles.ceil_percent(BOTTOM, len(rows))
        shown = [line[key] for key in ("group", "rows", "level_a", "level_b", "level_c", "level_a_lost")]
        assert shown == [f"{name}.jsonl", len(rows), a, len(rows) - a - c, c, 0]
        disagree = [max(row["scores"]) > dict(ordered(row))[ordered(row)[0][0]] for row in rows]
        assert line["label_disagreement"] == pytest.approx(sum(disagree) / len(rows))
    assert whole.grading["groups"][1]["label_disagreement"] > 0


@pytest.mark.parametrize(
    ("within", "groups"), [("none", ["all"] * len(EVERY)), ("topic", [row["topic"] for row in EVERY])]
)
def test_graded_within(models: SimpleNamespace, tmp_path: Path, tokenizer: Any, within: str, groups: list[str]) -> None:
    run = prepare(config(tmp_path, models, RAW, deft={"grade_within": within}))
    expected = levels_by_hand(EVERY, groups)
    assert expected != levels_by_hand(EVERY, FILES)
    assert levels_of(run, tokenizer) == expected
    assert {line["group"]: line["rows"] for line in run.grading["groups"]} == {g: groups.count(g) for g in groups}
    assert_discrepancy(run.discrepancy, count_by_hand(EVERY, expected, tokenizer))


def test_a_row_without_the_column_is_named(models: SimpleNamespace, tmp_path: Path) -> None:
    rows = json.loads(json.dumps(RAW))
    rows["pairs"][5]["topic"] = None
    with pytest.raises(ValueError, match=r"pairs\.jsonl row 5: no value in the column 'topic'"):
        prepare(config(tmp_path, models, rows, deft={"grade_within": "topic"}))


@pytest.mark.parametrize("train_on", ["A", "A+B"])
def test_trained_levels(
    models: SimpleNamespace, tmp_path: Path, tokenizer: Any, whole: SimpleNamespace, train_on: str
) -> None:
    run = prepare(config(tmp_path, models, RAW, deft={"train_on": train_on}))
    expected = {name: level for name, level in levels_by_hand(EVERY, FILES).items() if level in train_on}
    assert levels_of(run, tokenizer) == expected
    np.testing.assert_array_equal(run.discrepancy, whole.discrepancy)


@pytest.fixture(scope="module")
def grader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.reward_model(tmp_path_factory.mktemp("grader"))


@pytest.mark.parametrize("rank_by", ["label", "reward"])
def test_a_reward_model_grades_and_may_order(
    models: SimpleNamespace, tmp_path: Path, tokenizer: Any, grader: Path, rank_by: str
) -> None:
    """Its scores replace the data's; with `rank_by: reward` its order does, in tokens and in columns."""
    pairs = {"pairs": RAW["pairs"]}
    deft = {"reward_model": {"model": str(grader)}, "rank_by": rank_by}
    run = prepare(config(tmp_path, models, pairs, deft=deft))
    rewards = rewards_by_hand(grader, RAW["pairs"])
    reversed_rows = 0
    for name, row in zip(names(run.train, tokenizer), run.train, strict=True):
        expected = list(zip(texts_of(BY_NAME[name]), rewards[name], strict=True))
        reversed_rows += expected[0][1] < expected[1][1]
        if rank_by == "reward":
            expected.sort(key=lambda pair: -pair[1])
        assert responses_of(row, tokenizer) == [text for text, _ in expected]
        assert row["scores"] == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-4)
        assert row["ranks"] == [0, 1]
    assert 0 < reversed_rows < len(run.train)
    assert run.grading["label_disagreement"] == pytest.approx(reversed_rows / len(run.train))
    rescored = [{**row, "scores": rewards[name_of(row)]} for row in RAW["pairs"]]
    if rank_by == "reward":
        rescored = [as_list(row) for row in rescored]
    levels = levels_by_hand(rescored, ["pairs"] * len(rescored))
    assert levels_of(run, tokenizer) == levels
    assert_discrepancy(run.discrepancy, count_by_hand(rescored, levels, tokenizer))


def test_two_epochs_are_two(models: SimpleNamespace, tmp_path: Path, tokenizer: Any) -> None:
    """Steps are counted on the rows that grading leaves, and `val_set_size` rows are no part of it."""
    path = config(
        tmp_path, models, RAW, num_epochs=2, micro_batch_size=2, val_set_size=5, eval_strategy="epoch",
        deft={"train_on": "A"},
    )  # fmt: skip
    run = hosting.train(path)
    train, evaluation = run.trainer.train_dataset, run.trainer.eval_dataset
    held_out = names(evaluation, tokenizer)
    assert len(held_out) == 5
    training = [row for row in EVERY if name_of(row) not in held_out]
    levels = levels_by_hand(training, [name_of(row).split()[0] for row in training])
    chosen = {name for name, level in levels.items() if level == "A"}
    assert set(names(train, tokenizer)) == chosen
    assert set(train["level"]) == {"A"}
    for name, scores in zip(names(train, tokenizer), train["scores"], strict=True):
        assert list(scores) == [score for _, score in ordered(BY_NAME[name])]
    assert run.trainer.state.global_step == 2 * -(-len(chosen) // 2)
    assert run.trainer.state.epoch == pytest.approx(2.0)
    assert run.evaluations[-1]["epoch"] == pytest.approx(2.0)
    assert "level" not in evaluation.column_names
    assert_discrepancy(saved_discrepancy(tmp_path / "out"), count_by_hand(training, levels, tokenizer))
    statistics = run.trainer.state.log_history[0]
    assert statistics["deft/level_a_rows"] == len(chosen)
    assert sum(statistics[f"deft/level_{letter}_rows"] for letter in "abc") == len(training)


def test_rows_that_are_held_out_take_no_part(models: SimpleNamespace, tmp_path: Path, tokenizer: Any) -> None:
    """The highest score of all in an evaluation row moves no other row."""
    rows = json.loads(json.dumps(RAW))
    before = prepare(config(tmp_path, models, rows, val_set_size=4))
    held_out = names(before.evaluation, tokenizer)
    pair = next(name for name in held_out if name.startswith("pairs"))  # a list's scores make its order, and its key
    for row in (row for part in rows.values() for row in part if name_of(row) == pair):
        row["scores"][0] = 1e9
    after = prepare(config(tmp_path, models, rows, val_set_size=4))
    assert names(after.evaluation, tokenizer) == held_out
    assert not any("scores" in row for row in after.evaluation)
    assert levels_of(after, tokenizer) == levels_of(before, tokenizer)
    assert len(after.train) == len(EVERY) - 4
    assert after.grading == before.grading
    np.testing.assert_array_equal(after.discrepancy, before.discrepancy)


def test_test_datasets_take_no_part(
    models: SimpleNamespace, tmp_path: Path, tokenizer: Any, whole: SimpleNamespace
) -> None:
    """Rows of a test set that are training rows, too, are not trained on, whatever their scores there."""
    copies = [json.loads(json.dumps(row)) for row in (RAW["lists"][2], RAW["lists"][7])]
    copies[1]["scores"] = [score - 1e9 for score in copies[1]["scores"]]
    others = [{**row, "prompt": f"test {row['prompt']}"} for row in tiny.ranked_rows(4, seed=9)]
    test_sets = [{**entry(tmp_path, "test", TYPES["lists"]), "split": "train"}]
    # a list goes by its scores: a shift keeps its order, and so its key
    run = prepare(config(tmp_path, models, {**RAW, "test": [*copies, *others]}, test_datasets=test_sets))
    assert len(run.evaluation) == 6
    training = [row for row in EVERY if name_of(row) not in ("lists 2", "lists 7")]
    expected = levels_by_hand(training, [name_of(row).split()[0] for row in training])
    assert levels_of(run, tokenizer) == expected
    assert_discrepancy(run.discrepancy, count_by_hand(training, expected, tokenizer))


def test_long_rows_are_graded_counted_and_then_left_out(
    models: SimpleNamespace, tmp_path: Path, tokenizer: Any, whole: SimpleNamespace
) -> None:
    lengths = {
        name: max(row["sequence_lengths"]) for name, row in zip(names(whole.train, tokenizer), whole.train, strict=True)
    }
    levels = levels_of(whole, tokenizer)
    limit = sorted(lengths[name] for name in levels if levels[name] == "A")[-3]
    run = prepare(config(tmp_path, models, RAW, sequence_len=limit))
    lost = {name for name, length in lengths.items() if length > limit}
    assert levels_of(run, tokenizer) == {name: level for name, level in levels.items() if name not in lost}
    assert lost
    np.testing.assert_array_equal(run.discrepancy, whole.discrepancy)
    lost_a = [name for name in lost if levels[name] == "A"]
    assert len(lost_a) > 0
    assert {line["group"]: line["level_a_lost"] for line in run.grading["groups"]} == {
        f"{name}.jsonl": sum(row.startswith(name) for row in lost_a) for name in RAW
    }
    longest = max(lengths, key=lambda name: lengths[name])
    file, number = longest.split()
    with pytest.raises(ValueError, match=rf"longest {file}\.jsonl row {number} \(key .*with {lengths[longest]}.*raise"):
        prepare(config(tmp_path, models, RAW, sequence_len=limit, excess_length_strategy="raise"))


def test_counts_are_cached_by_content(
    models: SimpleNamespace, tmp_path: Path, whole: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config(tmp_path, models, RAW))
    monkeypatch.setattr("poft_plugin.preprocessors.grades.count_tokens", lambda *_, **__: pytest.fail("counted again"))
    (tmp_path / "out" / "discrepancy.safetensors").unlink()
    again = prepare(config(tmp_path, models, RAW, deft={"omega": 0.25}))
    np.testing.assert_array_equal(again.discrepancy, whole.discrepancy)
    edited = json.loads(json.dumps(RAW))
    edited["pairs"][3]["rejected"] += " mu"
    with pytest.raises(pytest.fail.Exception, match="counted again"):
        prepare(config(tmp_path, models, edited))


def test_where_nothing_depends_on_levels_nothing_is_graded(models: SimpleNamespace, tmp_path: Path) -> None:
    """`train_on: all, omega: 0` is the plain method: it asks for no scores."""
    rows = {name: [{k: v for k, v in row.items() if k != "scores"} for row in RAW[name]] for name in RAW}
    run = prepare(config(tmp_path, models, rows, deft={"omega": 0}))
    assert len(run.train) == len(EVERY)
    assert run.grading is None and run.discrepancy is None
    assert not {"level", "scores"} & run.train[0].keys()
    with pytest.raises(ValueError, match=r"lists\.jsonl row 0 .*no scores in the row \(37 such rows\).*reward_model"):
        prepare(config(tmp_path, models, rows))


def hh_row(number: int, chosen: str, rejected: str) -> Row:
    prompt = f"\n\nHuman: hh {number}: what?\n\nAssistant: say\n\nHuman: more"
    return {"chosen": f"{prompt}\n\nAssistant: {chosen}", "rejected": f"{prompt}\n\nAssistant: {rejected}"}


def test_dialogues_of_hh_rlhf(
    models: SimpleNamespace, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows without a common prompt or a response are left out and counted; asked to, they stop the run."""
    rows = [hh_row(number, f"good {number}", f"bad {number}") for number in range(4)]
    rows[1]["rejected"] = "\n\nHuman: another\n\nAssistant: bad"
    rows[2]["chosen"] += "\n\nHuman: and"
    kind = entry(tmp_path, "hh", "poft_plugin.hh_rlhf")
    plain = {"deft": {"omega": 0}, "datasets": [kind]}
    run = prepare(config(tmp_path, models, {"hh": rows}, **plain))
    assert "hh.jsonl: 2 of 4 rows left out; the first: hh.jsonl row 1" in capsys.readouterr().out
    assert names(run.train, tokenizer) == ["hh 0", "hh 3"]
    assert [responses_of(row, tokenizer) for row in run.train] == [["good 0", "bad 0"], ["good 3", "bad 3"]]
    assert "assistant\nsay<|im_end|>" in tokenizer.decode(run.train[0]["input_ids"])
    strict = [{**kind, "on_unusable_row": "error"}]
    with pytest.raises(ValueError, match=r"hh\.jsonl row 1: the two dialogues differ"):
        prepare(config(tmp_path, models, {"hh": rows}, deft={"omega": 0}, datasets=strict))


def test_unusable_rows_stop_the_run_unless_asked(models: SimpleNamespace, tmp_path: Path, tokenizer: Any) -> None:
    rows = json.loads(json.dumps(RAW["lists"]))
    rows[0]["responses"], rows[0]["scores"] = ["one"], [1.0]
    files = {"lists": rows}
    with pytest.raises(ValueError, match=r"lists\.jsonl row 0: 1 response\(s\); a ranked row needs at least two"):
        prepare(config(tmp_path, models, files))
    dropping = [{**entry(tmp_path, "lists"), "on_unusable_row": "drop"}]
    run = prepare(config(tmp_path, models, files, datasets=dropping))
    assert levels_of(run, tokenizer) == levels_by_hand(rows[1:], ["lists"] * (len(rows) - 1))


def test_equal_rows_with_other_scores_are_an_error(models: SimpleNamespace, tmp_path: Path) -> None:
    rows = json.loads(json.dumps(RAW))
    copy = json.loads(json.dumps(rows["pairs"][4]))
    copy["scores"][0] += 1
    rows["pairs"].append(copy)
    message = r"pairs\.jsonl row 14 \(key .*same texts as pairs\.jsonl row 4 \(key .*with other scores; remove one"
    with pytest.raises(ValueError, match=message):
        prepare(config(tmp_path, models, rows))
