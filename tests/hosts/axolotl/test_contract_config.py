"""The host contract, part 2: the validator and the commands. See `test_contract.py`."""

from __future__ import annotations

from contract_support import Recorder, host_fact, only_plugins, valid_config

# isort: split
# (the line above sets the environment, before Axolotl is imported)
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from axolotl.cli.args import PreprocessCliArgs, TrainerCliArgs
from axolotl.cli.plugins import PluginCommandGroup
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from pydantic import BaseModel, ConfigDict, ValidationError

PLUGIN = "hosts/axolotl/plugin.py"


class DemoBlock(BaseModel):
    model_config = ConfigDict(extra="forbid")

    strength: float = 1.0


class DemoArgs(BaseModel):
    demo: DemoBlock | None = None


class WithArgs(BasePlugin):
    def get_input_args(self) -> str:
        return f"{__name__}.DemoArgs"


@host_fact(
    "sample_packing is refused with any `rl`, accepted without; an `rl` of a plugin is refused",
    breaks="hosts/axolotl/run.py take_over takes `rl` off for every method; if both pass now, see patches/0001",
    look="axolotl/utils/schemas/validation.py check_sample_packing_w_rl; schemas/config.py rl",
)
def test_sample_packing_needs_rl_off() -> None:
    assert valid_config(sample_packing=True).sample_packing is True
    with pytest.raises(ValidationError, match="does not work with RLHF"):
        valid_config(sample_packing=True, rl="dpo")
    with pytest.raises(ValidationError, match="rl\n"):
        valid_config(rl="poft")


@pytest.mark.parametrize("key", ["dpo_loss_type", "dpo_loss_weights"])
@host_fact(
    "dpo_loss_type and dpo_loss_weights are refused without `rl: dpo`",
    breaks="hosts/axolotl/checks.py refuses them first, with our own remedy",
    look="axolotl/utils/schemas/validation.py check_dpo",
)
def test_dpo_keys_are_refused_without_rl(key: str) -> None:
    with pytest.raises(ValidationError, match="are for DPO only"):
        valid_config(**{key: [1.0] if key.endswith("weights") else ["sigmoid"]})


@host_fact(
    "without `rl`, entries are read as SFT entries and lose the preference fields, silently",
    breaks="hosts/axolotl/entries.py keeps the raw entries; if fields stay, it need not",
    look="axolotl/utils/config/__init__.py validate_config; schemas/datasets.py SFTDataset",
)
def test_preference_fields_of_an_entry_are_dropped() -> None:
    entry = {"path": "rows.jsonl", "type": "chat_template", "field_chosen": "best", "field_messages": "turns"}
    valid = valid_config(datasets=[entry]).datasets[0]
    assert valid["field_messages"] == "turns"
    assert "field_chosen" not in valid


@host_fact(
    "get_input_args names a class; its fields join the schema, and a nested extra='forbid' is enforced; "
    "an unknown top-level key passes and is dropped",
    breaks="hosts/axolotl/args.py: the `poft:` block would be lost, or a misspelt key in it ignored",
    look="axolotl/integrations/config.py merge_input_args",
)
def test_config_block_joins_the_schema() -> None:
    assert "demo" not in valid_config(demo={"strength": 2.0})
    with only_plugins(WithArgs()):
        assert valid_config(plugins=["demo"], demo={"strength": 2.0}).demo.strength == 2.0
        with pytest.raises(ValidationError, match=r"demo\.strenght\n.*Extra inputs"):
            valid_config(plugins=["demo"], demo={"strenght": 2.0})


@host_fact(
    "input-args classes are merged by their bare name, so two of one name collide",
    breaks="hosts/axolotl/args.py: keep its class name unlike any other plugin's",
    look="axolotl/integrations/config.py merge_input_args",
)
def test_input_args_of_one_name_collide() -> None:
    with only_plugins(WithArgs(), WithArgs()), pytest.raises(TypeError, match="duplicate base class"):
        valid_config(plugins=["demo"])


@host_fact(
    "with sample_packing, an unset eval_sample_packing becomes True; an explicit False stays and turns "
    "remove_unused_columns off",
    breaks="hosts/axolotl/run.py take_over sets eval_sample_packing: false when unset: packed eval can lose every row",
    look="axolotl/utils/schemas/validation.py check_eval_packing",
)
def test_eval_packing_follows_sample_packing() -> None:
    assert valid_config(sample_packing=True).eval_sample_packing is True
    explicit = valid_config(sample_packing=True, eval_sample_packing=False)
    assert explicit.eval_sample_packing is False
    assert explicit.remove_unused_columns is False
    assert valid_config().remove_unused_columns is None


@host_fact(
    "train asks plugins for datasets, trains on them, then calls post_train_unload",
    breaks=f"{PLUGIN} load_datasets: training would run on the host's datasets, without our columns",
    look="axolotl/cli/train.py do_train",
)
def test_train_uses_the_datasets_of_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.cli import train

    plugin = Recorder(datasets="ours")

    def fake_train(cfg: DictDefault, dataset_meta: str) -> tuple[None, None, None]:
        plugin.calls.append(f"train on {dataset_meta}")
        return None, None, None

    monkeypatch.setattr(train, "train", fake_train, raising=False)
    with only_plugins(plugin):
        train.do_train(DictDefault({"plugins": ["ours"]}), TrainerCliArgs())
    assert plugin.calls == [("load_datasets", False), "train on ours", "post_train_unload"]


@host_fact(
    "preprocess asks plugins for datasets and then leaves the host's own loading out",
    breaks=f"{PLUGIN} load_datasets: `axolotl preprocess` would not score",
    look="axolotl/cli/preprocess.py do_preprocess",
)
def test_preprocess_asks_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.cli import preprocess

    plugin = Recorder(datasets="ours")
    monkeypatch.setattr(preprocess, "load_datasets", lambda **_: plugin.calls.append("host"))
    cfg = DictDefault({"plugins": ["ours"], "dataset_prepared_path": str(tmp_path)})
    with only_plugins(plugin):
        preprocess.do_preprocess(cfg, PreprocessCliArgs(download=False))
    assert plugin.calls == [("load_datasets", True)]


@host_fact(
    "`axolotl evaluate` does not ask plugins for datasets",
    breaks="nothing if it asks now: MethodTrainer.evaluate in hosts/axolotl/trainer.py need not attach our columns",
    look="axolotl/cli/evaluate.py do_evaluate",
)
def test_evaluate_does_not_ask_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.cli import evaluate

    plugin, evaluated = Recorder(datasets="ours"), []
    monkeypatch.setattr(evaluate, "load_datasets", lambda **_: "theirs")
    monkeypatch.setattr(evaluate, "evaluate", lambda **kwargs: evaluated.append(kwargs["dataset_meta"]))
    with only_plugins(plugin):
        evaluate.do_evaluate(DictDefault({"plugins": ["ours"]}), TrainerCliArgs())
    assert evaluated == ["theirs"]
    assert plugin.calls == []


@host_fact(
    "entry points of the group axolotl.cli_commands become commands; core names cannot be shadowed",
    breaks="hosts/axolotl/cli.py and the entry points in pyproject.toml: our commands would not be found",
    look="axolotl/cli/plugins.py ENTRY_POINT_GROUP, PluginCommandGroup",
)
def test_commands_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.cli.main import cli

    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "axolotl.cli_commands"
        return [EntryPoint(name, "axolotl.cli.main:preprocess", group) for name in ("ours", "train")]

    monkeypatch.setattr("axolotl.cli.plugins.entry_points", entry_points)
    monkeypatch.setattr(cli, "_plugin_commands", None)
    assert isinstance(cli, PluginCommandGroup)
    context = click.Context(cli)
    assert "ours" in cli.list_commands(context)
    assert cli.get_command(context, "ours").resolve().name == "preprocess"
    assert cli.get_command(context, "train") is cli.commands["train"]
