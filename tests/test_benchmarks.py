"""Every benchmark runs, with a few rows, and prints a table. Times are looked at by people, not here."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
SHARED_CODE = {"__init__", "common", "synthetic", "trainers"}
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in SHARED_CODE)


@pytest.fixture(scope="module")
def running() -> dict[str, subprocess.Popen[str]]:
    """All at once: most of their time is imports."""
    command = [sys.executable, "-m"]
    options = ["--small", "--threads", "1"]
    return {
        name: subprocess.Popen(
            [*command, f"benchmarks.{name}", *options], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name in SCRIPTS
    }  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_prints_a_table(running: dict[str, subprocess.Popen[str]], name: str) -> None:
    output, errors = running[name].communicate(timeout=280)
    assert running[name].returncode == 0, errors[-3000:]
    assert "┃" in output
    assert "load average" in output


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_in_the_readme(name: str) -> None:
    assert f"`python -m benchmarks.{name} " in README
    assert f"<!-- {name}" in README


def test_contestants_take_turns() -> None:
    order: list[str] = []
    contestants = [common.Contestant(name, lambda name=name: order.append(name), work=3) for name in "abc"]
    timings = common.race(contestants, 3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert list(timings) == ["a", "b", "c"]
    assert all(len(timing.seconds) == 3 and timing.rate > 0 for timing in timings.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_peak_memory_is_what_a_call_held_at_once() -> None:
    held = common.peak_mib(lambda: bytearray(b"x") * (256 * 2**20))
    assert 240 <= held <= 300  # what other calls gave back may be taken up again: some MiB less


def test_a_section_of_the_readme_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nbetween\n<!-- b:begin -->\n<!-- b:end -->\n")
    report = common.Report("Title", ("who", "seconds"), [["one", "1"]], ["note"])
    common.write_section(page, "a", report.markdown())
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n<!-- a:begin -->\n**Title**\n\n| who | seconds |\n| --- | ---: |\n| one | 1 |\n")
    assert text.endswith("<!-- a:end -->\nbetween\n<!-- b:begin -->\n<!-- b:end -->\n")
    with pytest.raises(ValueError, match="no markers <!-- c:begin -->"):
        common.write_section(page, "c", "")


def test_a_table_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    common.Report("Title", ("who", "seconds"), [["one", "1.5"], ["two", "3"]], ["a note"]).show()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Title", "who", "seconds", "one", "1.5", "two", "3", "- a note"))
