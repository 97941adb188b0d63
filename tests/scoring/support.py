"""Rows and scorers for the scoring tests, and a plain float64 loop to compare with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from poft_plugin.config import ReferenceConfig, RewardModelConfig
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.data.rows import Turn, dump_conversation, row_key
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scorers.reward_model import RewardModelScorer
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.checkpoints import Checkpoint, resolve_checkpoint
from poft_plugin.scoring.jobs import Job, Preprocessor
from poft_plugin.scoring.run import prepare_missing, score_prepared
from poft_plugin.scoring.scorer import Scorer
from poft_plugin.scoring.shares import Share
from poft_plugin.scoring.stages import Stage


def conversation(row: dict[str, Any]) -> tuple[Turn, ...]:
    """A chat row, all assistant turns counted."""
    return tuple(Turn(m["role"], m["content"], m["role"] == "assistant") for m in row["messages"])


def as_rows(rows: list[dict[str, Any]], source: str = "data.jsonl") -> Rows:
    """Rows of one data set."""
    return rows_of([conversation(row) for row in rows], source)


def rows_of(conversations: Sequence[Sequence[Turn]], source: str = "data.jsonl") -> Rows:
    """Conversations as rows of one data set."""
    return Rows(
        pa.table(
            {
                "row_key": pa.chunked_array([[row_key(c) for c in conversations]]),
                "conversation": pa.chunked_array([[dump_conversation(c) for c in conversations]]),
                "source": pa.chunked_array([[source] * len(conversations)]),
                "row_number": pa.chunked_array([list(range(len(conversations)))]),
            }
        ),
        {},
    )


def prepared(preprocessor: Preprocessor, rows: Rows, settings: BaseModel, context: RunContext) -> Prepared:
    """A preprocessor's columns, with what it asks for scored."""
    return Stage.of([(preprocessor, settings)], rows, context).prepared()


def job_of(name: str, keys: pa.ChunkedArray, *, kind: str = "reference", highest: float | None = 0.0) -> Job:
    """A job over rows of these keys whose model is nowhere; their texts are `text of KEY`."""
    texts = pa.chunked_array([[f"text of {key}" for key in keys.to_pylist()]])
    rows = Rows(pa.table({"row_key": keys, "conversation": texts}), {})
    return Job(name, kind, ReferenceConfig(model=name), rows, never, highest=highest)


def never(checkpoint: Checkpoint) -> Scorer:
    """In the place of a scorer that must not be made."""
    raise AssertionError(checkpoint)


def scorer(folder: Path, cache: ScoreCache, *, include_end_of_turn: Any = False, **settings: Any) -> CausalLMScorer:
    """A scorer of a local model."""
    reference = ReferenceConfig(model=str(folder), **settings)
    checkpoint = resolve_checkpoint(str(folder), reference.revision, cache)
    return CausalLMScorer(reference, checkpoint, include_end_of_turn)


def grader(folder: Path, cache: ScoreCache, **settings: Any) -> RewardModelScorer:
    """A scorer of a local reward model."""
    model = RewardModelConfig(model=str(folder), **settings)
    return RewardModelScorer(model, resolve_checkpoint(str(folder), model.revision, cache, "reward model"))


def score_missing(
    reference: Scorer, rows: Rows, cache: ScoreCache, *, share: Share, device: str, batch_tokens: int
) -> int:
    """Prepares and scores one process's share, as the preprocessor does."""
    prepared = prepare_missing(reference, rows, cache, share)
    score_prepared(reference, prepared, rows, cache, device=device, batch_tokens=batch_tokens)
    return len(prepared)


def plain_reward(folder: Path, row: dict[str, Any]) -> tuple[float, int]:
    """Render, find the response in the text, full log-softmax in float64, one row, no padding.

    The counted tokens are those that share a character with an assistant's text. Texts here have one space between
    words and occur once in the rendered row, so that `str.find` and the tokenizer's own offsets suffice.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counted = set()
    position = 0
    for message in row["messages"]:
        content = message["content"].strip()
        begin = text.find(content, position)
        assert begin >= 0
        position = begin + len(content)
        if message["role"] == "assistant":
            spans = enumerate(encoding["offset_mapping"])
            counted |= {i for i, (start, end) in spans if min(end, position) > max(start, begin)}
    ids = torch.tensor(encoding["input_ids"])
    with torch.no_grad():
        logps = model(ids[None]).logits[0].log_softmax(-1)
    values = [float(logps[i - 1, ids[i]]) for i in sorted(counted) if i > 0]
    return sum(values) / len(values), len(values)
