"""One run: the method that `rl:` named, its settings, and what `register` took off the raw config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from poft_plugin.config import (
    DeftConfig,
    PoftConfig,
    RankingConfig,
    RowFilterConfig,
    entries_of,
    parse_block,
    settings_model,
)
from poft_plugin.hosts.axolotl.args import KEPT, NAME, TAKEN_KEYS, TAKEN_OVER
from poft_plugin.hosts.axolotl.chat_templates import name_host_templates
from poft_plugin.hosts.axolotl.checks import check_settings
from poft_plugin.hosts.axolotl.compat import name_plugin
from poft_plugin.hosts.axolotl.entries import take_over_entries
from poft_plugin.hosts.axolotl.names import check_names
from poft_plugin.hosts.axolotl.on_ray import (
    as_written,
    check_same_rows,
    is_worker,
    kept,
    make_absolute,
    score_first,
)
from poft_plugin.hosts.axolotl.spelling import check_keys, check_rl
from poft_plugin.method import Method
from poft_plugin.plugins import later_columns, load_object, registry, scores_start_policy
from poft_plugin.scoring.jobs import Preprocessor, Scope
from poft_plugin.trainers.step import Step, StepSetup

PERCENTAGES = ("keep_top_percent", "top_percent")
"""Keys of blocks that say how many rows stay."""


@dataclass(frozen=True)
class MethodRun:
    """A run of one method.

    Args:
        method: its row in the table.
        settings: its config block, the method's defaults filled in.
        filters: the row filters to apply, in order, by name with their settings.
        keys: the top-level keys that the method reads, or None.
        base_settings: for a wrapping method, the block of the method inside, where that is another block.
    """

    method: Method
    settings: BaseModel
    filters: tuple[tuple[str, dict[str, Any]], ...]
    keys: BaseModel | None = None
    base_settings: BaseModel | None = None

    def preprocessors(self, scope: Scope) -> list[tuple[Preprocessor, BaseModel]]:
        """The method's preprocessors of one scope, each with the block that it reads.

        Where another method wraps this one, blocks may be two: the wrapper's comes first.
        """
        found = [registry().preprocessors[name] for name in self.method.preprocessors]
        blocks = [block for block in (self.settings, self.base_settings) if block is not None]
        return [
            (each, next(block for block in blocks if isinstance(block, each.reads)))
            for each in found
            if each.scope == scope
        ]

    @property
    def scores_start_policy(self) -> bool:
        """Whether the policy's start weights are scored: it is then trained as it was scored, without dropout."""
        return scores_start_policy(self.method)

    @property
    def share_prompts(self) -> bool:
        """Whether a row's prompt lies in a pack once, for all of its responses."""
        return isinstance(self.settings, RankingConfig) and self.settings.share_prompt

    def check(self) -> None:
        """Refuses settings that cannot work, before any data is read: of the method, and of the one that it wraps.

        Raises:
            ValueError: as the methods' own checks.
        """
        for method, settings in ((self.method, self.settings), (self.method.base, self.base_settings)):
            if method is not None and method.check is not None and settings is not None:
                load_object(method.check)(settings)

    def doubts(self) -> list[str]:
        """What can be honoured, and is hardly meant: a percentage below 1."""
        values = [(self.method.block, key, getattr(self.settings, key, 100.0)) for key in PERCENTAGES]
        return [
            f"{block}.{key}: {value:g} keeps {value:g} % of the rows, in percent; {100 * value:g} % of them is "
            f"`{key}: {100 * value:g}`"
            for block, key, value in values
            if value < 1
        ]

    def step(self) -> Step:
        """The method's step object."""
        base = self.method.base
        loss = registry().losses[self.method.loss]
        inner = None
        if base is not None:
            inner = _make_step(base, StepSetup(self.base_settings or self.settings, loss, self.keys, None))
        return _make_step(self.method, StepSetup(self.settings, loss, self.keys, inner))


def take_over(cfg: Any) -> MethodRun | None:
    """Takes a method of ours off a raw config, so that the host builds plain SFT around our data and trainer.

    A worker of Ray's gets the config a second time, as the host has validated it: there what was kept is taken over.

    Args:
        cfg: the raw config, changed in place: `rl` and the method's top-level keys off, entries rewritten, evaluation
            unpacked unless it is asked.

    Returns:
        The run, or None where `rl:` is not ours.

    Raises:
        ValueError: for any setting that is wrong or cannot be honoured, naming key, value and remedy.
    """
    check_names(registry())
    if is_worker(cfg):
        return _take_over_again(cfg)
    rl = cfg.get("rl") or cfg.get(TAKEN_OVER)
    check_rl(rl)
    method = registry().methods.get(str(rl)) if rl else None
    if method is not None and not method.alone:
        method = None  # the host's own, or nothing that can be trained without a wrapper
    written = None
    if method is not None and cfg.get("use_ray"):
        make_absolute(cfg, method)
        written = kept(cfg)
    run = _take_over(cfg, method, rl)
    if run is not None and written is not None:
        score_first(written["config"], run.settings)
        cfg[KEPT] = written
    return run


def _take_over_again(cfg: Any) -> MethodRun | None:
    written = as_written(cfg)
    rl = written.get("rl") or written.get(TAKEN_OVER)
    method = registry().methods[rl]
    run = _take_over(written, method, rl)
    check_same_rows(written, cfg)
    blocks = [method.block, *([method.base.block] if method.base else [])]
    keys = ("datasets", "test_datasets", "row_filters", TAKEN_OVER, TAKEN_KEYS, *blocks)
    cfg.update({key: written[key] for key in keys if written.get(key) is not None})
    return run


def _take_over(cfg: Any, method: Method | None, rl: Any) -> MethodRun | None:
    if method is not None or NAME in (cfg.get("plugins") or []):
        check_keys(cfg, method)  # the host may load us unasked, into a run that is none of our business
    _check_blocks(cfg, method, rl)
    if method is None:
        return None
    saved = cfg.get(TAKEN_KEYS) or {}  # a saved config keeps them there
    if not isinstance(saved, Mapping):
        raise ValueError(f"{TAKEN_KEYS}: {saved!r} is written by poft_plugin itself; remove it")
    cfg.update({**saved, TAKEN_KEYS: None})
    check_settings(cfg, method)
    settings = _settings(cfg, method)
    keys = _take_keys(cfg, method)
    base, base_settings = method.base, None
    if base is not None and base.block != method.block:
        base_settings = _settings(cfg, base)
        base_settings = _with_shared_keys(method, settings, base_settings)
    filters = _filters(cfg, settings)
    _check_filter_columns(method, filters)
    name_host_templates()
    cfg.pop("rl", None)
    cfg[TAKEN_OVER] = method.name
    name_plugin(cfg)
    if cfg.get("sample_packing") and cfg.get("eval_sample_packing") is None:
        cfg["eval_sample_packing"] = False
    drops = isinstance(settings, PoftConfig) and settings.on_bad_row == "drop"
    take_over_entries(cfg, method, _group_column(filters, settings), drop_bad_rows=drops)
    return MethodRun(method, settings, filters, keys, base_settings)


def nothing_asked(cfg: Mapping[str, Any]) -> str:
    """Why no method of ours runs, and what would ask for one."""
    names = sorted(name for name, method in registry().methods.items() if method.alone)
    return f"`rl: {cfg.get('rl') or 'null'}` is none of its rl types ({', '.join(names)})"


def _make_step(method: Method, setup: StepSetup) -> Step:
    factory: Callable[[StepSetup], Step] = load_object(method.step)
    return factory(setup)


def _settings(cfg: Mapping[str, Any], method: Method) -> BaseModel:
    """The method's block with its own defaults where a key is null; a block without required keys may be left out."""
    model = load_object(method.config)
    raw = cfg.get(method.block)
    if raw is None and any(field.is_required() for field in model.model_fields.values()):
        raise ValueError(f"{method.block}: missing; `rl: {method.name}` reads its settings from this block")
    settings: BaseModel = parse_block(model, {} if raw is None else raw, method.block)
    for key in method.unread:
        if getattr(settings, key) is not None:
            raise ValueError(
                f"{method.block}.{key}: {getattr(settings, key)!r} is not read by `rl: {method.name}`; remove it"
            )
    filled = {key: value for key, value in method.defaults.items() if getattr(settings, key) is None}
    return settings.model_copy(update=filled)


def _take_keys(cfg: Any, method: Method) -> BaseModel | None:
    """Takes the method's top-level keys off the config: the host refuses some of them once `rl` is off."""
    if method.keys is None:
        return None
    model = load_object(method.keys)
    raw = {key: cfg[key] for key in model.model_fields if cfg.get(key) is not None}
    keys: BaseModel = parse_block(model, raw, "")
    for key in raw:
        cfg.pop(key)
    cfg[TAKEN_KEYS] = raw
    return keys


def _check_blocks(cfg: Mapping[str, Any], method: Method | None, rl: Any) -> None:
    read = set() if method is None else {method.block, *([method.base.block] if method.base else [])}
    for other in registry().methods.values():
        if cfg.get(other.block) is None or other.block in read:
            continue
        names = [m.name for m in registry().methods.values() if m.block == other.block and m.alone]
        raise ValueError(
            f"{other.block}: this block is there, but `rl: {rl}` does not read it. Set `rl:` to "
            f"{' or '.join(names)}, or remove the block"
        )
    if method is None and cfg.get("row_filters"):
        raise ValueError(f"row_filters: there, but `rl: {rl}` does not read it; remove it")


def _filters(cfg: Mapping[str, Any], settings: BaseModel) -> tuple[tuple[str, dict[str, Any]], ...]:
    raw = entries_of(cfg.get("row_filters"), "row_filters")
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
    if isinstance(settings, DeftConfig) and settings.train_on != "all":
        filters.append(("keep_levels", {"levels": settings.train_on}))
    return tuple(filters)


def _with_shared_keys(method: Method, settings: BaseModel, base_settings: BaseModel) -> BaseModel:
    """The inner block, what both have taken from the outer one; refused where it is set in the inner one."""
    assert method.base is not None
    shared = type(settings).model_fields.keys() & type(base_settings).model_fields.keys() - set(method.unread)
    for key in sorted(shared & base_settings.model_fields_set):
        raise ValueError(
            f"{method.base.block}.{key}: {getattr(base_settings, key)!r} is not read by `rl: {method.name}`, which "
            f"takes it from `{method.block}.{key}`; move it there"
        )
    return base_settings.model_copy(update={key: getattr(settings, key) for key in shared})


def _check_filter_columns(method: Method, filters: tuple[tuple[str, dict[str, Any]], ...]) -> None:
    """Refuses a filter whose settings name a column that is made of what filters left."""
    later = later_columns(method)
    for name, settings in filters:
        for value in settings.values():
            if isinstance(value, str) and value in later:
                raise ValueError(later_column(name, value, later[value]))


def later_column(name: str, column: str, maker: str) -> str:
    """What is wrong with a filter that reads a column of the last stage."""
    return (
        f"row_filters: `{name}` reads the column {column!r}, which `{maker}` makes of the rows that filters have left: "
        "it is not there yet. Filter by another column"
    )


def _group_column(filters: tuple[tuple[str, dict[str, Any]], ...], settings: BaseModel) -> str | None:
    asked = [settings.grade_within] if isinstance(settings, DeftConfig) else []
    columns = {*asked, *(f.get("within") for _, f in filters)} - {None, "none", "dataset"}
    if len(columns) > 1:
        raise ValueError(f"rows can be ranked within one column only, not {sorted(map(str, columns))}")
    return str(columns.pop()) if columns else None
