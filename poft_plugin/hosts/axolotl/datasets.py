"""What the host trains on: its rows with the method's columns, graded, filtered and laid out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset, concatenate_datasets

from poft_plugin.config import DeftConfig
from poft_plugin.data.columns import CONVERSATION, GROUP, LEFT_OUT, ROW_INDEX
from poft_plugin.data.groups import sequence_lengths
from poft_plugin.data.preparation import Prepared, Purpose, RunContext
from poft_plugin.hosts.axolotl.checks import check_packing, check_share_prompt
from poft_plugin.hosts.axolotl.host_rows import HostRows, join, selected, unique_rows
from poft_plugin.hosts.axolotl.policy import check_linear_head, check_no_window, policy_of
from poft_plugin.hosts.axolotl.ranked_datasets import (
    check_one_step,
    check_pack,
    laid_out,
    pack_tokens,
    report_ties,
    short_enough,
    too_long,
)
from poft_plugin.hosts.axolotl.rotary import check_frequencies
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.hosts.axolotl.stages import RunStages
from poft_plugin.scoring.heartbeat import beating
from poft_plugin.scoring.jobs import Scope
from poft_plugin.scoring.stages import Stage

EVALUATED: tuple[Scope, ...] = ("all", "kept")
"""Stages that rows go through to be evaluated: nothing is graded."""


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
    if run.scores_start_policy and cfg.lora_model_dir:
        raise ValueError(
            f"lora_model_dir: {cfg.lora_model_dir!r}: `rl: {run.method.name}` would begin with base model and adapter, "
            "whose log-probabilities are not scored here. Merge it first (`axolotl merge-lora`)"
        )
    context = run_context(cfg, purpose)
    if isinstance(run.settings, DeftConfig) and run.settings.omega:
        check_linear_head(cfg)
    with beating(context):
        (kept, *others), made = RunStages(cfg, run, context).kept
    report_ties(kept.rows)
    finished = [_finished(kept, run, cfg, training=True), *(_finished(p, run, cfg) for p in others)]
    if run.method.ranked:
        check_one_step(len(finished[0]), cfg, context)
    steps = None if purpose == "preprocess" else _count_steps(cfg, finished[0])
    meta = TrainDatasetMeta(finished[0], finished[1] if others else None, steps)
    return meta, made.statistics, made.tensors


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
    kept = {name: selected(part, keep, "that the run did not have") for name, (part, keep) in parts.items()}
    unique = unique_rows(kept.get("train"), kept.get("eval"))
    context = run_context(cfg, "evaluate")
    stages = [Stage.of(run.preprocessors(scope), unique, context) for scope in EVALUATED]
    prepared = Prepared.merged([stage.prepared() for stage in stages])
    return {name: _finished(join(part, unique, prepared), run, cfg) for name, part in kept.items()}


def run_context(cfg: DictDefault, purpose: Purpose) -> RunContext:
    """This process, as preprocessors see it; the commands of `axolotl poft` leave a run's own files alone."""
    output_dir = Path(cfg.output_dir) if cfg.output_dir and purpose != "score" else None
    return RunContext.from_environment(purpose, policy=policy_of(cfg), output_dir=output_dir)


def _finished(part: HostRows, run: MethodRun, cfg: DictDefault, *, training: bool = False) -> Dataset:
    """The data set that the trainer gets: text columns off, the method's columns and a row index on."""
    packed = training and bool(cfg.sample_packing)
    together = packed or (cfg.micro_batch_size if training else cfg.eval_batch_size or cfg.micro_batch_size) > 1
    if run.method.ranked:
        part = selected(part, short_enough(part.rows, cfg), *too_long(part.rows, cfg))
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
    texts = [name for name in (CONVERSATION, GROUP, LEFT_OUT) if name in part.dataset.column_names]
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
