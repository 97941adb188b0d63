"""What the benchmarks share: contestants timed in turn, memory, tables, and the last table of each in README.md.

Times are compared within one run: every repeat runs all contestants, each time beginning with another one, so that
whatever else the machine does meets all of them. A figure is the median of the repeats.
"""

import argparse
import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

README = Path(__file__).with_name("README.md")
MIB = 2**20
WIDTH = 140
SEED = 20251121
PACKAGES = ("torch", "transformers", "axolotl", "trl")
"""Whose versions a table names."""


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work.

    Args:
        name: in the table.
        run: does the work once.
        work: rows, steps or whatever is counted, that one call gets through.
        prepare: undoes the traces of the last call; it is not timed.
    """

    name: str
    run: Callable[[], Any]
    work: float = 1.0
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Timing:
    """What the repeats of one contestant took.

    Args:
        name: the contestant's.
        work: of one repeat.
        seconds: of each repeat, by the clock that was asked for.
        cpu_seconds: CPU seconds of each repeat, all threads of this process.
        take: which repeat counts: `median` or `best`.
    """

    name: str
    work: float
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    take: str = "median"

    @property
    def figure(self) -> float:
        """Seconds of the repeat that counts."""
        return self.median if self.take == "median" else min(self.seconds)

    @property
    def median(self) -> float:
        """Seconds of the median repeat."""
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        """CPU seconds of the median repeat."""
        return statistics.median(self.cpu_seconds)

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.figure

    @property
    def spread(self) -> str:
        """Fastest and slowest repeat."""
        return f"{min(self.seconds):.3g} to {max(self.seconds):.3g}"


def race(
    contestants: Sequence[Contestant],
    repeats: int,
    *,
    clock: str = "wall",
    take: str = "median",
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Times the contestants in turn.

    Args:
        contestants: with names of their own.
        repeats: rounds that count.
        clock: `wall`, or `cpu`: this process's CPU time over its threads, which other processes hardly touch.
        take: which round counts, `median` or `best`; on a busy machine the best is the least disturbed.
        warm_up: one round before that does not.

    Returns:
        By name, in the order given.
    """
    taken: dict[str, list[tuple[float, float]]] = {contestant.name: [] for contestant in contestants}
    assert len(taken) == len(contestants), "two contestants of one name"
    if warm_up:
        for contestant in contestants:
            _timed(contestant, clock)
    for number in range(repeats):
        shift = number % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            taken[contestant.name].append(_timed(contestant, clock))
    return {
        contestant.name: Timing(contestant.name, contestant.work, *zip(*taken[contestant.name], strict=True), take)
        for contestant in contestants
    }


def _timed(contestant: Contestant, clock: str) -> tuple[float, float]:
    if contestant.prepare is not None:
        contestant.prepare()
    gc.collect()
    _synchronize()
    start, cpu = now(clock), time.process_time()
    contestant.run()
    _synchronize()
    return now(clock) - start, time.process_time() - cpu


def now(clock: str = "wall") -> float:
    """Seconds since some moment: the wall clock's, or CPU time of this process and its ended children over threads."""
    if clock == "wall":
        return time.perf_counter()
    children = os.times()
    return (time.process_time() + children.children_user + children.children_system) / torch.get_num_threads()


def peak_mib(run: Callable[[], Any]) -> float:
    """Peak memory of a call above what the process held before it, in MiB.

    On a GPU the allocator's own count; on a CPU the high-water mark of resident memory, which Linux lets a process set
    back. Free memory of earlier calls is given back first, so that the call cannot hide in it. Warm up before.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        _synchronize()
        return (torch.cuda.max_memory_allocated() - held) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    held = _status("VmRSS")
    run()
    return (_status("VmHWM") - held) / MIB


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match, field
    return int(match[1]) * 1024


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(
    rows: int, inner: int, columns: int, *, device: str = "cpu", dtype: torch.dtype, clock: str = "wall"
) -> float:
    """FLOP per second of `(rows, inner) @ (inner, columns)`, over many different right-hand sides as in a model."""
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    weights = [torch.randn(columns, inner, device=device, dtype=dtype) for _ in range(4)]
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    flops = 2.0 * rows * inner * columns * len(weights)
    calls, best = max(1, int(2e9 / flops)), 0.0
    for _ in range(5):
        _synchronize()
        start = now(clock)
        for _ in range(calls):
            for weight in weights:
                torch.mm(left, weight.t(), out=out)
        _synchronize()
        best = max(best, calls * flops / (now(clock) - start))
    return best


@dataclass(frozen=True)
class Report:
    """A table with what has to be said about it.

    Args:
        title: what was measured, on what.
        headings: of the columns; the first is text, the others are numbers.
        rows: cells.
        notes: one line each.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def show(self) -> None:
        """Prints it."""
        table = Table(title=self.title)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=bool(number))
        for row in self.rows:
            table.add_row(*row)
        console = Console(width=max(WIDTH, Console().width), highlight=False)
        console.print(table)
        for note in self.notes:
            console.print(f"- {note}")

    def markdown(self) -> str:
        """The same as markdown."""
        lines = [
            f"**{self.title}**",
            "",
            "| " + " | ".join(self.headings) + " |",
            "| --- |" + " ---: |" * (len(self.headings) - 1),
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip()


def publish(name: str, reports: Sequence[Report], options: argparse.Namespace) -> None:
    """Prints the tables, and with `--write` puts them into README.md between the markers of `name`."""
    for report in reports:
        report.show()
    print(machine())
    if options.write:
        write_section(README, name, "\n\n".join([machine(), *(report.markdown() for report in reports)]))


def write_section(path: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

    Raises:
        ValueError: if the markers are not there.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    whole = path.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{path.name}: no markers {begin} and {end}")
    before, rest = whole.split(begin, 1)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def machine() -> str:
    """The machine, its load, the versions and the date, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        model = found[1]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if find_spec(name))
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {model}, {torch.get_num_threads()} of {os.cpu_count()} cores{gpu}, {versions}; "
        f"load average at the end {os.getloadavg()[0]:.1f}"
    )


def arguments(description: str | None, *, data: str | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark has.

    Args:
        description: of the benchmark.
        data: what `--data` names, where it has one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="A few rows, seconds: to see that it runs.")
    parser.add_argument("--write", action="store_true", help="Put the table into benchmarks/README.md.")
    parser.add_argument("--repeats", type=int, help="Rounds whose median counts.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores).")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: CPU seconds of the process, with --threads 1, on a machine that others use too.",
    )
    parser.add_argument(
        "--take", choices=["median", "best"], default="median", help="Which round counts; best on a busy machine."
    )
    if data:
        parser.add_argument("--data", type=Path, help=data)
    return parser


def settle(options: argparse.Namespace, *, repeats: int) -> argparse.Namespace:
    """Applies the options: threads, seeds, how often; `repeats` where none were asked for."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    gc.freeze()  # what the imports left is not looked through again before every timing
    if options.repeats is None:
        options.repeats = 1 if options.small else repeats
    return options


def rounds(options: argparse.Namespace) -> str:
    """How the times were taken, as a sentence."""
    clock = "Wall clock" if options.clock == "wall" else "CPU seconds of the process over its threads"
    return f"{clock}, {options.take} of {options.repeats} interleaved round{'s' if options.repeats > 1 else ''}."


def ratio(value: float) -> str:
    """A ratio for a table."""
    return f"{value:.2f} x" if value < 10 else f"{value:.0f} x"
