"""What is refused at config load, by name, before anything is read; and what is taken over."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
from axolotl.integrations.base import PluginManager

import poft_plugin
from poft_plugin.hosts.axolotl.args import TAKEN_OVER
from poft_plugin.hosts.axolotl.entries import SALT_FIELD, STRATEGY


def config(models: SimpleNamespace, folder: Path, **settings: Any) -> Path:
    data = tiny.write_jsonl(folder / "data.jsonl", tiny.chat_rows(4))
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template"}],
        "plugins": ["poft_plugin.PoftPlugin"],
        "rl": "poft",
        "poft": {"references": [{"model": str(models.ref_a)}]},
        "output_dir": str(folder / "out"),
    }
    return tiny.write_config(folder / "config.yml", **{**defaults, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poft": None}, r"poft: missing; `rl: poft` reads its settings"),
        ({"poft": {"references": []}}, r"poft\.references"),
        ({"poft": {"refs": []}}, r"poft\.refs: unknown key; allowed here: .*references"),
        ({"poft": {"references": [{"model": "a", "dtyp": "auto"}]}}, r"poft\.references\.0\.dtyp: unknown key"),
        ({"poft": {"references": [{"model": "a"}], "beta": 0}}, r"poft\.beta: .*greater than 0.*given: 0"),
        ({"poft": {"references": [{"model": "a"}, {"model": "a"}]}}, r"two of them have the model 'a'"),
        ({"poft": {"references": [{"model": "x/a"}, {"model": "y/a"}]}}, r"two of them have the name 'a'"),
        ({"rl": None}, r"poft: this block is there, but `rl: None` does not read it"),
        ({"rl": "dpo"}, r"poft: this block is there, but `rl: dpo` does not read it"),
        ({"streaming": True, "max_steps": 3}, r"streaming: True cannot be honoured"),
        ({"pretraining_dataset": "x"}, r"pretraining_dataset: 'x' cannot be honoured"),
        ({"base_model": "a/x.gguf"}, r"base_model: 'a/x\.gguf' cannot be .*a reference, not a policy.*gguf_file=FILE"),
        ({"train_on_inputs": True}, r"train_on_inputs: True cannot be honoured.*set it to false"),
        ({"excess_length_strategy": "truncate"}, r"excess_length_strategy: 'truncate'.*different texts"),
        ({"sample_packing": True, "eval_sample_packing": True}, r"eval_sample_packing: True"),
        ({"trainer_cls": "a.B"}, r"trainer_cls: 'a.B'"),
        ({"rl_beta": 0.1}, r"rl_beta: 0.1.*not read"),
        ({"remove_unused_columns": True}, r"remove_unused_columns: True"),
        ({"datasets": [{"path": "x.jsonl"}]}, r"datasets\[0\]: no `type:`"),
        ({"row_filters": [{"name": "keep_top_percent", "percent": 150}]}, r"row_filters\[0\]\.percent: .*150"),
        ({"row_filters": [{"name": "keep_top_percent", "pct": 5}]}, r"row_filters\[0\]\.percent: missing"),
        ({"row_filters": [{"name": "nope"}]}, r"row_filters\[0\].name: 'nope' is not registered.*keep_top_percent"),
    ],
)
def test_refused(models: SimpleNamespace, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hosting.load_config(config(models, tmp_path, **settings))


def test_taken_over(models: SimpleNamespace, tmp_path: Path) -> None:
    cfg = hosting.load_config(config(models, tmp_path, sample_packing=True))
    assert cfg.rl is None
    assert cfg[TAKEN_OVER] == "poft"
    assert cfg.eval_sample_packing is False
    assert cfg.datasets[0]["type"] == STRATEGY
    assert len(cfg.datasets[0][SALT_FIELD]) == 16
    assert cfg.poft["references"][0]["model"] == str(models.ref_a)


def test_a_saved_config_still_names_its_method(models: SimpleNamespace, tmp_path: Path) -> None:
    """What the host logs has no `rl`; training again from it must not become plain SFT."""
    hosting.load_config(config(models, tmp_path, rl=None, **{TAKEN_OVER: "poft"}))
    plugin = PluginManager.get_instance().plugins["poft_plugin.PoftPlugin"]
    assert plugin.method_run.method.name == "poft"


def test_without_our_rl_every_hook_does_nothing(models: SimpleNamespace, tmp_path: Path) -> None:
    cfg = hosting.load_config(config(models, tmp_path, rl=None, poft=None))
    plugin = PluginManager.get_instance().plugins["poft_plugin.PoftPlugin"]
    assert plugin.load_datasets(cfg) is None
    assert plugin.get_trainer_cls(cfg) is None
    assert plugin.get_collator_cls_and_kwargs(cfg) is None
    assert plugin.get_training_args(cfg) is None
    assert plugin.add_callbacks_post_trainer(cfg, None) == []
    assert cfg.datasets[0]["type"] == "chat_template"


def test_the_salt_follows_what_the_host_cannot_see(models: SimpleNamespace, tmp_path: Path) -> None:
    def salt(**settings: Any) -> str:
        return str(hosting.load_config(config(models, tmp_path, **settings)).datasets[0][SALT_FIELD])

    path = config(models, tmp_path)
    first = salt()
    assert salt() == first
    assert salt(poft={"references": [{"model": "other"}], "beta": 2.0}) == first
    within = {"references": [{"model": "a"}], "keep_top_percent": 50, "keep_within": "topic"}
    assert salt(poft=within) != first
    rows = tiny.chat_rows(4)
    rows[0]["messages"][1]["content"] += "!"
    tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    assert str(hosting.load_config(path).datasets[0][SALT_FIELD]) != first


def test_a_broken_import_of_ours_stops(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host prints an ImportError of a plugin and goes on with plain SFT."""
    import sys

    monkeypatch.setitem(sys.modules, "poft_plugin.hosts.axolotl.plugin", None)
    with pytest.raises(RuntimeError, match="nothing may be trained"):
        _ = poft_plugin.PoftPlugin
    with pytest.raises(RuntimeError, match="nothing may be trained"):
        hosting.load_config(config(models, tmp_path))
