"""Shares, resumption, refusals before and while scoring."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from poft_plugin.data.preparation import RunContext
from poft_plugin.data.rows import RowError
from poft_plugin.scoring import run as scoring_run
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.causal_lm import CausalLMScorer
from poft_plugin.scoring.run import Share, accelerator, share_of, wait_for_others
from poft_plugin.scoring.scorer import Score
from scoring.support import as_rows, score_missing, scorer

ROWS = as_rows(tiny.chat_rows(10, seed=9))


def test_every_row_is_in_exactly_one_share() -> None:
    for count in (1, 2, 3, 8):
        shares = [Share(index, count) for index in range(count)]
        for key in ROWS.keys.to_pylist():
            assert sum(share.holds(key) for share in shares) == 1
    assert not Share(None, 2).holds(ROWS.keys[0].as_py())


def test_shares_of_processes() -> None:
    """Two machines of four GPUs, two GPUs a copy: ranks 0, 1 and 4, 5 hold one."""
    contexts = [RunContext("train", rank, 8, rank % 4, 4) for rank in range(8)]
    assert [share_of(c, 2).index for c in contexts] == [0, 1, None, None, 2, 3, None, None]
    assert {share_of(c, 2).count for c in contexts} == {4}
    assert share_of(RunContext("train"), 1) == Share(0, 1)


def test_a_stopped_run_goes_on(models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after some batches: what was scored is kept, the next run scores the rest alone."""
    cache, original = ScoreCache(tmp_path), CausalLMScorer.score
    scored: list[int] = []

    def interrupted(self: CausalLMScorer, batch: Any) -> Any:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(batch))
        return original(self, batch)

    monkeypatch.setattr(CausalLMScorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_missing(scorer(models.ref_a, cache), ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=80)
    monkeypatch.setattr(CausalLMScorer, "score", original)
    left = len(ROWS) - sum(scored)
    assert 0 < left < len(ROWS)
    again = score_missing(scorer(models.ref_a, cache), ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=80)
    assert again == left
    assert (
        score_missing(scorer(models.ref_a, cache), ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=80) == 0
    )


def test_damaged_scores_are_made_again(models: SimpleNamespace, tmp_path: Path) -> None:
    """And nobody waits for them for ever: the same scores as before, from a pass over the damaged rows alone."""
    cache = ScoreCache(tmp_path)
    reference = scorer(models.ref_a, cache)
    settings: dict[str, Any] = {"share": Share(0, 1), "device": "cpu", "batch_tokens": 80}
    score_missing(reference, ROWS, cache, **settings)
    expected = cache.lookup(reference.identity, ROWS.keys)
    (file,) = (tmp_path / reference.identity.digest).glob("scores-*.parquet")
    table = pq.read_table(file)
    rewards = [float("nan"), 0.3, None, *table["reward"].to_pylist()[3:]]
    pq.write_table(table.set_column(1, "reward", pa.array(rewards, pa.float64())), file)
    assert score_missing(reference, ROWS, cache, **settings) == 3
    found = wait_for_others(reference, ROWS, cache)
    np.testing.assert_allclose(found.rewards, expected.rewards, rtol=1e-6)
    assert found.num_tokens.tolist() == expected.num_tokens.tolist()


def test_a_log_probability_above_zero_is_refused(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it written, it would count as damage, and be made again for ever."""
    monkeypatch.setattr(CausalLMScorer, "score", lambda _, batch: [Score(row.key, 0.25, 3) for row in batch])
    cache = ScoreCache(tmp_path)
    with pytest.raises(ValueError, match=r"data.jsonl row \d+ .*'ref_a' gives the reward 0.25, above 0"):
        score_missing(scorer(models.ref_a, cache), ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=80)
    assert cache.lookup(scorer(models.ref_a, cache).identity, ROWS.keys).missing.all()


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf, None, 0.5])
def test_a_damaged_score_is_named_and_made_again(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: float | None
) -> None:
    """What no log-probability is, in the file of scores: that row alone is scored again, to what it was."""
    cache, run = ScoreCache(tmp_path), {"share": Share(0, 1), "device": "cpu", "batch_tokens": 999}
    reference = scorer(models.ref_a, cache)
    score_missing(reference, ROWS, cache, **run)
    before = cache.lookup(reference.identity, ROWS.keys)
    (file,) = tmp_path.glob("*/scores-*.parquet")
    table, key = pq.read_table(file), ROWS.keys[3].as_py()
    damaged = [reward if line["row_key"] == key else line["reward"] for line in table.to_pylist()]
    pq.write_table(table.set_column(table.column_names.index("reward"), "reward", pa.array(damaged)), file)
    assert score_missing(scorer(models.ref_a, cache), ROWS, cache, **run) == 1
    assert f"1 lines cannot be scores, the first of row key {key}: reward {reward}" in capsys.readouterr().out
    again = cache.lookup(reference.identity, ROWS.keys)
    np.testing.assert_allclose(again.rewards, before.rewards, rtol=1e-6)
    np.testing.assert_array_equal(again.num_tokens, before.num_tokens)


def test_nothing_is_loaded_where_nothing_is_missing(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ScoreCache(tmp_path)
    score_missing(scorer(models.ref_a, cache), ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=999)
    monkeypatch.setattr(CausalLMScorer, "load", lambda *_: pytest.fail("loaded"))
    score_missing(scorer(models.ref_a, cache), ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=7)


def test_a_bad_row_stops_before_the_model_is_loaded(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLMScorer, "load", lambda *_: pytest.fail("loaded"))
    system = {"messages": [{"role": "system", "content": "Be kind."}, *tiny.chat_rows(1)[0]["messages"]]}
    cache, rows = ScoreCache(tmp_path), as_rows([*tiny.chat_rows(2), system])
    with pytest.raises(RowError, match=r"data.jsonl row 2 .*'ref_a' refuses.*system_turns"):
        score_missing(scorer(models.ref_a, cache), rows, cache, share=Share(0, 1), device="cpu", batch_tokens=99)
    monkeypatch.undo()
    merged = scorer(models.ref_a, cache, system_turns="merge")
    assert score_missing(merged, rows, cache, share=Share(0, 1), device="cpu", batch_tokens=99) == 3


def test_a_reward_that_is_not_finite_names_the_row(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, reference = ScoreCache(tmp_path), scorer(models.ref_a, ScoreCache(tmp_path))
    original = CausalLMScorer.load

    def broken(self: CausalLMScorer, device: str) -> None:
        original(self, device)
        self._model.get_output_embeddings().weight.data.fill_(float("nan"))

    monkeypatch.setattr(CausalLMScorer, "load", broken)
    with pytest.raises(ValueError, match=r"data.jsonl row \d+ .*'ref_a' gives the reward nan.*dtype"):
        score_missing(reference, ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=99)


def test_waiting_ends_when_the_others_have_written(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, reference = ScoreCache(tmp_path), scorer(models.ref_a, ScoreCache(tmp_path))
    score_missing(reference, ROWS, cache, share=Share(0, 2), device="cpu", batch_tokens=99)

    def the_other(_: float) -> None:
        score_missing(scorer(models.ref_a, cache), ROWS, cache, share=Share(1, 2), device="cpu", batch_tokens=99)

    monkeypatch.setattr(scoring_run.time, "sleep", the_other)
    assert not scoring_run.wait_for_others(reference, ROWS, cache).missing.any()


def test_devices_that_are_not_there() -> None:
    assert accelerator(RunContext("score"), 1) == "cpu"
    with pytest.raises(ValueError, match="devices: 4"):
        accelerator(RunContext("score"), 4)
