"""Two processes of one launch that do not see the same cache folder find out, and say so."""

import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import tiny
from torch.distributed import TCPStore

from poft_plugin.config import PoftConfig
from poft_plugin.data.preparation import RunContext
from poft_plugin.preprocessors.reference_rewards import reference_job, reference_rewards
from poft_plugin.scoring import heartbeat
from poft_plugin.scoring import run as scoring_run
from poft_plugin.scoring.board import Board, open_board
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.findings import Findings, say
from poft_plugin.scoring.heartbeat import Pulse, beating
from poft_plugin.scoring.identity import Identity
from poft_plugin.scoring.opened import open_job
from poft_plugin.scoring.shares import Share
from scoring.support import as_rows, prepared, scorer

KEYS = pa.chunked_array([["00", "01"]])


def launch(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """What a launcher does: a store, and where it is."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def rank(number: int) -> RunContext:
    return RunContext("score", rank=number, world_size=2, local_rank=number, local_world_size=2)


def board_of(pulse: Pulse, identity: int = 1, keys: pa.ChunkedArray = KEYS) -> Board:
    return open_board(pulse, Identity({"a": identity}), keys, [0, 1])


def test_notices_are_read_by_the_others_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    store = launch(monkeypatch)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    with beating(rank(0)) as first, beating(rank(1)) as second:
        other = board_of(second)
        assert other.machine_of(0) is None
        board_of(first).announce(0)
        deadline = time.monotonic() + 20
        while other.machine_of(0) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert other.machine_of(0)
        strangers = [board_of(second, 2), board_of(second, keys=pa.chunked_array([["00"]]))]
        assert [board.machine_of(0) for board in strangers] == [None, None]
        time.sleep(0.2)
        assert [board.machine_of(0) for board in strangers] == [None, None]
    del store


@pytest.mark.parametrize("port", [None, "1"])
def test_without_a_store_nothing_is_said(monkeypatch: pytest.MonkeyPatch, port: str | None) -> None:
    monkeypatch.setattr(heartbeat, "CONNECT", timedelta(seconds=1))
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    with beating(rank(0)) as pulse:
        board = board_of(pulse)
        board.announce(0)
        board.check([1])
        assert board.machine_of(0) is None


def scored(models: SimpleNamespace, folder: Path, number: int) -> None:
    settings = PoftConfig.model_validate({"references": [{"model": str(models.ref_a)}], "score_cache": str(folder)})
    prepared(reference_rewards, as_rows(tiny.chat_rows(8)), settings, rank(number))


def test_two_folders_are_an_error_that_names_them(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 finishes with its own folder; rank 1 must not wait for ever."""
    store = launch(monkeypatch)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(scoring_run, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(scoring_run, "POLL_SECONDS", 0.1)
    errors = {}

    def run(number: int) -> None:
        try:
            scored(models, tmp_path / str(number), number)
        except ValueError as error:
            errors[number] = str(error)

    ranks = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(timeout=60)
    assert errors.keys() == {0, 1}  # the second to see it hears it from the first, maybe
    assert all("score_cache is not shared between nodes" in error for error in errors.values())
    assert any(str(tmp_path / name) in errors[1] for name in "01")
    assert "POFT_SCORE_CACHE" in errors[1]
    del store


def test_one_folder_serves_both(models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = launch(monkeypatch)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(scoring_run, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(scoring_run, "POLL_SECONDS", 0.1)
    ranks = [threading.Thread(target=scored, args=(models, tmp_path, number)) for number in (0, 1)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(timeout=60)
    settings = PoftConfig.model_validate({"references": [{"model": str(models.ref_a)}]})
    cache = ScoreCache(tmp_path)
    (reference,) = settings.references
    assert not open_job(reference_job(reference, as_rows(tiny.chat_rows(8))), cache).lookup(cache).missing.any()
    del store


SKIPS = "{% for m in messages if m.role in ['user', 'assistant'] %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


def ranks_that_find_something(models: SimpleNamespace, folder: Path) -> int:
    """Two ranks, a template that leaves out tool turns, a context that is too short for some rows: for how many."""
    rows = [*tiny.chat_rows(12, seed=1), {"messages": [{"role": "user", "content": "one " * 40}, LAST]}]
    for row in rows[:6]:
        row["messages"].insert(1, {"role": "tool", "content": "zeta zeta zeta"})
    reference = {"model": str(models.short), "chat_template": SKIPS, "on_long_row": "drop"}
    settings = PoftConfig.model_validate({"references": [reference], "score_cache": str(folder)})
    table = as_rows(rows)
    shares = [Share(number, 2) for number in (0, 1)]
    for share in shares:  # both have something to say
        assert sum(share.holds(key) for key in table.keys[:6].to_pylist()) not in (0, 6)
    ranks = [
        threading.Thread(target=prepared, args=(reference_rewards, table, settings, rank(number))) for number in (0, 1)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(timeout=60)
    opened = open_job(reference_job(settings.references[0], table), ScoreCache(folder))
    return int(opened.lookup(ScoreCache(folder)).too_long.sum())


LAST = {"role": "assistant", "content": "two."}


def test_what_ranks_find_is_said_once_with_the_total(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = launch(monkeypatch)
    monkeypatch.setattr(scoring_run, "POLL_SECONDS", 0.1)
    long = ranks_that_find_something(models, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("leaves out turns") == 1
    assert "leaves out turns of role 'tool' in 6 of 13 rows" in printed
    assert printed.count("longer than its context") == 1
    assert long > 1
    assert f"{long} of 13 rows are longer than its context" in printed
    ranks_that_find_something(models, tmp_path)  # nothing is left to score
    assert "leaves out" not in capsys.readouterr().out
    del store


def test_without_a_store_each_says_which_share_it_means(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(scoring_run, "POLL_SECONDS", 0.1)
    ranks_that_find_something(models, tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "leaves out turns" in line]
    assert len(said) == 2
    assert {f"(share {number} of 2)" in line for line in said for number in (0, 1)} == {True, False}


def test_a_rank_that_leaves_nothing_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = launch(monkeypatch)
    monkeypatch.setattr("poft_plugin.scoring.board.GATHER_SECONDS", 0.2)
    reference = scorer(models.ref_a, ScoreCache(tmp_path))
    with beating(rank(0)) as pulse:
        board = open_board(pulse, reference.identity, KEYS, [0, 1])
        say(reference, Findings({"rows": 2, "skipped tool": 1}), Share(0, 2), board)
    assert "of role 'tool' in 1 of 2 rows" in (said := capsys.readouterr().out)
    assert "(in 1 of 2 shares)" in said
    del store
