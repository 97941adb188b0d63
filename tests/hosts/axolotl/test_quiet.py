"""Under a command of ours the host reports nothing but warnings and errors."""

import logging
from collections.abc import Iterator

import pytest

from poft_plugin.hosts.axolotl.quiet import AT_IMPORT, host_kept_quiet


class Screen(logging.Handler):
    """A handler as the host's: no level of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def screen() -> Iterator[Screen]:
    handler, logger = Screen(), logging.getLogger("axolotl")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def report() -> None:
    logger = logging.getLogger("axolotl.something")
    logger.setLevel(logging.DEBUG)  # as the host's get_logger does
    logger.info("config: ...")
    logger.warning("Processing datasets during training can lead to VRAM instability.")
    logger.warning("a warning")
    logger.error("an error")


def test_only_what_matters_is_shown(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AXOLOTL_LOG_LEVEL")
    before = [logging.getLogger(name).level for name in AT_IMPORT]
    with host_kept_quiet():
        report()
    assert screen.lines == ["a warning", "an error"]
    assert [logging.getLogger(name).level for name in AT_IMPORT] == before
    screen.lines.clear()
    report()
    assert len(screen.lines) == 4


def test_more_is_shown_for_the_asking(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXOLOTL_LOG_LEVEL", "INFO")
    with host_kept_quiet():
        report()
    assert len(screen.lines) == 4
