"""The host's prepared data sets, with the method's columns attached and its filters applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.common.datasets import load_datasets as load_host_datasets
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset, concatenate_datasets

from poft_plugin.config import DeftConfig
from poft_plugin.data.columns import CONVERSATION, DROPPABLE, GROUP, LEFT_OUT, ROW_INDEX, ROW_KEY, ROW_NUMBER, SOURCE
from poft_plugin.data.groups import sequence_lengths
from poft_plugin.data.preparation import Columns, Prepared, Purpose, Rows, RunContext
from poft_plugin.data.split import evaluation_rows
from poft_plugin.hosts.axolotl.checks import check_packing, check_share_prompt
from poft_plugin.hosts.axolotl.entries import SUPPORTED_TYPES
from poft_plugin.hosts.axolotl.left_out import nothing_left, set_name
from poft_plugin.hosts.axolotl.policy import check_linear_head, check_no_window, policy_of
from poft_plugin.hosts.axolotl.ranked_datasets import (
    RANKED_COLUMNS,
    check_one_step,
    check_pack,
    laid_out,
    not_in_evaluation,
    pack_tokens,
    report_ties,
    short_enough,
    too_long,
)
from poft_plugin.hosts.axolotl.rotary import check_frequencies
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.plugins import registry
from poft_plugin.scoring.heartbeat import beating

LOG = get_logger("axolotl.poft_plugin")  # the host shows messages of its own namespace only

TEXT_COLUMNS = (CONVERSATION, SOURCE, ROW_NUMBER, GROUP, DROPPABLE, LEFT_OUT)
"""What rows carry until their scores are joined."""

FEW_ROWS = 50
"""Training rows below which filters have hardly left what was meant."""


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
        return HostRows.of(meta.train_dataset, trained), evaluation, meta.total_num_steps
    whole = HostRows.of(concatenate_datasets([meta.train_dataset, meta.eval_dataset]), trained)
    aside = evaluation_rows(whole.rows.keys.to_pylist(), len(meta.eval_dataset))
    train = _selected(whole, ~aside, f"for evaluation (val_set_size: {cfg.val_set_size})")
    return train, replace(whole.select(aside), name=evaluated), meta.total_num_steps


def unique_rows(train: HostRows | None, evaluation: HostRows | None) -> Rows:
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


def prepare(
    cfg: DictDefault, run: MethodRun, purpose: Purpose
) -> tuple[TrainDatasetMeta, Mapping[str, float], Mapping[str, np.ndarray]]:
    """Loads, scores, joins, grades and filters.

    Args:
        cfg: the host's config; its token counts are reset, so that steps are counted on the rows that stay.
        run: the method.
        purpose: what this process does.

    Returns:
        What the host trains on, numbers for its trackers, and tensors for the trainer.

    Raises:
        ValueError: for anything that cannot be scored or trained on.
    """
    check_packing(cfg)
    run.check()
    if run.share_prompts:
        check_share_prompt(cfg)
        check_no_window(cfg, pack_tokens(cfg))
    if run.method.needs_start_policy and cfg.lora_model_dir:
        raise ValueError(
            f"lora_model_dir: {cfg.lora_model_dir!r}: `rl: {run.method.name}` would begin with base model and adapter, "
            "whose log-probabilities are not scored here. Merge it first (`axolotl merge-lora`)"
        )
    context = run_context(cfg, purpose)
    if isinstance(run.settings, DeftConfig) and run.settings.omega:
        check_linear_head(cfg)
    with beating(context):
        graded, others, whole = _graded(cfg, run, context)
    kept = _filtered(run, graded)
    report_ties(kept.rows)
    finished = [_finished(kept, run, cfg, training=True), *(_finished(p, run, cfg) for p in others)]
    if run.method.ranked:
        check_one_step(len(finished[0]), cfg, context)
    steps = None if purpose == "preprocess" else _count_steps(cfg, finished[0])
    meta = TrainDatasetMeta(finished[0], finished[1] if others else None, steps)
    return meta, whole.statistics, whole.tensors


def graded_rows(cfg: DictDefault, run: MethodRun, context: RunContext) -> list[Rows]:
    """All training rows with scores and levels, before any is left out, and the evaluation rows' scores."""
    graded, others, _ = _graded(cfg, run, context)
    return [graded.rows, *(part.rows for part in others)]


def _graded(cfg: DictDefault, run: MethodRun, context: RunContext) -> tuple[HostRows, list[HostRows], Prepared]:
    """Training rows and the other sets' rows with all columns on, and what the preprocessors made besides."""
    train, evaluation, _ = load_host_rows(cfg)
    if run.method.ranked and evaluation is not None:
        train = _selected(train, not_in_evaluation(train.rows, evaluation.rows), "that are evaluation rows")
    parts = [train] if evaluation is None else [train, evaluation]
    unique = unique_rows(train, evaluation)
    prepared = _run_preprocessors(run, unique, context)
    joined = [_attach(part, unique, prepared) for part in parts]
    graded, whole = _run_training_preprocessors(run, joined[0], context)
    return graded, joined[1:], _merged([prepared, whole])


def with_columns(
    parts: Mapping[str, tuple[HostRows, np.ndarray]], run: MethodRun, cfg: DictDefault
) -> dict[str, Dataset]:
    """Some rows of each set with the method's columns, from the score cache alone (`axolotl evaluate`).

    Args:
        parts: by name: a set of rows, and `(n,)` booleans that say which of them.
        run: the method.
        cfg: the host's config.

    Raises:
        ValueError: for a row without a cached score.
    """
    kept = {name: _selected(part, keep, "that the run did not have") for name, (part, keep) in parts.items()}
    unique = unique_rows(kept.get("train"), kept.get("eval"))
    prepared = _run_preprocessors(run, unique, run_context(cfg, "evaluate"))
    return {name: _finished(_attach(part, unique, prepared), run, cfg) for name, part in kept.items()}


def run_context(cfg: DictDefault, purpose: Purpose) -> RunContext:
    """This process, as preprocessors see it; the commands of `axolotl poft` leave a run's own files alone."""
    output_dir = Path(cfg.output_dir) if cfg.output_dir and purpose != "score" else None
    return RunContext.from_environment(purpose, policy=policy_of(cfg), output_dir=output_dir)


def _run_preprocessors(run: MethodRun, unique: Rows, context: RunContext) -> Prepared:
    names = run.method.preprocessors
    return _merged([registry().preprocessors[name](unique, run.settings_for(name), context) for name in names])


def _run_training_preprocessors(run: MethodRun, train: HostRows, context: RunContext) -> tuple[HostRows, Prepared]:
    """Those that see the training rows as they are: their columns need no join."""
    names = run.method.training_preprocessors
    prepared = _merged([registry().preprocessors[name](train.rows, run.settings_for(name), context) for name in names])
    return train.attach(prepared.columns), prepared


def _merged(results: Sequence[Prepared]) -> Prepared:
    columns = {name: values for result in results for name, values in result.columns.items()}
    statistics = {name: value for result in results for name, value in result.statistics.items()}
    tensors = {name: value for result in results for name, value in result.tensors.items()}
    return Prepared(columns, frozenset().union(*(result.dropped for result in results)), statistics, tensors)


def _attach(part: HostRows, unique: Rows, prepared: Prepared) -> HostRows:
    """Joins by row key, and takes out rows that must not be used."""
    index = pc.index_in(part.rows.keys, value_set=unique.keys.combine_chunks()).to_numpy()
    joined = part.attach({name: np.asarray(values)[index] for name, values in prepared.columns.items()})
    if not prepared.dropped:
        return joined
    keep = pc.invert(pc.is_in(part.rows.keys, value_set=pa.array(sorted(prepared.dropped)))).to_numpy()
    return _selected(joined, keep, "that a reference or reward model cannot read")


def _filtered(run: MethodRun, part: HostRows) -> HostRows:
    for name, settings in run.filters:
        keep = registry().row_filters[name](part.rows, **settings)
        part = _selected(part, np.asarray(keep, dtype=bool), f"by the filter {name}")
    if run.filters and len(part.rows) < FEW_ROWS:
        LOG.warning(f"only {len(part.rows)} rows are left to train on by {', '.join(name for name, _ in run.filters)}")
    return part


def _selected(part: HostRows, keep: np.ndarray, why: str, remedy: str = "") -> HostRows:
    if not keep.all():
        LOG.info(f"{len(keep) - int(keep.sum()):,} of {len(keep):,} rows left out {why}")
    if not keep.any():
        raise nothing_left(len(keep), part.name, why, remedy)
    return part.select(keep)


def _has_gaps(values: np.ndarray) -> bool:
    return values.dtype == object and any(value is None for value in values)


def _finished(part: HostRows, run: MethodRun, cfg: DictDefault, *, training: bool = False) -> Dataset:
    """The data set that the trainer gets: text columns off, the method's columns and a row index on."""
    packed = training and bool(cfg.sample_packing)
    together = packed or (cfg.micro_batch_size if training else cfg.eval_batch_size or cfg.micro_batch_size) > 1
    if run.method.ranked:
        part = _selected(part, short_enough(part.rows, cfg), *too_long(part.rows, cfg))
        check_frequencies(cfg, lambda: sequence_lengths(part.rows), together=together, name=part.name)
        dataset = laid_out(part.rows, list(part.rows.attached), share_prompts=packed and run.share_prompts)
        if packed:
            check_pack(part.rows, np.asarray(dataset["length"]), cfg)
        return dataset
    check_frequencies(
        cfg, lambda: [np.array([len(ids)]) for ids in part.dataset["input_ids"]], together=together, name=part.name
    )
    columns: dict[str, Sequence[float] | np.ndarray] = dict(part.rows.attached)
    columns[ROW_INDEX] = np.arange(len(part.rows))
    texts = [name for name in (CONVERSATION, GROUP) if name in part.dataset.column_names]
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
