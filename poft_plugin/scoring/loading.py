"""Weights out of a checkpoint, all of them: what a checkpoint lacks would be random, and is refused."""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

NAMED = 5
"""Tensors that a message names."""


COMPLETE = "Use a complete checkpoint: save or download it again"
DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError)
"""What reading a file raises that was cut off or is none of weights."""

OLD_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.(masked_)?bias|position_ids)$")
"""What older versions of transformers saved, and newer ones make anew."""

_said: set[tuple[str, ...]] = set()


def load_complete(model_class: Any, location: str, title: str, *, remedy: str = COMPLETE, **arguments: Any) -> Any:
    """`from_pretrained`, with a look at its loading report.

    Args:
        model_class: an auto class or a model class.
        location: what `from_pretrained` gets.
        title: the model in messages.
        remedy: what to do where weights are missing.
        arguments: its keywords. `device_map={"": "meta"}` reads names and shapes only.

    Raises:
        ValueError: if files are missing or broken, tensors are missing, have another shape than the config says, or
            are LoRA weights beside the model's own.
    """
    try:
        model, report = model_class.from_pretrained(
            location, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except (OSError, ImportError, ValueError, *DAMAGED) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        broken = list(broken_files(Path(location)))
        why = "; ".join(broken) or str(error).strip()
        if broken or isinstance(error, DAMAGED):  # quantized weights that are missing cannot be made up: an error, too
            why += f". {COMPLETE}"
        raise ValueError(f"{title}: its weights cannot be loaded from {location}: {why}") from error
    refuse_incomplete(report, title, remedy)
    say_unused(report, title)
    return model


def broken_files(folder: Path) -> Iterator[str]:
    """Weight files of a local folder that are not there or cannot be read, in words.

    Args:
        folder: of the checkpoint; nothing is found where it is no folder.
    """
    for index in sorted(folder.glob("*.index.json")):
        held: dict[str, str] = json.loads(index.read_text()).get("weight_map", {})
        for name in sorted(set(held.values())):
            tensors = sorted(tensor for tensor, file in held.items() if file == name)
            if not (folder / name).exists():
                yield f"{name} is not there ({len(tensors)} weights, {', '.join(tensors[:NAMED])} among them)"
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        try:
            if file.suffix == ".bin":
                torch.load(file, map_location="meta", weights_only=True)
            else:
                with safe_open(file, "pt"):
                    pass
        except (OSError, *DAMAGED):
            yield f"{file.name} is cut off or damaged ({file.stat().st_size:,} bytes)"


def say_unused(report: Mapping[str, Any], title: str) -> None:
    """Names weights of a checkpoint that the model has no place for, once: it is scored without them.

    Args:
        report: transformers' loading report.
        title: the model in messages.

    Examples:
        >>> say_unused({"unexpected_keys": {"v_head.weight", "layers.0.attn.masked_bias"}}, "reference 'x'")
        reference 'x': 1 weights of its checkpoint have no place in the model, v_head.weight among them
        >>> say_unused({"unexpected_keys": {"v_head.weight"}}, "reference 'x'")
    """
    unused = [name for name in sorted(report["unexpected_keys"]) if not OLD_BUFFERS.search(name)]
    if unused and (title, *unused) not in _said:
        _said.add((title, *unused))
        print(
            f"{title}: {len(unused)} weights of its checkpoint have no place in the model, {', '.join(unused[:NAMED])} "
            "among them",
            flush=True,
        )


def refuse_incomplete(report: Mapping[str, Any], title: str, remedy: str) -> None:
    """Refuses a checkpoint that does not fill its model.

    Args:
        report: transformers' loading report.
        title: the model in messages.
        remedy: what to do where weights are missing, unless all names have a prefix.

    Raises:
        ValueError: naming the tensors, and the prefix of all names where there is one.

    Examples:
        >>> report = {"missing_keys": {"a.b"}, "unexpected_keys": {"module.a.b"}}
        >>> refuse_incomplete(report, "reference 'x'", "")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: reference 'x': its checkpoint lacks 1 weights, a.b among them...without the prefix 'module.'
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        remedy = _prefix_hint(missing, unexpected) or remedy
        raise ValueError(
            f"{title}: its checkpoint lacks {len(missing)} weights, {', '.join(missing[:NAMED])} among them, "
            f"which would be random. {remedy}"
        )
    mismatched = sorted(str(name) for name, *_ in report.get("mismatched_keys", ()))
    if mismatched:
        shapes = "; ".join(
            f"{name} is {tuple(stored)}, and {tuple(wanted)} by its config.json"
            for name, stored, wanted in sorted(report["mismatched_keys"])[:NAMED]
        )
        raise ValueError(
            f"{title}: {len(mismatched)} of its weights have another shape than its config.json says: {shapes}. They "
            "would be random. Use a checkpoint whose config.json is its own"
        )
    adapters = [name for name in unexpected if ".lora_" in name]
    if adapters:
        raise ValueError(
            f"{title}: its checkpoint has {len(adapters)} LoRA weights ({adapters[0]} among them) that are not merged, "
            "and would be left out. Merge them first (`axolotl merge-lora`)"
        )


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    first = missing[0]
    for name in unexpected:
        if name.endswith(f".{first}"):
            return f"It has them as {name!r} and so on: save it without the prefix {name.removesuffix(first)!r}"
    return ""
