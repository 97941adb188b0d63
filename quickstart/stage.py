"""Where the quickstart works and on which rows, how it calls `axolotl`, and its clock."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "quickstart" / "work"
AXOLOTL = Path(sys.executable).parent / "axolotl"

SEED = 7
# Questions for preference pairs are more than the pairs: some give no two answers that differ in how right they are.
SIZES = {"heldout": 1000, "train": 2000, "reference": 12000, "preference": 3000}

# Axolotl on a CPU: no telemetry, no hub, and no GPU even where there is one, so that the run is the same everywhere.
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

console = Console()


class Clock:
    """Says what is going on, and remembers how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Announces a step, and its seconds when it is done."""
        start = time.perf_counter()
        with console.status(f"{text} ..."):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 1)
        console.print(f"{text}: {self.seconds[name]:.1f} s")


def check_axolotl() -> None:
    """Ends with a remedy if the host is not installed."""
    if not AXOLOTL.exists():
        raise SystemExit(f"{AXOLOTL} is not there: run `make quickstart`, or install axolotl and this plugin")


def log_file(name: str) -> Path:
    """Where the output of a step's `axolotl` goes."""
    return WORK / f"{name}.log"


def axolotl(log_name: str, *arguments: str) -> None:
    """Runs `axolotl` in a process of its own; its output goes to a log file, whose end is shown if it fails."""
    log = log_file(log_name)
    command, environment = [AXOLOTL, *arguments], os.environ | ENVIRONMENT
    with log.open("wb") as out:
        done = subprocess.run(command, check=False, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        raise SystemExit(f"{tail}\n\naxolotl {' '.join(arguments)} ended with {done.returncode}; all of it: {log}")
