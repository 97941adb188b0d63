"""Weights out of a checkpoint, all of them: what a checkpoint lacks would be random, and is refused."""

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError

NAMED = 5
"""Tensors that a message names."""


COMPLETE = "Use a complete checkpoint: save or download it again"


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
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise ValueError(f"{title}: its weights cannot be loaded from {location}: {error}") from error
    refuse_incomplete(report, title, remedy)
    return model


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
