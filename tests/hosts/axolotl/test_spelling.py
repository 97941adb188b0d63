"""Keys near ours are refused with the place that they were meant for; the host's keys never are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import RLType

from poft_plugin.hosts.axolotl import plugin
from poft_plugin.hosts.axolotl.plugin import PoftPlugin
from poft_plugin.hosts.axolotl.raw_config import check_asked_for
from poft_plugin.hosts.axolotl.run import MethodRun, take_over
from poft_plugin.hosts.axolotl.spelling import check_keys, check_rl
from poft_plugin.plugins import registry

PLUGIN = "poft_plugin.PoftPlugin"
POFT: dict[str, Any] = {
    "base_model": "b",
    "plugins": [PLUGIN],
    "rl": "poft",
    "poft": {"references": "./a"},
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
}
DEFT = {**POFT, "rl": "deft_dpo", "poft": None, "deft": {"reward_model": "./rm"}}


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin warns of."""
    lines: list[str] = []
    monkeypatch.setattr(plugin.LOG, "warning", lines.append)
    return lines


def run(config: dict[str, Any], **settings: Any) -> MethodRun | None:
    return take_over(DictDefault({**config, **settings}))


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (POFT, {"beta": 0.5}, r"^beta: no key of the host at the top level; did you mean `poft\.beta`\?$"),
        (POFT, {"reference": "x"}, r"did you mean `poft\.references`"),
        (POFT, {"row_filter": []}, r"row_filter: .*did you mean `row_filters:`"),
        (POFT, {"poftt": {}}, r"did you mean `poft:`"),
        (POFT, {"dtype": "bfloat16"}, r"did you mean `poft\.references\[\]\.dtype`"),
        (POFT, {"omega": 1}, r"`deft\.omega` is read by other methods alone"),
        (POFT, {"deft_dpo": {}}, r"did you mean `rl: deft_dpo`"),
        (POFT, {"beta": 1, "gama": 0}, r"^beta: .*\ngama: .*`poft\.gamma`"),
        (DEFT, {"beta": 0.1}, r"did you mean `rl_beta`"),
        (DEFT, {"top_percents": 10}, r"did you mean `deft\.top_percent`"),
        (DEFT, {"reward_modl": "./rm"}, r"did you mean `deft\.reward_model`"),
        (DEFT, {"reward_model": "./rm"}, r"reward_model: './rm' .*inside the block `deft:`"),
        (DEFT, {"reward_model": {"model": "./rm"}}, r"inside the block `deft:`"),
        (POFT, {"rl": None, "poft": None, "pof": {}}, r"did you mean `poft:`"),
        (POFT, {"rl": None, "poft": None, "beta": 1}, r"`poft\.beta` is read by"),
        (POFT, {"rl": "pofd"}, r"rl: 'pofd' is no rl type; did you mean `rl: poft`"),
        (POFT, {"rl": "DEFT-DPO"}, r"did you mean `rl: deft_dpo`"),
        (POFT, {"rl": "sft", "poft": None}, r"did you mean `rl: deft_sft`"),
        (POFT, {"use_dft": True}, r"use_dft: True cannot be honoured"),
        (POFT, {"diffusion_lm": {"eps": 0.1}}, r"diffusion_lm: .*another loss"),
        (POFT, {"balance_labels": True}, r"balance_labels: True cannot be honoured"),
        (POFT, {"label_balance_window_optim_steps": 2}, r"label_balance_window_optim_steps: 2 cannot be honoured"),
        (POFT, {"adapter": "mixlora"}, r"adapter: 'mixlora' cannot be honoured"),
        (POFT, {"context_parallel": {"size": 2}}, r"context_parallel: \{'size': 2\}.*one device"),
    ],
)
def test_refused(config: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(config, **settings)


def test_no_key_of_the_host_is_taken_for_a_misspelling() -> None:
    """Every field of its schema, under every method and none."""
    fields = [*AxolotlInputConfig.model_fields, "axolotl_config_path", "debug", "shard", "device"]
    for method in (None, *registry().methods.values()):
        check_keys(dict.fromkeys(fields, 1), method)
    for kind in RLType:
        check_rl(kind.value)


@pytest.mark.parametrize("settings", [{"x-anchors": 1}, {"train_on_eos": 1}, {"context_parallel": {"size": 1}}, {7: 1}])
def test_taken(settings: dict[Any, Any]) -> None:
    assert take_over(DictDefault({**POFT, **settings})) is not None


@pytest.mark.parametrize(
    ("written", "models"),
    [
        ("./a", ["./a"]),
        (["./a", "./b"], ["./a", "./b"]),
        ({"model": "./a"}, ["./a"]),
        ([{"model": "./a"}, "b"], ["./a", "b"]),
    ],
)  # fmt: skip
def test_a_model_may_be_named_alone(written: Any, models: list[str]) -> None:
    found = run(POFT, poft={"references": written})
    assert found is not None
    assert [reference.model for reference in found.settings.references] == models
    assert run(DEFT).settings.reward_model.model == "./rm"


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (POFT, {"poft": {"references": "a", "keep_top_percent": 0.9}}, "90 % of them is `keep_top_percent: 90`"),
        (DEFT, {"deft": {"top_percent": 0.5}}, "deft.top_percent: 0.5 keeps 0.5 % of the rows"),
        (POFT, {"poft": {"references": "a", "keep_top_percent": 1}}, None),
    ],
)
def test_a_percentage_below_one_is_doubted(
    config: dict[str, Any], settings: dict[str, Any], expected: str | None, warned: list[str]
) -> None:
    PoftPlugin().register(DictDefault({**config, **settings}))
    assert [expected in message for message in warned] == [True] if expected else warned == []


@pytest.mark.parametrize(("plugins", "says"), [([PLUGIN], True), (["a.B"], False)])
def test_nothing_asked_for_is_said_in_one_line(warned: list[str], plugins: list[str], says: bool) -> None:
    PoftPlugin().register(DictDefault({"base_model": "b", "plugins": plugins}))
    assert len(warned) == says
    assert all(line.startswith("poft_plugin does nothing in this run: `rl: null`") for line in warned)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**POFT, "plugins": None}, r"not loaded.*Add the lines\nplugins:\n  - poft_plugin\.PoftPlugin"),
        ({**POFT, "plugins": ["a.B"]}, r"not loaded"),
        ({**POFT, "plugins": ["poft_plugn.PoftPlugin"]}, r"'poft_plugn\.PoftPlugin' is no plugin; did you mean"),
        ({**POFT, "plugins": ["poft_plugin"]}, r"'poft_plugin' is no plugin; did you mean"),
        ({**POFT, "plugins": PLUGIN}, r"expected a list of names"),
        ({**POFT, "rl": None}, r"the block `poft:` is there, but `rl: null` asks for nothing"),
        ({**POFT, "rl": "poff"}, r"did you mean `rl: poft`"),
        ({**POFT, "rl": "dpo", "poft": None}, r"`rl: dpo` asks for nothing of poft_plugin"),
        ([1], r"expected keys and values"),
        ("a: [", r"not a YAML file"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_ask_for_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: Any, message: str
) -> None:
    monkeypatch.setattr("poft_plugin.hosts.axolotl.raw_config.entry_points", lambda group: [])  # as before 0.21
    path = tmp_path / "config.yml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=message):
        check_asked_for(str(path))


@pytest.mark.parametrize("config", [POFT, DEFT, {**POFT, "rl": None, "poft_plugin_rl": "poft"}])
def test_a_file_that_asks_for_us(tmp_path: Path, config: dict[str, Any], models: SimpleNamespace) -> None:
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    check_asked_for(str(path))
