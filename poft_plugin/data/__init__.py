"""Rows and batches: conversations, keys, renderings, packing, grades. Knows no loss and no host.

The exported functions are loaded on first use: importing this room loads none of its modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poft_plugin.data.discrepancy import discrepancy_distribution
    from poft_plugin.data.grading import grade_levels

__all__ = ["discrepancy_distribution", "grade_levels"]

_MODULES = {"discrepancy_distribution": "discrepancy", "grade_levels": "grading"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
