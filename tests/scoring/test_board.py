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
from poft_plugin.scoring import run as scoring_run
from poft_plugin.scoring.board import open_board
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.identity import Identity
from poft_plugin.scoring.opened import open_job
from scoring.support import as_rows, prepared

KEYS = pa.chunked_array([["00", "01"]])


def launch(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """What a launcher does: a store, and where it is."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def rank(number: int) -> RunContext:
    return RunContext("score", rank=number, world_size=2, local_rank=number, local_world_size=2)


def test_notices_are_read_by_the_others_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    store = launch(monkeypatch)
    one, other = (open_board(rank(number), Identity({"a": 1}), KEYS) for number in (0, 1))
    assert other.machine_of(0) is None
    one.announce(0)
    deadline = time.monotonic() + 20
    while other.machine_of(0) is None and time.monotonic() < deadline:
        time.sleep(0.01)  # a store answers `set` before the server has it
    assert other.machine_of(0)
    assert open_board(rank(1), Identity({"a": 2}), KEYS).machine_of(0) is None
    assert open_board(rank(1), Identity({"a": 1}), pa.chunked_array([["00"]])).machine_of(0) is None
    del store


@pytest.mark.parametrize("port", [None, "1"])
def test_without_a_store_nothing_is_said(monkeypatch: pytest.MonkeyPatch, port: str | None) -> None:
    monkeypatch.setattr("poft_plugin.scoring.board.CONNECT", timedelta(seconds=1))
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    board = open_board(rank(0), Identity({"a": 1}), KEYS)
    board.announce(0)
    assert board.machine_of(0) is None


def scored(models: SimpleNamespace, folder: Path, number: int) -> None:
    settings = PoftConfig.model_validate({"references": [{"model": str(models.ref_a)}], "score_cache": str(folder)})
    prepared(reference_rewards, as_rows(tiny.chat_rows(8)), settings, rank(number))


def test_two_folders_are_an_error_that_names_them(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 finishes with its own folder; rank 1 must not wait for ever."""
    store = launch(monkeypatch)
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
    assert errors.keys() == {0, 1}
    assert "score_cache is not shared between nodes" in errors[0]
    assert str(tmp_path / "1") in errors[1]
    assert "POFT_SCORE_CACHE" in errors[1]
    del store


def test_one_folder_serves_both(models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = launch(monkeypatch)
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
