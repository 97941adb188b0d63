"""The plugin manager: finds every package that registered methods, losses, preprocessors or row filters."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from poft_plugin import hookspecs

if TYPE_CHECKING:
    from poft_plugin.data.preparation import RowFilter
    from poft_plugin.method import Method
    from poft_plugin.scoring.jobs import Preprocessor
    from poft_plugin.trainers.step import LossFunction

Item = TypeVar("Item")

OURS_ONLY = "POFT_PLUGIN_OURS_ONLY"
"""Environment variable: where set, only the built-in methods are loaded (to tell whose fault an error is)."""


@dataclass(frozen=True)
class Registry:
    """Everything registered, by name.

    Args:
        methods: the rl types, wrapped ones too.
        losses: the loss types.
        preprocessors: the dataset preprocessors.
        row_filters: the row filters.
        packages: who registered each rl type, by its name.
    """

    methods: "dict[str, Method]" = field(default_factory=dict)
    losses: "dict[str, LossFunction]" = field(default_factory=dict)
    preprocessors: "dict[str, Preprocessor]" = field(default_factory=dict)
    row_filters: "dict[str, RowFilter]" = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)


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
        ValueError: if two packages register one name, or a method names a preprocessor that is not there, or that
            reads another block than the method has.
    """
    found = Registry()
    methods = _Table("rl type", found.methods, found.packages)
    for package, hook in _implementations("register_methods"):
        hook(lambda method, package=package: methods.add(package, method.name, method))
    wrappers: list[tuple[str, Callable[[Method], Method | None]]] = []
    for package, hook in _implementations("register_wrappers"):
        hook(lambda wrap, package=package: wrappers.append((package, wrap)))
    for package, wrapped in [
        (package, wrap(method)) for package, wrap in wrappers for method in found.methods.values()
    ]:
        if wrapped is not None:
            methods.add(package, wrapped.name, wrapped)
    tables: dict[str, _Table[Any]] = {
        "register_losses": _Table("loss", found.losses),
        "register_preprocessors": _Table("preprocessor", found.preprocessors),
        "register_row_filters": _Table("row filter", found.row_filters),
    }
    for name, table in tables.items():
        for package, hook in _implementations(name):
            hook(partial(table.add, package))
    for method in found.methods.values():
        _check_preprocessors(method, found, tables["register_preprocessors"].packages)
    return found


def scores_start_policy(method: "Method") -> bool:
    """Whether a preprocessor of the method scores with the policy's start weights."""
    return any(registry().preprocessors[name].start_policy for name in method.preprocessors)


def later_columns(method: "Method") -> dict[str, str]:
    """Columns that are made of what filters left, each with the name of its preprocessor."""
    table = registry().preprocessors
    late = [name for name in method.preprocessors if table[name].scope == "kept"]
    return {column: name for name in late for column in table[name].columns}


def load_object(path: str) -> Any:
    """The object at `package.module:Name`.

    Raises:
        ImportError: if the module is not there.
        AttributeError: if the module has no such name.
    """
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class _Table(Generic[Item]):
    """Registered items of one kind, and who registered them."""

    kind: str
    items: dict[str, Item]
    packages: dict[str, str] = field(default_factory=dict)

    def add(self, package: str, name: str, item: Item) -> None:
        if name in self.items:
            raise ValueError(
                f"two packages register the {self.kind} {name!r}: {self.packages[name]} and {package}; uninstall one "
                "of them"
            )
        self.items[name], self.packages[name] = item, package


def _check_preprocessors(method: "Method", found: Registry, packages: Mapping[str, str]) -> None:
    """A method's preprocessors are there, and read its block or that of the method that it wraps."""
    for name in method.preprocessors:
        title = f"rl type {method.name!r} ({found.packages[method.name]}): its preprocessor {name!r}"
        if name not in found.preprocessors:
            raise ValueError(f"{title} is not registered; known: {', '.join(sorted(found.preprocessors))}")
        reads = getattr(found.preprocessors[name], "reads", None)
        if reads is None:
            raise ValueError(
                f"{title} ({packages[name]}) does not declare what it reads: decorate it with "
                "`@preprocessor(reads=...)` of poft_plugin.scoring.jobs"
            )
        blocks = [(each.block, load_object(each.config)) for each in (method, method.base) if each is not None]
        if not any(issubclass(block, reads) for _, block in blocks):
            described = " and ".join(f"`{key}:` ({block.__name__})" for key, block in blocks)
            raise ValueError(f"{title} ({packages[name]}) reads a {reads.__name__}; the method's block is {described}")


def _implementations(hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Who implements a hook: the package's name and the implementation, which takes `register`."""
    distributions = {entry.value: entry.dist.name for entry in entry_points(group=hookspecs.GROUP) if entry.dist}
    for found in reversed(getattr(manager().hook, hook).get_hookimpls()):  # in pluggy's own order
        if found.argnames:  # one that takes nothing registers nothing
            yield distributions.get(found.plugin_name, found.plugin_name), found.function
