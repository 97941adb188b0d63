"""Every example config passes Axolotl's own validation, offline, and every method has its four parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from poft_plugin.hosts.axolotl.args import TAKEN_OVER
from poft_plugin.hosts.axolotl.checks import check_packing
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.methods import METHODS, Method
from poft_plugin.plugins import load_object, registry

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "example_configs").glob("*.yml"))
PLUGIN = "poft_plugin.PoftPlugin"
MACHINE = {"bf16": True, "tf32": True, "fp8": False, "n_gpu": 8, "compute_capability": "sm_90"}
CONSUMER_GPU = {**MACHINE, "n_gpu": 1, "compute_capability": "sm_89"}
TORCH = {"torch_version": "2.13.0"}

every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def read(path: Path) -> dict[str, Any]:
    """The config as written."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(raw, dict)
    return raw


def validated(raw: dict[str, Any], machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, MethodRun]:
    """What the host makes of a config, and what our plugin took over. Loads no model."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    monkeypatch.chdir(ROOT)  # the paths in the examples are relative to it
    cfg = DictDefault(raw)
    prepare_plugins(cfg)
    valid = validate_config(cfg, capabilities=machine, env_capabilities=TORCH)
    run = PluginManager.get_instance().plugins[PLUGIN].method_run
    assert run is not None
    return valid, run


@every_example
def test_example_passes_the_validation_of_the_host(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = read(path)
    valid, run = validated(read(path), CONSUMER_GPU if "24gb" in path.stem else MACHINE, monkeypatch)
    assert valid.rl is None
    assert run.method.name == valid[TAKEN_OVER] == raw["rl"]
    block = raw[run.method.block]
    assert [reference.model for reference in run.settings.references] == [r["model"] for r in block["references"]]
    check_packing(valid)


@every_example
def test_every_key_of_an_example_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host drops top-level keys that it does not know without a word: a misspelt one would do nothing."""
    raw = read(path)
    known = {*validated(read(path), MACHINE, monkeypatch)[0], "rl"}
    unset = {key for key, value in raw.items() if value is None}
    assert not set(raw) - known - unset


@every_example
def test_files_that_an_example_names_are_there(path: Path) -> None:
    deepspeed = read(path).get("deepspeed")
    if deepspeed is not None:
        assert json.loads((ROOT / deepspeed).read_text())["zero_optimization"]["stage"] == 3


def test_readme_of_the_examples_lists_each_once() -> None:
    readme = (ROOT / "example_configs" / "README.md").read_text(encoding="utf-8")
    assert EXAMPLES
    assert [readme.count(f"| `{path.name}` |") for path in EXAMPLES] == [1] * len(EXAMPLES)


@every_method
def test_method_is_complete(method: Method) -> None:
    assert any(read(path).get("rl") == method.name for path in EXAMPLES), f"no example config has `rl: {method.name}`"
    assert method.loss in registry().losses
    assert callable(load_object(method.step))
    assert load_object(method.config).model_config["extra"] == "forbid"
    assert {*method.preprocessors} <= {*registry().preprocessors}
    own = ROOT / "tests" / "trainers" / f"test_{method.name}.py"
    assert own.is_file(), f"{own.relative_to(ROOT)} is missing"
