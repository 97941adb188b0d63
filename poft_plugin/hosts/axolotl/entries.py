"""The `datasets:` entries of a run: rewritten so that the host asks our strategy, which asks the host's own.

The host's prepared-dataset hash is a fixed list of fields of an entry. It sees neither `rl` nor the content of a file
(an edited row would load the stale set), so `input_format`, which the host hashes and does not read, carries a
digest of what it cannot see.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.utils.schemas.datasets import SFTDataset

from poft_plugin.config import entries_of, parse_block
from poft_plugin.hosts.axolotl.prompt_completion import PROMPT_COMPLETION, PromptCompletionFields
from poft_plugin.hosts.axolotl.ranked_fields import RANKED_TYPES, RankedFields
from poft_plugin.hosts.axolotl.ranked_host_types import from_host_type
from poft_plugin.method import Method

STRATEGY = "poft_plugin.hosts.axolotl.strategy"
SALT_FIELD = "input_format"
CONTRACT = 6

FAMILIES = (
    "chat_template", "alpaca", "alpaca_chat", "alpaca_instruct", "alpaca_w_system", "gpteacher", "oasst",
    "jeopardy", "explainchoice", "concisechoice", "summarizetldr", "input_output",
)  # fmt: skip

SUPPORTED_TYPES = (
    f"{', '.join(FAMILIES)} (with `.load_...` and `:style` as in Axolotl), {PROMPT_COMPLETION}, or a mapping of field "
    "names"
)

SUPPORTED_RANKED_TYPES = ", ".join(RANKED_TYPES)

RANKED_HOST_KEYS = (
    "path", "type", "name", "split", "ds_type", "data_files", "revision", "shards", "shards_idx",
    "preprocess_shards", "trust_remote_code", "chat_template", "chat_template_jinja", "train_on_eos", "weight",
)  # fmt: skip
"""Keys of an entry that keep the host's meaning for preference rows."""

UNREAD_WITH_COMPLETION = ("field_messages", "message_field_training", "message_field_training_detail", "roles_to_train")
"""Keys of the host's chat strategy that say what is trained on: here the completion is."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip

TOKEN_KEYS = (
    "tokens", "tokenizer_type", "tokenizer_legacy", "tokenizer_use_fast", "tokenizer_use_mistral_common",
    "revision_of_model", "trust_remote_code", "excess_length_strategy", "min_sample_len", "eval_sequence_len",
)  # fmt: skip
"""Top-level keys that decide which rows are there and which tokens they have, and that the host's hash lacks."""


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
        completion: for rows of a prompt and a completion.
        evaluation: whether it stands under `test_datasets:`.
        drop_bad_rows: whether conversations that cannot be used are left out.
    """

    raw: Mapping[str, Any]
    label: str
    group_column: str | None
    ranked: Ranked | None = None
    completion: PromptCompletionFields | None = None
    evaluation: bool = False
    drop_bad_rows: bool = False


ENTRIES: dict[str, Entry] = {}
"""Entries of this process by digest: how the strategy finds what `register` took over."""


def take_over_entries(cfg: Any, method: Method, group_column: str | None, *, drop_bad_rows: bool = False) -> None:
    """Rewrites `datasets:` and `test_datasets:` of a raw config in place.

    Args:
        cfg: the raw config.
        method: the method that is trained.
        group_column: as in `Entry`.
        drop_bad_rows: as in `Entry`.

    Raises:
        ValueError: for an entry without path or type, a type that the method cannot use, or a key that nothing reads.
    """
    used: dict[str, int] = {}
    for section in ("datasets", "test_datasets"):
        for number, raw in enumerate(entries_of(cfg.get(section), section)):
            where = f"{section}[{number}]"
            raw = from_host_type(raw, where) if method.ranked else raw
            label = _label(raw, where, used, method)
            _check_weight(raw, where)
            ranked = Ranked(_ranked_fields(raw, where), method.max_responses) if method.ranked else None
            completion = None if method.ranked else _completion_fields(raw, where)
            entry = Entry(
                dict(raw), label, group_column, ranked, completion=completion,
                evaluation=section == "test_datasets", drop_bad_rows=drop_bad_rows,
            )  # fmt: skip
            digest = _digest(entry, method.name, cfg)
            ENTRIES[digest] = entry
            kept = {key: raw[key] for key in RANKED_HOST_KEYS if key in raw} if method.ranked else dict(raw)
            cfg[section][number] = {**kept, "type": STRATEGY, SALT_FIELD: digest}


def _check_weight(raw: Mapping[str, Any], where: str) -> None:
    """The host takes a share of a data set since 0.20; before, it drops the key without a word."""
    weight = raw.get("weight")
    if weight is not None and "weight" not in SFTDataset.model_fields:
        raise ValueError(
            f"{where}.weight: {weight!r} is not read by this version of Axolotl (0.20 is the first that does). Remove "
            "it; `shards: 2` with `shards_idx: 0` takes a half of the rows"
        )
    if weight is not None and not (isinstance(weight, int | float) and 0 < weight <= 1):
        raise ValueError(f"{where}.weight: {weight!r} is no share of a data set: give a number above 0 and up to 1")


def _completion_fields(raw: Mapping[str, Any], where: str) -> PromptCompletionFields | None:
    """The own keys of an entry of conversations, where its type has some.

    Raises:
        ValueError: for a key that nothing reads.
    """
    is_completion = raw["type"] == PROMPT_COMPLETION
    own = set(PromptCompletionFields.model_fields) if is_completion else set()
    known = set(SFTDataset.model_fields) | own
    for key, value in raw.items():
        if is_completion and key in UNREAD_WITH_COMPLETION:
            raise ValueError(
                f"{where}.{key}: {value!r} is not read with `type: {PROMPT_COMPLETION}`, of which the completion is "
                "trained on; remove it"
            )
        if key not in known and value is not None:
            close = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"did you mean `{close[0]}`?" if close else "remove it"
            raise ValueError(f"{where}.{key}: no such key of a dataset entry; {hint}")
    if not is_completion:
        return None
    return parse_block(PromptCompletionFields, {key: raw[key] for key in own if raw.get(key) is not None}, where)


def _ranked_fields(raw: Mapping[str, Any], where: str) -> RankedFields:
    if raw.get("train_on_eos") == "all":
        raise ValueError(
            f"{where}.train_on_eos: 'all' trains on ends of turns that are no response; use `turn` or `last`, or "
            "remove it"
        )
    own = {key: value for key, value in raw.items() if key not in RANKED_HOST_KEYS and value is not None}
    fields = parse_block(RankedFields, own, where)
    fields.check(str(raw["type"]), where)
    return fields


def _label(raw: Mapping[str, Any], where: str, used: dict[str, int], method: Method) -> str:
    for key in ("path", "type"):
        if not raw.get(key):
            raise ValueError(f"{where}: no `{key}:`")
    kind = raw["type"]
    for key, allowed in (("path", str), ("type", (str, Mapping))):
        if not isinstance(raw[key], allowed):
            raise ValueError(f"{where}.{key}: expected a name, found {raw[key]!r}")
    if method.ranked and kind not in RANKED_TYPES:
        raise ValueError(
            f"{where} ({raw['path']}): type {kind!r} is not supported by `rl: {method.name}`, which takes preference "
            f"rows. What works: {SUPPORTED_RANKED_TYPES}"
        )
    family = PROMPT_COMPLETION if kind == PROMPT_COMPLETION else str(kind).partition(":")[0].partition(".")[0]
    if not method.ranked and isinstance(kind, str) and family not in (*FAMILIES, PROMPT_COMPLETION):
        raise ValueError(f"{where} ({raw['path']}): type {kind!r} is not supported. What works: {SUPPORTED_TYPES}")
    path = str(raw["path"])
    name = Path(path).name if os.path.exists(path) else path  # unlike pathlib's, it knows names that no file can have
    parts = [raw.get("name"), *_names(raw.get("data_files")), raw.get("split")]
    label = " ".join([name, *(str(part) for part in parts if part)])
    if shares := [f"{key} {raw[key]}" for key in ("weight", "shards_idx") if raw.get(key) is not None]:
        label += f" ({', '.join(shares)})"  # positions of rows are those in the share that the host takes
    used[label] = used.get(label, 0) + 1
    return label if used[label] == 1 else f"{label} #{used[label]}"


def _digest(entry: Entry, rl: str, cfg: Mapping[str, Any]) -> str:
    seed = cfg.get("seed") if entry.raw.get("shards") or entry.raw.get("weight") else None  # it picks the rows
    seen = [CONTRACT, rl, entry.label, entry.group_column, entry.drop_bad_rows, entry.raw, seed]
    seen += [cfg.get(key) for key in TOKEN_KEYS]
    digest = hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode())
    for file in _files(entry.raw, cfg):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _names(data_files: Any) -> list[Any]:
    """`data_files` of an entry: a name, a list of them, or a mapping of splits to either."""
    if isinstance(data_files, Mapping):
        return [name for names in data_files.values() for name in _names(names)]
    if isinstance(data_files, (list, tuple)):
        return list(data_files)
    return [] if data_files is None else [data_files]


def _files(raw: Mapping[str, Any], cfg: Mapping[str, Any]) -> Iterable[Path]:
    """Local files that the prepared rows depend on: data, templates, the policy's tokenizer."""
    named = [raw["path"], *_names(raw.get("data_files"))]
    named += [raw.get("chat_template_jinja"), cfg.get("chat_template_jinja")]
    tokenizer = Path(str(cfg.get("tokenizer_config") or cfg.get("base_model")))
    found = [tokenizer / name for name in TOKENIZER_FILES]
    for name in named:
        if name and os.path.isdir(str(name)):
            found += sorted(path for path in Path(str(name)).rglob("*") if ".cache" not in path.parts)
        elif name:
            found.append(Path(str(name)))
    return [path for path in found if os.path.isfile(path)]
