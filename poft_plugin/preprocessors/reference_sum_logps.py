"""DPO's reference: log-probabilities of the policy's own start weights, of the rows that are trained on alone."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from poft_plugin.config import ReferenceConfig, ScoringBlock
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
from poft_plugin.scorers.start_policy import KIND, LABELS, TOKENS, StartPolicyScorer
from poft_plugin.scoring.cache import Lookup
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.jobs import Job, Preparation, preprocessor


@preprocessor(reads=ScoringBlock, scope="kept", columns=(REFERENCE_SUM_LOGPS,), start_policy=True)
def reference_sum_logps(rows: Rows, settings: BaseModel, context: RunContext) -> Preparation:
    """Attaches `reference_sum_logps`, `log pi_ref(y | x)` of each response (Eq. 5), pi_ref being the start checkpoint.

    Args:
        rows: unique ranked rows that are trained or evaluated on, with their tokens.
        settings: any block that scores.
        context: this process, with its policy.
    """
    assert context.policy is not None
    sequences, keys = token_rows(rows, context.policy.sequence_len)

    def attach(lookups: Sequence[Lookup]) -> Prepared:
        (lookup,) = lookups
        sums = (lookup.values * lookup.num_tokens).tolist()
        sum_of = dict(zip(sequences.keys.to_pylist(), sums, strict=True))
        # a row that is too long to be trained on has none, and is left out later
        return Prepared({REFERENCE_SUM_LOGPS: ragged([[sum_of.get(key, float("nan")) for key in row] for row in keys])})

    return Preparation((start_policy_job(context.policy, sequences),), attach)


def start_policy_job(policy: Policy, sequences: Rows) -> Job:
    """The policy's start weights over sequences of tokens, known by these."""
    names = ("model", "revision", "dtype", "attn_implementation", "trust_remote_code")
    settings = ReferenceConfig.model_validate({name: getattr(policy, name) for name in names})
    quantization = None if policy.quantization is None else dict(policy.quantization)

    def make(checkpoint: Checkpoint) -> StartPolicyScorer:
        scorer = StartPolicyScorer(settings, checkpoint, quantization=quantization)
        known = int(scorer.config.get_text_config().vocab_size)
        if policy.vocab_size > known:
            raise ValueError(
                f"base_model {policy.model}: its tokenizer has {policy.vocab_size} tokens, its weights {known}. New "
                "rows would begin at random, and the start policy could not be scored: train them in first, or save a "
                "model with resized embeddings and name that"
            )
        return scorer

    return Job(KIND, KIND, settings, sequences, make, highest=0.0)


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
