"""The whole extension surface.

A package implements any of these hooks and names its module under the entry-point group `poft_plugin`; our own methods
come in by the same door (see `poft_plugin.methods`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from poft_plugin.data.preparation import RowFilter
    from poft_plugin.method import Method
    from poft_plugin.scoring.jobs import Preprocessor
    from poft_plugin.trainers.step import LossFunction

GROUP = "poft_plugin"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def register_methods(register: "Callable[[Method], None]") -> None:
    """Register rl types: `register(Method(name="toy", ...))` makes `rl: toy` trainable."""


@hookspec
def register_wrappers(register: "Callable[[Callable[[Method], Method | None]], None]") -> None:
    """Register wrappers: `register(wrap)`, where `wrap(method)` makes a new rl type of a registered one, or None."""


@hookspec
def register_losses(register: "Callable[[str, LossFunction], None]") -> None:
    """Register loss types: `register("toy", loss)`, a pure function of per-sequence numbers that a method names."""


@hookspec
def register_preprocessors(register: "Callable[[str, Preprocessor], None]") -> None:
    """Register dataset preprocessors: `register("rewards", preprocess)` attaches columns before training."""


@hookspec
def register_row_filters(register: "Callable[[str, RowFilter], None]") -> None:
    """Register row filters: `register("short", keep)` is usable as `row_filters: [{name: short, ...}]`."""
