"""The plugin manager: finds every package that registered methods, losses, preprocessors or row filters."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from poft_plugin import hookspecs

if TYPE_CHECKING:
    from poft_plugin.data.preparation import Preprocessor, RowFilter
    from poft_plugin.methods import Method
    from poft_plugin.trainers.step import LossFunction

Item = TypeVar("Item")

OURS_ONLY = "POFT_PLUGIN_OURS_ONLY"
"""Environment variable: where set, only the built-in methods are loaded (to tell whose fault an error is)."""


@dataclass(frozen=True)
class Registry:
    """Everything registered, by name."""

    methods: "dict[str, Method]" = field(default_factory=dict)
    losses: "dict[str, LossFunction]" = field(default_factory=dict)
    preprocessors: "dict[str, Preprocessor]" = field(default_factory=dict)
    row_filters: "dict[str, RowFilter]" = field(default_factory=dict)


@cache
def manager() -> pluggy.PluginManager:
    """The plugin manager of this process, with all entry points of the group loaded."""
    plugin_manager = pluggy.PluginManager(hookspecs.GROUP)
    plugin_manager.add_hookspecs(hookspecs)
    if os.environ.get(OURS_ONLY):
        plugin_manager.register(importlib.import_module("poft_plugin.methods"))
    else:
        # not pluggy's own loading: it leaves out, silently, an entry point whose name another package uses too
        for entry in entry_points(group=hookspecs.GROUP):
            plugin = entry.load()
            if not plugin_manager.is_registered(plugin):
                plugin_manager.register(plugin, name=entry.value)
    plugin_manager.check_pending()
    return plugin_manager


@cache
def registry() -> Registry:
    """All registered items.

    Raises:
        ValueError: if two packages register one name.
    """
    found, hook = Registry(), manager().hook
    add_method = _adder("rl type", found.methods)
    hook.register_methods(register=lambda method: add_method(method.name, method))
    wrappers: list[Callable[[Method], Method | None]] = []
    hook.register_wrappers(register=wrappers.append)
    for wrapped in [wrap(method) for wrap in wrappers for method in found.methods.values()]:
        if wrapped is not None:
            add_method(wrapped.name, wrapped)
    hook.register_losses(register=_adder("loss", found.losses))
    hook.register_preprocessors(register=_adder("preprocessor", found.preprocessors))
    hook.register_row_filters(register=_adder("row filter", found.row_filters))
    return found


def load_object(path: str) -> Any:
    """The object at `package.module:Name`.

    Raises:
        ImportError: if the module is not there.
        AttributeError: if the module has no such name.
    """
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _adder(kind: str, table: dict[str, Item]) -> Callable[[str, Item], None]:
    def add(name: str, item: Item) -> None:
        if name in table:
            raise ValueError(f"two packages register the {kind} {name!r}; uninstall one of them")
        table[name] = item

    return add
