"""The host contract, part 1: plugin loading and hooks.

Each test pins one fact about Axolotl that `poft_plugin` leans on, with tiny inputs. When a new
Axolotl breaks one, the failure ends with a note: the fact, what it breaks, where to look.
This part holds the seams; `_config`, `_data`, `_prepared`, `_packing` and `_training` follow.
"""

from __future__ import annotations

from contract_support import SINCE_0_21, Recorder, host_fact, only_plugins, raw_config

# isort: split
# (the line above sets the environment, before Axolotl is imported)
import inspect
from pathlib import Path
from typing import Any, ClassVar

import axolotl.cli.config as host_config
import pytest
import yaml
from axolotl import train
from axolotl.integrations import base
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


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
@host_fact(
    "a plugin under `plugins:` that fails to load stops the run; before 0.21 an ImportError is printed, and the run "
    "goes on without the plugin",
    breaks="the wrapper in poft_plugin/__init__.py, which turns ImportError into RuntimeError: plain SFT would be "
    "trained. If ImportError is fatal in every version that we support, delete it, and patches/0.19/0002",
    look=f"axolotl/cli/config.py prepare_plugins; {BASE} PluginManager.register",
)
def test_a_plugin_that_cannot_be_loaded_stops_the_run(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"broken_{error}.py").write_text(f"raise {error}('no torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = DictDefault({"plugins": [f"broken_{error}.Plugin"]})
    with only_plugins() as manager:
        if error == "ImportError" and not SINCE_0_21:
            host_config.prepare_plugins(cfg)
            assert "no torch" in capsys.readouterr().out
        else:
            with pytest.raises((ImportError, RuntimeError), match="no torch"):
                host_config.prepare_plugins(cfg)
        assert not manager.plugins


@host_fact(
    "plugins of an earlier config in the process stay loaded, and their hooks are asked for every later config; "
    "since 0.21 `register` is not",
    breaks=f"{PLUGIN}: every hook must check that the config at hand asks for us, not only that we were loaded",
    look="axolotl/utils/config/__init__.py prepare_plugins; " + BASE,
)
def test_plugins_of_an_earlier_config_are_still_asked() -> None:
    earlier, cfg = TakesRlOff(), DictDefault({"rl": "dpo", "plugins": [f"{__name__}.Recorder"]})
    with only_plugins(earlier, Recorder(datasets="theirs")) as manager:
        host_config.prepare_plugins(cfg)
        assert manager.load_datasets(cfg) == "theirs"
    assert cfg.rl == ("dpo" if SINCE_0_21 else None)


@pytest.mark.skipif(not SINCE_0_21, reason="plugins without a line under `plugins:` came with Axolotl 0.21")
@pytest.mark.parametrize("module", [__name__, "no_such_package_of_ours"])
@host_fact(
    "a plugin that an installed package names under the entry-point group axolotl.plugins needs no line in the "
    "config: its `register` gets every config; where it cannot be loaded, the host warns and goes on without it",
    breaks="pyproject.toml and the README: `plugins:` would be needed. If errors are fatal now, the advice to keep the "
    "line can go",
    look=f"{BASE} get_builtin_plugins, PluginManager.get_instance",
)
def test_installed_plugins_need_no_line(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TakesRlOff, "seen", [])
    cfg = DictDefault({"rl": "poft"})
    with only_plugins():
        monkeypatch.setattr(base, "get_builtin_plugins", lambda: (f"{module}.TakesRlOff",))
        host_config.prepare_plugins(cfg)
    assert cfg.rl == (None if module == __name__ else "poft")  # what is left on is refused: test_contract_config


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
    "there is one PluginManager; before 0.21 host modules keep a reference to it from import time",
    breaks="tests that replace PluginManager._instance; swap its `plugins` instead, as contract_support does",
    look="axolotl/train.py PLUGIN_MANAGER",
)
def test_the_manager_is_one_object() -> None:
    assert PluginManager.get_instance() is PluginManager()
    assert hasattr(train, "PLUGIN_MANAGER") is not SINCE_0_21
