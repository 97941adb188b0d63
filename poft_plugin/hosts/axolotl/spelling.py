"""Keys that are meant for us and would be passed over: misspelt ones, and ones that belong inside a block.

The host passes over every top-level key that it does not know. Keys of the host and of other plugins are never refused.
"""

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any, get_args

from axolotl.integrations.config import merge_input_args
from axolotl.utils.schemas.enums import RLType
from pydantic import BaseModel

from poft_plugin.hosts.axolotl.args import PoftPluginArgs
from poft_plugin.method import Method
from poft_plugin.plugins import load_object, registry

NEAR = 0.84
"""Similarity from which a key is taken for a misspelling: one letter in five."""

NEAR_NAME = 0.54
"""The same for a value of `rl:`, which nothing but a method's name can be."""

OTHER_MEANING = {"reward_model"}
"""Keys inside our blocks that the host has at the top level, where they mean something else."""


def closest(word: str, known: Iterable[str], cutoff: float) -> str | None:
    """The known word that is most like another one, or None where none is near.

    Examples:
        >>> closest("row-filter", ["row_filters", "references"], 0.84)
        'row_filters'
    """
    written = word.lower().replace("-", "_")
    ratios = {name: SequenceMatcher(None, written, name.lower()).ratio() for name in known}
    best = max(ratios, key=lambda name: ratios[name], default=None)
    return best if best is not None and ratios[best] >= cutoff else None


def check_rl(rl: Any) -> None:
    """Refuses an `rl:` that is neither ours nor the host's, but like one of ours.

    Raises:
        ValueError: naming the one that it is most like.
    """
    names = [name for name, method in registry().methods.items() if method.alone]
    if rl is None or rl in [kind.value for kind in RLType] or rl in names:
        return
    wrapped = f"deft_{rl}"
    near = wrapped if wrapped in names else closest(str(rl), names, NEAR_NAME)
    if near is not None:
        raise ValueError(f"rl: {rl!r} is no rl type; did you mean `rl: {near}`? Known here: {', '.join(sorted(names))}")


def check_keys(cfg: Mapping[str, Any], method: Method | None) -> None:
    """Refuses top-level keys that nothing knows and that are like ours.

    Args:
        cfg: the raw config.
        method: the method that it names; None where it names none of ours: misspelt keys of blocks go unseen then.

    Raises:
        ValueError: naming every such key and where it belongs.
    """
    host = _top_level(method) | {known.block for known in registry().methods.values()}
    unknown = [key for key in cfg if isinstance(key, str) and key not in host and cfg.get(key) is not None]
    remarks = {key: _meant(key, host, method) for key in unknown}
    lines = [f"{key}: no key of the host at the top level; {remark}" for key, remark in remarks.items() if remark]
    if lines:
        raise ValueError("\n".join(lines))


def _meant(key: str, host: set[str], method: Method | None) -> str | None:
    """What a key was meant to be, as the rest of a sentence; None where it is like nothing of ours."""
    methods = registry().methods
    if key in methods and methods[key].alone:
        return f"did you mean `rl: {key}`?"
    block = closest(key, {"row_filters", *(known.block for known in methods.values())}, NEAR)
    if block is not None:
        return f"did you mean `{block}:`?"
    if method is not None:
        own = _keys_inside(method)
        direct = {name for name, place in own.items() if place == f"{method.block}.{name}"}
        near = key if key in own else closest(key, direct | host, NEAR)
        if near in own and (near not in host or near in OTHER_MEANING):
            return f"did you mean `{own[near]}`?"
        read = () if method.keys is None else load_object(method.keys).model_fields
        longer = next((name for name in read if name.endswith(f"_{key}")), None)
        if longer is not None:
            return f"did you mean `{longer}`?"
    others = {name: known for known in methods.values() for name in load_object(known.config).model_fields}
    if key in others:
        return f"`{others[key].block}.{key}` is read by other methods alone, such as `rl: {_alone(others[key])}`"
    return None


def _alone(method: Method) -> str:
    return method.name if method.alone else f"deft_{method.name}"


def _top_level(method: Method | None) -> set[str]:
    """Top-level keys of the host, of every plugin that is loaded, and ours."""
    schema = merge_input_args()[1]
    fields = schema.model_fields | PoftPluginArgs.model_fields
    if method is not None and method.keys is not None:
        fields = fields | load_object(method.keys).model_fields
    return {*fields, *(field.alias for field in fields.values() if field.alias)}


def _keys_inside(method: Method) -> dict[str, str]:
    """Every key inside the blocks that a method reads, and its place: `deft.reward_model.dtype`."""
    places: dict[str, str] = {}
    for part in filter(None, (method, method.base)):
        for name, place in _fields(load_object(part.config), part.block):
            places.setdefault(name, place)
    return places


def _fields(model: type[BaseModel], place: str) -> list[tuple[str, str]]:
    """Fields of a block, those of the blocks inside it after them."""
    own = [(name, f"{place}.{name}") for name in model.model_fields]
    for name, field in model.model_fields.items():
        nested = _nested(field.annotation)
        if nested is not None:
            block, many = nested
            own += _fields(block, f"{place}.{name}{'[]' if many else ''}")
    return own


def _nested(annotation: Any) -> tuple[type[BaseModel], bool] | None:
    """The block inside an annotation, and whether there may be many of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        found = _nested(part)
        if found is not None:
            return found[0], found[1] or Ellipsis in get_args(annotation)
    return None
