"""The upstream proposals in `patches/` apply to the installed Axolotl and do what their README says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")  # else its telemetry client hangs at exit

VERSION = importlib.metadata.version("axolotl")
RELEASE = ".".join(VERSION.split(".")[:2])
ALL = Path(__file__).resolve().parents[1] / "patches"
FOLDER = ALL / RELEASE
README = (ALL / "README.md").read_text(encoding="utf-8")
RL_TYPES, IMPORT_ERRORS = "0001-plugin-registered-rl-types.patch", "0002-plugin-import-errors-are-fatal.patch"
NAMES = sorted(patch.name for patch in FOLDER.glob("*.patch"))
ORDERS = [[name] for name in NAMES] + ([NAMES, NAMES[::-1]] if len(NAMES) > 1 else [])

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no patches against Axolotl {VERSION}")


def touched_files(patch: Path) -> list[str]:
    """The files that a patch changes, relative to site-packages."""
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)


def apply(root: Path, *names: str) -> Path:
    """Copies what the patches touch from the installed package and applies them, in this order."""
    spec = importlib.util.find_spec("axolotl")
    assert spec is not None and spec.origin is not None
    site = Path(spec.origin).parents[1]
    for file in {file for name in names for file in touched_files(FOLDER / name)}:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(site / file, root / file)
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}  # never inside another checkout
    for name in names:
        command = ["git", "apply", "-p1", str(FOLDER / name)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name} no longer applies, roll it again:\n{done.stderr}"
    return root


def load_patched(root: Path, monkeypatch: pytest.MonkeyPatch, *modules: str) -> list[ModuleType]:
    """Executes patched files under their own names, for the time of the test.

    The genuine modules, and what the tests call, come first: nothing may import a patched one for good.
    """
    for name in (*modules, "axolotl.core.builders", "axolotl.cli.checks", "axolotl.train"):
        importlib.import_module(name)
    loaded = []
    for name in modules:
        spec = importlib.util.spec_from_file_location(name, root / (name.replace(".", "/") + ".py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded


@pytest.fixture
def rl_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of patch 0001 that decide about `rl`, with a plugin that registers `poft`."""
    root = apply(tmp_path, RL_TYPES)
    names = ["utils.schemas.enums", "integrations.base", "utils.schemas.validation", "utils.schemas.config"]
    names += ["utils.trainer", "cli.train"]
    modules = load_patched(root, monkeypatch, *(f"axolotl.{name}" for name in names))
    patched = SimpleNamespace(**{module.__name__.split(".")[-1]: module for module in modules})
    patched.train = modules[-1]

    # those that come with the host are subclasses of the genuine one
    monkeypatch.setattr(patched.base, "get_builtin_plugins", tuple, raising=False)
    plugin = patched.base.BasePlugin()
    assert plugin.get_rl_types() == []
    monkeypatch.setattr(plugin, "get_rl_types", lambda: ["poft"])
    patched.base.PluginManager.get_instance().plugins["ours"] = plugin
    return patched


@pytest.mark.parametrize("names", ORDERS)
def test_patches_apply_and_compile(names: list[str], tmp_path: Path) -> None:
    apply(tmp_path, *names)
    files = sorted(tmp_path.rglob("*.py"))
    assert files
    for file in files:
        py_compile.compile(str(file), cfile=str(tmp_path / "compiled.pyc"), doraise=True)


def test_readme_has_one_row_per_patch() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == 4 and all(row) for row in cells)
    said = {(row[0].strip("`"), release) for row in cells for release in row[1].split(", ")}
    assert said == {(patch.name, patch.parent.name) for patch in ALL.glob("*/*.patch")}
    assert RL_TYPES in NAMES


def test_readme_names_the_installed_version() -> None:
    assert f"[{RELEASE}/]({RELEASE}) against {VERSION}" in README, f"check the patches against Axolotl {VERSION}"


@pytest.mark.parametrize("patch", ALL.glob("*/*.patch"), ids=lambda patch: f"{patch.parent.name}/{patch.name}")
def test_hunks_in_integrations_carry_one_line_of_context(patch: Path) -> None:
    # Those files are under another licence than the rest: quote no more of them than a diff needs.
    sections = re.split(r"^--- a/", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in sections:
        if section.startswith("axolotl/integrations/"):
            for hunk in re.split(r"^@@.*@@.*\n", section, flags=re.MULTILINE)[1:]:
                kinds = "".join(line[:1] for line in hunk.splitlines())
                assert re.fullmatch(r" ?[+-](.*[+-])? ?", kinds), kinds


@pytest.mark.skipif(IMPORT_ERRORS not in NAMES, reason=f"the host does it itself: Axolotl {VERSION}")
def test_import_errors_are_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = apply(tmp_path, IMPORT_ERRORS)
    [base] = load_patched(root, monkeypatch, "axolotl.integrations.base")
    manager = base.PluginManager.get_instance()
    with pytest.raises(ImportError, match="no_such_package_of_ours"):
        manager.register("no_such_package_of_ours.Plugin")
    assert not manager.plugins


def test_plugin_rl_types_are_not_builtin(rl_types: SimpleNamespace) -> None:
    enums = rl_types.enums
    assert rl_types.base.PluginManager.get_instance().get_rl_types() == ["poft"]
    assert [enums.is_builtin_rl(rl) for rl in (None, "poft", "dpo", enums.RLType.KTO)] == [False, False, True, True]


def test_schema_accepts_registered_rl_types(rl_types: SimpleNamespace) -> None:
    def validated(**changes: Any) -> Any:
        entry = {"path": "rows.jsonl", "type": "chat_template"}
        base = {"base_model": "none", "datasets": [entry], "micro_batch_size": 1, "gradient_accumulation_steps": 1}
        return rl_types.config.AxolotlInputConfig(**base, learning_rate=0.1, **changes)

    config = validated(rl="poft", sample_packing=True)
    assert (config.rl, config.sample_packing) == ("poft", True)
    assert validated(rl="dpo").rl is rl_types.enums.RLType.DPO
    assert validated().rl is None
    with pytest.raises(ValueError, match=r"`rl: pofd` is unknown, use one of dpo, .*, poft"):
        validated(rl="pofd")
    with pytest.raises(ValueError, match="does not work with RLHF"):
        validated(rl="dpo", sample_packing=True)


@pytest.mark.parametrize(("rl", "builder"), [("poft", "sft"), ("dpo", "preference"), (None, "sft")])
def test_registered_rl_types_ride_the_sft_path(
    rl: str | None, builder: str, rl_types: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl.core import builders
    from axolotl.utils.dict import DictDefault

    chosen: list[str] = []
    for path, trainer, loader in (
        ("sft", "HFCausalTrainerBuilder", "load_datasets"),
        ("preference", "HFRLTrainerBuilder", "load_preference_datasets"),
    ):
        fake = SimpleNamespace(build=lambda _, path=path: chosen.append(path))
        monkeypatch.setattr(builders, trainer, lambda *_, fake=fake: fake)
        monkeypatch.setattr(rl_types.train, loader, lambda path=path, **_: chosen.append(path), raising=False)
    monkeypatch.setattr(rl_types.train, "train", lambda **_: (None, None, None), raising=False)
    cfg = DictDefault({"rl": rl})
    rl_types.trainer.setup_trainer(cfg, *[None] * 6)
    rl_types.train.do_train(cfg, cli_args=None)
    assert chosen == [builder, builder]
