"""A config file as it is written, before the host reads it: whether it asks for us at all.

Without its line under `plugins:`, or where it cannot be loaded, nothing of ours runs in the host's own commands, and
they cannot say so.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points, version
from typing import Any

import yaml

from poft_plugin.hosts.axolotl.args import NAME
from poft_plugin.plugins import registry

LINES = f"plugins:\n  - {NAME}"

LOADS_ENTRY_POINTS = (0, 21)
"""The first version of the host that loads plugins by the entry-point group `axolotl.plugins`, without a line."""


def check_asked_for(config: str) -> None:
    """Refuses a file that does not ask for a method of ours, and says what is missing.

    Args:
        config: the YAML file.

    Raises:
        ValueError: for a file that is no config, a line under `plugins:` that is missing or misspelt, or an `rl:` that
            is missing; or where the plugin cannot be loaded.
    """
    raw = _read(config)
    _check_loads()
    from poft_plugin.hosts.axolotl.spelling import check_rl

    _check_plugins(raw, config)
    rl, methods = raw.get("rl") or raw.get("poft_plugin_rl"), registry().methods
    check_rl(rl)
    if isinstance(rl, str) and rl in methods and methods[rl].alone:
        return
    names = sorted(name for name, method in methods.items() if method.alone)
    blocks = sorted({method.block for method in methods.values() if raw.get(method.block) is not None})
    there = f"the block `{blocks[0]}:` is there, but " if blocks else ""
    raise ValueError(
        f"{config}: {there}`rl: {rl or 'null'}` asks for nothing of poft_plugin, which would do nothing. Set `rl:` to "
        f"one of {', '.join(names)}"
    )


def _read(config: str) -> Mapping[str, Any]:
    try:
        with open(config, encoding="utf-8") as stream:
            raw = yaml.safe_load(stream)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config}: not a YAML file: {error}") from error
    if not isinstance(raw, Mapping):
        raise ValueError(f"{config}: expected keys and values (`base_model: ...`), found {str(raw)[:80]!r}")
    return raw


def _check_loads() -> None:
    import poft_plugin

    try:
        _ = poft_plugin.PoftPlugin
    except RuntimeError as error:
        raise ValueError(
            f"{error}. `axolotl train` stops, too, where {NAME} is under `plugins:`; without that line it warns, goes "
            "on, and may train plain SFT. Mend the environment (`pip check`)"
        ) from error


def _check_plugins(raw: Mapping[str, Any], config: str) -> None:
    from poft_plugin.hosts.axolotl.spelling import closest

    plugins = raw.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise ValueError(f"{config}: plugins: {plugins!r}: expected a list of names. Write\n{LINES}")
    if NAME in (name.replace(":", ".") for name in plugins):
        return
    misspelt = next((name for name in plugins if closest(name, [NAME, "poft_plugin"], 0.7)), None)
    if misspelt is not None:
        raise ValueError(f"{config}: plugins: {misspelt!r} is no plugin; did you mean {NAME}? It is not loaded so")
    if not _loaded_unasked():
        raise ValueError(f"{config}: poft_plugin is not loaded, and nothing of it runs. Add the lines\n{LINES}")


def _loaded_unasked() -> bool:
    """Whether the host finds us by our entry point."""
    host = tuple(int(part) for part in version("axolotl").split(".")[:2])
    ours = [point for point in entry_points(group="axolotl.plugins") if point.value.startswith("poft_plugin")]
    return bool(ours) and host >= LOADS_ENTRY_POINTS
