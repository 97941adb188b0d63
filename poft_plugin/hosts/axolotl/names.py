"""Names that belong to the host: no registered method may take one over."""

from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import RLType

from poft_plugin.plugins import OURS_ONLY, Registry

REMEDY = (
    f"Its package has to choose another name; until then uninstall it, or set {OURS_ONLY}=1 to leave other packages out"
)


def check_names(registry: Registry) -> None:
    """Refuses methods that hide an `rl:` type of the host, or whose block hides a key of the host.

    Args:
        registry: everything registered.

    Raises:
        ValueError: naming the package, the method and what it would hide.
    """
    types, keys = {str(kind.value) for kind in RLType}, AxolotlInputConfig.model_fields
    for name, method in registry.methods.items():
        who = f"{registry.packages[name]} registers the rl type {name!r}"
        if method.alone and name in types:
            raise ValueError(
                f"{who}, which is Axolotl's own: every config with `rl: {name}` would train another method. {REMEDY}. "
                f"(A method that is there to be wrapped, as `rl: deft_{name}`, may have that name: `alone=False`)"
            )
        if method.block in keys:
            raise ValueError(f"{who} with the block {method.block!r}, which is a key of Axolotl's own. {REMEDY}")
