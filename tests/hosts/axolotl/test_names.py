"""No registered method takes over a name of the host's."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import RLType

from poft_plugin import plugins
from poft_plugin.hookspecs import hookimpl
from poft_plugin.hosts.axolotl.names import check_names
from poft_plugin.hosts.axolotl.run import take_over
from poft_plugin.methods import PRO, Method

HOSTS_OWN = [str(kind.value) for kind in RLType]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees another's plugins."""
    monkeypatch.delenv(plugins.OURS_ONLY, raising=False)
    plugins.manager.cache_clear()
    plugins.registry.cache_clear()
    yield
    plugins.manager.cache_clear()
    plugins.registry.cache_clear()


def registered(method: Method) -> plugins.Registry:
    """The registry with a package `toys` that registers this method."""
    toys = SimpleNamespace(register_methods=hookimpl(lambda register: register(method)))
    plugins.manager().register(toys, name="toys")
    return plugins.registry()


def test_what_is_installed_takes_nothing_over() -> None:
    check_names(plugins.registry())
    assert "simpo" in HOSTS_OWN and len(HOSTS_OWN) > 4


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("name", sorted({*HOSTS_OWN} - {"dpo"}))
def test_an_rl_type_of_the_hosts_is_refused(name: str, ranked: bool) -> None:
    """Also where the config asks for something else: whoever writes `rl: simpo` next would get another method."""
    registered(replace(PRO, name=name, ranked=ranked))
    for config in ({"rl": name}, {"rl": "poft"}, {}):
        with pytest.raises(ValueError, match=rf"^toys registers the rl type '{name}', which is Axolotl's own"):
            take_over(DictDefault(config))


@pytest.mark.parametrize("name", sorted({*HOSTS_OWN} - {"dpo"}))
def test_a_method_that_is_there_to_be_wrapped_may_have_its_name(name: str) -> None:
    found = registered(replace(PRO, name=name, alone=False))
    check_names(found)
    assert found.methods[f"deft_{name}"].alone
    assert take_over(DictDefault({"rl": name})) is None  # the host's own


@pytest.mark.parametrize("block", ["trl", "datasets", "reward_model", "lora_r"])
def test_a_block_that_hides_a_key_of_the_hosts_is_refused(block: str) -> None:
    registered(replace(PRO, name="toy", block=block))
    with pytest.raises(
        ValueError, match=rf"^toys registers the rl type 'toy' with the block '{block}', which is a key"
    ):
        take_over(DictDefault({"rl": "poft"}))
