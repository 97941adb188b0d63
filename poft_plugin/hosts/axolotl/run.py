"""One run: the method that `rl:` named, its settings, and what `register` took off the raw config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from poft_plugin.config import RowFilterConfig, parse_block, settings_model
from poft_plugin.hosts.axolotl.args import TAKEN_OVER
from poft_plugin.hosts.axolotl.checks import check_settings
from poft_plugin.hosts.axolotl.entries import take_over_entries
from poft_plugin.methods import Method
from poft_plugin.plugins import load_object, registry
from poft_plugin.trainers.step import Step


@dataclass(frozen=True)
class MethodRun:
    """A run of one method.

    Args:
        method: its row in the table.
        settings: its config block.
        filters: the row filters to apply, in order, by name with their settings.
    """

    method: Method
    settings: BaseModel
    filters: tuple[tuple[str, dict[str, Any]], ...]

    def step(self) -> Step:
        """The method's step object."""
        factory: Callable[..., Step] = load_object(self.method.step)
        return factory(self.settings, registry().losses[self.method.loss])


def take_over(cfg: Any) -> MethodRun | None:
    """Takes a method of ours off a raw config, so that the host builds plain SFT around our data and trainer.

    Args:
        cfg: the raw config, changed in place: `rl` off, entries rewritten, evaluation unpacked unless it is asked.

    Returns:
        The run, or None where `rl:` is not ours.

    Raises:
        ValueError: for any setting that is wrong or cannot be honoured, naming key, value and remedy.
    """
    methods = registry().methods
    rl = cfg.get("rl") or cfg.get(TAKEN_OVER)
    method = methods.get(str(rl)) if rl else None
    _check_blocks(cfg, method, rl)
    if method is None:
        return None
    check_settings(cfg, method.name)
    settings = parse_block(load_object(method.config), cfg.get(method.block), method.block)
    filters = _filters(cfg, settings)
    cfg.pop("rl", None)
    cfg[TAKEN_OVER] = method.name
    if cfg.get("sample_packing") and cfg.get("eval_sample_packing") is None:
        cfg["eval_sample_packing"] = False
    take_over_entries(cfg, method.name, _group_column(filters))
    return MethodRun(method, settings, filters)


def _check_blocks(cfg: Mapping[str, Any], method: Method | None, rl: Any) -> None:
    for other in registry().methods.values():
        if cfg.get(other.block) is None or (method is not None and other.block == method.block):
            continue
        raise ValueError(
            f"{other.block}: this block is there, but `rl: {rl}` does not read it. Set `rl: {other.name}` or remove it"
        )
    if method is not None and cfg.get(method.block) is None:
        raise ValueError(f"{method.block}: missing; `rl: {method.name}` reads its settings from this block")
    if method is None and cfg.get("row_filters"):
        raise ValueError(f"row_filters: there, but `rl: {rl}` does not read it; remove it")


def _filters(cfg: Mapping[str, Any], settings: BaseModel) -> tuple[tuple[str, dict[str, Any]], ...]:
    raw = cfg.get("row_filters") or []
    entries = [parse_block(RowFilterConfig, entry, f"row_filters[{i}]") for i, entry in enumerate(raw)]
    for number, entry in enumerate(entries):
        if entry.name not in registry().row_filters:
            known = ", ".join(sorted(registry().row_filters))
            raise ValueError(f"row_filters[{number}].name: {entry.name!r} is not registered; known: {known}")
        model = settings_model(registry().row_filters[entry.name])
        parse_block(model, entry.settings(), f"row_filters[{number}]")
    filters = [(entry.name, entry.settings()) for entry in entries]
    percent = getattr(settings, "keep_top_percent", 100.0)
    if percent < 100:
        within = settings.keep_within  # type: ignore[attr-defined]
        filters.append(("keep_top_percent", {"percent": percent, "within": within}))
    return tuple(filters)


def _group_column(filters: tuple[tuple[str, dict[str, Any]], ...]) -> str | None:
    columns = {f.get("within") for _, f in filters} - {None, "none", "dataset"}
    if len(columns) > 1:
        raise ValueError(f"row_filters: rows can be ranked within one column only, not {sorted(map(str, columns))}")
    return str(columns.pop()) if columns else None
