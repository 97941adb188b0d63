"""What came out: two tables, `results.json` and `report.png`."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from matplotlib.figure import Figure
from rich.table import Table

from poft_plugin.data.rows import load_conversation
from quickstart.stage import console
from quickstart.task import SPOILED, Row

RESULTS = "results.json"
PICTURE = "report.png"
COLOURS = {"clean": "tab:blue", "spoiled": "tab:red"}


def preference_scores(path: Path, rows: list[Row]) -> list[float]:
    """Each row's preference score: the mean reward over the references, out of an `axolotl poft export --rows` file.

    Rows meet their scores by their text, as the plugin itself does; the order of either file is no matter.
    """
    rewards = defaultdict(list)
    for line in pq.read_table(path, columns=["conversation", "reward"]).to_pylist():
        texts = tuple(turn.content for turn in load_conversation(line["conversation"]))
        rewards[texts].append(line["reward"])
    return [fmean(rewards[row.prompt, row.answer]) for row in rows]


def publish(results: dict[str, Any], rows: list[Row], folder: Path) -> None:
    """Prints the tables and writes both files.

    Args:
        results: `exact_match` and `seconds` by name; `preference_score` and `tau` of every row; `preferences`, as
            `preference_table` has it.
        rows: the training rows.
        folder: where the files go.
    """
    groups = {name: _grouped(results[name], rows) for name in ("preference_score", "tau")}
    means = {
        f"mean_{name}": {kind: round(fmean(values), 4) for kind, values in found.items()}
        for name, found in groups.items()
    }
    summary = {"exact_match": results["exact_match"], **means, "seconds": results["seconds"]}
    summary["training_rows"] = {kind: len(values) for kind, values in groups["tau"].items()}
    summary["preferences"] = results["preferences"]
    (folder / RESULTS).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _draw(groups, folder / PICTURE)
    console.print(_table(summary))
    console.print(preference_table(summary["preferences"]))
    console.print(f"{folder / RESULTS}\n{folder / PICTURE}", soft_wrap=True, highlight=False)


def _grouped(values: list[float], rows: list[Row]) -> dict[str, list[float]]:
    """Values of the clean and of the spoiled rows, and of each way to spoil."""
    groups: dict[str, list[float]] = {kind: [] for kind in ("clean", "spoiled", *SPOILED)}
    for value, row in zip(values, rows, strict=True):
        for kind in ("spoiled", row.spoiled) if row.spoiled else ("clean",):
            groups[kind].append(value)
    return groups


def _table(summary: dict[str, Any]) -> Table:
    found, tau, seconds = summary["exact_match"], summary["mean_tau"], summary["seconds"]
    table = Table(title="SFT and PoFT on the same rows, three in ten of them spoiled")
    for column in ("", "SFT", "PoFT"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("held-out exact match", f"{found['sft']:.3f}", f"{found['poft']:.3f}")
    for kind in ("clean", "spoiled"):
        table.add_row(f"mean tau of {kind} rows at the end", "1 (no weights)", f"{tau[kind]:.3f}")
    table.add_row("seconds of axolotl train, start included", f"{seconds['sft']:.0f}", f"{seconds['poft']:.0f}")
    table.add_row("seconds of axolotl poft score", "-", f"{seconds['score']:.0f}")
    table.caption = (
        f"The references reach {found['reference_a']:.3f} and {found['reference_b']:.3f}. "
        f"All of it took {seconds['total']:.0f} seconds."
    )
    return table


def preference_table(found: dict[str, Any]) -> Table:
    """DPO and DEFT-DPO side by side, next to the model that both begin with.

    Args:
        found: `quality` and `training` by name of the run; `pairs`, how many of each kind by level;
            `reward_model_accuracy`, the share of held-out pairs of a right and a spoiled answer in the right order.
    """
    quality, training = found["quality"], found["training"]
    table = Table(title="DPO and DEFT-DPO on the same preference pairs")
    for column in ("", "SFT (start)", "DPO", "DEFT-DPO"):
        table.add_column(column, justify="left" if not column else "right")
    for text, key, form in (
        ("rows trained on", "rows", ",d"),
        ("optimizer steps", "steps", ",d"),
        ("seconds of axolotl train, all included", "seconds", ".0f"),
        ("seconds of its training loop", "loop_seconds", ".1f"),
    ):
        table.add_row(text, "", *(f"{training[name][key]:{form}}" for name in ("dpo", "deft_dpo")))
    for text, key in (
        ("mean reward of held-out answers, r_eval", "reward_eval"),
        ("the same by r_train, which graded the rows", "reward_train"),
        ("held-out exact match", "exact_match"),
    ):
        table.add_row(text, *(f"{quality[name][key]:.3f}" for name in ("sft", "dpo", "deft_dpo")))
    accuracy = found["reward_model_accuracy"]
    table.caption = (
        f"Chosen answers of all pairs: {_kinds(_total(found['pairs']))}; of level A: {_kinds(found['pairs']['A'])}. "
        f"r_train and r_eval put {accuracy['reward_train']:.3f} and {accuracy['reward_eval']:.3f} of held-out right "
        "answers above spoiled ones."
    )
    return table


def _kinds(count: dict[str, int]) -> str:
    """How many pairs of each kind, in words."""
    return ", ".join(f"{number:,} {kind}" for kind, number in count.items())


def _total(levels: dict[str, dict[str, int]]) -> dict[str, int]:
    return {kind: sum(count[kind] for count in levels.values()) for kind in levels["A"]}


def _draw(groups: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")  # without pyplot: no display, no window
    left, right = figure.subplots(1, 2)
    _densities(left, groups["preference_score"], "preference score: mean reward of the references, nats per token")
    left.set_title("Preference score of the training rows")
    left.set_yscale("log")  # nearly all clean rows sit next to 0: on a linear scale nothing else would show
    _densities(right, groups["tau"], "tau: weight of a row's gradient at the end of training")
    right.set_title("What PoFT makes of it")
    figure.savefig(path, dpi=120)


def _densities(axes: Any, groups: dict[str, list[float]], label: str) -> None:
    """Clean against spoiled rows, each as a density of its own, on common bins."""
    shown = {kind: groups[kind] for kind in COLOURS}
    low, high = min(map(min, shown.values())), max(map(max, shown.values()))
    for kind, values in shown.items():
        label_of_kind = f"{kind} ({len(values):,} rows)"
        axes.hist(values, bins=50, range=(low, high), density=True, alpha=0.6, color=COLOURS[kind], label=label_of_kind)
    axes.set(xlabel=label, ylabel="density")
    axes.legend()
