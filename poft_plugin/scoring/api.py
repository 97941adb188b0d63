"""Scoring without a host: conversations in, scores out, from the same cache and by the same engines."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from poft_plugin.config import ScoringBlock
from poft_plugin.data.columns import CONVERSATION, ROW_KEY, ROW_NUMBER, SOURCE
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.data.rows import Turn, dump_conversation, row_key
from poft_plugin.scoring.cache import Lookup
from poft_plugin.scoring.engines import Engine, score_jobs
from poft_plugin.scoring.jobs import Job

Messages = Sequence[Mapping[str, str]]


def rows_of(conversations: Sequence[Messages], *, source: str = "rows") -> Rows:
    """Conversations as rows; what counts is the last turn.

    Args:
        conversations: messages with `role` and `content`, the last one the response that is scored.
        source: what messages call them.

    Raises:
        ValueError: for a conversation without messages.

    Examples:
        >>> rows_of([[{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]]).where(0)[:10]
        'rows row 0'
    """
    turns = []
    for number, messages in enumerate(conversations):
        if not messages:
            raise ValueError(f"{source} row {number}: no messages")
        *prompt, last = messages
        before = [Turn(message["role"], message["content"]) for message in prompt]
        turns.append([*before, Turn(last["role"], last["content"], counted=True)])
    columns = {
        ROW_KEY: pa.array([row_key(conversation) for conversation in turns], pa.string()),
        CONVERSATION: pa.array([dump_conversation(conversation) for conversation in turns], pa.string()),
        SOURCE: pa.array([source] * len(turns), pa.string()),
        ROW_NUMBER: pa.array(range(len(turns)), pa.int64()),
    }
    return Rows(pa.table({name: pa.chunked_array([values]) for name, values in columns.items()}), {})


def score_rows(
    rows: Rows,
    jobs: Sequence[Callable[[Rows], Job]],
    *,
    cache: str | Path | None = None,
    batch_tokens: int | None = None,
    engine: Engine | None = None,
) -> list[Lookup]:
    """Every job's scores of the rows; what the cache lacks is scored now, in this process or by its launch.

        from functools import partial
        from poft_plugin.config import ReferenceConfig
        from poft_plugin.preprocessors.reference_rewards import reference_job

        model = ReferenceConfig(model="HuggingFaceTB/SmolLM2-135M-Instruct")
        (found,) = score_rows(rows_of(conversations), [partial(reference_job, model)])
        found.values  # mean log-probability per response token, nats

    Args:
        rows: as `rows_of` makes them; a row that occurs twice is scored once.
        jobs: what makes a job of rows: `reference_job` or `reward_model_job` with a model's settings.
        cache: folder of the score cache; None: $POFT_SCORE_CACHE, else ./poft_scores.
        batch_tokens: tokens of a batch; None: 8192 on a GPU, 1024 on a CPU.
        engine: how jobs are done; None: by the processes of this launch.

    Returns:
        A `Lookup` per job, aligned with the rows.

    Raises:
        ValueError: for a model that cannot be used, or a row that cannot be scored.
    """
    unique = rows.unique()
    folder = None if cache is None else str(cache)
    block = ScoringBlock.model_validate({"score_cache": folder, "batch_tokens": batch_tokens})
    found = score_jobs([make(unique) for make in jobs], block, RunContext.from_environment("score"), engine)
    place = pc.index_in(rows.keys, value_set=unique.keys.combine_chunks()).to_numpy()
    return [Lookup(lookup.values[place], lookup.num_tokens[place]) for lookup in found]
