"""poft_plugin: preference-oriented SFT (PoFT) and distribution-guided alignment (DEFT) inside Axolotl.

Importing this package loads neither torch nor axolotl; the host asks for `PoftPlugin` by name.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from poft_plugin.hosts.axolotl.plugin import PoftPlugin

__all__ = ["PoftPlugin", "__version__"]


def __getattr__(name: str) -> Any:
    if name != "PoftPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the plugin is {__name__}.PoftPlugin")
    try:
        from poft_plugin.hosts.axolotl.plugin import PoftPlugin
    except ImportError as error:
        # Axolotl 0.19 prints an ImportError of a plugin and goes on: it would train plain SFT (patches/0002).
        raise RuntimeError(f"poft_plugin cannot be imported, so nothing may be trained: {error}") from error
    return PoftPlugin
