"""The training preprocessor: levels, the discrepancy, the cache of counts, and what a run leaves behind."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pyarrow as pa
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from poft_plugin.config import DeftConfig
from poft_plugin.data.columns import LEVEL, ORDER, SCORES
from poft_plugin.data.groups import in_order, ragged
from poft_plugin.data.preparation import Policy, Prepared, Rows, RunContext
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import Turn
from poft_plugin.preprocessors import grades as module
from poft_plugin.preprocessors.grades import DISCREPANCY, grades, load_discrepancy
from scoring.ranked_support import counted, ranked
from scoring.support import prepared

TOP, BOTTOM, ROWS, LONG = 30, 25, 12, 20


def make_rows() -> tuple[Rows, list[list[list[int]]]]:
    """Rows with scores in the order of the data and another order of their own."""
    rng = random.Random(5)
    sizes = [rng.randint(2, 5) for _ in range(ROWS)]
    samples = [RankedSample((Turn("user", f"{n}?"),), tuple("abcde"[:c]), tuple(range(c))) for n, c in enumerate(sizes)]
    sequences = [[[rng.randrange(3, 60) for _ in range(rng.randint(6, 33))] for _ in range(c)] for c in sizes]
    scores = [[rng.gauss(0, 1) for _ in range(c)] for c in sizes]
    order = [sorted(range(c), key=lambda i, row=row: -row[i]) for c, row in zip(sizes, scores, strict=True)]
    rows = ranked(samples, sequences)
    return Rows(rows.table, {SCORES: ragged(scores), ORDER: ragged(order)}), sequences


RANKED, SEQUENCES = make_rows()
BY_LABEL = Rows(RANKED.table, {SCORES: RANKED.attached[SCORES]})


@pytest.fixture(scope="module")
def policy(models: SimpleNamespace) -> Policy:
    return Policy(str(models.policy), AutoTokenizer.from_pretrained(models.policy), sequence_len=LONG)


def graded(rows: Rows, policy: Policy, folder: Path, run: dict[str, Any] | None = None, **settings: Any) -> Prepared:
    block = {"top_percent": TOP, "bottom_percent": BOTTOM, "omega": 0.5, "score_cache": str(folder / "cache")}
    context = RunContext("train", **{"policy": policy, "output_dir": folder / "out", **(run or {})})
    return prepared(grades, rows, DeftConfig.model_validate({**block, **settings}), context)


def best_of(rows: Rows, index: int) -> float:
    """A row's grade score: its highest; a pair's is its better response's, by the run's order."""
    scores = list(rows.attached[SCORES][index])
    first = rows.attached[ORDER][index][0] if ORDER in rows.attached else 0
    return scores[first] if len(scores) == 2 else max(scores)


def best_first(rows: Rows, number: int) -> list[float]:
    """A row's scores in the order that is trained on."""
    scores, order = list(rows.attached[SCORES][number]), rows.attached.get(ORDER)
    return scores if order is None else [scores[position] for position in order[number]]


def by_hand(rows: Rows, policy: Policy) -> tuple[list[str], oracles.DeftCounts]:
    """Levels within the one data set, and counts of label tokens."""
    best = [best_of(rows, index) for index in range(len(rows))]
    levels = oracles.deft_levels(best, rows.keys.to_pylist(), TOP, BOTTOM)
    samples = []
    for index, level in enumerate(levels):
        scores = list(rows.attached[SCORES][index])
        order = list(rows.attached[ORDER][index]) if ORDER in rows.attached else list(range(len(scores)))
        labels = [[label for label in counted(ids)[1:] if label >= 0] for ids in SEQUENCES[index]]
        samples.append((level, [labels[i] for i in order], [scores[i] for i in order]))
    return levels, oracles.deft_counts(samples, policy.vocab_size, policy.special_token_ids)


@pytest.mark.parametrize("rows", [RANKED, BY_LABEL], ids=["by reward", "by label"])
def test_levels_and_discrepancy(rows: Rows, policy: Policy, tmp_path: Path) -> None:
    prepared, (levels, counts) = graded(rows, policy, tmp_path), by_hand(rows, policy)
    assert prepared.columns[LEVEL].tolist() == levels
    expected = [float(value) for value in oracles.deft_discrepancy(counts.positive, counts.negative)]
    np.testing.assert_allclose(prepared.tensors[DISCREPANCY], expected, rtol=0, atol=2 * 2**-53)
    assert prepared.tensors[DISCREPANCY].sum() == 0
    assert counts.contradictory + counts.uncounted > 0
    assert not prepared.dropped
    assert {key: prepared.statistics[f"deft/level_{key}_rows"] for key in "abc"} == {
        key: levels.count(key.upper()) for key in "abc"
    }
    np.testing.assert_array_equal(load_discrepancy(tmp_path / "out"), prepared.tensors[DISCREPANCY])


def test_what_a_run_leaves_behind(policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graded(BY_LABEL, policy, tmp_path)
    assert "Grades: A = top 30 %, C = bottom 25 %" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "grading.json").read_text())
    levels, counts = by_hand(BY_LABEL, policy)
    lost = [max(map(len, row)) > LONG and level == "A" for row, level in zip(SEQUENCES, levels, strict=True)]
    (line,) = summary["groups"]
    assert any(lost)
    assert (line["group"], line["level_a_lost"]) == ("data.jsonl", sum(lost))
    disagree = [max(row) > row[0] for row in BY_LABEL.attached[SCORES]]
    assert summary["label_disagreement"] == pytest.approx(sum(disagree) / ROWS)
    assert summary["counts"]["tokens_positive"] == sum(counts.positive)
    assert len(summary["tokens"]["positive"]) == 10


def test_tied_labels_disagree_with_no_score(policy: Policy, tmp_path: Path) -> None:
    """A score above the first response's is no disagreement where the label calls the two equal."""
    samples = [
        RankedSample((Turn("user", f"{n}?"),), ("a", "b", "c"), ranks) for n, ranks in enumerate([(0, 0, 1)] * 4)
    ]
    rows = ranked(samples, [[[1, 2, 3, 4, 5, 6 + n]] * 3 for n in range(4)])
    scores = ragged([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    prepared = graded(Rows(rows.table, {SCORES: scores}), policy, tmp_path)
    assert prepared.statistics["deft/label_disagreement"] == pytest.approx(1 / 4)


def test_only_the_first_process_writes(policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = graded(RANKED, policy, tmp_path, {"rank": 1, "world_size": 2})
    assert "Grades" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    first = graded(RANKED, policy, tmp_path, {"rank": 0, "world_size": 2})
    np.testing.assert_array_equal(first.tensors[DISCREPANCY], other.tensors[DISCREPANCY])
    assert first.columns[LEVEL].tolist() == other.columns[LEVEL].tolist()
    assert not list(tmp_path.rglob(".*")), "a temporary file is left"
    assert graded(RANKED, policy, tmp_path, {"output_dir": None}).columns.keys() == {LEVEL}


def test_without_omega_there_is_no_discrepancy(policy: Policy, tmp_path: Path) -> None:
    prepared = graded(RANKED, policy, tmp_path, omega=0)
    assert prepared.columns.keys() == {LEVEL} and not prepared.tensors
    assert (tmp_path / "out" / "grading.json").exists()
    with pytest.raises(ValueError, match=r"discrepancy\.safetensors: no such file.*Set `output_dir:`.*or `omega: 0`"):
        load_discrepancy(tmp_path / "out")
    nothing = graded(RANKED, policy, tmp_path / "nothing", omega=0, train_on="all")
    assert not nothing.columns and not nothing.tensors and not (tmp_path / "nothing").exists()


def test_groups(policy: Policy, tmp_path: Path) -> None:
    topics = ["x" if n % 3 else "y" for n in range(ROWS)]
    table = RANKED.table.append_column("group", pa.array(topics)).set_column(
        RANKED.table.column_names.index("source"), "source", pa.array(["p"] * 5 + ["q"] * (ROWS - 5))
    )
    rows = Rows(table, RANKED.attached)
    best, keys = [oracles.grade_score(best_first(rows, number)) for number in range(ROWS)], rows.keys.to_pylist()
    for within, groups in (("topic", topics), ("dataset", rows.sources.tolist()), ("none", ["all"] * ROWS)):
        found = graded(rows, policy, tmp_path, grade_within=within)
        for group in set(groups):
            inside = [n for n in range(ROWS) if groups[n] == group]
            expected = oracles.deft_levels([best[n] for n in inside], [keys[n] for n in inside], TOP, BOTTOM)
            assert found.columns[LEVEL][inside].tolist() == expected
            assert found.statistics[f"deft/{group}/level_a_rows"] == expected.count("A")


def changed_label(rows: Rows) -> Rows:
    labels = rows.table["ranked_labels"].to_pylist()
    labels[0][-1] += 1
    place = rows.table.column_names.index("ranked_labels")
    return Rows(rows.table.set_column(place, "ranked_labels", pa.array(labels, pa.list_(pa.int32()))), rows.attached)


def test_counts_are_known_by_everything_that_they_depend_on(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    original = module.count_tokens
    monkeypatch.setattr(module, "count_tokens", counting)

    def counts_again(rows: Rows, policy: Policy = policy, **settings: Any) -> bool:
        calls.clear()
        graded(rows, policy, tmp_path, **settings)
        return bool(calls)

    assert counts_again(RANKED)
    assert not counts_again(RANKED, omega=0.25, train_on="all", rank_by="reward", reward_over="all")
    assert counts_again(BY_LABEL)
    # the same levels and, from best to worst, the same scores, of responses in another order
    in_turn = in_order(RANKED.attached[SCORES], RANKED.attached[ORDER])
    assert counts_again(Rows(RANKED.table, {SCORES: ragged(in_turn)}))
    assert counts_again(RANKED, top_percent=60)
    assert counts_again(changed_label(RANKED))
    scores = ragged([[2 * score for score in row] for row in RANKED.attached[SCORES]])
    assert counts_again(Rows(RANKED.table, {**RANKED.attached, SCORES: scores}))
    grown = AutoTokenizer.from_pretrained(policy.model)
    grown.add_tokens(["<new>"])
    assert counts_again(RANKED, replace(policy, tokenizer=grown))
    special = AutoTokenizer.from_pretrained(policy.model)
    special.add_special_tokens({"additional_special_tokens": [special.convert_ids_to_tokens(40)]})
    assert counts_again(RANKED, replace(policy, tokenizer=special))
    assert not counts_again(RANKED, replace(policy, sequence_len=10, model="./elsewhere"))


def test_the_stored_counts_are_whole(policy: Policy, tmp_path: Path) -> None:
    graded(RANKED, policy, tmp_path)
    (path,) = (tmp_path / "cache").glob("tokens-*.safetensors")
    stored, (_, counts) = load_file(path), by_hand(RANKED, policy)
    assert stored["positive"].tolist() == counts.positive
    assert stored["negative"].tolist() == counts.negative
    first = json.loads((tmp_path / "out" / "grading.json").read_text())
    graded(RANKED, policy, tmp_path)
    assert json.loads((tmp_path / "out" / "grading.json").read_text()) == first
