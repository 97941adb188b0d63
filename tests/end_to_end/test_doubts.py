"""What can be honoured and is hardly meant is said: few rows left, grades near coins; commands with nothing to do."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graded
import hosting
import pytest
import tiny
from axolotl.cli.main import cli
from click.testing import CliRunner

from poft_plugin.hosts.axolotl import datasets
from poft_plugin.report.grading import COIN_TOSSING

ROWS = 60
CHATS = {"path": "./chats.jsonl", "ds_type": "json", "type": "chat_template"}
PAIRS = {"path": "./pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands write into the environment is undone."""
    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of data sets."""
    lines: list[str] = []
    monkeypatch.setattr(datasets.LOG, "warning", lines.append)
    return lines


def config(folder: Path, models: SimpleNamespace, **settings: Any) -> Path:
    """In the working folder."""
    common = {"base_model": str(models.policy), "plugins": ["poft_plugin.PoftPlugin"], "output_dir": "./out"}
    return tiny.write_config(folder / "config.yml", **common, dataset_prepared_path="./prepared", **settings)


def poft(*arguments: str) -> str:
    """`axolotl poft ...` in this process; its output, after it went well."""
    hosting.forget_plugins()
    done = CliRunner().invoke(cli, ["poft", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(("kept", "says"), [(datasets.FEW_ROWS, False), (datasets.FEW_ROWS - 1, True), (1, True)])
def test_few_rows_left_by_a_percentage(
    models: SimpleNamespace, in_folder: Path, warned: list[str], *, kept: int, says: bool
) -> None:
    """`keep_top_percent: 0.9` for 90 % leaves hardly a row."""
    tiny.write_jsonl(in_folder / "chats.jsonl", tiny.chat_rows(ROWS))
    block = {"references": str(models.ref_a), "keep_top_percent": 100 * (kept - 0.5) / ROWS, "score_cache": "./scores"}
    _, meta = graded.host_datasets(config(in_folder, models, rl="poft", poft=block, datasets=[CHATS]))
    assert len(meta.train_dataset) == kept
    expected = [f"only {kept} rows are left to train on by keep_top_percent"]
    assert warned == (expected if says else [])


@pytest.mark.parametrize("percent", [COIN_TOSSING, COIN_TOSSING + 0.05])
def test_scores_that_contradict_the_labels(models: SimpleNamespace, in_folder: Path, percent: float) -> None:
    """The plan of data with scores of their own: graded at once, and doubted above the bound alone."""
    rows = tiny.pair_rows(40)
    turned = random.Random(0).sample(range(len(rows)), round(percent * len(rows)))
    for number, row in enumerate(rows):
        row["scores"] = [0.0, 1.0] if number in turned else [1.0, 0.0]
    tiny.write_jsonl(in_folder / "pairs.jsonl", rows)
    said = poft("plan", str(config(in_folder, models, rl="deft_pro", datasets=[PAIRS])))
    assert "nothing to score" in said
    assert "Grades: A = top 3.73 %" in said
    line = f"labels and scores disagree in {100 * percent:.1f} % of the rows, near the 50 % of a coin"
    assert (f"pairs.jsonl: {line}" in " ".join(said.split())) == (percent > COIN_TOSSING)


@pytest.mark.parametrize("rl", ["pro", "rrhf", "deft_dpo"])
def test_commands_with_nothing_to_do_succeed(models: SimpleNamespace, in_folder: Path, rl: str) -> None:
    tiny.write_jsonl(in_folder / "pairs.jsonl", tiny.pair_rows(6))
    path = str(config(in_folder, models, rl=rl, datasets=[PAIRS]))
    shown = poft("score", path, "--show", "2")
    assert "nothing to show: no reference and no reward model reads these rows" in " ".join(shown.split())
    assert "«" not in shown
    if rl != "deft_dpo":  # whose start policy is to be scored
        assert "nothing to score: no model is asked for with these settings" in poft("plan", path)
