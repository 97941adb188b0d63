"""The preprocessor of PoFT: mean over references, imported scores, revisions, long rows, what may not be scored."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from poft_plugin.config import PoftConfig
from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.data.preparation import RunContext
from poft_plugin.preprocessors.reference_rewards import reference_rewards
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.checkpoints import MissingCheckpointError, resolve_checkpoint
from poft_plugin.scoring.exchange import Scored, export_scores, import_scores
from scoring.support import as_rows, job_of, plain_reward, prepared, scorer

DATA = tiny.chat_rows(5, seed=2)
ROWS = as_rows(DATA)
PREPROCESS, TRAIN = RunContext("preprocess"), RunContext("train")


def config(folder: Path, *references: dict[str, Any], **settings: Any) -> PoftConfig:
    return PoftConfig.model_validate({"references": references, "score_cache": str(folder / "cache"), **settings})


def test_mean_over_references(models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path, {"model": str(models.ref_a)}, {"model": str(models.ref_b)})
    found = prepared(reference_rewards, ROWS, settings, TRAIN)
    expected = [(plain_reward(models.ref_a, row)[0] + plain_reward(models.ref_b, row)[0]) / 2 for row in DATA]
    np.testing.assert_allclose(found.columns[REFERENCE_LOGP], expected, rtol=1e-4)
    assert "5 to score" in capsys.readouterr().out
    assert "poft/reference/ref_a/data.jsonl/mean" in found.statistics
    prepared(reference_rewards, ROWS, settings, TRAIN)
    assert "5 rows cached, 0 to score" in capsys.readouterr().out


def test_only_what_is_new_is_scored(models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One edited row scores one row; an added reference scores that reference; a beta scores nothing."""
    scored: list[tuple[str, int]] = []
    original = CausalLMScorer.score

    def counted(self: CausalLMScorer, batch: Any) -> Any:
        scored.append((self.name, len(batch)))
        return original(self, batch)

    monkeypatch.setattr(CausalLMScorer, "score", counted)
    one = config(tmp_path, {"model": str(models.ref_a)})
    prepared(reference_rewards, ROWS, one, TRAIN)
    assert sum(count for _, count in scored) == 5
    scored.clear()
    edited = [dict(DATA[0], messages=[DATA[0]["messages"][0], {"role": "assistant", "content": "new"}]), *DATA[1:]]
    prepared(reference_rewards, as_rows(edited), one, TRAIN)
    assert scored == [("ref_a", 1)]
    scored.clear()
    both = config(tmp_path, {"model": str(models.ref_a)}, {"model": str(models.ref_b)})
    prepared(reference_rewards, ROWS, both, TRAIN)
    assert {name for name, _ in scored} == {"ref_b"}
    scored.clear()
    for beta in (0.5, 1.0, 2.0):
        for gamma in (-1.0, 0.0):
            swept = both.model_copy(update={"beta": beta, "gamma": gamma, "batch_tokens": int(100 * beta)})
            prepared(reference_rewards, ROWS, swept, TRAIN)
    assert scored == []


def test_missing_scores_error(models: SimpleNamespace, tmp_path: Path) -> None:
    settings = config(tmp_path, {"model": str(models.ref_a)}, missing_scores="error")
    with pytest.raises(
        ValueError, match=r"'ref_a': 5 of 5 rows have no cached score.*missing_scores.*axolotl poft score"
    ):
        prepared(reference_rewards, ROWS, settings, TRAIN)
    prepared(reference_rewards, ROWS, settings, PREPROCESS)
    prepared(reference_rewards, ROWS, settings, TRAIN)


def test_evaluation_scores_nothing(models: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="axolotl evaluate"):
        prepared(reference_rewards, ROWS, config(tmp_path, {"model": str(models.ref_a)}), RunContext("evaluate"))


def test_rows_longer_than_the_context(models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_rows([*tiny.chat_rows(2, seed=1), {"messages": [{"role": "user", "content": "alpha " * 40},
                                                             {"role": "assistant", "content": "beta"}]}])  # fmt: skip
    load = CausalLMScorer.load
    monkeypatch.setattr(CausalLMScorer, "load", lambda *_: pytest.fail("loaded before all rows were looked at"))
    for _ in range(2):  # the second time from the cache's note of their lengths
        with pytest.raises(ValueError, match=r"'short': 3 of 3 rows are longer.*data.jsonl row 2.*on_long_row"):
            prepared(
                reference_rewards,
                data,
                config(tmp_path, {"model": str(models.ref_a)}, {"model": str(models.short)}),
                TRAIN,
            )
    monkeypatch.setattr(CausalLMScorer, "load", load)
    with pytest.raises(ValueError, match=r"'short': \d of 3 rows are longer.*data.jsonl row 2.*on_long_row"):
        prepared(reference_rewards, data, config(tmp_path, {"model": str(models.short)}), TRAIN)
    dropped = prepared(
        reference_rewards, data, config(tmp_path, {"model": str(models.short), "on_long_row": "drop"}), TRAIN
    )
    assert data.keys[2].as_py() in dropped.dropped
    assert np.isnan(dropped.columns[REFERENCE_LOGP][2])


def test_scores_from_elsewhere_need_no_model(tmp_path: Path) -> None:
    keys = ROWS.keys.to_pylist()
    pq.write_table(pa.table({"row_key": keys, "reward": [-1.0, -2.0, -3.0, -4.0, -5.0]}), tmp_path / "big.parquet")
    settings = config(tmp_path, {"name": "big", "scores": str(tmp_path / "big.parquet")})
    assert prepared(reference_rewards, ROWS, settings, TRAIN).columns[REFERENCE_LOGP].tolist() == [
        -1.0,
        -2.0,
        -3.0,
        -4.0,
        -5.0,
    ]
    pq.write_table(pa.table({"row_key": keys[:3], "reward": [-1.0, -2.0, -3.0]}), tmp_path / "big.parquet")
    with pytest.raises(ValueError, match=r"'big': its imported scores lack 2 of 5 rows, the first data.jsonl row 3"):
        prepared(reference_rewards, ROWS, settings, TRAIN)


def test_a_wholly_imported_reference_need_not_exist(tmp_path: Path) -> None:
    settings = config(tmp_path, {"model": "./not_here"})
    with pytest.raises(MissingCheckpointError, match="./not_here: no such folder"):
        prepared(reference_rewards, ROWS, settings, TRAIN)
    pq.write_table(pa.table({"row_key": ROWS.keys.to_pylist(), "reward": [-1.0] * 5}), tmp_path / "s.parquet")
    import_scores(tmp_path / "s.parquet", [job_of("./not_here", ROWS.keys)], ScoreCache(tmp_path / "cache"))
    assert prepared(reference_rewards, ROWS, settings, TRAIN).columns[REFERENCE_LOGP].tolist() == [-1.0] * 5


def fake_hub(folder: Path, source: Path, commit: str) -> None:
    """A model as the hub's own cache keeps it, with `main` at a commit."""
    repository = folder / "models--org--tiny"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def test_a_hub_revision_that_has_moved(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, first, second = tmp_path / "hub", "a" * 40, "b" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    fake_hub(hub, models.ref_a, first)
    settings = config(tmp_path, {"model": "org/tiny"})
    checkpoint = resolve_checkpoint("org/tiny", None, ScoreCache(tmp_path))
    assert checkpoint.identity == {"model": "org/tiny", "commit": first}
    prepared(reference_rewards, ROWS, settings, TRAIN)
    fake_hub(hub, models.ref_b, second)
    with pytest.raises(ValueError, match=f"{first} when it was scored and is {second} now.*revision: {first}"):
        prepared(reference_rewards, ROWS, settings, TRAIN)
    prepared(reference_rewards, ROWS, config(tmp_path, {"model": "org/tiny", "revision": first}), TRAIN)
    prepared(reference_rewards, ROWS, settings, RunContext("score"))
    prepared(reference_rewards, ROWS, settings, TRAIN)
    with pytest.raises(MissingCheckpointError, match="cannot be reached"):
        resolve_checkpoint("org/never-downloaded", None, ScoreCache(tmp_path))

    def no_network(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    assert resolve_checkpoint("org/tiny", None, ScoreCache(tmp_path)).commit == second


def test_imported_scores_of_another_scorer_are_not_used_silently(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = config(tmp_path / "half", {"model": str(models.ref_a), "dtype": "bfloat16"})
    found = prepared(reference_rewards, ROWS, half, TRAIN)
    cache = ScoreCache(tmp_path / "half" / "cache")
    identity = scorer(models.ref_a, cache, dtype="bfloat16", include_end_of_turn="auto").identity
    lookup = cache.lookup(identity, ROWS.keys)
    source = str(models.ref_a)
    job = job_of(source, ROWS.keys)
    export_scores(tmp_path / "half.parquet", [Scored(job, lookup, identity)])
    import_scores(tmp_path / "half.parquet", [job], ScoreCache(tmp_path / "cache"))
    capsys.readouterr()
    again = prepared(reference_rewards, ROWS, config(tmp_path, {"model": source}), TRAIN)
    assert "imported scores were made with other settings (dtype)" in capsys.readouterr().out
    assert not np.array_equal(again.columns[REFERENCE_LOGP], found.columns[REFERENCE_LOGP])
