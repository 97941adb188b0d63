"""Files of scores: what is exported comes back unchanged, what does not belong is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from poft_plugin.scoring.cache import Lookup, ScoreCache
from poft_plugin.scoring.exchange import Scored, export_scores, import_scores, imported_scores, read_score_file
from poft_plugin.scoring.identity import Identity
from scoring.support import job_of

KEYS = pa.chunked_array([["k1", "k2", "k3"]])
SCORED = Lookup(np.array([-1.5, np.nan, -0.25]), np.array([3, 0, 8], dtype=np.int32))
A, B = job_of("./a", KEYS), job_of("./b", KEYS)
IDENTITY = Identity({"weights": "abc", "dtype": "float32"})


def write(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_round_trip_keeps_identity_and_values(tmp_path: Path) -> None:
    file = tmp_path / "scores.parquet"
    assert export_scores(file, [Scored(A, SCORED, IDENTITY)]) == 2
    table = pq.read_table(file)
    assert table.column_names == ["row_key", "model", "reward", "num_tokens"]
    assert table.schema.field("reward").type == pa.float64()
    cache = ScoreCache(tmp_path / "cache")
    assert import_scores(file, [A, B], cache) == {"./a": 2}
    again = cache.lookup(IDENTITY, KEYS)
    np.testing.assert_array_equal(again.values, SCORED.values)
    imported = imported_scores(cache, "./a")
    assert imported is not None
    assert imported.identity is not None and imported.identity.digest == IDENTITY.digest
    assert imported_scores(cache, "./b") is None


def test_all_rows_are_listed_with_null_where_unscored(tmp_path: Path) -> None:
    assert export_scores(tmp_path / "r.parquet", [Scored(A, SCORED, None)], list_rows=True) == 3
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [row["reward"] for row in rows] == [-1.5, None, -0.25]
    assert [row["num_tokens"] for row in rows] == [3, None, 8]
    assert [row["conversation"] for row in rows] == ["text of k1", "text of k2", "text of k3"]


def test_a_hand_made_file_is_used_for_its_reference(tmp_path: Path) -> None:
    file, cache = write(tmp_path / "f.parquet", row_key=["k1", "k2"], reward=[-1.0, -2.0]), ScoreCache(tmp_path / "c")
    assert import_scores(file, [A], cache) == {"./a": 2}
    imported = imported_scores(cache, "./a")
    assert imported is not None and imported.identity is None
    np.testing.assert_array_equal(imported.lookup(KEYS).values, [-1.0, -2.0, np.nan])
    assert import_scores(file, [A], cache) == {"./a": 2}  # again: nothing new, no error


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"row_key": ["k1"], "model": ["./zzz"], "reward": [-1.0]}, "'./zzz', which is no reference"),
        ({"row_key": ["k9"], "model": ["./a"], "reward": [-1.0]}, "1 row keys of './a' are no rows.*k9"),
        ({"row_key": ["k1"], "reward": [-1.0]}, "no column `model`"),
        ({"row_key": ["k1"], "model": ["./a"]}, "no column 'reward'"),
        ({"row_key": ["k1"], "model": ["./a"], "reward": [float("-inf")]}, "row key k1 is not finite"),
        ({"row_key": ["k1"], "model": ["./a"], "reward": [3.5]}, "1 rewards are above 0.*k1.*Check the sign"),
        ({"row_key": ["k1"], "model": ["./a"], "reward": ["x"]}, "column 'reward' must hold numbers"),
        ({"row_key": [None, "k1"], "model": ["./a"] * 2, "reward": [-1.0, -1.0]}, "1 rows without a row key"),
        ({"row_key": ["k1", "k1"], "model": ["./a"] * 2, "reward": [-1.0, -2.0]}, "k1 comes twice"),
    ],
)
def test_what_does_not_belong_is_refused_and_nothing_is_taken(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    file, cache = write(tmp_path / "f.parquet", **columns), ScoreCache(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        import_scores(file, [A, B], cache)
    assert not cache.folder.exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.parquet: no such file"):
        read_score_file(tmp_path / "nowhere.parquet", "big", highest=0.0)
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(ValueError, match="not a parquet file"):
        read_score_file(tmp_path / "text.parquet", "big", highest=0.0)
    file = write(tmp_path / "f.parquet", row_key=["k1"], model=["other"], reward=[-1.0])
    with pytest.raises(ValueError, match="no scores of 'big'.*other"):
        read_score_file(file, "big", highest=0.0)


def test_a_second_hand_made_import_corrects_the_first(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "c")
    import_scores(write(tmp_path / "1.parquet", row_key=["k1", "k2"], reward=[-1.0, -2.0]), [A], cache)
    import_scores(write(tmp_path / "2.parquet", row_key=["k1", "k3"], reward=[-9.0, -3.0]), [A], cache)
    imported = imported_scores(cache, "./a")
    assert imported is not None
    np.testing.assert_array_equal(imported.lookup(KEYS).values, [-9.0, -2.0, -3.0])


def test_an_unscored_reference_exports_nothing(tmp_path: Path) -> None:
    nothing = Lookup(np.full(3, np.nan), np.zeros(3, dtype=np.int32))
    assert export_scores(tmp_path / "e.parquet", [Scored(A, nothing, IDENTITY)]) == 0


def test_scores_of_a_reward_model_may_have_any_sign(tmp_path: Path) -> None:
    cache, grader = ScoreCache(tmp_path / "c"), job_of("./a", KEYS, kind="reward model", highest=None)
    file = write(tmp_path / "f.parquet", row_key=["k1", "k2"], reward=[3.5, -2.0])
    with pytest.raises(ValueError, match="above 0"):
        read_score_file(file, "./a", highest=0.0)
    assert read_score_file(file, "./a", highest=None).table["reward"].to_pylist() == [3.5, -2.0]
    assert import_scores(file, [grader], cache) == {"./a": 2}
    imported = imported_scores(cache, "./a")
    assert imported is not None
    np.testing.assert_array_equal(imported.lookup(KEYS).values, [3.5, -2.0, np.nan])
    infinite = write(tmp_path / "i.parquet", row_key=["k1"], reward=[float("inf")])
    with pytest.raises(ValueError, match="k1 is not finite"):
        import_scores(infinite, [grader], cache)
    foreign = write(tmp_path / "o.parquet", row_key=["k1"], model=["./b"], reward=[3.5])
    with pytest.raises(ValueError, match="'./b', which is no reward model of this config"):
        import_scores(foreign, [grader], cache)
