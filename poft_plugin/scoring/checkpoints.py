"""Where a model's weights are, and what they are: a hub commit, or the content hash of a local folder."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from poft_plugin.scoring.cache import ScoreCache

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "config.json", "*.index.json", "*.py")
LOCAL_PREFIXES = (".", "/", "~")


class MissingCheckpointError(ValueError):
    """The checkpoint is not there: no such folder, no such repository, or no access."""


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model.

    Args:
        location: what `from_pretrained` gets.
        commit: hub commit, or None for a local folder.
        weights: content hash of a local folder's weights and config, or None for a hub model.
    """

    location: str
    commit: str | None
    weights: str | None

    @property
    def identity(self) -> dict[str, str | None]:
        """Its part of a scorer's identity: a local folder may move, its content may not change."""
        if self.commit is None:
            return {"weights": self.weights}
        return {"model": self.location, "commit": self.commit}


def resolve_checkpoint(model: str, revision: str | None, cache: ScoreCache, what: str = "reference") -> Checkpoint:
    """Finds a checkpoint and pins it.

    Args:
        model: hub id or local folder.
        revision: hub revision (branch, tag or commit), or None for the default branch.
        cache: keeps hashes of local weight files, so that they are read once.
        what: what the model is to the user: `reference` or `reward model`.

    Raises:
        MissingCheckpointError: if it is not there, with the remedy.
    """
    folder, title = Path(os.path.expanduser(model)), f"{what} {model}"
    if os.path.isdir(folder):  # unlike pathlib's, it knows names that no folder can have
        if revision is not None:
            raise ValueError(f"{title}: `revision: {revision}` is for hub models; this is a local folder")
        return Checkpoint(str(folder), None, _folder_hash(folder, cache, title))
    if model.startswith(LOCAL_PREFIXES):
        raise MissingCheckpointError(
            f"{title}: no such folder ({folder.absolute()}). Correct "
            "`model:`, or import its scores (`axolotl poft import`)"
        )
    return Checkpoint(model, _hub_commit(model, revision, title), None)


def _hub_commit(model: str, revision: str | None, title: str) -> str:
    try:
        commit = HfApi().model_info(model, revision=revision).sha
        if commit:
            return commit
    except GatedRepoError as error:
        raise MissingCheckpointError(
            f"{title}: gated; accept its licence on the hub and log in (`hf auth login`)"
        ) from error
    except HFValidationError as error:
        raise MissingCheckpointError(f"{title}: neither a local folder nor the name of a hub model") from error
    except RevisionNotFoundError as error:
        raise MissingCheckpointError(f"{title}: no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise MissingCheckpointError(
            f"{title}: no such repository on the hub (or no access), and no such local folder"
        ) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError):
        pass  # no network: what was downloaded before decides
    return _downloaded_commit(model, revision, title)


def _downloaded_commit(model: str, revision: str | None, title: str) -> str:
    try:
        snapshot = snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MissingCheckpointError(
            f"{title}: the hub cannot be reached and revision {revision or 'main'!r} was not downloaded "
            "before; download it (`hf download`), give a local folder, or import its scores (`axolotl poft import`)"
        ) from error
    return Path(snapshot).name


def _folder_hash(folder: Path, cache: ScoreCache, title: str) -> str:
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        hint = "a LoRA adapter: merge it first (`axolotl merge-lora`)" if adapter else "no config.json in it"
        raise MissingCheckpointError(f"{title}: not a model folder: {hint}")
    known = cache.read_note("fingerprints")
    fresh: dict[str, Any] = {}
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        address = str(file.resolve())
        entry = known.get(address)
        # the change time too: copies and archives may keep the size and the modification time
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if entry is None or entry[:-1] != seen:
            entry = fresh[address] = [*seen, _file_hash(file)]
        digest.update(f"{file.name}:{entry[-1]}\n".encode())
    if fresh:
        cache.update_note("fingerprints", fresh)
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
