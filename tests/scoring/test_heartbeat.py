"""Whoever waits for another process's scores ends when that one fails, dies or hangs, and says which."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from torch.distributed import TCPStore

from poft_plugin.config import PoftConfig
from poft_plugin.data.preparation import RunContext
from poft_plugin.preprocessors.reference_rewards import reference_rewards
from poft_plugin.scoring import board, heartbeat
from poft_plugin.scoring import run as scoring_run
from poft_plugin.scoring.heartbeat import ProcessLostError, Pulse, batch_limit, beating
from scoring.support import as_rows, prepared

HERE = Path(__file__).parent


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """What a launcher does: a store, and where it is. Beats are quick here, and patience is short."""
    found = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found.port))
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(scoring_run, "POLL_SECONDS", 0.05)
    return found


def rank(number: int) -> RunContext:
    return RunContext("score", rank=number, world_size=2, local_rank=number, local_world_size=2)


def error_of(look: Callable[[], None], seconds: float = 20.0) -> str:
    """What is raised while one looks again and again; nothing where that is not within these seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            look()
        except ProcessLostError as error:
            return str(error)
        time.sleep(0.02)
    return ""


def test_a_process_that_works_is_waited_for(store: TCPStore) -> None:
    with beating(rank(0)) as one, beating(rank(1)) as other:

        def look() -> None:
            other.step("scoring with m", 1.0)
            one.check([1])

        assert error_of(look, 2.0) == ""


def test_a_process_that_says_nothing_more_is_named(store: TCPStore) -> None:
    with beating(rank(0)) as one:
        with beating(rank(1)) as other:
            other.step("scoring with m")
        error = error_of(lambda: one.check([1]))
    assert error.startswith(f"rank 1 on {socket.gethostname()} (process {os.getpid()}) gives no sign of life for 1 s")
    assert "start the run again" in error


def test_work_that_hangs_is_named_though_the_thread_lives(store: TCPStore) -> None:
    with beating(rank(0)) as one, beating(rank(1)) as other:
        other.step("loading m", 3.0)
        assert error_of(lambda: one.check([1]), 2.0) == ""
        other.step("scoring with m", 0.5)
        error = error_of(lambda: one.check([1]))
    assert error.startswith(f"rank 1 on {socket.gethostname()} (process {os.getpid()}) hangs: scoring with m")


def test_work_of_which_nobody_knows_how_long_it_takes_is_waited_for(store: TCPStore) -> None:
    with beating(rank(0)) as one, beating(rank(1)) as other:
        other.step("reading data")
        assert error_of(lambda: one.check([1]), 2.0) == ""


def test_a_process_that_never_came_is_named(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "ABSENT_SECONDS", 0.5)
    with beating(rank(0)) as one:
        assert error_of(lambda: one.check([1])).startswith("rank 1 has not begun to prepare its rows after ")


def test_an_error_reaches_those_who_wait_and_those_who_score(store: TCPStore) -> None:
    with beating(rank(0)) as waiting, beating(RunContext("score", 2, 3, 2, 3)) as scoring:
        with pytest.raises(ValueError, match="row 7"), beating(rank(1)):
            raise ValueError("row 7 is empty\nand more")
        errors = [error_of(lambda: waiting.check([2])), error_of(lambda: scoring.step("scoring with m", 90.0))]
    said = f"rank 1 on {socket.gethostname()} (process {os.getpid()}) ended with an error: row 7 is empty"
    assert errors == [f"{said}\nScored rows stay in the cache"] * 2


def test_only_the_first_error_is_passed_on(store: TCPStore) -> None:
    """A process that ends because another did announces nothing: the cause would be lost under its echoes."""
    with pytest.raises(ProcessLostError), beating(rank(1)):
        raise ProcessLostError("another process ended with an error")
    with beating(rank(0)) as one:
        assert error_of(lambda: one.step("scoring with m"), 1.0) == ""


def test_blocks_within_one_another_are_one(store: TCPStore) -> None:
    with beating(rank(0)) as outer:
        with beating(rank(0)) as inner:
            assert inner is outer
        with beating(rank(1)) as other:
            other.check([0])
            assert error_of(lambda: other.check([0]), 2.0) == ""


def test_a_process_alone_starts_no_thread(store: TCPStore) -> None:
    with beating(RunContext("score")) as pulse:
        assert not pulse._thread.is_alive()
        pulse.step("scoring with m", 1.0)


def test_a_batch_may_take_much_longer_than_the_slowest_before() -> None:
    assert batch_limit(0.1) == heartbeat.DEAD_SECONDS
    assert batch_limit(120.0) == 1200.0


def test_a_suspended_job_has_not_waited(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes of a job stop and go on: clocks have moved, nobody is lost."""
    with beating(rank(0)) as one, beating(rank(1)) as other:
        other.step("scoring with m", 0.8)
        one.check([1])
        clock = time.monotonic
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock() + 3600)
        for _ in range(10):
            other.step("scoring with m", 0.8)
            one.check([1])
            time.sleep(0.05)


STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_a_store_that_is_gone_ends_the_waiting(store: TCPStore, blow: int) -> None:
    """The machine with the store is often the one that dies; one that hangs would hang whoever asks it."""
    with subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        port = host.stdout.readline().strip()
        pulse = Pulse(0, ("127.0.0.1", port))
        while not pulse._answered:
            time.sleep(0.02)
        host.send_signal(blow)
        error = error_of(lambda: pulse.check([]))
        host.kill()
    pulse.close(None)
    assert error.startswith(f"the launcher's store at 127.0.0.1:{port} is gone or does not answer for 1 s")


def test_a_lost_process_ends_the_others_and_its_rows_stay(
    models: SimpleNamespace, store: TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real processes on one cache: one is stopped amid its share, goes on, and is killed."""
    monkeypatch.setattr(heartbeat, "DEAD_SECONDS", 2.0)
    monkeypatch.setattr(board, "GATHER_SECONDS", 0.5)  # the second time rank 1 is amid its first round
    settings: dict[str, Any] = {"references": [{"model": str(models.ref_a)}], "score_cache": str(tmp_path / "scores")}
    settings["batch_tokens"] = 64
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    rows, block = as_rows(tiny.chat_rows(100)), PoftConfig.model_validate(settings)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    command = [sys.executable, str(HERE / "slow_rank.py"), str(path), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        for blow in (signal.SIGSTOP, signal.SIGKILL):
            assert other.stdout.readline() == "scoring\n"
            other.send_signal(blow)
            began = time.monotonic()
            with pytest.raises(ProcessLostError, match=f"rank 1 on .* \\(process {other.pid}\\) gives no sign of life"):
                prepared(reference_rewards, rows, block, rank(0))
            assert time.monotonic() - began < 20
            other.send_signal(signal.SIGCONT)
    monkeypatch.delenv("MASTER_PORT")
    made = prepared(reference_rewards, rows, block, RunContext("score"))
    assert len(made.columns["reference_logp"]) == len(rows)
