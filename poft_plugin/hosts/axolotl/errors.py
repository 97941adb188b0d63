"""Errors that a user can mend end in one message, in the host's own commands too.

In a command the message is click's: `Error: ...` and exit status 1. A process that a launcher starts is not click's
(`python -m axolotl.cli.train`), and there the hook for uncaught errors prints the same line.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import click

PACKAGE = __name__.partition(".")[0]

TRACEBACK = "POFT_TRACEBACK"
"""Environment variable: where set, errors come with their traceback."""


class UserError(click.ClickException, ValueError):
    """What is wrong with a config, its data or its models, and the remedy."""


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Turns what a user can mend into a `UserError`: wrong values, and files that cannot be read or written.

    Raises:
        UserError: for a ValueError or an OSError inside, unless the traceback is asked for.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, UserError) or os.environ.get(TRACEBACK):
            raise
        raise UserError(message_of(error)) from error


def message_of(error: Exception) -> str:
    """The text that a user reads: ours as it is; another's with its type, and how to see where it comes from."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _is_ours(error):
        return str(error)
    return f"{type(error).__name__}: {error}\n({TRACEBACK}=1 shows where it comes from)"


def install_hook() -> None:
    """Lets uncaught errors of ours end in their message; every other one is shown as before."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if isinstance(error, ValueError) and _is_ours(error) and not os.environ.get(TRACEBACK):
            rank = os.environ.get("RANK", "0")
            print(f"Error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
            _tell_torchrun(f"Error: {error}")
        else:
            before(kind, error, where)

    if not getattr(before, "is_poft_hook", False):
        hook.is_poft_hook = True  # type: ignore[attr-defined]
        sys.excepthook = hook


def _tell_torchrun(message: str) -> None:
    """Lets the last lines of torchrun name the error, too: in the file that it gives its workers."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        data = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(data))


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it, maybe in a worker process."""
    if type(error).__module__.partition(".")[0] == PACKAGE:
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).partition(".")[0] == PACKAGE
