"""`axolotl poft plan` names what keeps a config from training what is meant, where the host says nothing of it."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
from axolotl.cli.main import cli
from click.testing import CliRunner, Result

from poft_plugin.hosts.axolotl import raw_config

PLUGIN = "poft_plugin.PoftPlugin"


@pytest.fixture(autouse=True)
def by_its_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Axolotl 0.21; and what the command writes into the environment is undone."""
    monkeypatch.setattr(raw_config, "entry_points", lambda group: [])
    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")


@pytest.fixture
def write(models: SimpleNamespace, in_folder: Path) -> Any:
    """Writes a config, sound but for the changes."""
    tiny.write_jsonl(Path("chats.jsonl"), tiny.chat_rows(4))
    tiny.write_jsonl(Path("pairs.jsonl"), tiny.pair_rows(6))
    tiny.reward_model(in_folder / "grader")
    chats = {"path": "./chats.jsonl", "ds_type": "json", "type": "chat_template"}
    pairs = {"path": "./pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}
    kinds: dict[str, dict[str, Any]] = {
        "poft": {"rl": "poft", "poft": {"references": [{"model": str(models.ref_a)}]}, "datasets": [chats]},
        "deft": {"rl": "deft_dpo", "deft": {"reward_model": {"model": "./grader"}}, "datasets": [pairs]},
    }

    def written(kind: str, changes: dict[str, Any]) -> str:
        common = {"base_model": str(models.policy), "plugins": [PLUGIN], "output_dir": "./out"}
        return str(tiny.write_config(Path("config.yml"), **{**common, **kinds[kind], **changes}))

    return written


def plan(path: str) -> Result:
    """The command, in this process."""
    hosting.forget_plugins()
    return CliRunner().invoke(cli, ["poft", "plan", path])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("poft", {"plugins": None}, "poft_plugin is not loaded, and nothing of it runs. Add the lines\nplugins:\n  - "),
        ("poft", {"plugins": []}, "poft_plugin is not loaded"),
        ("poft", {"plugins": ["poft_plugin.PoftPlugn"]}, "'poft_plugin.PoftPlugn' is no plugin; did you mean"),
        ("deft", {"plugins": ["poft-plugin.PoftPlugin"]}, "is no plugin; did you mean " + PLUGIN),
        ("poft", {"rl": "pofft"}, "rl: 'pofft' is no rl type; did you mean `rl: poft`?"),
        ("deft", {"rl": "deft_dop"}, "rl: 'deft_dop' is no rl type; did you mean `rl: deft_dpo`?"),
        ("poft", {"rl": None}, "the block `poft:` is there, but `rl: null` asks for nothing of poft_plugin"),
        ("deft", {"rl": None}, "the block `deft:` is there, but `rl: null` asks for nothing of poft_plugin"),
        ("deft", {"rl": "dpo"}, "the block `deft:` is there, but `rl: dpo` asks for nothing of poft_plugin"),
        ("poft", {"beta": 0.5}, "beta: no key of the host at the top level; did you mean `poft.beta`?"),
        ("deft", {"beta": 0.5}, "beta: no key of the host at the top level; did you mean `rl_beta`?"),
        ("poft", {"row_filter": [{"name": "x"}]}, "row_filter: no key of the host at the top level; did you mean `row"),
        ("poft", {"references": "./a"}, "references: no key of the host at the top level; did you mean `poft.refer"),
        ("deft", {"reward_model": "./grader"}, "reward_model: './grader' cannot be honoured with `rl: deft_dpo`: true "
         "or false here; a model that grades belongs inside the block `deft:`"),
    ],
)  # fmt: skip
def test_one_message(write: Any, kind: str, changes: dict[str, Any], message: str) -> None:
    done = plan(write(kind, changes))
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert done.output.count("Error: ") == 1


def test_models_that_are_named_alone_simply_work(write: Any, models: SimpleNamespace) -> None:
    """Strings where a block or a list of blocks could stand."""
    one, two = str(models.ref_a), str(models.ref_b)
    for references in (one, [one, two], [one, {"model": two}]):
        done = plan(write("poft", {"poft": {"references": references}}))
        assert (done.exit_code, "ref_a" in done.output) == (0, True), done.output
        assert ("ref_b" in done.output) == (references != one)
    done = plan(write("deft", {"deft": {"reward_model": "./grader"}}))
    assert (done.exit_code, "grader" in done.output) == (0, True), done.output


@pytest.mark.parametrize("plugins", [[PLUGIN], None])
@pytest.mark.parametrize("rl", ["poft", None])
def test_a_plugin_that_cannot_be_loaded(
    write: Any, monkeypatch: pytest.MonkeyPatch, plugins: list[str] | None, rl: str | None
) -> None:
    """Without a line the newer host warns, goes on, and with no `rl:` trains plain SFT: the plan says so."""
    monkeypatch.setitem(sys.modules, "poft_plugin.hosts.axolotl.plugin", None)  # type: ignore[arg-type]
    done = plan(write("poft", {"plugins": plugins, "rl": rl}))
    assert done.exit_code == 1
    assert "Error: poft_plugin cannot be imported, so nothing may be trained: import of poft_plugin" in done.output
    assert "without that line it warns, goes on, and may train plain SFT" in done.output
