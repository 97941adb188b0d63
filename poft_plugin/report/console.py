"""Where tables and progress go: a terminal as wide as it is, a log file 120 columns wide."""

import sys
from collections.abc import Iterable, Sized
from typing import IO, Any

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

LOG_WIDTH = 120
LOG_SECONDS = 30.0


def make_console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """A console for tables. What it prints is text: names and rows hold brackets and colons that are no markup."""
    console = Console(file=file, width=width, markup=False, emoji=False)
    if width is None and not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def warn(console: Console, message: str) -> None:
    """A line that begins with the word warning."""
    console.print(Text.assemble(("warning", "bold yellow"), f": {message}"))


def progress(items: Iterable[Any] | None = None, *, description: str, total: int | None = None) -> Any:
    """A progress bar; in a log file a line now and then."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    interval = 0.2 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(items, desc=description, total=total, unit="row", mininterval=interval)
