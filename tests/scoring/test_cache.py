"""The cache: content-addressed, atomic, several writers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from poft_plugin.scoring.cache import ENVIRONMENT, ScoreCache, atomic_file, cache_folder
from poft_plugin.scoring.identity import Identity, Score

A, B = Identity({"x": 1, "y": None}), Identity({"y": None, "x": 2})
KEYS = pa.chunked_array([["a", "b", "c"], ["a"]])


def test_lookup_is_aligned_with_the_keys(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.write(A, [Score("c", -3.0, 30), Score("a", -1.0, 10)])
    found = cache.lookup(A, KEYS)
    np.testing.assert_array_equal(found.values, [-1.0, np.nan, -3.0, -1.0])
    np.testing.assert_array_equal(found.num_tokens, [10, 0, 30, 10])
    np.testing.assert_array_equal(found.missing, [False, True, False, False])
    assert cache.lookup(B, KEYS).missing.all()


def test_rows_that_are_too_long_are_known_and_not_missing(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.write(A, [Score("b", float("nan"), -5000)])
    found = cache.lookup(A, KEYS)
    np.testing.assert_array_equal(found.too_long, [False, True, False, False])
    np.testing.assert_array_equal(found.missing, [True, False, True, True])


def test_writers_add_files(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    for key in "abc":
        cache.write(A, [Score(key, -1.0, 1)])
    assert not cache.lookup(A, KEYS).missing.any()
    assert len(list((tmp_path / A.digest).glob("scores-*.parquet"))) == 3
    assert (tmp_path / A.digest / "identity.json").exists()


def test_identity_does_not_depend_on_key_order() -> None:
    assert Identity({"x": 1, "y": 2}).digest == Identity({"y": 2, "x": 1}).digest != A.digest


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.write(A, [Score("a", -1.0, 1)])
    file = next((tmp_path / A.digest).glob("scores-*.parquet"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{file.name}.*delete it"):
        cache.lookup(A, KEYS)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_file(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_notes_merge(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "new")
    assert cache.read_note("revisions") == {}
    cache.update_note("revisions", {"a": "1"})
    cache.update_note("revisions", {"b": "2"})
    assert cache.read_note("revisions") == {"a": "1", "b": "2"}


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert cache_folder(None) == Path("poft_scores")
    monkeypatch.setenv(ENVIRONMENT, "/somewhere")
    assert cache_folder(None) == Path("/somewhere")
    assert cache_folder("here") == Path("here")


LOG_PROBABILITY, LOGIT = Identity({"z": 1}, highest=0.0), Identity({"z": 1})


@pytest.mark.parametrize(
    ("reward", "tokens"),
    [(np.nan, 3), (np.nan, 0), (np.nan, None), (np.inf, 3), (-np.inf, 3), (None, 3), (0.5, 3), (-1.0, 0), (-1.0, None)],
)
def test_a_line_that_cannot_be_a_score_is_named_and_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: float | None, tokens: int | None
) -> None:
    cache = ScoreCache(tmp_path)
    lines = {"row_key": ["a", "b"], "reward": [reward, -2.0], "num_tokens": [tokens, 7]}
    cache.write_table(LOG_PROBABILITY, pa.table(lines))
    found = cache.lookup(LOG_PROBABILITY, KEYS)
    assert found.missing.tolist() == [True, False, True, True]
    assert not found.too_long.any()
    (file,) = (tmp_path / LOG_PROBABILITY.digest).glob("scores-*.parquet")
    said = capsys.readouterr().out
    assert f"{file}: 1 lines cannot be scores, the first of row key a: reward {reward}, num_tokens {tokens}" in said
    cache.write(LOG_PROBABILITY, [Score("a", -3.0, 4)])  # scored again, in another file
    again = cache.lookup(LOG_PROBABILITY, KEYS)
    assert (again.values[0], again.num_tokens[0]) == (-3.0, 4)
    assert capsys.readouterr().out == ""


def test_a_reward_models_score_may_have_any_sign(tmp_path: Path) -> None:
    """The bound is no part of the address."""
    cache = ScoreCache(tmp_path)
    assert LOGIT.digest == LOG_PROBABILITY.digest
    cache.write(LOGIT, [Score("a", 5.0, 3), Score("b", 9e-7, 3)])
    assert cache.lookup(LOGIT, KEYS).values[0] == 5.0
    assert cache.lookup(LOG_PROBABILITY, KEYS).missing.tolist() == [True, False, True, True]
