"""The host's own training on Ray (`axolotl train --use-ray`): a driver reads the config, workers train with it.

A worker gets the validated config of the driver and registers its plugins with it once more. It holds defaults that the
host filled in, and the entries that we rewrote; what was written is kept under one key, and registered again as it was.
"""

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.logging import get_logger

from poft_plugin.config import ScoringBlock, entries_of
from poft_plugin.hosts.axolotl.args import KEPT
from poft_plugin.hosts.axolotl.entries import SALT_FIELD
from poft_plugin.method import Method
from poft_plugin.plugins import load_object
from poft_plugin.scoring.cache import cache_folder

LOG = get_logger("axolotl.poft_plugin")

OUTPUT_DIR = "./model-out"
"""Where the host writes if nothing else is said."""

DRIVER = os.path.join("axolotl", "cli", "train.py")


def is_worker(cfg: Mapping[str, Any]) -> bool:
    """Whether a config was registered before, by a driver.

    Raises:
        ValueError: if somebody has put such a config into a file.
    """
    kept = cfg.get(KEPT)
    if kept is None:
        return False
    if not (cfg.get("use_ray") and isinstance(kept, Mapping) and {"config", "folder"} <= kept.keys()):
        raise ValueError(f"{KEPT}: is written by poft_plugin itself, for workers of Ray's; remove it")
    return True


def make_absolute(cfg: Any, method: Method) -> None:
    """Folders of the run as the driver understands them: a worker stands in a folder of Ray's session.

    Args:
        cfg: the raw config, changed in place.
        method: the method that is trained.

    Raises:
        ValueError: where several processes would each be a driver.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and _starts_training():
        raise ValueError(
            f"use_ray: true in one of {processes} processes of a launcher: each of them would start a training of its "
            "own. Start one process: `axolotl train CONFIG --use-ray`"
        )
    cfg["output_dir"] = os.path.abspath(cfg.get("output_dir") or OUTPUT_DIR)
    cfg["dataset_prepared_path"] = os.path.abspath(cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH)
    for part in filter(None, (method, method.base)):
        block, model = cfg.get(part.block), load_object(part.config)
        optional = part is method and not any(field.is_required() for field in model.model_fields.values())
        if issubclass(model, ScoringBlock) and (isinstance(block, Mapping) or (block is None and optional)):
            folder = cache_folder((block or {}).get("score_cache"))
            cfg[part.block] = {**(block or {}), "score_cache": str(folder.absolute())}


def kept(cfg: Any) -> dict[str, Any]:
    """What a worker registers: the config as it was written, and where."""
    return {"config": _plain(cfg), "folder": os.getcwd()}


def as_written(cfg: Any) -> Any:
    """The raw config of the driver, in a worker. Relative paths in it mean what they mean to the driver."""
    folder = cfg[KEPT]["folder"]
    if os.path.isdir(folder):
        os.chdir(folder)
    return type(cfg)(cfg[KEPT]["config"])


def check_same_rows(found: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    """Refuses data that are not those of the driver.

    Args:
        found: the raw config, registered here.
        cfg: what the driver made of it.

    Raises:
        ValueError: naming the entry.
    """
    for section in ("datasets", "test_datasets"):
        here, there = (entries_of(config.get(section), section) for config in (found, cfg))
        for number, (ours, theirs) in enumerate(zip(here, there, strict=True)):
            if any(ours.get(key) != theirs.get(key) for key in ("path", SALT_FIELD)):
                raise ValueError(
                    f"{section}[{number}] ({ours['path']}): its files, those of the tokenizer or its keys are not the "
                    f"same here as in the process that started the training. Every machine needs the same files (and "
                    f"`{KEPT}:` does not belong into a config file)"
                )


def score_first(config: Mapping[str, Any], settings: Any) -> None:
    """Scores what is missing before workers start, where this is the driver of a training.

    The host calls nothing of ours between the config and Ray. Where workers have an accelerator and this machine has
    none, they score their shares themselves, as the processes of any launcher do.

    Args:
        config: the raw config, as written.
        settings: the method's block.

    Raises:
        ValueError: if the scoring ends with an error, which it has printed itself.
    """
    if not (isinstance(settings, ScoringBlock) and _starts_training()):
        return
    if settings.missing_scores == "error":
        return
    if not (torch.accelerator.is_available() or _on_cpus()):
        LOG.info("no accelerator here: what is not scored yet is scored by the workers, each its share")
        return
    LOG.info("scoring what is missing before Ray's workers start")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yml")
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if key != "use_ray"}))
        command = [sys.executable, "-m", "poft_plugin.hosts.axolotl.cli", "score", str(path)]
        status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(f"nothing is trained: scoring ended with the status {status} (see above)")


def check_one_training(cfg: Mapping[str, Any]) -> None:
    """Refuses workers that do not know of each other.

    Raises:
        ValueError: naming both numbers, and the remedy.
    """
    expected, found = int(os.environ.get("WORLD_SIZE", "1")), PartialState().num_processes
    if cfg.get("use_ray") and found != expected:
        raise ValueError(
            f"ray_num_workers: {expected}, but this worker knows of {found}: each would train a model of its own. On "
            "machines without an accelerator set ACCELERATE_USE_CPU=true in the environment of all of them"
        )


def _plain(value: Any) -> Any:
    """Dicts and lists alone: what files and other processes take."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _starts_training() -> bool:
    """Whether the host's `train` command is what runs: `register` is the same for all commands."""
    return any(frame.f_code.co_filename.endswith(DRIVER) for frame, _ in traceback.walk_stack(None))


def _on_cpus() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
