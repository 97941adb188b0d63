"""What tests share: the offline environment, tiny models built once, and Axolotl run inside this process."""

import atexit
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    ACCELERATE_USE_CPU="true",
    AXOLOTL_LOG_LEVEL="WARNING",
    AXOLOTL_DATASET_NUM_PROC="0",  # rows are prepared in this process: a worker costs seconds
)
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny

ROOT = Path(__file__).parent.parent


def pytest_unconfigure() -> None:
    """Pytest's summary is the last that is read: colorama, which the host sets up, would write to a closed stream."""
    from colorama.initialise import reset_all

    atexit.unregister(reset_all)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and tokenizers, where they lie beside the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data beside the project ({folder}): this test needs it")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A policy and two references with another tokenizer and template. Read only."""
    folder = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        folder=folder,
        policy=tiny.policy(folder / "policy"),
        ref_a=tiny.reference(folder / "ref_a", seed=2),
        ref_b=tiny.reference(folder / "ref_b", seed=3),
        short=tiny.reference(folder / "short", seed=4, context=32),
    )


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
