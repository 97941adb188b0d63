"""How time and memory grow with the number of rows: scoring, joining, counting, grading.

The exponent is the slope of log time (and of log memory) over log rows: 1 is linear, below 1 a fixed part still shows.

    python -m benchmarks.growth [--write]
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from benchmarks import synthetic
from benchmarks.common import SEED, Contestant, Report, arguments, peak_mib, publish, race, rounds, settle
from poft_plugin.config import ReferenceConfig
from poft_plugin.data.discrepancy import GradedSample, count_tokens
from poft_plugin.data.grading import grade_levels
from poft_plugin.data.preparation import RunContext
from poft_plugin.preprocessors.reference_rewards import reference_rewards
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.checkpoints import resolve_checkpoint
from poft_plugin.scoring.identity import Score
from poft_plugin.scoring.run import batches_for

SIZES = (1_000, 10_000, 100_000)
SMALL = (50, 200, 800)
VOCABULARY = 32_768
RESPONSE_TOKENS = 200


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = settle(arguments(__doc__).parse_args(argv), repeats=3)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        publish("growth", [measure(options, Path(folder))], options)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Times every task at every size, and takes the slopes."""
    sizes = SMALL if options.small else SIZES
    makers = {
        "scoring": partial(scoring, folder / "scored"),
        "joining": partial(joining, folder / "joined"),
        "counting": counting,
        "grading": grading,
    }
    cells = []
    for task, make in makers.items():
        runs = [Contestant(str(count), make(count), count) for count in sizes]
        timings = race(runs, options.repeats, clock=options.clock, take=options.take)
        seconds = [timings[run.name].figure for run in runs]
        peaks = [max(peak_mib(run.run), 0.0) for run in runs]
        for number, count in enumerate(sizes):
            slopes = (_slope(sizes, seconds), _slope(sizes, peaks)) if number == len(sizes) - 1 else ("", "")
            per_row = f"{1e6 * seconds[number] / count:.3g}"
            cells.append([task, f"{count:,}", f"{seconds[number]:.3g}", per_row, f"{peaks[number]:,.1f}", *slopes])
    headings = ("task", "rows", "seconds", "microseconds a row", "peak MiB", "exponent, time", "exponent, memory")
    notes = (
        f"{rounds(options)} Peak memory: above what was held before.",
        "Scoring: a Llama of one layer, rows of about 30 tokens, results kept and written to the cache.",
        "Joining: unique rows, the cached scores of three references, summary and mean, as `axolotl train` does it.",
        f"Counting: pairs of {RESPONSE_TOKENS}-token responses. Grading: levels with ties broken by row key.",
    )
    return Report("Growth with the number of rows", headings, cells, notes)


def scoring(folder: Path, count: int) -> Callable[[], Any]:
    """Scores `count` rows in batches and writes them."""
    if not folder.exists():
        synthetic.checkpoint(folder, SEED)
    cache = ScoreCache(folder / "scores")
    scorer = CausalLMScorer(ReferenceConfig(model=str(folder)), resolve_checkpoint(str(folder), None, cache))
    scorer.load("cuda" if torch.cuda.is_available() else "cpu")
    rows = synthetic.random_rows(count, 260, prompt=10, response=15)

    def run() -> None:
        done: list[Score] = []
        for batch in batches_for(scorer, rows, 1024):
            done += scorer.score(batch)
        cache.write(scorer.identity, done)

    return run


def joining(folder: Path, count: int) -> Callable[[], Any]:
    """Finds every row's three scores and their mean."""
    references = [folder / f"reference_{number}" for number in range(3)]
    for number, reference in enumerate(references):
        if not reference.exists():
            synthetic.checkpoint(reference, number)
    rows = synthetic.rows_of(count)
    settings = synthetic.settings_for(references, folder / f"scores_{count}")
    synthetic.fill_cache(settings, rows.keys)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            synthetic.prepared(reference_rewards, rows.unique(), settings, RunContext("train"))

    return run


def counting(count: int) -> Callable[[], Any]:
    """Counts the tokens of `count` pairs into the two sides of the discrepancy."""
    rng = np.random.default_rng(SEED)
    tokens = rng.integers(0, VOCABULARY, (1000, 2, RESPONSE_TOKENS))

    def samples() -> Iterator[GradedSample]:
        for number in range(count):
            yield GradedSample("ABC"[number % 3], list(tokens[number % len(tokens)]), (1.0, 0.0))

    return lambda: count_tokens(samples(), vocab_size=VOCABULARY).discrepancy()


def grading(count: int) -> Callable[[], Any]:
    """Grades `count` scores with many ties."""
    rng = np.random.default_rng(SEED)
    scores = rng.normal(size=count).round(2)
    keys = np.array([f"{number:032x}" for number in rng.permutation(count)])
    return lambda: grade_levels(scores, top_percent=3.73, bottom_percent=12.5, keys=keys)


def _slope(counts: Sequence[int], values: Sequence[float]) -> str:
    """Slope of the log-log line through the values, or a dash where one of them is nothing."""
    return "-" if min(values) <= 0 else f"{np.polyfit(np.log(counts), np.log(values), 1)[0]:.2f}"


if __name__ == "__main__":
    main()
