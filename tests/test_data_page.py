"""docs/data.md: every section's row, read with the lines that the section says to write, is what it says."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import AutoTokenizer

from poft_plugin.data.columns import CONVERSATION
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import load_conversation
from poft_plugin.hosts.axolotl.entries import take_over_entries
from poft_plugin.hosts.axolotl.strategy import load
from poft_plugin.plugins import registry

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
FENCE = r"```{}\n(.*?)\n```"


class Layout(NamedTuple):
    """A section of the page: what to write, a row, and what is read of it."""

    title: str
    method: str
    entry: dict[str, Any]
    row: dict[str, Any]
    read: str


def layouts() -> list[Layout]:
    """The sections that have a row."""
    found, method = [], ""
    for section in re.split(r"^(?=##+ )", PAGE, flags=re.MULTILINE):
        title = section.partition("\n")[0].lstrip("# ")
        method = {"Preference rows": "deft_pro", "Conversations": "poft"}.get(title, method)
        blocks = [re.findall(FENCE.format(kind), section, flags=re.DOTALL) for kind in ("yaml", "json", "text")]
        assert len(set(map(len, blocks))) == 1, title
        for entry, row, read in zip(*blocks, strict=True):
            found.append(Layout(title, method, yaml.safe_load(entry), json.loads(row), read))
    return found


LAYOUTS = layouts()


@pytest.fixture(scope="module")
def tokenizer(models: SimpleNamespace) -> Any:
    return AutoTokenizer.from_pretrained(models.policy)


def prepared(layout: Layout, rows: list[dict[str, Any]], folder: Path, tokenizer: Any) -> Dataset:
    """Rows as the host would get them from the strategy that the entry is taken over to."""
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"path": str(file), "ds_type": "json", **layout.entry}
    cfg = DictDefault({"datasets": [entry], "sequence_len": 512, "base_model": "none", "train_on_inputs": False})
    take_over_entries(cfg, registry().methods[layout.method], None)
    raw = Dataset.from_json(str(file), cache_dir=str(folder / "cache"))
    return load(tokenizer, cfg, cfg["datasets"][0]).wrap_dataset(raw)


def shown(layout: Layout, conversation: str) -> str:
    """As the page shows it."""
    if layout.method == "poft":
        turns, answers = load_conversation(conversation), []
    else:
        sample = RankedSample.loads(conversation)
        scores = [""] * len(sample.ranks) if sample.scores is None else [f" [{score:g}]" for score in sample.scores]
        turns = sample.prompt
        answers = [
            f"{rank + 1}. {text}{score}"
            for rank, text, score in zip(sample.ranks, sample.responses, scores, strict=True)
        ]
    lines = [f"{'> ' if turn.counted else ''}{turn.role}: {turn.content}" for turn in turns]
    return "\n".join(line.replace("\n", "\\n") for line in [*lines, *answers])


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.title for layout in LAYOUTS])
def test_what_the_page_says_is_read(
    layout: Layout, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the row and of a second one, that nothing of it is left unread is not said of any."""
    rows = prepared(layout, [layout.row, layout.row], tmp_path, tokenizer)
    assert [shown(layout, text) for text in rows[CONVERSATION]] == [layout.read] * 2
    assert "is not read" not in capsys.readouterr().out


def test_every_section_is_in_the_table() -> None:
    table = PAGE.split("| --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    linked = re.findall(r"\(#([^)]+)\)", table)
    headings = re.findall(r"^##+ (.*)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert len(linked) == len(set(linked)) >= 20
    assert set(linked) <= anchors


def test_there_are_sections() -> None:
    assert len([layout for layout in LAYOUTS if layout.method == "deft_pro"]) >= 20
    assert len([layout for layout in LAYOUTS if layout.method == "poft"]) >= 9
