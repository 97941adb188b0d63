"""DPO's reference: the policy's own start weights, scored once before training, over the tokens that it trains on.

So no second model is in memory while the policy trains, with an adapter or without. Rows are known by their tokens, not
by their texts: the policy's template, its end-of-turn tokens and its labels are all in them.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel
from transformers import BitsAndBytesConfig

from poft_plugin.config import DeftConfig, ReferenceConfig
from poft_plugin.data.columns import (
    RANKED_INPUT_IDS,
    RANKED_LABELS,
    REFERENCE_SUM_LOGPS,
    ROW_KEY,
    ROW_NUMBER,
    SEQUENCE_LENGTHS,
    SOURCE,
)
from poft_plugin.data.groups import longest_sequences, ragged
from poft_plugin.data.preparation import Policy, Prepared, Rows, RunContext
from poft_plugin.data.rows import KEY_LENGTH
from poft_plugin.losses.logps import IGNORED
from poft_plugin.scoring.cache import ScoreCache, cache_folder
from poft_plugin.scoring.causal_lm import CausalLMScorer
from poft_plugin.scoring.checkpoints import resolve_checkpoint
from poft_plugin.scoring.scorer import Identity, PreparedRow
from poft_plugin.scoring.sources import Source, score_all

CONTRACT = "causal LM, mean log-probability of the labels of given tokens, version 2"
KIND = "start policy"
TOKENS, LABELS = "input_ids", "labels"


@dataclass
class StartPolicyScorer(CausalLMScorer):
    """Scores token sequences with the policy's start weights.

    Args:
        settings: where the policy is, as a reference.
        checkpoint: the same, resolved.
        quantization: keywords of `BitsAndBytesConfig` that the policy is loaded with, or None.
    """

    quantization: dict[str, Any] | None = field(default=None, kw_only=True)

    @property
    def kind(self) -> str:
        """What it is in messages."""
        return KIND

    @property
    def attention(self) -> str | None:
        """As the policy's, whatever it leaves out: both are to be the same function."""
        return self.settings.attn_implementation

    @cached_property
    def identity(self) -> Identity:
        """What its scores depend on: neither tokenizer nor template, since rows are tokens."""
        return Identity(
            {
                "contract": CONTRACT,
                **self.checkpoint.identity,
                "dtype": str(self.dtype).removeprefix("torch."),
                "quantization": self.quantization,
                **self.stored_quantization,
            },
            highest=0.0,
        )

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """As the policy's."""
        return None if self.quantization is None else BitsAndBytesConfig(**self.quantization)

    @property
    def context_length(self) -> int | None:
        """No bound: rows over `sequence_len` are not asked for."""
        return None

    def prepare_row(self, rows: Rows, index: int) -> PreparedRow:
        """One of the rows of `token_rows`, as it is; the first token is predicted by nothing."""
        ids, labels = (np.asarray(rows.table[name][index].values) for name in (TOKENS, LABELS))
        counted = labels != IGNORED
        counted[0] = False
        return PreparedRow(rows.keys[index].as_py(), ids, counted)


def reference_sum_logps(rows: Rows, settings: BaseModel, run: RunContext) -> Prepared:
    """Attaches `reference_sum_logps`, `log pi_ref(y | x)` of each response (Eq. 5), pi_ref being the start checkpoint.

    Args:
        rows: unique ranked rows, with their tokens.
        settings: the block `deft:`.
        run: this process, with its policy; scoring is shared among all, without collectives.

    Raises:
        ValueError: where scores are missing and nothing may be scored.
    """
    assert isinstance(settings, DeftConfig)
    assert run.policy is not None
    cache = ScoreCache(cache_folder(settings.score_cache))
    source = open_start_policy(run.policy, cache)
    sequences, keys = token_rows(rows, run.policy.sequence_len)
    (lookup,) = score_all([source], sequences, cache, settings=settings, run=run)
    sums = (lookup.rewards * lookup.num_tokens).tolist()
    sum_of = dict(zip(sequences.keys.to_pylist(), sums, strict=True))
    # a row that is too long to be trained on has none, and is left out later
    return Prepared({REFERENCE_SUM_LOGPS: ragged([[sum_of.get(key, float("nan")) for key in row] for row in keys])})


def open_start_policy(policy: Policy, cache: ScoreCache) -> Source:
    """Finds the policy's start weights, without loading them.

    Raises:
        ValueError: if they are not there, or the tokenizer has tokens that the weights have no rows for.
    """
    names = ("model", "revision", "dtype", "attn_implementation", "trust_remote_code")
    settings = ReferenceConfig.model_validate({name: getattr(policy, name) for name in names})
    checkpoint = resolve_checkpoint(policy.model, policy.revision, cache, what=KIND)
    quantization = None if policy.quantization is None else dict(policy.quantization)
    scorer = StartPolicyScorer(settings, checkpoint, quantization=quantization)
    known = int(scorer.config.get_text_config().vocab_size)
    if policy.vocab_size > known:
        raise ValueError(
            f"base_model {policy.model}: its tokenizer has {policy.vocab_size} tokens, its weights {known}. New rows "
            "would begin at random, and the start policy could not be scored: train them in first, or save a model "
            "with resized embeddings and name that"
        )
    return Source(KIND, settings, scorer, None)


def token_rows(rows: Rows, sequence_len: int) -> tuple[Rows, list[list[str]]]:
    """Every sequence of the rows as a row of its own, known by its tokens and labels.

    Args:
        rows: ranked rows.
        sequence_len: rows with a longer sequence are left out: they are not trained on.

    Returns:
        Unique rows with `input_ids` and `labels`, and the key of each row's each sequence.
    """
    fitting = longest_sequences(rows) <= sequence_len
    keys: list[list[str]] = []
    found: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
    for index, lengths in enumerate(rows.table[SEQUENCE_LENGTHS].to_pylist()):
        ids, labels = (np.asarray(rows.table[name][index].values) for name in (RANKED_INPUT_IDS, RANKED_LABELS))
        ends = np.cumsum(lengths)[:-1]
        keys.append([])
        for tokens, counted in zip(np.split(ids, ends), np.split(labels, ends), strict=True):
            key = hashlib.sha256(tokens.astype(np.int32).tobytes() + counted.astype(np.int32).tobytes())
            keys[-1].append(key.hexdigest()[:KEY_LENGTH])
            if fitting[index]:
                found.setdefault(keys[-1][-1], (tokens, counted, index))
    first = pa.array([index for _, _, index in found.values()], pa.int64())
    table = pa.table(
        {
            ROW_KEY: pa.array(list(found), pa.string()),
            TOKENS: pa.array([tokens for tokens, _, _ in found.values()], pa.list_(pa.int32())),
            LABELS: pa.array([labels for _, labels, _ in found.values()], pa.list_(pa.int32())),
            SOURCE: rows.table[SOURCE].take(first),
            ROW_NUMBER: rows.table[ROW_NUMBER].take(first),
        }
    )
    return Rows(table, {}), keys
