"""Where tables and progress go: a terminal as wide as it is, a log file 120 columns wide."""

import sys
from collections.abc import Iterable, Sized
from typing import Any

from rich.console import Console
from tqdm import tqdm

LOG_WIDTH = 120
LOG_SECONDS = 30.0


def make_console() -> Console:
    """A console for tables."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def progress(items: Iterable[Any] | None = None, *, description: str, total: int | None = None) -> Any:
    """A progress bar; in a log file a line now and then."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    interval = 0.2 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(items, desc=description, total=total, unit="row", mininterval=interval)
