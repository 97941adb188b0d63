"""The host contract, part 1: plugin loading and hooks.

Each test pins one fact about Axolotl that `poft_plugin` leans on, with tiny inputs. When a new
Axolotl breaks one, the failure ends with a note: the fact, what it breaks, where to look.
This part holds the seams; `_config`, `_data`, `_prepared`, `_packing` and `_training` follow.
"""

from __future__ import annotations

from contract_support import Recorder, host_fact, only_plugins, raw_config

# isort: split
# (the line above sets the environment, before Axolotl is imported)
import inspect
from pathlib import Path
from typing import Any, ClassVar

import axolotl.cli.config as host_config
import pytest
import yaml
from axolotl import train
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault

PLUGIN = "hosts/axolotl/plugin.py"
BASE = "axolotl/integrations/base.py"


class ValidatedError(Exception):
    """Ends `load_cfg` right after validation and carries the validated config."""


class TakesRlOff(BasePlugin):
    """Does in `register` what our plugin does, and notes what it saw."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def register(self, cfg: dict[str, Any]) -> None:
        self.seen.append(dict(cfg))
        cfg.pop("rl", None)


def load_and_validate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: DictDefault, **command_line: str
) -> DictDefault:
    """What `load_cfg` holds right after validation, from a YAML file and command-line values."""

    def stop(cfg: DictDefault) -> None:
        raise ValidatedError(cfg)

    monkeypatch.setattr(host_config, "prepare_debug_log", stop)  # its first step after validation
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    with only_plugins(), pytest.raises(ValidatedError) as stopped:
        host_config.load_cfg(str(file), **command_line)
    return stopped.value.args[0]


@pytest.mark.parametrize("from_command_line", [False, True])
@host_fact(
    "register(cfg) gets the raw config, command-line values included, before validation, and may take keys off",
    breaks="hosts/axolotl/run.py take_over: `rl: poft` would reach the validator, which knows the built-in types only",
    look="axolotl/cli/config.py load_cfg, prepare_plugins",
)
def test_register_gets_the_raw_config_before_validation(
    from_command_line: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TakesRlOff, "seen", [])
    rl = {"rl": "poft"}
    config = raw_config(plugins=[f"{__name__}.TakesRlOff"], sample_packing=True, **({} if from_command_line else rl))
    cfg = load_and_validate(tmp_path, monkeypatch, config, **(rl if from_command_line else {}))
    assert [seen["rl"] for seen in TakesRlOff.seen] == ["poft"]
    assert cfg.rl is None
    assert cfg.sample_packing is True


@host_fact(
    "PluginManager.register prints an ImportError and goes on without the plugin",
    breaks="nothing if it raises now: delete the wrapper in poft_plugin/__init__.py that turns ImportError "
    "into RuntimeError, and patches/0002",
    look=f"{BASE} PluginManager.register",
)
def test_an_import_error_in_a_plugin_is_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    with only_plugins() as manager:
        manager.register("no_such_package_of_ours.Plugin")
        assert not manager.plugins
    assert "no_such_package_of_ours" in capsys.readouterr().out


@host_fact(
    "PluginManager.register lets errors other than ImportError through",
    breaks="the wrapper in poft_plugin/__init__.py: RuntimeError would be swallowed too, and plain SFT trained",
    look=f"{BASE} PluginManager.register",
)
def test_a_runtime_error_in_a_plugin_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plugin_module.py").write_text("raise RuntimeError('no torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with only_plugins() as manager, pytest.raises(RuntimeError, match="no torch"):
        manager.register("broken_plugin_module.Plugin")


@host_fact(
    "plugins of an earlier config in the process stay registered, and are asked for every later config",
    breaks=f"{PLUGIN}: every hook must check that the config at hand asks for us, not only that we were loaded",
    look="axolotl/cli/config.py prepare_plugins; " + BASE,
)
def test_plugins_of_an_earlier_config_are_still_asked() -> None:
    earlier = TakesRlOff()
    with only_plugins(earlier):
        cfg = DictDefault({"rl": "dpo", "plugins": [f"{__name__}.Recorder"]})
        host_config.prepare_plugins(cfg)
    assert cfg.rl is None


@pytest.mark.parametrize(
    ("hook", "parameters"),
    [
        ("register", ["cfg"]),
        ("get_input_args", []),
        ("load_datasets", ["cfg", "preprocess"]),
        ("get_trainer_cls", ["cfg"]),
        ("get_training_args", ["cfg"]),
        ("get_collator_cls_and_kwargs", ["cfg", "is_eval"]),
        ("add_callbacks_post_trainer", ["cfg", "trainer"]),
        ("post_train_unload", ["cfg"]),
    ],
)
@host_fact(
    "BasePlugin has the hooks that we override, with these parameters, and answers nothing by default",
    breaks=f"{PLUGIN}: our override would not be called, or be called with arguments it does not take",
    look=f"{BASE} BasePlugin",
)
def test_hooks_have_the_signatures_we_override(hook: str, parameters: list[str]) -> None:
    function = getattr(BasePlugin, hook)
    assert list(inspect.signature(function).parameters) == ["self", *parameters]
    assert not function(BasePlugin(), *[None] * len(parameters))


@host_fact(
    "PluginManager passes preprocess and is_eval on to the hooks",
    breaks=f"{PLUGIN}: load_datasets could not tell preprocess from train, nor the collator train from eval",
    look=f"{BASE} PluginManager",
)
def test_manager_passes_the_stage_on() -> None:
    plugin = Recorder()
    with only_plugins(plugin) as manager:
        manager.load_datasets(DictDefault(), preprocess=True)
        manager.get_collator_cls_and_kwargs(DictDefault(), is_eval=True)
    assert plugin.calls == [("load_datasets", True), ("collator", True)]


@host_fact(
    "the first collator answer that is not None wins and is unpacked into two",
    breaks=f"{PLUGIN}: return None from hooks that are not ours, never (None, None), which wins too",
    look=f"{BASE} PluginManager.get_collator_cls_and_kwargs",
)
def test_first_collator_that_is_not_none_wins() -> None:
    answers = [None, (None, None), (dict, {"key": 1})]
    plugins = [Recorder(collator=answer) for answer in answers]
    with only_plugins(*plugins) as manager:
        assert manager.get_collator_cls_and_kwargs(DictDefault()) == (None, None)
    with only_plugins(plugins[0], plugins[2]) as manager:
        assert manager.get_collator_cls_and_kwargs(DictDefault()) == (dict, {"key": 1})


@host_fact(
    "the first trainer class that is not None wins; two plugins with datasets are an error",
    breaks=f"{PLUGIN} get_trainer_cls, load_datasets: another plugin could silently take ours away",
    look=f"{BASE} PluginManager.get_trainer_cls, load_datasets",
)
def test_one_trainer_class_and_one_dataset_loader() -> None:
    with only_plugins(Recorder(), Recorder(datasets="ours")) as manager:
        assert manager.get_trainer_cls(DictDefault()) is dict
        assert manager.load_datasets(DictDefault()) == "ours"
    two = only_plugins(Recorder(datasets="ours"), Recorder(datasets="theirs"))
    with two as manager, pytest.raises(RuntimeError, match="Multiple plugins loaded datasets"):
        manager.load_datasets(DictDefault())


@host_fact(
    "host modules keep a reference to the PluginManager singleton from import time",
    breaks="tests that replace PluginManager._instance; swap its `plugins` instead, as contract_support does",
    look="axolotl/train.py PLUGIN_MANAGER",
)
def test_the_manager_is_one_object() -> None:
    assert train.PLUGIN_MANAGER is PluginManager.get_instance() is PluginManager()
