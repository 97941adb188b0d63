"""The last steps of preparing preference rows: judged by length, checked against steps and packs, laid out."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset
from datasets.table import InMemoryTable

from poft_plugin.data.columns import (
    ORDER,
    RANKED_INPUT_IDS,
    RANKED_LABELS,
    RANKS,
    ROW_INDEX,
    ROW_KEY,
    ROW_NUMBER,
    SEQUENCE_LENGTHS,
    SOURCE,
)
from poft_plugin.data.groups import in_order, lay_out, longest_sequences
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.hosts.axolotl.left_out import over_length

LOG = get_logger("axolotl.poft_plugin")  # the host shows messages of its own namespace only

RANKED_COLUMNS = (RANKED_INPUT_IDS, RANKED_LABELS, SEQUENCE_LENGTHS)


def not_in_evaluation(train: Rows, evaluation: Rows) -> np.ndarray:
    """`(n,)`: training rows that are no evaluation rows, so that nothing is graded or counted on those."""
    seen = pc.is_in(train.keys, value_set=pc.unique(evaluation.keys.combine_chunks()))
    return np.asarray(pc.invert(seen).to_numpy())


def short_enough(rows: Rows, cfg: DictDefault) -> np.ndarray:
    """`(n,)`: rows of which every sequence fits into `sequence_len`, as the host's own length filter asks of a row.

    Raises:
        ValueError: with `excess_length_strategy: raise`, naming the longest row.
    """
    lengths = longest_sequences(rows)
    keep: np.ndarray = lengths <= cfg.sequence_len
    if (cfg.excess_length_strategy or "drop").lower() == "raise" and not keep.all():
        worst = int(lengths.argmax())
        raise ValueError(
            f"{int((~keep).sum())} of {len(rows)} rows have a sequence of more than sequence_len {cfg.sequence_len} "
            f"tokens, the longest {rows.where(worst)} with {lengths[worst]} (excess_length_strategy: raise)"
        )
    return keep


def too_long(rows: Rows, cfg: DictDefault) -> tuple[str, str]:
    """Why rows are left out that `short_enough` does not keep, and the remedy."""
    lengths = longest_sequences(rows)
    worst = int(lengths.argmax())
    return over_length(cfg.sequence_len, rows.where(worst), int(lengths[worst]))


def report_ties(rows: Rows) -> None:
    """Says how many training rows hold no preference: all of their responses have one rank, by label or by score."""
    tied = [index for index, ranks in enumerate(rows.attached.get(RANKS, ())) if len({*ranks}) == 1]
    if tied:
        LOG.warning(
            f"{len(tied):,} of {len(rows):,} rows to train on have responses of equal rank alone, so that none is "
            f"preferred (the first: {rows.where(tied[0])}): a preference loss learns nothing from them"
        )


def check_pack(rows: Rows, lengths: np.ndarray, cfg: DictDefault) -> None:
    """Refuses packs that cannot hold the largest group: the sequences of a sample stay together.

    Args:
        rows: of the training set, for the message.
        lengths: `(n,)`, tokens of each row as it is laid out.
        cfg: the host's config.

    Raises:
        ValueError: naming the row, its tokens, a pack's tokens and the remedies.
    """
    worst, length = int(lengths.argmax()), int(lengths.max())
    rows_apart, capacity = _rows_apart(cfg), pack_tokens(cfg)
    if length > capacity:
        remedy = f"`sequence_len: {length}`" if rows_apart else f"`micro_batch_size: {-(-length // cfg.sequence_len)}`"
        raise ValueError(
            f"sample_packing: {rows.where(worst)} has {length} tokens in all its responses, a pack holds {capacity} "
            f"(sequence_len {cfg.sequence_len}{'' if rows_apart else f' x micro_batch_size {cfg.micro_batch_size}'}). "
            f"Set {remedy} or more, or `sample_packing: false`"
        )


def pack_tokens(cfg: DictDefault) -> int:
    """Tokens that a row of a packed batch holds."""
    return int(cfg.sequence_len * (1 if _rows_apart(cfg) else cfg.micro_batch_size))


def _rows_apart(cfg: DictDefault) -> bool:
    """The host packs `micro_batch_size` rows, or, where attention takes any length, one row of as many tokens."""
    return bool(not cfg.attn_supports_packing if cfg.multipack_real_batches is None else cfg.multipack_real_batches)


def check_one_step(count: int, cfg: DictDefault, context: RunContext) -> None:
    """Refuses fewer training rows than one optimizer step takes.

    Raises:
        ValueError: naming both numbers and the remedies.
    """
    per_batch = 1 if cfg.sample_packing else cfg.micro_batch_size
    step = per_batch * cfg.gradient_accumulation_steps * context.world_size
    if count < step:
        raise ValueError(
            f"{count} rows are left to train on, fewer than the {step} of one optimizer step (micro_batch_size "
            f"{cfg.micro_batch_size} x gradient_accumulation_steps {cfg.gradient_accumulation_steps} x "
            f"{context.world_size} processes). Raise `deft.top_percent`, set `train_on: A+B`, or lower one of them"
        )


def laid_out(rows: Rows, names: list[str], *, share_prompts: bool = False) -> Dataset:
    """The data set that the trainer gets: tokens of whole groups, from best to worst, and the method's columns."""
    order = rows.attached.get(ORDER)
    columns = {name: _column(rows.attached[name], order) for name in names if name != ORDER}
    columns |= {name: rows.table[name] for name in (ROW_KEY, SOURCE, ROW_NUMBER)}
    columns[ROW_INDEX] = pa.array(np.arange(len(rows)))
    table = lay_out(rows, share_prompts=share_prompts)
    for name, values in columns.items():
        table = table.append_column(name, values)
    return Dataset(InMemoryTable(table))


def _column(values: np.ndarray, order: np.ndarray | None) -> pa.Array:
    if values.dtype == object and len(values) and isinstance(values[0], list):
        return pa.array(in_order(values, order))
    return pa.array(values)
