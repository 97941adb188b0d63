"""Scoring without a host: the numbers of a plain float64 loop, a row once, from one cache."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from poft_plugin.config import ReferenceConfig, RewardModelConfig
from poft_plugin.preprocessors.reference_rewards import reference_job
from poft_plugin.preprocessors.response_scores import reward_model_job
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring.api import rows_of, score_rows
from scoring.ranked_support import plain_score
from scoring.support import plain_reward

DATA = tiny.chat_rows(5, seed=2)
CONVERSATIONS = [row["messages"] for row in (*DATA, DATA[0])]


def test_two_models_score_conversations(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grader = tiny.reward_model(tmp_path / "grader")
    jobs = [
        partial(reference_job, ReferenceConfig(model=str(models.ref_a), dtype="float32"), include_end_of_turn=False),
        partial(reward_model_job, RewardModelConfig(model=str(grader), dtype="float32")),
    ]
    rows = rows_of(CONVERSATIONS)
    likelihoods, rewards = score_rows(rows, jobs, cache=tmp_path / "scores")
    expected = [plain_reward(models.ref_a, row) for row in (*DATA, DATA[0])]
    np.testing.assert_allclose(likelihoods.values, [reward for reward, _ in expected], rtol=1e-5)
    assert likelihoods.num_tokens.tolist() == [count for _, count in expected]
    np.testing.assert_allclose(
        rewards.values, [plain_score(grader, rows.conversation(i)) for i in range(len(rows))], rtol=1e-4, atol=1e-5
    )
    assert "5 to score" in capsys.readouterr().out  # the row that occurs twice once
    monkeypatch.setattr(CausalLMScorer, "load", lambda *_: pytest.fail("all is cached"))
    again, _ = score_rows(rows, jobs, cache=tmp_path / "scores")
    np.testing.assert_array_equal(again.values, likelihoods.values)


def test_one_model_twice_is_refused_by_name(models: SimpleNamespace, tmp_path: Path) -> None:
    job = partial(reference_job, ReferenceConfig(model=str(models.ref_a)))
    with pytest.raises(ValueError, match=r"two jobs are called '.*ref_a': a reference \(ref_a\) and a reference"):
        score_rows(rows_of(CONVERSATIONS), [job, job], cache=tmp_path)
    with pytest.raises(ValueError, match="mine row 1: no messages"):
        rows_of([CONVERSATIONS[0], []], source="mine")
