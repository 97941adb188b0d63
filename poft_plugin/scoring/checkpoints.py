"""Where a model's weights are, and what they are: a hub commit, or the content hash of a local folder or GGUF file."""

import hashlib
import os
import re
from collections.abc import Sequence
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
GGUF = ".gguf"
GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
WHOLE = (".safetensors", ".bin", ".pt", ".pth")
CONFIG, ADAPTER = "config.json", "adapter_config.json"


class MissingCheckpointError(ValueError):
    """The checkpoint is not there: no such folder, no such repository, or no access."""


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model.

    Args:
        location: what `from_pretrained` gets.
        commit: hub commit, or None for a local folder.
        weights: content hash of a local folder's weights and config, or None for a hub model.
        gguf: the GGUF file at that location, where the model is one.
    """

    location: str
    commit: str | None
    weights: str | None
    gguf: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """Its part of a scorer's identity: a local folder may move, its content may not change."""
        if self.commit is None:
            return {"weights": self.weights}
        file = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"model": self.location, "commit": self.commit, **file}


def resolve_checkpoint(model: str, revision: str | None, cache: ScoreCache, what: str = "reference") -> Checkpoint:
    """Finds a checkpoint and pins it.

    Args:
        model: hub id or local folder, or a GGUF file in either: `folder/model.gguf`, `owner/name/model.gguf`.
        revision: hub revision (branch, tag or commit), or None for the default branch.
        cache: keeps hashes of local weight files, so that they are read once.
        what: what the model is to the user: `reference` or `reward model`.

    Raises:
        MissingCheckpointError: if it is not there, with the remedy.
    """
    path, title = Path(os.path.expanduser(model)), f"{what} {model}"
    is_folder = os.path.isdir(path)  # unlike pathlib's, it knows names that no folder can have
    is_gguf = path.suffix == GGUF and not is_folder
    if is_gguf and (part := GGUF_PART.search(model)):
        whole = Path(model).name.removesuffix(part.group()) + GGUF
        raise MissingCheckpointError(
            f"{title}: one part of a GGUF file that was split; parts are not put together here. Join them "
            f"(`llama-gguf-split --merge {Path(model).name} {whole}`), and give that file as `model:`"
        )
    if is_folder or (is_gguf and os.path.isfile(path)):
        if revision is not None:
            raise ValueError(f"{title}: `revision: {revision}` is for hub models; this is a local one")
        if is_gguf:
            return Checkpoint(str(path.parent), None, _content_hash([path], cache), path.name)
        return Checkpoint(str(path), None, _folder_hash(path, cache, title))
    if model.startswith(LOCAL_PREFIXES) or (is_gguf and model.count("/") < 2):
        raise MissingCheckpointError(
            f"{title}: no such {'file' if is_gguf else 'folder'} ({path.absolute()}). Correct "
            "`model:`, or import its scores (`axolotl poft import`)"
        )
    if is_gguf:
        owner, name, file = model.split("/", 2)
        return Checkpoint(f"{owner}/{name}", _hub_commit(f"{owner}/{name}", revision, title, file), None, file)
    return Checkpoint(model, _hub_commit(model, revision, title), None)


def _hub_commit(model: str, revision: str | None, title: str, file: str = CONFIG) -> str:
    try:
        info = HfApi().model_info(model, revision=revision)
        if info.sha:
            _check_files({sibling.rfilename for sibling in info.siblings or ()}, title, file)
            return info.sha
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
    return _downloaded_commit(model, revision, title, file)


def _downloaded_commit(model: str, revision: str | None, title: str, file: str) -> str:
    try:
        snapshot = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=[file]))
        names = {found.relative_to(snapshot).as_posix() for found in snapshot.rglob("*")}
        if file not in names and ADAPTER not in names:
            raise LocalEntryNotFoundError(f"{file} was not downloaded")
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MissingCheckpointError(
            f"{title}: the hub cannot be reached and revision {revision or 'main'!r} was not downloaded "
            "before; download it (`hf download`), give a local folder, or import its scores (`axolotl poft import`)"
        ) from error
    _check_files(names, title, file)
    return snapshot.name


def _check_files(names: set[str], title: str, needed: str = CONFIG) -> None:
    """Refuses what is no model by its file names; a repository that lists no files is left to the loader.

    transformers loads a folder with an adapter as the adapter's base model: whatever else is in it is not the model.
    """
    gguf = sorted(name for name in names if name.endswith(GGUF))
    only_gguf = bool(gguf) and needed == CONFIG and not any(name.endswith(WHOLE) for name in names)
    if ADAPTER in names and needed == CONFIG:
        auto = "AutoPeftModelForSequenceClassification" if title.startswith("reward") else "AutoPeftModelForCausalLM"
        labels = ", num_labels=1" if title.startswith("reward") else ""
        hint = (
            "a LoRA adapter: merge it first (`axolotl merge-lora`, or peft's "
            f"`{auto}.from_pretrained(ADAPTER{labels}).merge_and_unload().save_pretrained(FOLDER)`, its tokenizer "
            "beside it), and give the merged folder as `model:`"
        )
    elif not names or (needed in names and not only_gguf):
        return
    else:
        hint = "no weights in it" if needed in names else f"no {needed} in it"
        if gguf:
            hint += f"; a GGUF file is named itself, after the folder or repository: `.../{gguf[0]}`"
    raise MissingCheckpointError(f"{title}: not a model folder: {hint}")


def _folder_hash(folder: Path, cache: ScoreCache, title: str) -> str:
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    _check_files({file.name for file in folder.iterdir()} | {"."}, title)
    return _content_hash(files, cache)


def _content_hash(files: Sequence[Path], cache: ScoreCache) -> str:
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
