"""Every example config passes Axolotl's own validation, offline, tiny ones train, and every method has its parts."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

import hosting
import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from poft_plugin.hosts.axolotl.args import TAKEN_OVER
from poft_plugin.hosts.axolotl.checks import check_packing
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.methods import Method
from poft_plugin.plugins import load_object, registry

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "example_configs"
EXAMPLES = sorted(FOLDER.rglob("*.yml"))
TINY = [path for path in EXAMPLES if path.stem.endswith("-tiny")]
SECOND_STEPS = [path for path in EXAMPLES if path.stem.startswith("2-")]
BUILT_IN = [m for m in registry().methods.values() if m.step.startswith("poft_plugin.") and m.alone]
PLUGIN = "poft_plugin.PoftPlugin"
MACHINE = {"bf16": True, "tf32": True, "fp8": False, "n_gpu": 8, "compute_capability": "sm_90"}
CONSUMER_GPU = {**MACHINE, "n_gpu": 1, "compute_capability": "sm_89"}
TORCH = {"torch_version": "2.13.0"}


def name_of(path: Path) -> str:
    """The path below `example_configs/`."""
    return path.relative_to(FOLDER).as_posix()


every_example = pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
every_tiny_example = pytest.mark.parametrize("path", TINY, ids=name_of)
every_second_step = pytest.mark.parametrize("path", SECOND_STEPS, ids=name_of)
every_method = pytest.mark.parametrize("method", BUILT_IN, ids=lambda method: method.name)


def read(path: Path) -> dict[str, Any]:
    """The config as written."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(raw, dict)
    return raw


def validated(
    raw: dict[str, Any], machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, MethodRun | None]:
    """What the host makes of a config, and what our plugin took over, if anything. Loads no model."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    monkeypatch.chdir(ROOT)  # the paths in the examples are relative to it
    cfg = DictDefault(raw)
    prepare_plugins(cfg)
    valid = validate_config(cfg, capabilities=machine, env_capabilities=TORCH)
    plugin = PluginManager.get_instance().plugins.get(PLUGIN)
    return valid, None if plugin is None else plugin.method_run


@every_example
def test_example_passes_the_validation_of_the_host(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = read(path)
    valid, run = validated(read(path), CONSUMER_GPU if "24gb" in path.stem else MACHINE, monkeypatch)
    if run is None:
        assert raw["rl"] == valid.rl == "dpo"  # the host's own
        return
    assert valid.rl is None
    assert run.method.name == valid[TAKEN_OVER] == raw["rl"]
    block = raw[run.method.block]
    if "references" in block:
        assert [reference.model for reference in run.settings.references] == [r["model"] for r in block["references"]]
    check_packing(valid)


@every_example
def test_every_key_of_an_example_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host drops top-level keys that it does not know without a word: a misspelt one would do nothing."""
    raw = read(path)
    valid, run = validated(read(path), MACHINE, monkeypatch)
    known = {*valid, "rl", *(type(run.keys).model_fields if run and run.keys else ())}
    unset = {key for key, value in raw.items() if value is None}
    assert not set(raw) - known - unset


@every_example
def test_files_that_an_example_names_are_there(path: Path) -> None:
    raw = read(path)
    deepspeed = raw.get("deepspeed")
    if deepspeed is not None:
        assert json.loads((ROOT / deepspeed).read_text())["zero_optimization"]["stage"] == 3
    local = [entry["path"] for entry in raw["datasets"] if entry["path"].startswith("./example_configs/")]
    assert all((ROOT / file).is_file() for file in local)


@every_tiny_example
def test_tiny_example_trains(path: Path, models: Any, in_folder: Path) -> None:
    """As `axolotl train NAME --base-model FOLDER` does; the rows, the loss and the settings are the example's."""
    raw = read(path)
    raw |= {"base_model": str(models.policy), "max_steps": 2}
    raw["plugins"] = [*raw["plugins"], "hosting.RecorderPlugin"]
    for entry in raw["datasets"]:
        entry["path"] = str(ROOT / entry["path"])
    config = in_folder / "config.yml"
    config.write_text(yaml.safe_dump({**raw, "dataloader_num_workers": 0, "dataloader_pin_memory": False}))
    recording = hosting.train(config)
    assert len(recording.logs) == 2
    assert all(isfinite(entry["loss"]) for entry in recording.logs)
    changed = [n for n, p in recording.trainer.model.named_parameters() if not p.equal(recording.initial[n])]
    assert changed


@every_second_step
def test_a_second_step_begins_where_the_first_ended(path: Path) -> None:
    (first,) = [read(other) for other in path.parent.glob("1-*.yml")]
    second = read(path)
    assert second["base_model"] == first["output_dir"]
    assert second["chat_template_jinja"] == first["chat_template_jinja"]
    assert second["output_dir"] == f"./model-out/{path.parent.name}/{path.stem}"


def test_readme_of_the_examples_lists_each_once() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert EXAMPLES
    assert [readme.count(f"`{name_of(path)}`") for path in EXAMPLES] == [1] * len(EXAMPLES)


def test_examples_of_each_kind_were_found() -> None:
    assert {read(path)["rl"] for path in TINY} == {m.name for m in BUILT_IN if m.ranked}
    assert len(SECOND_STEPS) == 3


@every_method
def test_method_is_complete(method: Method) -> None:
    assert any(read(path).get("rl") == method.name for path in EXAMPLES), f"no example config has `rl: {method.name}`"
    assert method.loss in registry().losses
    assert callable(load_object(method.step))
    assert load_object(method.config).model_config["extra"] == "forbid"
    assert {*method.preprocessors} <= {*registry().preprocessors}
    step = load_object(method.step).__module__.rpartition(".")[2]
    for name in {method.loss, step}:
        own = ROOT / "tests" / "trainers" / f"test_{name}.py"
        assert own.is_file(), f"{own.relative_to(ROOT)} is missing"
