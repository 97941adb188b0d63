"""The `datasets:` entries of a run: rewritten so that the host asks our strategy, which asks the host's own.

The host's prepared-dataset hash is a fixed list of fields of an entry. It sees neither `rl` nor the content of a file
(an edited row would load the stale set), so `input_format`, which the host hashes and does not read, carries a
digest of what it cannot see.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poft_plugin.config import parse_block
from poft_plugin.hosts.axolotl.ranked_rows import RANKED_TYPES, RankedFields
from poft_plugin.methods import Method

STRATEGY = "poft_plugin.hosts.axolotl.strategy"
SALT_FIELD = "input_format"
CONTRACT = 2

FAMILIES = ("chat_template", "alpaca", "alpaca_chat", "alpaca_instruct", "alpaca_w_system", "gpteacher", "oasst")
FAMILIES += ("jeopardy", "explainchoice", "concisechoice", "summarizetldr", "input_output")

SUPPORTED_TYPES = f"{', '.join(FAMILIES)} (with `.load_...` and `:style` as in Axolotl), or a mapping of field names"

SUPPORTED_RANKED_TYPES = ", ".join(RANKED_TYPES)

RANKED_HOST_KEYS = (
    "path", "type", "name", "split", "ds_type", "data_files", "revision", "shards", "shards_idx",
    "preprocess_shards", "trust_remote_code", "chat_template", "chat_template_jinja", "train_on_eos",
)  # fmt: skip
"""Keys of an entry that keep the host's meaning for preference rows."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True)
class Ranked:
    """What an entry of preference rows has besides.

    Args:
        fields: its keys that say where prompt, responses and scores are.
        max_responses: most responses of a row that the method takes, or None.
    """

    fields: RankedFields
    max_responses: int | None


@dataclass(frozen=True)
class Entry:
    """A dataset entry as the user wrote it.

    Args:
        raw: the entry's keys.
        label: what rows of it are called: the path's last part, numbered where two entries share it.
        group_column: raw column whose value rows carry as their group, or None.
        ranked: for preference methods.
    """

    raw: Mapping[str, Any]
    label: str
    group_column: str | None
    ranked: Ranked | None = None


ENTRIES: dict[str, Entry] = {}
"""Entries of this process by digest: how the strategy finds what `register` took over."""


def take_over_entries(cfg: Any, method: Method, group_column: str | None) -> None:
    """Rewrites `datasets:` and `test_datasets:` of a raw config in place.

    Args:
        cfg: the raw config.
        method: the method that is trained.
        group_column: as in `Entry`.

    Raises:
        ValueError: for an entry without path or type, a type that the method cannot use, or (preference rows) a key
            that nothing reads.
    """
    used: dict[str, int] = {}
    for section in ("datasets", "test_datasets"):
        for number, raw in enumerate(cfg.get(section) or []):
            where = f"{section}[{number}]"
            label = _label(raw, where, used, method)
            ranked = Ranked(_ranked_fields(raw, where), method.max_responses) if method.ranked else None
            entry = Entry(dict(raw), label, group_column, ranked)
            digest = _digest(entry, method.name, cfg)
            ENTRIES[digest] = entry
            kept = {key: raw[key] for key in RANKED_HOST_KEYS if key in raw} if method.ranked else dict(raw)
            cfg[section][number] = {**kept, "type": STRATEGY, SALT_FIELD: digest}


def _ranked_fields(raw: Mapping[str, Any], where: str) -> RankedFields:
    own = {key: value for key, value in raw.items() if key not in RANKED_HOST_KEYS and value is not None}
    return parse_block(RankedFields, own, where)


def _label(raw: Mapping[str, Any], where: str, used: dict[str, int], method: Method) -> str:
    for key in ("path", "type"):
        if not raw.get(key):
            raise ValueError(f"{where}: no `{key}:`")
    kind = raw["type"]
    if method.ranked and kind not in RANKED_TYPES:
        raise ValueError(
            f"{where} ({raw['path']}): type {kind!r} is not supported by `rl: {method.name}`, which takes preference "
            f"rows. What works: {SUPPORTED_RANKED_TYPES}"
        )
    if not method.ranked and isinstance(kind, str) and kind.partition(":")[0].partition(".")[0] not in FAMILIES:
        raise ValueError(f"{where} ({raw['path']}): type {kind!r} is not supported. What works: {SUPPORTED_TYPES}")
    path = str(raw["path"])
    name = Path(path).name if Path(path).exists() else path
    files = raw.get("data_files") or []
    parts = [raw.get("name"), *([files] if isinstance(files, str) else files), raw.get("split")]
    label = " ".join([name, *(str(part) for part in parts if part)])
    used[label] = used.get(label, 0) + 1
    return label if used[label] == 1 else f"{label} #{used[label]}"


def _digest(entry: Entry, rl: str, cfg: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(
        json.dumps([CONTRACT, rl, entry.label, entry.group_column, entry.raw], sort_keys=True, default=str).encode()
    )
    for file in _files(entry.raw, cfg):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _files(raw: Mapping[str, Any], cfg: Mapping[str, Any]) -> Iterable[Path]:
    """Local files that the prepared rows depend on: data, templates, the policy's tokenizer."""
    data_files = raw.get("data_files") or []
    named = [raw["path"], *([data_files] if isinstance(data_files, str) else data_files)]
    named += [raw.get("chat_template_jinja"), cfg.get("chat_template_jinja")]
    tokenizer = Path(str(cfg.get("tokenizer_config") or cfg.get("base_model")))
    found = [tokenizer / name for name in TOKENIZER_FILES]
    for name in named:
        if name and len(str(name)) < 1024 and Path(str(name)).is_dir():
            found += sorted(path for path in Path(str(name)).rglob("*") if ".cache" not in path.parts)
        elif name and len(str(name)) < 1024:
            found.append(Path(str(name)))
    return [path for path in found if path.is_file()]
