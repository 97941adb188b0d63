"""`axolotl evaluate`: the trained model, on the rows and against the reference that it was trained with; nothing else.

The host's command evaluates `base_model`, on rows that it splits anew, and asks no plugin for data. What the run was is
read from its record.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from poft_plugin.data.columns import ROW_KEY
from poft_plugin.hosts.axolotl.datasets import with_columns
from poft_plugin.hosts.axolotl.host_rows import HostRows, load_host_rows
from poft_plugin.hosts.axolotl.record import FOLDER, RUN_FILE, RunRecord, compared_settings, read_record, read_rows
from poft_plugin.hosts.axolotl.run import MethodRun


def check_evaluation(cfg: DictDefault, run: MethodRun) -> RunRecord:
    """Finds the record of the run whose model is to be evaluated, and refuses anything but that model.

    Args:
        cfg: the host's config, with what was changed on the command line.
        run: the method.

    Raises:
        ValueError: with the line to write.
    """
    out = Path(cfg.output_dir)
    record = read_record(out)
    if record is None:
        raise ValueError(
            f"axolotl evaluate: {out / FOLDER / RUN_FILE}: no such file: nothing was trained into output_dir {out}. "
            f"`axolotl train {_config(cfg)}` first, then {_line(cfg, cfg.adapter)}"
        )
    if record.rl != run.method.name or (found := _differing(record, run)):
        what = f"rl: {record.rl}" if record.rl != run.method.name else f"other settings ({', '.join(found)})"
        raise ValueError(
            f"axolotl evaluate: the model in {out} was trained with {what} than this config says. Evaluate it with "
            f"the config that it was trained with: {_line(cfg, record.adapter)}"
        )
    _check_model(cfg, record, out)
    return record


def evaluation_sets(cfg: DictDefault, run: MethodRun) -> dict[str, Dataset]:
    """The rows that the run was trained on (`train`) and that it set aside (`eval`), with the method's columns.

    Raises:
        ValueError: as `check_evaluation`; if the data no longer have those rows; or if one has no cached score.
    """
    start = check_evaluation(cfg, run).start
    as_trained = DictDefault({**cfg, **start, "lora_model_dir": None, "total_num_tokens": None})
    rows = read_rows(Path(cfg.output_dir))
    train, evaluation, _ = load_host_rows(as_trained)
    parts = {"train": (train, _had(train, rows, cfg, aside=False))}
    if evaluation is not None:
        parts["eval"] = (evaluation, _had(evaluation, rows, cfg, aside=True))
    return with_columns(parts, run, as_trained)


def _had(part: HostRows, recorded: pa.Table, cfg: DictDefault, *, aside: bool) -> np.ndarray:
    """`(n,)`: the rows of a set that the run had in its own."""
    keys = recorded.filter(pc.equal(recorded["evaluation"], aside))[ROW_KEY]
    gone = pc.invert(pc.is_in(keys, value_set=part.rows.keys.combine_chunks())).to_numpy()
    if gone.any():
        what = "evaluated" if aside else "trained"
        raise ValueError(
            f"axolotl evaluate: {int(gone.sum())} of {len(keys)} rows that were {what} on are not there any more, the "
            f"first of key {keys[int(np.flatnonzero(gone)[0])]}. Restore `datasets:`, `test_datasets:` and "
            f"`val_set_size:` as they were, or train again into {cfg.output_dir}"
        )
    return np.asarray(pc.is_in(part.rows.keys, value_set=keys.combine_chunks()).to_numpy())


def _check_model(cfg: DictDefault, record: RunRecord, out: Path) -> None:
    named = cfg.lora_model_dir if record.adapter else cfg.base_model
    start = str(record.start["base_model"])
    path = Path(str(named)).resolve() if named else None
    is_checkpoint = path is not None and path.parent == out.resolve() and path.name.startswith("checkpoint-")
    if path != out.resolve() and not is_checkpoint:
        what = f"base_model {cfg.base_model}" + (f" with {cfg.lora_model_dir}" if cfg.lora_model_dir else "")
        raise ValueError(
            f"axolotl evaluate: this would evaluate {what}, not what was trained into {out} (from {start}). Write: "
            f"{_line(cfg, record.adapter)}"
        )
    if record.adapter and str(cfg.base_model) != start:
        raise ValueError(
            f"axolotl evaluate: the adapter in {out} was trained on {start}, not on base_model {cfg.base_model}. "
            f"Write: {_line(cfg, record.adapter)}"
        )
    if not record.finished and not is_checkpoint:
        raise ValueError(
            f"axolotl evaluate: the training into {out} did not come to its end. Name one of its checkpoints: "
            f"{_line(cfg, record.adapter, '/checkpoint-STEP')}"
        )


def _differing(record: RunRecord, run: MethodRun) -> list[str]:
    """Keys whose value is not the training run's."""
    now = compared_settings(run)
    return [
        f"{block}.{key}"
        for block in {**record.settings, **now}
        for key in {**record.settings.get(block, {}), **now.get(block, {})}
        if record.settings.get(block, {}).get(key) != now.get(block, {}).get(key)
    ]


def _line(cfg: DictDefault, adapter: str | None, checkpoint: str = "") -> str:
    option = "--lora-model-dir" if adapter else "--base-model"
    return f"`axolotl evaluate {_config(cfg)} {option} {cfg.output_dir}{checkpoint}`"


def _config(cfg: DictDefault) -> str:
    return str(cfg.axolotl_config_path or "CONFIG")
