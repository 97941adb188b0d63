"""What is written down is what is there: keys, metrics, refusals, dependencies, and the README's own config."""

import re
import tomllib
from pathlib import Path

import pytest
import test_examples
import torch
import yaml

from docs import generate_configuration
from poft_plugin.config import PoftConfig, ReferenceConfig, RowFilterConfig
from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.hosts.axolotl.checks import REFUSALS
from poft_plugin.hosts.axolotl.entries import FAMILIES
from poft_plugin.losses import poft_loss
from poft_plugin.report.scores import Distribution, Summary
from poft_plugin.trainers.metrics import MetricSums
from poft_plugin.trainers.poft import PoftStep
from poft_plugin.trainers.step import SequenceBatch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIX = "run `python docs/generate_configuration.py`"


def first_cells(section: str) -> set[str]:
    """What stands in backquotes in the first cell of each table row of a section of the README."""
    body = re.split(r"^##+ ", README.split(f"\n{section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    cells = [line.split("|")[1] for line in body.splitlines() if line.startswith("| ")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_configuration_page_is_fresh() -> None:
    assert generate_configuration.PAGE.read_text(encoding="utf-8") == generate_configuration.page(), FIX


def test_tables_of_keys_in_the_readme_are_fresh() -> None:
    assert generate_configuration.readme(README) == README, FIX


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("## Keys of `poft:`", PoftConfig.model_fields),
        ("### A reference", ReferenceConfig.model_fields),
        ("### Top-level keys", [*generate_configuration.top_level(), *RowFilterConfig.model_fields]),
    ],
)
def test_every_key_is_in_the_readme(section: str, keys: list[str]) -> None:
    assert first_cells(section) == {*keys}


def test_every_metric_is_in_the_readme() -> None:
    one, count = torch.tensor([-1.0]), torch.tensor([4.0])
    batch = SequenceBatch(one, count, torch.tensor([0]), {REFERENCE_LOGP: one})
    sums = MetricSums()
    sums.add(PoftStep(poft_loss)(batch).metrics)
    each_log = {"loss", *sums.pop(lambda tensor: tensor)}
    once = Summary((Distribution("NAME", "DATASET", 1, 0.0, (0.0, 0.0, 0.0)),), {("NAME", "NAME"): 1.0}).statistics()
    assert first_cells("## Metrics") == each_log | set(once)


def test_every_refused_setting_is_in_the_readme() -> None:
    listed = {cell.split(":")[0] for cell in first_cells("## What is refused")}
    assert listed == {refusal.key for refusal in REFUSALS}


def test_every_supported_dataset_type_is_in_the_readme() -> None:
    section = README.split("\n## Dataset types that work\n", 1)[1].split("\n## ", 1)[0]
    assert {*FAMILIES} <= {name.partition(".")[0] for name in re.findall(r"`([^`]+)`", section)}


def test_every_dependency_has_a_role_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for key, names in project["optional-dependencies"].items() if key != "dev" for name in names]
    names = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0] for line in [*project["dependencies"], *extras]}
    assert first_cells("## Dependencies and what each is for") == names


def test_config_in_the_readme_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    raw = yaml.safe_load(block[1])
    valid, run = test_examples.validated(dict(raw), test_examples.MACHINE, monkeypatch)
    assert run.method.name == "poft"
    assert set(raw) <= {*valid, "rl"}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not ((ROOT / page).parent / target).exists()]
    assert not missing


def test_papers_page_names_functions_that_exist() -> None:
    """Every `path.py: name` in docs/papers.md is a definition in that file."""
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:poft_plugin|tests)/[a-z_/]+\.py)`(?:: `(\w+)`)?", text)
    assert named
    for path, name in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not name or re.search(rf"^\s*(?:def|class) {name}\b|^{name} = ", source, flags=re.MULTILINE), (
            path,
            name,
        )
