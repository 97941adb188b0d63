"""Which way imports go, what importing costs, and how long a file or a function may get."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "poft_plugin"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 300, 60

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def test_imports_go_down() -> None:
    """The contracts under [tool.importlinter] in pyproject.toml."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as c; c()",
        "--no-logo",
        "--no-cache",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("poft_plugin", ("torch", "transformers", "axolotl")),
        ("poft_plugin.config", ("torch", "transformers", "axolotl")),
        ("poft_plugin.plugins", ("torch", "transformers", "axolotl")),
        ("poft_plugin.hosts.axolotl.cli", ("torch", "transformers", "axolotl")),
        ("poft_plugin.trainers.poft", ("transformers", "axolotl")),
        ("poft_plugin.preprocessors.reference_rewards", ("axolotl", "trl")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; sys.exit(', '.join(name for name in {heavy} if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import {module} loads {done.stderr.strip()}"


@every_file
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE


@every_file
def test_functions_are_short(path: Path) -> None:
    """Signature and docstring do not count: the body does."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: _body_lines(node) for node in functions}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION}


def test_there_is_no_utils_module() -> None:
    assert not [path for path in FILES if path.stem in {"util", "utils", "helpers", "misc"}]


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
