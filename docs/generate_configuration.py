"""Writes `docs/configuration.md`, and the tables of keys in the README, from the pydantic models.

    python docs/generate_configuration.py

A test fails where either is stale.
"""

import inspect
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from poft_plugin.config import RowFilterConfig, ScoringBlock
from poft_plugin.hosts.axolotl.args import PoftPluginArgs
from poft_plugin.hosts.axolotl.ranked_fields import RankedFields
from poft_plugin.methods import Method
from poft_plugin.plugins import load_object, registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
README = ROOT / "README.md"

METHODS = [m for m in registry().methods.values() if m.alone and m.step.startswith("poft_plugin.")]
"""The rl types that this package brings."""


def _widest(block: str) -> type[BaseModel]:
    """The model with the most keys: the block `deft:` has a smaller one for `pro` and `rrhf`."""
    models: list[type[BaseModel]] = [load_object(method.config) for method in METHODS if method.block == block]
    return max(models, key=lambda model: len(model.model_fields))


BLOCKS: dict[str, type[BaseModel]] = {block: _widest(block) for block in dict.fromkeys(m.block for m in METHODS)}


def _inside() -> dict[str, type[BaseModel]]:
    """The blocks inside blocks, each described once, by the first key that takes it."""
    found: dict[type[BaseModel], str] = {}
    for block, outer in BLOCKS.items():
        for name, field in outer.model_fields.items():
            listed = get_origin(field.annotation) in (tuple, list, Sequence)
            for model in _models(field.annotation):
                found.setdefault(model, f"{block}.{name}{'[]' if listed else ''}")
    return {path: model for model, path in found.items()}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The blocks in an annotation such as `Block | None` or `tuple[Block, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _own_keys() -> dict[str, type[BaseModel]]:
    """The models of the host's keys that methods read, each called after its first key."""
    models: list[type[BaseModel]] = [load_object(method.keys) for method in METHODS if method.keys]
    return {f"{next(iter(model.model_fields))} and others": model for model in models}


def _who_reads(keys: type[BaseModel]) -> str:
    """The methods that read a model of the host's keys, in short."""
    return " and ".join(
        f"`rl: {method.name}`" for method in METHODS if method.keys and load_object(method.keys) is keys
    )


INSIDE, OWN_KEYS = _inside(), _own_keys()
NESTED: dict[str, type[BaseModel]] = {
    **INSIDE,
    "row_filters[]": RowFilterConfig,
    "datasets[]": RankedFields,
    **OWN_KEYS,
}
TITLES = {
    **{path: f"An entry of `{path[:-2]}:`" if path.endswith("[]") else f"`{path}:`" for path in INSIDE},
    "row_filters[]": "An entry of `row_filters:`",
    "datasets[]": "An entry of `datasets:` with preference rows",
    **{name: f"Top-level keys of {_who_reads(model)}" for name, model in OWN_KEYS.items()},
}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

INTRODUCTION = """# Configuration

Made from the pydantic models by `python docs/generate_configuration.py`; change a description there, not here.

Inside a block, a key that is not listed is an error that names the key and what is allowed. Only an entry of
`row_filters:` takes further keys: they are the filter's own settings.
"""


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """A block's keys in the order of the tables: those of scoring, which many blocks share, come last."""
    return dict(sorted(model.model_fields.items(), key=lambda item: item[0] in ScoringBlock.model_fields))


def top_level() -> dict[str, FieldInfo]:
    """Our keys at the top level of a config that are not the block of a method."""
    blocks = {method.block for method in registry().methods.values()}
    return {name: field for name, field in PoftPluginArgs.model_fields.items() if name not in blocks}


def table(fields: dict[str, FieldInfo], *, with_types: bool, block: str = "") -> str:
    """A Markdown table of fields: key, (type,) default, (which methods read it, where not all do,) meaning."""
    readers = {name: _readers(block, name) for name in fields}
    named = len(set(readers.values())) > 1
    heading = ["Key", *(["Type"] if with_types else []), "Default", *(["Read by"] if named else []), "Meaning"]
    lines = [heading, ["---"] * len(heading)]
    for name, field in fields.items():
        kind, read_by = [type_of(field)] if with_types else [], [readers[name]] if named else []
        lines.append([f"`{name}`", *kind, default_of(field), *read_by, _text(field.description or "")])
    return _rows(lines)


def defaults() -> str:
    """A Markdown table of the defaults that differ from method to method."""
    varying = [method for method in METHODS if method.defaults]
    names = list(dict.fromkeys(name for method in varying for name in method.defaults))
    lines = [["Method", *(f"`{name}`" for name in names)], ["---"] * (1 + len(names))]
    for method in varying:
        lines.append([f"`{method.name}`", *(_default_in(method, name) for name in names)])
    return _rows(lines)


def type_of(field: FieldInfo) -> str:
    """The type in words, with its bounds."""
    bounds = [f"{sign} {value}" for name, sign in BOUNDS.items() for value in _bound(field, name)]
    return ", ".join([_words(field.annotation), *bounds])


def default_of(field: FieldInfo) -> str:
    """The default as YAML, or `required`."""
    if field.is_required():
        return "required"
    return _yaml(field.get_default(call_default_factory=True))


def page() -> str:
    """All of `docs/configuration.md`."""
    parts = [INTRODUCTION, "## Top level", table(top_level(), with_types=True)]
    for block, model in (BLOCKS | NESTED).items():
        title = f"## {TITLES.get(block, f'`{block}:`')}"
        parts += [title, _summary(model), table(keys_of(model), with_types=True, block=block)]
        if block == "deft":
            parts += ["### Defaults by method", "Of the keys whose default above is `null`.", defaults()]
    parts += ["## Row filters", "Registered by this package; other packages may add more.", _filters()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def readme(text: str) -> str:
    """The README with its tables of keys brought up to date.

    Raises:
        ValueError: if a table's place in it is missing.
    """
    fields = {"top level": top_level(), **{name: keys_of(model) for name, model in (BLOCKS | NESTED).items()}}
    tables = {name: table(found, with_types=False, block=name) for name, found in fields.items()}
    for name, made in {**tables, "defaults by method": defaults()}.items():
        begin, end = f"<!-- keys: {name} -->", "<!-- end of keys -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), flags=re.DOTALL)
        replacement = f"{begin}\n\n{made}\n\n{end}"
        text, count = pattern.subn(lambda _, new=replacement: new, text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{README}: {begin!r} ... {end!r} is there {count} times, not once")
    return text


def main() -> None:
    """Writes both files."""
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")


def _filters() -> str:
    """A Markdown table of the registered row filters and their settings."""
    lines = [["Filter", "Settings", "Meaning"], ["---"] * 3]
    ours = {name: f for name, f in registry().row_filters.items() if f.__module__.startswith("poft_plugin.")}
    for name, function in sorted(ours.items()):
        settings = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        shown = [f"`{p.name}`{'' if p.default is p.empty else f' ({_yaml(p.default)})'}" for p in settings]
        lines.append([f"`{name}`", ", ".join(shown), _summary(function)])
    return _rows(lines)


def _rows(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _readers(block: str, key: str) -> str:
    """The methods of a block that read a key, in short."""
    sharing = [method for method in METHODS if method.block == block]
    reading = [m for m in sharing if key in load_object(m.config).model_fields and key not in m.unread]
    if reading == sharing:
        return "all"
    if reading == [method for method in sharing if method.base is not None]:
        return "`deft_...`"
    return ", ".join(f"`{method.name}`" for method in reading)


def _default_in(method: Method, key: str) -> str:
    """A method's default of a key: its own, else the block's; `-` where it does not read the key."""
    fields = load_object(method.config).model_fields
    if key not in fields or key in method.unread:
        return "-"
    if key not in method.defaults:
        return default_of(fields[key])
    value = method.defaults[key]
    return "required" if value is None else _yaml(value)


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return _joined(_yaml(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return _joined(word for argument in arguments for word in re.split(", | or ", _words(argument)))
    if origin in (tuple, list, Sequence):
        words = _words(arguments[0])
        return f"list of {words}{'s' if words in ('block', 'number') else ''}"
    if origin in (dict, Mapping):
        return "names with values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    return {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}[annotation]


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, float):
        return f"`{str(value).replace('e-0', 'e-')}`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _bound(field: FieldInfo, name: str) -> list[float]:
    return [getattr(item, name) for item in field.metadata if getattr(item, name, None) is not None]


def _joined(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _summary(documented: Any) -> str:
    """The first line of a docstring."""
    return _text((documented.__doc__ or "").split("\n")[0])


def _text(text: str) -> str:
    """A description inside a table cell."""
    return text.replace("|", "\\|").replace("<column>", "`<column>`")


if __name__ == "__main__":
    main()
