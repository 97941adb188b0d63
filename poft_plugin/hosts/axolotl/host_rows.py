"""The host's prepared data sets, and their rows by content."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from axolotl.common.datasets import load_datasets as load_host_datasets
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset, concatenate_datasets

from poft_plugin.data.columns import CONVERSATION, DROPPABLE, GROUP, LEFT_OUT, ROW_KEY, ROW_NUMBER, SOURCE
from poft_plugin.data.preparation import Columns, Prepared, Rows, RunContext
from poft_plugin.data.split import evaluation_rows
from poft_plugin.hosts.axolotl.entries import SUPPORTED_TYPES
from poft_plugin.hosts.axolotl.left_out import left_out_lines, nothing_left, set_name
from poft_plugin.hosts.axolotl.ranked_datasets import RANKED_COLUMNS

LOG = get_logger("axolotl.poft_plugin")  # the host shows messages of its own namespace only

TEXT_COLUMNS = (CONVERSATION, SOURCE, ROW_NUMBER, GROUP, DROPPABLE, LEFT_OUT)
"""What rows carry until their scores are joined."""


@dataclass(frozen=True)
class HostRows:
    """A prepared data set of the host and its rows by content.

    Args:
        dataset: the host's.
        rows: its `row_key` and text columns, in order.
        name: the key that they come from, for messages.
    """

    dataset: Dataset
    rows: Rows
    name: str

    @classmethod
    def of(cls, dataset: Dataset, name: str) -> "HostRows":
        """Reads the text columns out of a prepared data set.

        Raises:
            ValueError: if they are not there: the host leaves rows alone that are tokens already.
        """
        names = [name for name in (ROW_KEY, *TEXT_COLUMNS, *RANKED_COLUMNS) if name in dataset.column_names]
        if ROW_KEY not in names:
            raise ValueError(
                "datasets: rows that are already tokenized (they have input_ids and labels) hold no text that "
                f"references could score; give raw rows. What works: {SUPPORTED_TYPES}"
            )
        return cls(dataset, Rows(dataset.select_columns(names).with_format("arrow")[:], {}), name)

    def attach(self, columns: Columns) -> "HostRows":
        """The same with these columns; one that is not for all of these rows is left out."""
        there = {name: values for name, values in columns.items() if not _has_gaps(values)}
        return replace(self, rows=replace(self.rows, attached={**self.rows.attached, **there}))

    def select(self, keep: np.ndarray) -> "HostRows":
        """The rows that are kept."""
        attached = {name: values[keep] for name, values in self.rows.attached.items()}
        rows = Rows(self.rows.table.filter(pa.array(keep)), attached)
        return replace(self, dataset=self.dataset.select(np.flatnonzero(keep)), rows=rows)


def load_host_rows(cfg: DictDefault) -> tuple[HostRows, HostRows | None, int | None]:
    """Training and evaluation rows as the host prepares them, and its own step count.

    `val_set_size` rows are set aside by their keys: the host takes the last ones of its own shuffle.

    Raises:
        ValueError: as `HostRows.of`, or if no row is left to train on.
    """
    meta = load_host_datasets(cfg=cfg)
    trained, evaluated = (set_name(cfg, evaluation=evaluation) for evaluation in (False, True))
    if meta.eval_dataset is None or cfg.test_datasets:
        evaluation = None if meta.eval_dataset is None else HostRows.of(meta.eval_dataset, evaluated)
        train = HostRows.of(meta.train_dataset, trained)
        _report_left_out([train] if evaluation is None else [train, evaluation])
        return train, evaluation, meta.total_num_steps
    whole = HostRows.of(concatenate_datasets([meta.train_dataset, meta.eval_dataset]), trained)
    _report_left_out([whole])
    aside = evaluation_rows(whole.rows.keys.to_pylist(), len(meta.eval_dataset))
    train = selected(whole, ~aside, f"for evaluation (val_set_size: {cfg.val_set_size})")
    return train, replace(whole.select(aside), name=evaluated), meta.total_num_steps


def _report_left_out(parts: Sequence[HostRows]) -> None:
    """Said in each command, also where the host reads rows that it prepared before."""
    if RunContext.from_environment("score").rank == 0:
        for line in left_out_lines(part.rows.table for part in parts):
            print(line, flush=True)


def unique_rows(train: HostRows | None, evaluation: HostRows | None = None) -> Rows:
    """Every row of both sets once; a row that is in both is an evaluation row.

    Raises:
        ValueError: as `Rows.unique`.
    """
    parts = [part.rows.table for part in (train, evaluation) if part is not None]
    unique = Rows(pa.concat_tables(parts), {}).unique()
    if evaluation is None:
        return unique
    evaluated = pc.is_in(unique.keys, value_set=pc.unique(evaluation.rows.keys.combine_chunks()))
    return replace(unique, in_training=np.asarray(pc.invert(evaluated).to_numpy()))


def join(part: HostRows, unique: Rows, prepared: Prepared) -> HostRows:
    """Joins by row key, and takes out rows that must not be used."""
    index = pc.index_in(part.rows.keys, value_set=unique.keys.combine_chunks()).to_numpy()
    joined = part.attach({name: np.asarray(values)[index] for name, values in prepared.columns.items()})
    if not prepared.dropped:
        return joined
    keep = pc.invert(pc.is_in(part.rows.keys, value_set=pa.array(sorted(prepared.dropped)))).to_numpy()
    return selected(joined, keep, "that a reference or reward model cannot read")


def selected(part: HostRows, keep: np.ndarray, why: str, remedy: str = "") -> HostRows:
    """The rows that are kept, with a word on the others.

    Args:
        part: a set of rows.
        keep: `(n,)` booleans.
        why: ends the sentence "N rows left out".
        remedy: what to do where none is left.

    Raises:
        ValueError: where none is left.
    """
    if not keep.all():
        LOG.info(f"{len(keep) - int(keep.sum()):,} of {len(keep):,} rows left out {why}")
    if not keep.any():
        raise nothing_left(len(keep), part.name, why, remedy)
    return part.select(keep)


def _has_gaps(values: np.ndarray) -> bool:
    return values.dtype == object and any(value is None for value in values)
