"""The wheel, installed and not editable: the command is there, and the quickstart's config trains with it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from quickstart import task

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "poft_plugin", source / "poft_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source))
    wheel = next(folder.glob("*.whl"))
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site"), str(wheel))
    return folder / "site"


def run(*command: str, cwd: Path | None = None, **environment: str) -> str:
    ran = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=280, env={**os.environ, **environment}
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def test_contents(site: Path) -> None:
    assert (site / "poft_plugin" / "py.typed").exists()
    assert (site / "poft_plugin" / "hosts" / "axolotl" / "plugin.py").exists()
    assert not (site / "tests").exists()
    metadata = next(site.glob("poft_plugin-*.dist-info"))
    assert "poft_plugin.hosts.axolotl.cli:poft" in (metadata / "entry_points.txt").read_text()


def test_the_installed_wheel_trains_the_quickstart_config(site: Path, tmp_path: Path) -> None:
    script = str(Path(sys.executable).parent / "axolotl")
    path = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = run(sys.executable, "-c", "import poft_plugin; print(poft_plugin.__file__)", cwd=tmp_path, **path)
    assert Path(where.strip()).is_relative_to(site)
    help_text = run(script, "poft", "--help", cwd=tmp_path, **path)
    assert all(re.search(rf"^  {command} ", help_text, re.M) for command in ("plan", "score", "export", "import"))

    config = yaml.safe_load((ROOT / "example_configs" / "poft-quickstart.yml").read_text())
    work = tmp_path / "quickstart" / "work"
    tiny.policy(work / "base")
    tiny.reference(work / "reference_a", seed=5)
    tiny.reference(work / "reference_b", seed=6)
    rows = task.spoil(task.splits({"train": 24}, seed=1)["train"], share=0.3, seed=2)
    tiny.write_jsonl(work / "train.jsonl", [{"messages": row.messages()} for row in rows])
    config |= {"max_steps": 2, "special_tokens": {"pad_token": "<|pad|>"}}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    run(script, "train", "config.yml", "--launcher", "python", cwd=tmp_path, **path)
    assert (work / "poft" / "model.safetensors").exists()
