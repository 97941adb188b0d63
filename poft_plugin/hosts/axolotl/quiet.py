"""The host's own reports, kept off the screen while a command of ours runs. Warnings and errors stay."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HOST = "axolotl"

AT_IMPORT = ("torchao", "torch.utils._pytree", "torch.distributed.elastic.multiprocessing.redirects")
"""Loggers of libraries that warn, each time that they are imported, of what they do not find on a machine."""


@contextmanager
def host_kept_quiet() -> Iterator[None]:
    """Raises the level of the host's console to warnings, unless `AXOLOTL_LOG_LEVEL` asks for more.

    The host set its handlers up before any command of ours was looked for. Off a terminal, the progress bars of
    `datasets` are off, too.
    """
    if "AXOLOTL_LOG_LEVEL" in os.environ:
        yield
        return
    # the console's handler has no level; the one of the log file has
    handlers = [handler for handler in logging.getLogger(HOST).handlers if handler.level == logging.NOTSET]
    loggers = [logging.getLogger(name) for name in AT_IMPORT]
    before: list[tuple[logging.Handler | logging.Logger, int]]
    before = [*((handler, handler.level) for handler in handlers), *((logger, logger.level) for logger in loggers)]
    for handler in handlers:
        handler.setLevel(logging.WARNING)
        handler.addFilter(_is_true)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ["AXOLOTL_LOG_LEVEL"] = "WARNING"  # worker processes and torchrun's ranks
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    finally:
        del os.environ["AXOLOTL_LOG_LEVEL"]
        for handler in handlers:
            handler.removeFilter(_is_true)
        for place, level in before:
            place.setLevel(level)


def _is_true(record: logging.LogRecord) -> bool:
    """Drops the host's advice to preprocess before training: nothing trains here."""
    return "Processing datasets during training" not in record.getMessage()
