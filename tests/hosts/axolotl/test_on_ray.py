"""Workers of Ray's register a config that the driver has registered and validated: the run is the same."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from poft_plugin.hosts.axolotl import on_ray
from poft_plugin.hosts.axolotl.args import KEPT
from poft_plugin.hosts.axolotl.entries import ENTRIES, SALT_FIELD
from poft_plugin.hosts.axolotl.on_ray import check_one_training
from poft_plugin.plugins import load_object, registry

METHODS = sorted(name for name, method in registry().methods.items() if method.alone)
PLUGIN = "poft_plugin.PoftPlugin"
MACHINE = {"bf16": True, "tf32": True, "fp8": False, "n_gpu": 8, "compute_capability": "sm_90"}
TORCH = {"torch_version": "2.13.0"}


@pytest.fixture(autouse=True)
def where_it_was() -> Iterator[None]:
    """A worker goes to the driver's folder."""
    folder = os.getcwd()
    yield
    os.chdir(folder)


def written(models: SimpleNamespace, folder: Path, name: str) -> dict[str, Any]:
    """A config of a method as somebody writes it, with relative names and a value in every kind of place."""
    method = registry().methods[name]
    rows = tiny.pair_rows(4) if method.ranked else tiny.chat_rows(4)
    tiny.write_jsonl(folder / "rows.jsonl", rows)
    kind = "chat_template.default" if method.ranked else "chat_template"
    entry = {"path": "./rows.jsonl", "ds_type": "json", "type": kind}
    required = {"poft": {"references": [{"model": str(models.ref_a)}], "keep_top_percent": 50}}
    required["deft"] = {"omega": 0.5, "top_percent": 50, "bottom_percent": 25}
    block = required.get(method.block, {})
    fields = load_object(method.config).model_fields
    raw: dict[str, Any] = {
        "base_model": str(models.policy), "plugins": [PLUGIN], "rl": name, "use_ray": True, "datasets": [entry],
        "test_datasets": [{**entry, "split": "train"}], "sample_packing": True,
        "row_filters": [{"name": "keep_top_percent", "percent": 90}] if name == "poft" else None,
        method.block: {key: value for key, value in block.items() if key in fields} or None,
    }  # fmt: skip
    if method.keys is not None and "rl_beta" in load_object(method.keys).model_fields:
        raw["rl_beta"] = 0.3
    return yaml.safe_load(tiny.write_config(folder / f"{name}.yml", **raw).read_text())


def registered(raw: Any) -> Any:
    """What the host does with a config up to its validation; the plugin's run."""
    hosting.forget_plugins()
    cfg = DictDefault(raw)
    prepare_plugins(cfg)
    cfg = validate_config(cfg, capabilities=MACHINE, env_capabilities=TORCH)
    return cfg, PluginManager.get_instance().plugins[PLUGIN].method_run


@pytest.mark.parametrize("name", METHODS)
def test_a_worker_has_the_run_of_the_driver(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg, run = registered(written(models, tmp_path, name))
    sent = json.loads(json.dumps(cfg.to_dict(), default=str))
    sent["trl"] = {"beta": None, "use_vllm": False, "max_completion_length": 512}  # as the host fills its own blocks
    entries = dict(ENTRIES)
    ENTRIES.clear()  # a worker is another process
    session = tmp_path / "session"
    session.mkdir()
    monkeypatch.chdir(session)
    again, same = registered(sent)
    assert (same, again.rl) == (run, None)
    assert {digest: entries[digest] for digest in ENTRIES} == ENTRIES
    for section in ("datasets", "test_datasets"):
        assert [entry[SALT_FIELD] for entry in again[section]] == [entry[SALT_FIELD] for entry in cfg[section]]
        assert all(entry[SALT_FIELD] in ENTRIES for entry in again[section])


def test_folders_are_those_of_the_driver(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POFT_SCORE_CACHE", raising=False)
    raw = written(models, tmp_path, "poft")
    raw |= {"output_dir": "./out", "dataset_prepared_path": None}
    cfg, run = registered(raw)
    assert (cfg.output_dir, cfg.dataset_prepared_path) == (str(tmp_path / "out"), str(tmp_path / "last_run_prepared"))
    assert run.settings.score_cache == str(tmp_path / "poft_scores")
    _, block_that_was_left_out = registered(written(models, tmp_path, "pro"))
    assert block_that_was_left_out.settings.score_cache == str(tmp_path / "poft_scores")
    assert registered({**raw, "use_ray": False})[1].settings.score_cache is None


def test_other_rows_than_those_of_the_driver_are_refused(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg, _ = registered(written(models, tmp_path, "poft"))
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(3))
    with pytest.raises(ValueError, match=r"datasets\[0\] \(\./rows\.jsonl\): its files, .* are not the same here"):
        registered(cfg.to_dict())


@pytest.mark.parametrize("changes", [{"use_ray": False}, {KEPT: {"a": 1}}])
def test_what_is_kept_for_workers_is_no_setting(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg, _ = registered(written(models, tmp_path, "poft"))
    with pytest.raises(ValueError, match=rf"{KEPT}: is written by poft_plugin itself, for workers of Ray's; remove it"):
        registered({**cfg.to_dict(), **changes})


def test_a_driver_in_every_process_of_a_launcher_is_refused(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    registered(written(models, tmp_path, "poft"))  # `axolotl poft score --launcher torchrun`
    monkeypatch.setattr(on_ray, "_starts_training", lambda: True)
    with pytest.raises(ValueError, match=r"use_ray: true in one of 2 processes .* `axolotl train CONFIG --use-ray`"):
        registered(written(models, tmp_path, "poft"))


def test_workers_that_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_one_training({"use_ray": True})
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_one_training({"use_ray": False})
    with pytest.raises(ValueError, match=r"ray_num_workers: 2, but this worker knows of 1: .*ACCELERATE_USE_CPU=true"):
        check_one_training({"use_ray": True})


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The configs that are scored instead of scoring."""
    found: list[dict[str, Any]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        found.append(yaml.safe_load(Path(command[-1]).read_text()))
        return SimpleNamespace(returncode=int(len(found) > 1))

    monkeypatch.setattr(on_ray, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": run}))
    return found


def test_training_alone_scores_before_it(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[dict[str, Any]]
) -> None:
    """The host tells `register` nothing of the command: it is looked for among the callers."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from axolotl.cli import train

    monkeypatch.chdir(tmp_path)
    raw = written(models, tmp_path, "poft")
    registered(raw)
    assert commands == []
    monkeypatch.setattr("axolotl.cli.config.load_cfg", lambda config, **_: registered(config)[0])
    monkeypatch.setitem(vars(train), "load_cfg", lambda config, **_: registered(config)[0])  # it may be looked up late
    monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda *_, **__: SimpleNamespace(fit=lambda: None))
    train.do_cli(raw)
    (scored,) = commands
    assert "use_ray" not in scored
    assert {key: scored[key] for key in ("rl", "datasets")} == {key: raw[key] for key in ("rl", "datasets")}
    assert scored["poft"]["score_cache"] == str(tmp_path / "poft_scores")
    with pytest.raises(ValueError, match="nothing is trained: scoring ended with the status 1"):
        train.do_cli(raw)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    train.do_cli(raw)  # no accelerator here: workers score
    train.do_cli({**raw, "poft": {**raw["poft"], "missing_scores": "error"}})
    assert len(commands) == 2
