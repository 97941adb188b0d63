"""How the plugin gets into a run, and that a run of ours without it is never plain SFT."""

from __future__ import annotations

from contract_support import SINCE_0_21, only_plugins

# isort: split
# (the line above sets the environment, before Axolotl is imported)
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from axolotl.cli.config import load_cfg
from axolotl.integrations import base
from axolotl.utils.dict import DictDefault

from poft_plugin.hosts.axolotl.args import NAME, TAKEN_OVER
from poft_plugin.hosts.axolotl.compat import name_plugin
from poft_plugin.hosts.axolotl.plugin import PoftPlugin

installed_plugins = pytest.mark.skipif(not SINCE_0_21, reason="installed plugins load by themselves since Axolotl 0.21")


@pytest.fixture
def config(models: SimpleNamespace, tmp_path: Path) -> Path:
    """A config of ours without a line under `plugins:`."""
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.chat_rows(4))
    return tiny.write_config(
        tmp_path / "config.yml",
        base_model=str(models.policy),
        datasets=[{"path": str(data), "ds_type": "json", "type": "chat_template"}],
        plugins=None,
        rl="poft",
        poft={"references": [{"model": str(models.ref_a)}]},
        output_dir=str(tmp_path / "out"),
    )


def install(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an installed package named this plugin."""
    monkeypatch.setattr(base, "get_builtin_plugins", lambda: (plugin,))


@installed_plugins
def test_installed_it_needs_no_line(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_plugins() as manager:
        install(NAME, monkeypatch)
        cfg = load_cfg(str(config))
        assert [type(plugin) for plugin in manager.plugins.values()] == [PoftPlugin]
        assert manager.get_trainer_cls(cfg).__name__ == "MethodTrainer"
    assert (cfg.rl, cfg[TAKEN_OVER], cfg.plugins) == (None, "poft", [NAME])


@installed_plugins
def test_installed_but_broken_the_run_is_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plugin_of_ours.py").write_text("raise ImportError('no torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with only_plugins():
        install("broken_plugin_of_ours.Plugin", monkeypatch)
        with pytest.raises(ValueError, match=r"\brl\b[\s\S]*'poft'"):
            load_cfg(str(config))


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (None, [NAME]),
        ([], [NAME]),
        (["other.Plugin"], ["other.Plugin", NAME]),
        ([NAME], [NAME]),
        (["poft_plugin:PoftPlugin"], ["poft_plugin:PoftPlugin"]),
    ],
)
def test_a_config_that_was_taken_over_names_the_plugin(written: Any, named: list[str]) -> None:
    cfg = DictDefault({"plugins": written})
    name_plugin(cfg)
    assert cfg.plugins == named


def test_a_later_config_of_the_process_is_left_alone(config: Path) -> None:
    """The host keeps asking plugins of an earlier config; since 0.21 it does not even tell them of the new one."""
    with only_plugins(PoftPlugin()) as manager:
        ours = DictDefault({"rl": "poft", **_raw(config)})
        next(iter(manager.plugins.values())).register(ours)
        assert manager.get_trainer_cls(ours) is not None
        plain = DictDefault({"output_dir": "elsewhere"})
        assert manager.load_datasets(plain) is None
        assert manager.get_trainer_cls(plain) is None
        assert manager.get_training_args(plain) in (None, {})
        assert manager.get_collator_cls_and_kwargs(plain) is None
        assert manager.add_callbacks_post_trainer(plain, None) == []


def _raw(config: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(config.read_text()))
