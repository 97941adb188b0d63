"""The host's prepared data sets, with the method's columns attached and its filters applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.common.datasets import load_datasets as load_host_datasets
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset, concatenate_datasets

from poft_plugin.data.columns import CONVERSATION, GROUP, ROW_INDEX, ROW_KEY, ROW_NUMBER, SOURCE
from poft_plugin.data.preparation import Columns, Prepared, Rows, RunContext
from poft_plugin.hosts.axolotl.checks import check_packing
from poft_plugin.hosts.axolotl.entries import SUPPORTED_TYPES
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.plugins import load_object, registry

LOG = get_logger("axolotl.poft_plugin")  # the host shows messages of its own namespace only

TEXT_COLUMNS = (CONVERSATION, SOURCE, ROW_NUMBER, GROUP)
"""What rows carry until their scores are joined."""


@dataclass(frozen=True)
class HostRows:
    """A prepared data set of the host and its rows by content.

    Args:
        dataset: the host's.
        rows: its `row_key` and text columns, in order.
    """

    dataset: Dataset
    rows: Rows

    @classmethod
    def of(cls, dataset: Dataset) -> "HostRows":
        """Reads the text columns out of a prepared data set.

        Raises:
            ValueError: if they are not there: the host leaves rows alone that are tokens already.
        """
        names = [name for name in (ROW_KEY, *TEXT_COLUMNS) if name in dataset.column_names]
        if ROW_KEY not in names:
            raise ValueError(
                "datasets: rows that are already tokenized (they have input_ids and labels) hold no text that "
                f"references could score; give raw rows. What works: {SUPPORTED_TYPES}"
            )
        return cls(dataset, Rows(dataset.select_columns(names).with_format("arrow")[:], {}))


def load_host_rows(cfg: DictDefault) -> tuple[HostRows, HostRows | None, int | None]:
    """Training and evaluation rows as the host prepares them, and its own step count."""
    meta = load_host_datasets(cfg=cfg)
    evaluation = HostRows.of(meta.eval_dataset) if meta.eval_dataset is not None else None
    return HostRows.of(meta.train_dataset), evaluation, meta.total_num_steps


def prepare(cfg: DictDefault, run: MethodRun, context: RunContext) -> tuple[TrainDatasetMeta, Mapping[str, float]]:
    """Loads, scores, joins and filters.

    Args:
        cfg: the host's config; its token counts are reset, so that steps are counted on the rows that stay.
        run: the method.
        context: this process.

    Returns:
        What the host trains on, and numbers for its trackers.

    Raises:
        ValueError: for anything that cannot be scored or trained on.
    """
    check_packing(cfg)
    if run.method.check is not None:
        load_object(run.method.check)(run.settings)
    train, evaluation, _ = load_host_rows(cfg)
    parts = [train] if evaluation is None else [train, evaluation]
    unique = Rows(pa.concat_tables([part.rows.table for part in parts]), {}).unique()
    prepared = _run_preprocessors(run, unique, context)
    joined = [_attach(part, unique, prepared) for part in parts]
    kept = _filtered(run, joined[0])
    finished = [_finished(part, prepared) for part in (kept, *joined[1:])]
    steps = None if context.purpose == "preprocess" else _count_steps(cfg, finished[0])
    return TrainDatasetMeta(finished[0], finished[1] if evaluation else None, steps), prepared.statistics


def attach_columns(dataset: Dataset, run: MethodRun, context: RunContext) -> Dataset:
    """Attaches the method's columns to a prepared data set that came without them (`axolotl evaluate`)."""
    part = HostRows.of(dataset)
    unique = part.rows.unique()
    prepared = _run_preprocessors(run, unique, context)
    return _finished(_attach(part, unique, prepared), prepared)


def _run_preprocessors(run: MethodRun, unique: Rows, context: RunContext) -> Prepared:
    results = [registry().preprocessors[name](unique, run.settings, context) for name in run.method.preprocessors]
    columns = {name: values for result in results for name, values in result.columns.items()}
    statistics = {name: value for result in results for name, value in result.statistics.items()}
    return Prepared(columns, frozenset().union(*(result.dropped for result in results)), statistics)


def _attach(part: HostRows, unique: Rows, prepared: Prepared) -> HostRows:
    """Joins by row key, and takes out rows that must not be used."""
    index = pc.index_in(part.rows.keys, value_set=unique.keys.combine_chunks()).to_numpy()
    attached: Columns = {name: np.asarray(values)[index] for name, values in prepared.columns.items()}
    joined = HostRows(part.dataset, Rows(part.rows.table, attached))
    if not prepared.dropped:
        return joined
    keep = pc.invert(pc.is_in(part.rows.keys, value_set=pa.array(sorted(prepared.dropped)))).to_numpy()
    return _selected(joined, keep, "that a reference cannot read")


def _filtered(run: MethodRun, part: HostRows) -> HostRows:
    for name, settings in run.filters:
        keep = registry().row_filters[name](part.rows, **settings)
        part = _selected(part, np.asarray(keep, dtype=bool), f"by the filter {name}")
    return part


def _selected(part: HostRows, keep: np.ndarray, why: str) -> HostRows:
    LOG.info(f"{len(keep) - int(keep.sum()):,} of {len(keep):,} rows left out {why}")
    if not keep.any():
        raise ValueError(f"no rows left to train on: all {len(keep)} were left out {why}")
    attached = {name: values[keep] for name, values in part.rows.attached.items()}
    return HostRows(part.dataset.select(np.flatnonzero(keep)), Rows(part.rows.table.filter(pa.array(keep)), attached))


def _finished(part: HostRows, prepared: Prepared) -> Dataset:
    """The data set that the trainer gets: text columns off, the method's columns and a row index on."""
    columns: dict[str, Sequence[float] | np.ndarray] = {name: part.rows.attached[name] for name in prepared.columns}
    columns[ROW_INDEX] = np.arange(len(part.rows))
    texts = [name for name in TEXT_COLUMNS if name in part.dataset.column_names]
    return concatenate_datasets([part.dataset.remove_columns(texts), Dataset.from_dict(columns)], axis=1)


def _count_steps(cfg: DictDefault, train: Dataset) -> int:
    """The host's own count, on the rows that stay: what it cached was counted before the filters."""
    cfg.total_num_tokens = None
    cfg.total_supervised_tokens = None
    cfg.sample_packing_eff_est = None
    total = int(calculate_total_num_steps(cfg, train))
    if total < 1:
        raise ValueError(
            f"no optimizer step fits: {len(train)} rows make less than one step of gradient_accumulation_steps "
            f"{cfg.gradient_accumulation_steps} x micro_batch_size {cfg.micro_batch_size}; lower them"
        )
    return min(total, cfg.max_steps) if cfg.max_steps else total
