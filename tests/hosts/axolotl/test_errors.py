"""What a user can mend ends in one message, in the host's own commands; everything else as ever."""

import json
import multiprocessing
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
from axolotl.cli.main import cli
from click.testing import CliRunner, Result

from poft_plugin.data.rows import RowError
from poft_plugin.hosts.axolotl.errors import TRACEBACK, UserError, install_hook, message_of, one_message


def run(*arguments: str) -> Result:
    """A command of the host, in this process."""
    hosting.forget_plugins()
    return CliRunner().invoke(cli, list(arguments))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poft": {"references": [{"model": "a", "dtyp": "auto"}]}}, "Error: poft.references.0.dtyp: unknown key"),
        ({"poft": {"references": [{"model": "./nowhere"}]}}, "Error: reference ./nowhere: no such folder"),
    ],
)
@pytest.mark.parametrize("command", [("preprocess",), ("train", "--launcher", "python")])
def test_the_hosts_own_commands_end_in_one_message(
    models: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")  # undoes what the command writes into the environment
    ran = run(command[0], str(tiny.poft_config(models, tmp_path, **settings)), *command[1:])
    assert isinstance(ran.exception, SystemExit), "".join(traceback.format_exception(ran.exception))
    assert ran.exit_code == 1
    assert message in ran.stderr
    assert "Traceback" not in ran.output


def test_the_traceback_is_there_for_the_asking(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    path = tiny.poft_config(models, tmp_path, poft={"references": []})
    with pytest.raises(ValueError, match=r"poft\.references") as caught:
        hosting.load_config(path)
    assert not isinstance(caught.value, UserError)


def test_a_user_error_is_a_value_error_that_travels() -> None:
    error = pickle.loads(pickle.dumps(UserError("poft.beta: 0")))
    assert isinstance(error, ValueError)
    assert str(error) == error.message == "poft.beta: 0"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: Is a directory"), one_message():
        tmp_path.read_text()


def test_errors_of_others_say_their_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"JSONDecodeError: Expecting value.*\n\(POFT_TRACEBACK=1"), one_message():
        json.loads("no")
    with pytest.raises(ZeroDivisionError), one_message():  # an error of ours, not of the user
        _ = 1 / 0


def raise_row_error(_: int) -> None:
    raise RowError("data.jsonl row 3: a row without a response")


def test_row_errors_out_of_worker_processes_are_ours() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(RowError) as caught:
        pool.map(raise_row_error, [0])
    assert message_of(caught.value) == "data.jsonl row 3: a row without a response"


UNCAUGHT = """
import sys
sys.excepthook = lambda *error: print("as ever", file=sys.stderr)
from poft_plugin.hosts.axolotl.errors import install_hook
install_hook()
install_hook()
from poft_plugin.data.rows import checked_conversation
{}
"""


@pytest.mark.parametrize(
    ("statement", "output"),
    [
        ("checked_conversation([], 'data.jsonl row 3')", "Error (rank 1): data.jsonl row 3: a row without a response"),
        ("raise ValueError('not ours')", "as ever\n"),
        ("checked_conversation(3, '')", "as ever\n"),
    ],
)
def test_uncaught_errors_of_a_launched_process(tmp_path: Path, statement: str, output: str) -> None:
    """What `python -m axolotl.cli.train` raises in training steps, where no hook of ours is around it."""
    file = tmp_path / "error.json"
    environment = {"RANK": "1", "TORCHELASTIC_ERROR_FILE": str(file)}
    command = [sys.executable, "-c", UNCAUGHT.format(statement)]
    ran = subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith(output)
    assert ran.stderr.count("\n") == 1
    told = json.loads(file.read_text())["message"]["message"] if file.exists() else None
    assert told == ("Error: " + ran.stderr.strip().partition(": ")[2] if output != "as ever\n" else None)


def test_the_hook_is_installed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    install_hook()
    first = sys.excepthook
    install_hook()
    assert sys.excepthook is first is not sys.__excepthook__
