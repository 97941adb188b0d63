"""What is written down is what is there: keys, metrics, refusals, dependencies, and the README's own config."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import test_examples
import torch
import yaml
from axolotl.utils.dict import DictDefault

from docs import generate_configuration
from poft_plugin.config import DpoKeys, ReferenceConfig, RewardModelConfig, RowFilterConfig
from poft_plugin.data.columns import RANKS, SCORES
from poft_plugin.hosts.axolotl.checks import PREFIXES, RANKED_REFUSALS, REFUSALS, START_REFUSALS
from poft_plugin.hosts.axolotl.entries import FAMILIES
from poft_plugin.hosts.axolotl.ranked_fields import RANKED_TYPES, RankedFields
from poft_plugin.hosts.axolotl.run import take_over
from poft_plugin.methods import Method
from poft_plugin.report.grading import summarise_grading
from poft_plugin.report.scores import Distribution, Summary
from poft_plugin.trainers.metrics import MetricSums
from poft_plugin.trainers.step import SequenceBatch, Step

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
        *((f"## Keys of `{block}:`", model.model_fields) for block, model in generate_configuration.BLOCKS.items()),
        ("### A reference", ReferenceConfig.model_fields),
        ("### Defaults by method", [m.name for m in test_examples.BUILT_IN if m.defaults]),
        ("### The reward model", RewardModelConfig.model_fields),
        ("### A data set of preference rows", RankedFields.model_fields),
        ("## Top-level keys", [*generate_configuration.top_level(), *RowFilterConfig.model_fields]),
        ("### Top-level keys of `rl: deft_dpo`", DpoKeys.model_fields),
    ],
)
def test_every_key_is_in_the_readme(section: str, keys: list[str]) -> None:
    assert first_cells(section) == {*keys}


def steps_of(method: Method) -> list[Step]:
    """The steps of the runs that the example configs of a method ask for."""
    examples = [raw for raw in map(test_examples.read, test_examples.EXAMPLES) if raw.get("rl") == method.name]
    runs = [take_over(DictDefault(raw)) for raw in examples]
    return [run.step() for run in runs if run is not None]


def test_every_metric_is_in_the_readme() -> None:
    """A pair of responses through the step of every method."""
    numbers = torch.tensor([-1.0, -2.0])
    columns = dict.fromkeys((SCORES, *(name for m in test_examples.BUILT_IN for name in m.columns)), numbers)
    columns[RANKS] = torch.tensor([0.0, 1.0])
    counts, groups = torch.tensor([4.0, 4.0]), torch.tensor([0, 0])
    batch = SequenceBatch(numbers, counts, groups, columns, distribution_rewards=numbers)
    sums = MetricSums()
    for method in test_examples.BUILT_IN:
        for step in steps_of(method):
            sums.add(step(batch).metrics)
    each_log = {"loss", *sums.pop(lambda tensor: tensor)}
    once = Summary((Distribution("NAME", "DATASET", 1, 0.0, (0.0, 0.0, 0.0)),), {("NAME", "NAME"): 1.0}).statistics()
    graded = summarise_grading(
        np.array(["A"]),
        np.zeros(1),
        ["DATASET"],
        top_percent=100,
        bottom_percent=0,
        grade_within="dataset",
        disagree=np.zeros(1),
    ).statistics()
    assert {"deft/distribution_reward", "dpo/loss", "poft/win_rate"} <= each_log
    assert first_cells("## Metrics") == each_log | {*once, *graded}


def test_every_refused_setting_is_in_the_readme() -> None:
    listed = {cell.split(":")[0] for cell in first_cells("## What is refused")}
    refusals = (*REFUSALS, *RANKED_REFUSALS, *START_REFUSALS)
    assert listed == {refusal.key for refusal in refusals} | {f"{prefix}..." for prefix in PREFIXES}


def test_every_method_is_in_the_readme() -> None:
    assert first_cells("## The methods") == {method.name for method in test_examples.BUILT_IN}


def test_every_supported_dataset_type_is_in_the_readme() -> None:
    section = README.split("\n## Dataset types that work\n", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r"`([^`]+)`", section)
    assert {*FAMILIES} <= {name.partition(".")[0] for name in named}
    assert {*RANKED_TYPES} <= {*named}


def test_every_dependency_has_a_role_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for key, names in project["optional-dependencies"].items() if key != "dev" for name in names]
    names = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0] for line in [*project["dependencies"], *extras]}
    assert first_cells("## Dependencies and what each is for") == names


@pytest.mark.parametrize(("number", "rl"), [(0, "poft"), (1, "deft_dpo")])
def test_config_in_the_readme_is_valid(number: int, rl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)[number])
    valid, run = test_examples.validated(dict(raw), test_examples.MACHINE, monkeypatch)
    assert run is not None
    assert run.method.name == raw["rl"] == rl
    assert set(raw) <= {*valid, "rl", *(type(run.keys).model_fields if run.keys else ())}


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
