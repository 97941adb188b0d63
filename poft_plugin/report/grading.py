"""What grading and counting found: a table, numbers for the trackers, the tokens that tell good from bad."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from poft_plugin.data.discrepancy import TokenCounts
from poft_plugin.data.grading import LEVELS
from poft_plugin.report.console import make_console, warn

Ranked = tuple[tuple[str, float], ...]
"""Texts of tokens and their entries in the discrepancy distribution, the farthest from 0 first."""

COIN_TOSSING = 0.4
"""Share of rows whose scores contradict the label, above which scores look like coins: those disagree in half."""

HINT = "Wrong chat template of the reward model, or another one's task? Run `axolotl poft score CONFIG --show 3`"


class TopTokens(NamedTuple):
    """The ends of the discrepancy distribution."""

    positive: Ranked = ()
    negative: Ranked = ()


@dataclass(frozen=True)
class GroupGrades:
    """Grades of one group.

    Args:
        group: label of the group.
        rows: its samples.
        level_a: samples at level A; so `level_b`, `level_c`.
        level_b: see `level_a`.
        level_c: see `level_a`.
        quantiles: 5, 50 and 95 % of the grade scores, in the reward model's unit.
        label_disagreement: share of its samples which reward model and label order differently; None where there is
            nothing to compare.
        level_a_lost: level-A rows that the length filter took.
    """

    group: str
    rows: int
    level_a: int
    level_b: int
    level_c: int
    quantiles: tuple[float, float, float]
    label_disagreement: float | None
    level_a_lost: int = 0


@dataclass(frozen=True)
class CountNumbers:
    """`TokenCounts` without its vocabulary: how many samples, responses and tokens were counted where."""

    samples: int
    responses_positive: int
    responses_negative: int
    tokens_positive: int
    tokens_negative: int
    middle_uncounted: int
    middle_contradictory: int


@dataclass(frozen=True)
class GradingSummary:
    """What `summarise_grading` found, with the settings it was found under."""

    top_percent: float
    bottom_percent: float
    grade_within: str
    groups: tuple[GroupGrades, ...]
    label_disagreement: float | None
    counts: CountNumbers | None = None
    tokens: TopTokens = field(default_factory=TopTokens)

    def as_json(self) -> dict[str, Any]:
        """Lists, dictionaries, numbers, strings and None."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"tokens": self.tokens._asdict()}))
        return plain

    def with_level_a_lost(self, lost: Mapping[str, int]) -> "GradingSummary":
        """The same with each group's number of level-A rows lost to length; groups not named keep theirs."""
        unknown = lost.keys() - {line.group for line in self.groups}
        assert not unknown, unknown
        groups = [replace(line, level_a_lost=lost.get(line.group, line.level_a_lost)) for line in self.groups]
        return replace(self, groups=tuple(groups))

    def statistics(self) -> dict[str, float]:
        """Flat numbers for the host's trackers."""
        numbers = {
            "deft/level_a_rows": float(sum(line.level_a for line in self.groups)),
            "deft/level_b_rows": float(sum(line.level_b for line in self.groups)),
            "deft/level_c_rows": float(sum(line.level_c for line in self.groups)),
        }
        if self.label_disagreement is not None:
            numbers["deft/label_disagreement"] = self.label_disagreement
        return numbers | {f"deft/{line.group}/level_a_rows": float(line.level_a) for line in self.groups}

    def warnings(self) -> list[str]:
        """What looks wrong."""
        return [
            f"{line.group}: labels and scores disagree in {_percent(line.label_disagreement)} of the rows, near the "
            f"50 % of a coin: these grades say little. {HINT}"
            for line in self.groups
            if (line.label_disagreement or 0.0) > COIN_TOSSING
        ]


def summarise_grading(
    levels: np.ndarray,
    grade_scores: np.ndarray,
    groups: Iterable[object],
    *,
    top_percent: float,
    bottom_percent: float,
    grade_within: str,
    disagree: np.ndarray | None = None,
    counts: TokenCounts | None = None,
    tokens: TopTokens | None = None,
) -> GradingSummary:
    """Level counts, scores and disagreement of each group, in order of first appearance.

    Args:
        levels: `(n,)` letters, `A`, `B` or `C`.
        grade_scores: `(n,)`, the reward model's unit.
        groups: n labels; they are shown as text.
        top_percent: the setting that `levels` were made with; so `bottom_percent`, `grade_within`.
        bottom_percent: see `top_percent`.
        grade_within: see `top_percent`.
        disagree: `(n,)`, whether reward model and label order a sample's responses differently; NaN for a sample
            that has no order. None if nothing was compared.
        counts: what was counted for the discrepancy distribution, if there is one.
        tokens: its ends, from `top_tokens`.
    """
    labels = np.array([str(label) for label in groups], dtype=object)
    unsure = np.full(len(levels), np.nan) if disagree is None else np.asarray(disagree, dtype=np.float64)
    assert len(levels) == len(grade_scores) == len(labels) == len(unsure)
    lines = []
    for name in dict.fromkeys(labels.tolist()):
        inside = labels == name
        a, b, c = (int((levels[inside] == level).sum()) for level in LEVELS)
        low, middle, high = np.quantile(grade_scores[inside], [0.05, 0.5, 0.95]).tolist()
        lines.append(GroupGrades(name, int(inside.sum()), a, b, c, (low, middle, high), _share(unsure[inside])))
    return GradingSummary(
        top_percent=top_percent,
        bottom_percent=bottom_percent,
        grade_within=grade_within,
        groups=tuple(lines),
        label_disagreement=_share(unsure),
        counts=None if counts is None else _numbers(counts),
        tokens=tokens or TopTokens(),
    )


def top_tokens(discrepancy: np.ndarray, decode: Callable[[int], str], count: int = 10) -> TopTokens:
    """The tokens that good responses hold more often, and those that bad ones do; ties by token id.

    Args:
        discrepancy: `(V,)`, from `discrepancy_distribution`.
        decode: text of a token id.
        count: how many of each; fewer where fewer are above or below 0.
    """
    ranked = []
    for values in (discrepancy, -discrepancy):
        order = np.argsort(-values, kind="stable")[:count].tolist()
        ranked.append(tuple((decode(token), float(discrepancy[token])) for token in order if values[token] > 0))
    return TopTokens(*ranked)


def print_grading(summary: GradingSummary, console: Console | None = None) -> None:
    """The tables that users see after grading."""
    console = console or make_console()
    console.print(_grades_table(summary))
    if summary.counts is not None:
        for line in _count_lines(summary.counts):
            console.print(line)
    if summary.tokens.positive or summary.tokens.negative:
        console.print(_tokens_table(summary.tokens))
    for warning in summary.warnings():
        warn(console, warning)


def _grades_table(summary: GradingSummary) -> Table:
    title = f"Grades: A = top {summary.top_percent:g} %, C = bottom {summary.bottom_percent:g} %"
    table = Table(title=f"{title}; ranked within: {summary.grade_within}")
    table.add_column("data set")
    for heading in ("rows", "A", "B", "C", "5 %", "50 %", "95 %", "labels disagree", "A lost to length"):
        table.add_column(heading, justify="right")
    for line in summary.groups:
        sizes = [f"{number:,}" for number in (line.rows, line.level_a, line.level_b, line.level_c)]
        scores = [f"{value:.3f}" for value in line.quantiles]
        table.add_row(line.group, *sizes, *scores, _percent(line.label_disagreement), f"{line.level_a_lost:,}")
    if len(summary.groups) > 1:
        names = ("rows", "level_a", "level_b", "level_c", "level_a_lost")
        sums = [f"{sum(asdict(line)[name] for line in summary.groups):,}" for name in names]
        table.add_section()
        table.add_row("all", *sums[:4], "", "", "", _percent(summary.label_disagreement), sums[4])
    return table


def _count_lines(counts: CountNumbers) -> list[str]:
    return [
        f"counted {counts.responses_positive:,} responses ({counts.tokens_positive:,} tokens) as good, "
        f"{counts.responses_negative:,} ({counts.tokens_negative:,} tokens) as bad",
        f"between best and worst: {counts.middle_uncounted:,} responses near neither end, "
        f"{counts.middle_contradictory:,} left out because scores are equal or contradict the label",
    ]


def _tokens_table(tokens: TopTokens) -> Table:
    table = Table(title="Tokens that good responses hold more often, and bad ones")
    for heading in ("good", "Q_diff", "bad", "Q_diff"):
        table.add_column(heading, justify="right" if heading == "Q_diff" else "left")
    for number in range(max(map(len, tokens))):
        cells = [side[number] if number < len(side) else None for side in tokens]
        texts = [("", "") if cell is None else (repr(cell[0]), f"{cell[1]:+.2e}") for cell in cells]
        table.add_row(*texts[0], *texts[1])
    return table


def _numbers(counts: TokenCounts) -> CountNumbers:
    return CountNumbers(
        samples=counts.samples,
        responses_positive=counts.responses_positive,
        responses_negative=counts.responses_negative,
        tokens_positive=int(counts.positive.sum()),
        tokens_negative=int(counts.negative.sum()),
        middle_uncounted=counts.middle_uncounted,
        middle_contradictory=counts.middle_contradictory,
    )


def _share(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
