"""DPO's reference: the start policy's sums over the labels of given tokens, against its own logits in float64."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pyarrow as pa
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from poft_plugin.config import DeftConfig
from poft_plugin.data.columns import REFERENCE_SUM_LOGPS
from poft_plugin.data.preparation import Policy, Rows, RunContext
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import Turn
from poft_plugin.preprocessors.reference_sum_logps import reference_sum_logps, start_policy_job, token_rows
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.opened import OpenedJob, open_job
from scoring.ranked_support import counted, ranked
from scoring.support import prepared

VOCABULARY = 350


def token_ids() -> list[list[list[int]]]:
    """Rows of two to four sequences; the last two rows share one, and one is trained on from its first token on."""
    rng = random.Random(0)
    rows = [
        [[rng.randrange(VOCABULARY) for _ in range(rng.randint(3, 40))] for _ in range(rng.randint(2, 4))]
        for _ in range(6)
    ]
    rows[5][0] = rows[4][0]
    rows[0][1] = rows[0][1][:2]
    assert counted(rows[0][1])[0] != -100
    return rows


SEQUENCES = token_ids()
UNIQUE = {tuple(ids) for row in SEQUENCES for ids in row}
SAMPLES = [
    RankedSample((Turn("user", f"{n}?"),), tuple("abcd"[: len(row)]), tuple(range(len(row))))
    for n, row in enumerate(SEQUENCES)
]


@pytest.fixture(scope="module")
def tokenizer(models: SimpleNamespace) -> Any:
    return AutoTokenizer.from_pretrained(models.policy)


def run_of(models: SimpleNamespace, tokenizer: Any, purpose: Any = "train", **policy: Any) -> RunContext:
    known = {"sequence_len": 64, **policy}
    return RunContext(purpose, policy=Policy(str(models.policy), tokenizer, **known))


def sums(rows: Rows, cache: Path, run: RunContext, **settings: Any) -> list[list[float]]:
    block = DeftConfig.model_validate({"score_cache": str(cache), **settings})
    return [list(row) for row in prepared(reference_sum_logps, rows, block, run).columns[REFERENCE_SUM_LOGPS]]


def opened(policy: Policy, cache: ScoreCache) -> OpenedJob:
    return open_job(start_policy_job(policy, Rows.none()), cache)


def summed(logps: torch.Tensor, ids: list[int]) -> float:
    """Over the labels, from the log-probability of each token but the first."""
    labels = counted(ids)
    return float(sum(logps[t - 1] for t in range(1, len(ids)) if labels[t] != -100))


@pytest.fixture(scope="module")
def expected(models: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    """Sums in float64, and the plain form's in the policy's own precision."""
    own = AutoModelForCausalLM.from_pretrained(models.policy).eval()
    wide = AutoModelForCausalLM.from_pretrained(models.policy, dtype=torch.float64).eval()
    exact, plain = [], []
    for ids in (ids for row in SEQUENCES for ids in row):
        tokens = torch.tensor(ids)
        with torch.no_grad():
            exact.append(summed(oracles.model_token_logps(wide(tokens[None]).logits[0], tokens), ids))
            logits = own(tokens[None]).logits[0, :-1]
        plain.append(summed(-torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none"), ids))
    return np.array(exact), np.array(plain)


@pytest.mark.parametrize("batch_tokens", [1, 96, 8192])
def test_sums_are_the_models_own(
    models: SimpleNamespace, tokenizer: Any, tmp_path: Path, expected: tuple[np.ndarray, np.ndarray], batch_tokens: int
) -> None:
    """No farther from float64 than the plain form in the same precision, whatever the batches."""
    exact, plain = expected
    found = sums(ranked(SAMPLES, SEQUENCES), tmp_path, run_of(models, tokenizer), batch_tokens=batch_tokens)
    assert [len(row) for row in found] == [len(row) for row in SEQUENCES]
    budget = 2 * float(np.abs(plain - exact).max()) + 1e-6 * float(np.abs(exact).max())
    assert float(np.abs(np.array([value for row in found for value in row]) - exact).max()) <= budget
    assert found[4][0] == found[5][0]


def test_scored_once_and_never_again(
    models: SimpleNamespace, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The batch size is no part of what scores are known by; another process of another purpose finds them."""
    rows, run = ranked(SAMPLES, SEQUENCES), run_of(models, tokenizer)
    found = sums(rows, tmp_path, run, batch_tokens=1)
    assert f"start policy policy: 0 rows cached, {len(UNIQUE)} to score" in capsys.readouterr().out
    monkeypatch.setattr(CausalLMScorer, "load", lambda *_: pytest.fail("the policy was loaded"))
    assert sums(rows, tmp_path, run, missing_scores="error") == found
    assert sums(rows, tmp_path, run_of(models, tokenizer, "evaluate"), batch_tokens=64) == found
    edited = [*SEQUENCES[:-1], [SEQUENCES[-1][0], [5, 6, 7, 8]]]
    with pytest.raises(ValueError, match=rf"'policy': 1 of {len(UNIQUE) - len(SEQUENCES[-1]) + 2} rows have no cach"):
        sums(ranked([*SAMPLES[:-1], SAMPLES[0]], edited), tmp_path, run, missing_scores="error")
    with pytest.raises(ValueError, match=r"`axolotl evaluate` scores nothing"):
        sums(ranked([SAMPLES[0]], [[[1, 2, 3], [4, 5, 6]]]), tmp_path, run_of(models, tokenizer, "evaluate"))


def test_rows_that_are_too_long_are_not_scored(models: SimpleNamespace, tokenizer: Any, tmp_path: Path) -> None:
    """They are left out later; a row's other sequences would be scored for nothing."""
    limit = sorted(max(map(len, row)) for row in SEQUENCES)[2]
    fitting = [max(map(len, row)) <= limit for row in SEQUENCES]
    rows = ranked(SAMPLES, SEQUENCES)
    sequences, keys = token_rows(rows, limit)
    wanted = {tuple(ids) for row, fits in zip(SEQUENCES, fitting, strict=True) if fits for ids in row}
    assert {tuple(ids) for ids in sequences.table["input_ids"].to_pylist()} == wanted
    assert [len(row) for row in keys] == [len(row) for row in SEQUENCES]
    found = sums(rows, tmp_path, run_of(models, tokenizer, sequence_len=limit))
    known = set(sequences.keys.to_pylist())
    for row, names in zip(found, keys, strict=True):
        assert np.isfinite(row).tolist() == [name in known for name in names]
    assert [bool(np.isfinite(row).all()) for row in found] == fitting


def test_rows_are_prepared_as_they_are(models: SimpleNamespace, tokenizer: Any, tmp_path: Path) -> None:
    """A first token is predicted by nothing: it is no response token of the plan, either."""
    sequences, _ = token_rows(ranked(SAMPLES, SEQUENCES), 64)
    scorer: Any = opened(Policy(str(models.policy), tokenizer, 64), ScoreCache(tmp_path)).scorer
    for index, ids in enumerate(sequences.table["input_ids"].to_pylist()):
        row = scorer.prepare_row(sequences, index)
        assert row.input_ids.tolist() == ids
        assert row.counted.tolist() == [False, *(label != -100 for label in counted(ids)[1:])]


def test_a_sequence_is_known_by_its_labels_too() -> None:
    same = [[[1, 2, 3, 4, 5, 6]] * 2]
    rows = ranked(SAMPLES[:1], same)
    assert len(token_rows(rows, 64)[0]) == 1
    labels = rows.table["ranked_labels"].to_pylist()
    labels[0][2] = -100
    place = rows.table.column_names.index("ranked_labels")
    edited = pa.chunked_array([pa.array(labels, pa.list_(pa.int32()))])
    assert len(token_rows(Rows(rows.table.set_column(place, "ranked_labels", edited), {}), 64)[0]) == 2


def identity(models: SimpleNamespace, tokenizer: Any, cache: Path, **policy: Any) -> Any:
    found = opened(Policy(str(models.policy), tokenizer, **{"sequence_len": 64, **policy}), ScoreCache(cache))
    assert found.scorer is not None
    return found.scorer.identity


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


def test_identity(models: SimpleNamespace, tokenizer: Any, tmp_path: Path) -> None:
    """Weights, dtype and quantization; neither lengths, attention, tokenizer nor folders."""
    first = identity(models, tokenizer, tmp_path)
    assert first.fields.keys() == {"contract", "weights", "dtype", "quantization"}
    for other in ({"sequence_len": 8}, {"attn_implementation": "eager"}):
        assert identity(models, tokenizer, tmp_path / "elsewhere", **other).digest == first.digest
    assert identity(models, AutoTokenizer.from_pretrained(models.ref_a), tmp_path).digest == first.digest
    changed = [{"dtype": "bfloat16"}, {"quantization": {"load_in_8bit": True}}, {"quantization": NF4}]
    digests = {identity(models, tokenizer, tmp_path, **policy).digest for policy in changed}
    assert len(digests | {first.digest}) == 4
    moved = SimpleNamespace(policy=shutil.copytree(models.policy, tmp_path / "moved"))
    assert identity(moved, tokenizer, tmp_path).digest == first.digest
    other = tiny.policy(tmp_path / "other", seed=8)
    assert identity(SimpleNamespace(policy=other), tokenizer, tmp_path).digest != first.digest


def test_it_is_loaded_as_the_policy_is(models: SimpleNamespace, tokenizer: Any, tmp_path: Path) -> None:
    policy = Policy(str(models.policy), tokenizer, 64, quantization=NF4, dtype="bfloat16", attn_implementation="eager")
    scorer: Any = opened(policy, ScoreCache(tmp_path)).scorer
    assert scorer.dtype == torch.bfloat16
    assert scorer.settings.attn_implementation == "eager"
    quantization = scorer.quantization_config
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert quantization.bnb_4bit_compute_dtype == torch.bfloat16
    assert (scorer.context_length, scorer.devices) == (None, 1)


def test_tokens_without_weights_are_refused(models: SimpleNamespace, tmp_path: Path) -> None:
    grown = AutoTokenizer.from_pretrained(models.policy)
    grown.add_tokens([f"<new {number}>" for number in range(100)])
    with pytest.raises(ValueError, match=rf"its tokenizer has {len(grown)} tokens, its weights 400"):
        identity(models, grown, tmp_path)
    with pytest.raises(ValueError, match=r"start policy ./gone: no such folder"):
        identity(SimpleNamespace(policy="./gone"), grown, tmp_path)
