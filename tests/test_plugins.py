"""The registry: what the project ships, what others may add, and what is refused."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from poft_plugin import hookspecs, methods, plugins
from poft_plugin.config import DeftConfig
from poft_plugin.hookspecs import hookimpl
from poft_plugin.methods import METHODS, Method, deft
from poft_plugin.plugins import OURS_ONLY, load_object
from poft_plugin.scoring.jobs import Preprocessor

TOY = Method(name="toy", paper="none", block="toy", config="toy:Config", step="toy:step", loss="toy_loss")
SHIPPED = (*METHODS, *(method for base in METHODS if (method := deft(base)) is not None))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees another's plugins."""
    monkeypatch.delenv(OURS_ONLY, raising=False)
    plugins.manager.cache_clear()
    plugins.registry.cache_clear()
    yield
    plugins.manager.cache_clear()
    plugins.registry.cache_clear()


class ToyPlugin:
    """Another package."""

    @hookimpl
    def register_methods(self, register: Any) -> None:
        """A method."""
        register(TOY)

    @hookimpl
    def register_losses(self, register: Any) -> None:
        """A loss."""
        register("toy_loss", "the loss")

    @hookimpl
    def register_preprocessors(self, register: Any) -> None:
        """A preprocessor."""
        register("toy_rewards", "the preprocessor")

    @hookimpl
    def register_row_filters(self, register: Any) -> None:
        """A filter."""
        register("toy_filter", "the filter")


def installed(folder: Path, source: str) -> None:
    """A distribution on disk with one plugin module, as `pip install` leaves it."""
    (folder / "toy_package.py").write_text(source)
    info = folder / "toy_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[poft_plugin]\ntoy = toy_package\n")


def test_two_packages_may_call_their_entry_point_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pluggy itself would leave the second one out without a word."""
    for number in (1, 2):
        code = "from poft_plugin.hookspecs import hookimpl\n@hookimpl\ndef register_losses(register):\n"
        (tmp_path / f"alike_{number}.py").write_text(f"{code}    register('alike_{number}', print)\n")
        info = tmp_path / f"alike_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: alike-{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[poft_plugin]\nmethods = alike_{number}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert {"alike_1", "alike_2", "poft"} <= plugins.registry().losses.keys()


@pytest.fixture
def toy_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that registers a loss."""
    lines = ["from poft_plugin.hookspecs import hookimpl", "", "@hookimpl", "def register_losses(register):"]
    installed(tmp_path, "\n".join([*lines, "    register('toy', 'the loss')", ""]))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("toy_package", None)


def test_what_the_project_ships_comes_in_by_its_entry_point() -> None:
    found = plugins.registry()
    assert plugins.manager().is_registered(methods)
    assert {"poft", "pro", "rrhf", "dpo", "sft"} <= {method.name for method in METHODS}
    assert all(found.methods[method.name] is method for method in METHODS)
    assert {method.loss for method in METHODS} <= found.losses.keys()
    assert {"reference_rewards", "response_scores", "reference_sum_logps", "grades"} <= found.preprocessors.keys()
    assert {"keep_top_percent", "keep_levels"} <= found.row_filters.keys()


@pytest.mark.parametrize("method", SHIPPED, ids=lambda method: method.name)
def test_every_method_names_what_exists(method: Method) -> None:
    found = plugins.registry()
    assert callable(found.losses[method.loss])
    assert all(callable(found.preprocessors[n]) for n in method.preprocessors)
    for path in filter(None, (method.config, method.keys)):
        assert load_object(path).model_config["extra"] == "forbid"
    assert all(callable(load_object(path)) for path in filter(None, (method.step, method.check)))
    assert {*method.defaults, *method.unread} <= load_object(method.config).model_fields.keys()


def test_another_package_adds_to_each_table() -> None:
    plugins.manager().register(ToyPlugin())
    found = plugins.registry()
    assert found.methods["toy"] is TOY
    assert found.losses["toy_loss"] == "the loss"
    assert found.preprocessors["toy_rewards"] == "the preprocessor"
    assert found.row_filters["toy_filter"] == "the filter"
    assert "poft" in found.methods


@pytest.mark.parametrize(
    ("hook", "item", "kind"),
    [
        ("register_methods", [METHODS[0]], "rl type 'poft'"),
        ("register_losses", ["poft", print], "loss 'poft'"),
        ("register_preprocessors", ["reference_rewards", print], "preprocessor 'reference_rewards'"),
        ("register_row_filters", ["keep_top_percent", print], "row filter 'keep_top_percent'"),
    ],
)
def test_a_name_that_is_taken_is_refused(hook: str, item: list[Any], kind: str) -> None:
    """Whichever comes first would win in silence."""

    def implementation(register: Any) -> None:
        register(*item)

    plugins.manager().register(SimpleNamespace(**{hook: hookimpl(implementation)}))
    with pytest.raises(ValueError, match=f"two packages register the {kind}: .*poft_plugin.*; uninstall one of them"):
        plugins.registry()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (None, r"its preprocessor 'toy_columns' is not registered; known: .*grades"),
        (print, r"its preprocessor 'toy_columns' \(.*\) does not declare what it reads: .*@preprocessor\(reads="),
        (
            Preprocessor(print, DeftConfig),
            r"its preprocessor 'toy_columns' \(.*\) reads a DeftConfig; .* `poft:` \(PoftConfig\)$",
        ),
    ],
)
def test_a_preprocessor_has_to_fit_its_method(item: Any, message: str) -> None:
    registers(replace(METHODS[0], name="toy", preprocessors=("toy_columns",)))
    if item is not None:
        registers("toy_columns", item, hook="register_preprocessors", apart=True)
    with pytest.raises(ValueError, match=r"^rl type 'toy' \(.*\): " + message):
        plugins.registry()


def registers(*items: Any, hook: str = "register_methods", apart: bool = False) -> None:
    """Another package that registers these by one hook; or, `apart`, one item by its name."""

    def implementation(register: Callable[..., None]) -> None:
        for item in [items] if apart else [(item,) for item in items]:
            register(*item)

    plugins.manager().register(SimpleNamespace(**{hook: hookimpl(implementation)}))


@pytest.mark.parametrize("ranked", [True, False])
def test_a_name_that_a_wrapped_method_takes_is_refused(ranked: bool) -> None:
    taken = replace(TOY, name="deft_dpo", ranked=ranked)
    registers(taken)
    with pytest.raises(ValueError, match="two packages register the rl type 'deft_dpo': .* and poft_plugin; uninstall"):
        plugins.registry()


def test_another_package_may_wrap_methods_too() -> None:
    """Every method but those that are wrapped already; what it turns down is left."""
    seen: list[str] = []

    def wrapper(method: Method) -> Method | None:
        seen.append(method.name)
        return replace(method, name=f"twice_{method.name}", base=method) if method.name == "poft" else None

    registers(wrapper, hook="register_wrappers")
    found = plugins.registry().methods
    assert seen == [method.name for method in METHODS]
    assert found.keys() == {*(method.name for method in SHIPPED), "twice_poft"}
    plugins.registry.cache_clear()
    registers(wrapper, hook="register_wrappers")
    with pytest.raises(ValueError, match="two packages register the rl type 'twice_poft'"):
        plugins.registry()


def test_each_rl_type_says_who_registered_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that `pip uninstall` takes; a wrapped form is its wrapper's."""
    imports = ["from dataclasses import replace", "from poft_plugin.hookspecs import hookimpl"]
    hook = ["@hookimpl", "def register_methods(register):", "    register(replace(PRO, name='toy'))"]
    installed(tmp_path, "\n".join([*imports, "from poft_plugin.methods import PRO", *hook, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    packages = plugins.registry().packages
    assert packages.keys() == plugins.registry().methods.keys()
    assert (packages["toy"], packages["deft_toy"], packages["pro"]) == ("toy-package", "poft_plugin", "poft_plugin")
    plugins.registry.cache_clear()
    registers(replace(TOY, name="toy"))
    with pytest.raises(ValueError, match="two packages register the rl type 'toy': .*toy-package.*; uninstall one"):
        plugins.registry()
    sys.modules.pop("toy_package", None)


def test_an_installed_package_is_found(toy_package: None) -> None:
    assert plugins.registry().losses["toy"] == "the loss"


@pytest.mark.usefixtures("toy_package")
def test_with_ours_only_others_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OURS_ONLY, "1")
    found = plugins.registry()
    assert found.losses.keys() == {method.loss for method in METHODS}
    assert found.methods.keys() == {method.name for method in SHIPPED}
    assert "toy_package" not in sys.modules


def test_a_package_that_cannot_be_imported_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its `rl:` type would be unknown without a reason."""
    installed(tmp_path, "import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        plugins.registry()


def test_a_hook_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from poft_plugin.hookspecs import hookimpl\n\n@hookimpl\ndef register_loses(register):\n    pass\n"
    installed(tmp_path, source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pluggy.PluginValidationError, match="unknown hook 'register_loses'"):
        plugins.registry()
    sys.modules.pop("toy_package", None)


def test_a_hook_with_other_arguments_is_refused() -> None:
    def implementation(table: Any) -> None:
        """Takes what no hook gives."""

    plugin = SimpleNamespace(register_losses=hookimpl(implementation))
    with pytest.raises(pluggy.PluginValidationError, match=r"register_losses(?s:.)*\{'table'\}.*can not be found"):
        plugins.manager().register(plugin)


def test_the_tables_are_made_once() -> None:
    assert plugins.registry() is plugins.registry()
    assert plugins.manager() is plugins.manager()
    assert plugins.manager().project_name == hookspecs.GROUP == "poft_plugin"


def test_objects_are_loaded_by_path() -> None:
    assert load_object("poft_plugin.methods:METHODS") is METHODS
    with pytest.raises(AttributeError, match="NOWHERE"):
        load_object("poft_plugin.methods:NOWHERE")
    with pytest.raises(ImportError, match="nowhere"):
        load_object("poft_plugin.nowhere:METHODS")
