"""What the references say of the data: a table after scoring, numbers for the trackers, warnings."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from poft_plugin.report.console import make_console, warn

LOW_MEAN = -4.0
"""Nats per token. A well-fed reference gives the answers of a usable data set about -1; -4 says it reads noise."""

LOW_CORRELATION = 0.3
HINT = "wrong chat template? run `axolotl poft score CONFIG --show 3`"


@dataclass(frozen=True)
class Distribution:
    """One reference on one data set, in nats per token."""

    reference: str
    source: str
    rows: int
    mean: float
    quantiles: tuple[float, float, float]


@dataclass(frozen=True)
class Summary:
    """Distributions, and the Spearman rank correlation of each pair of references."""

    distributions: tuple[Distribution, ...]
    correlations: dict[tuple[str, str], float]

    def statistics(self) -> dict[str, float]:
        """Flat numbers for the host's trackers."""
        numbers: dict[str, float] = {}
        for line in self.distributions:
            prefix = f"poft/reference/{line.reference}/{line.source}"
            values = (line.mean, *line.quantiles)
            numbers |= dict(zip([f"{prefix}/{k}" for k in ("mean", "q05", "q50", "q95")], values, strict=True))
        for (a, b), value in self.correlations.items():
            numbers[f"poft/reference_correlation/{a}/{b}"] = value
        return numbers

    def warnings(self) -> list[str]:
        """What looks wrong."""
        found = [
            f"reference {line.reference!r} gives {line.source} {line.mean:.2f} nats per token on average; {HINT}"
            for line in self.distributions
            if line.mean < LOW_MEAN
        ]
        return found + [
            f"references {a!r} and {b!r} hardly agree on the rows (rank correlation {value:.2f}); {HINT}"
            for (a, b), value in self.correlations.items()
            if value < LOW_CORRELATION
        ]


def summarise(references: Sequence[str], rewards: np.ndarray, sources: np.ndarray) -> Summary:
    """Distribution of each reference's rewards on each data set.

    Args:
        references: M names.
        rewards: `(M, n)`, nats per token.
        sources: `(n,)` the data set of each row.
    """
    lines = []
    for name, values in zip(references, rewards, strict=True):
        for source in dict.fromkeys(sources.tolist()):
            part = values[sources == source]
            low, middle, high = np.quantile(part, [0.05, 0.5, 0.95]).tolist()
            lines.append(Distribution(name, source, len(part), float(part.mean()), (low, middle, high)))
    pairs = combinations(range(len(references)), 2) if rewards.shape[1] > 2 else ()
    correlations = {(references[a], references[b]): _rank_correlation(rewards[a], rewards[b]) for a, b in pairs}
    return Summary(tuple(lines), correlations)


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The table that users see after scoring, and the warnings."""
    console = console or make_console()
    table = Table(title="References' mean log-probability of the responses (nats per token)")
    for heading in ("reference", "data set", "rows", "mean", "5 %", "50 %", "95 %"):
        table.add_column(heading, justify="left" if heading in ("reference", "data set") else "right")
    for line in summary.distributions:
        numbers = [f"{value:.3f}" for value in (line.mean, *line.quantiles)]
        table.add_row(line.reference, line.source, f"{line.rows:,}", *numbers)
    console.print(table)
    for (a, b), value in summary.correlations.items():
        console.print(f"rank correlation of {a} and {b}: {value:.3f}")
    for warning in summary.warnings():
        warn(console, warning)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)
