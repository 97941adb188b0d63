"""The table of methods: every ranked method's form inside DEFT, ours and other packages'."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from poft_plugin import plugins
from poft_plugin.config import Block, DeftConfig
from poft_plugin.data.preparation import Prepared
from poft_plugin.hookspecs import hookimpl
from poft_plugin.methods import METHODS, Method, deft
from poft_plugin.scoring.jobs import Preprocessor

TOY = Method(
    name="toy", paper="none", block="toy", config="poft_plugin.config:RankingConfig", step="toy:step", loss="toy_loss"
)
RANKED_TOY = replace(
    TOY, ranked=True, preprocessors=("toy_rewards", "response_scores", "toy_counts"),
    columns=("bonus",), max_responses=3, keys="toy:Keys", defaults={"strength": 2.0}, unread=("weakness",),
    check="toy:check",
)  # fmt: skip
WRAPPED = tuple(method for base in METHODS if (method := deft(base)) is not None)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees another's plugins."""
    monkeypatch.delenv(plugins.OURS_ONLY, raising=False)
    plugins.manager.cache_clear()
    plugins.registry.cache_clear()
    yield
    plugins.manager.cache_clear()
    plugins.registry.cache_clear()


def registered(method: Method, reads: type[Block] = Block) -> None:
    """Another package that registers this method."""

    def register_methods(register: Callable[[Method], None]) -> None:
        register(method)

    def register_preprocessors(register: Callable[[str, Preprocessor], None]) -> None:
        for name in ("toy_rewards", "toy_counts"):
            register(name, Preprocessor(lambda rows, settings, context: Prepared({}), reads))

    hooks = {hook.__name__: hookimpl(hook) for hook in (register_methods, register_preprocessors)}
    plugins.manager().register(SimpleNamespace(**hooks))


def test_every_ranked_method_has_its_deft_form_and_no_other() -> None:
    """PoFT's rows are conversations: there is no preference to lean on."""
    found = plugins.registry().methods
    ranked = {name for name, method in found.items() if method.ranked and method.base is None}
    assert {"pro", "rrhf", "dpo", "sft"} <= ranked == {method.name for method in METHODS if method.ranked}
    wrapped = {name: method for name, method in found.items() if method.base is not None}
    assert wrapped.keys() == {f"deft_{name}" for name in ranked}
    for name, method in wrapped.items():
        assert method.base is found[name.removeprefix("deft_")]
        assert method.alone
    assert "deft_poft" not in found
    assert not found["dpo"].alone and not found["sft"].alone


@pytest.mark.parametrize("method", WRAPPED, ids=lambda method: method.name)
def test_a_deft_form_reads_its_own_block_and_grades(method: Method) -> None:
    base = method.base
    assert base is not None
    assert method.config == "poft_plugin.config:DeftConfig"
    assert method.preprocessors == (*base.preprocessors, "grades")
    assert method.preprocessors[0] == "response_scores"
    assert (method.loss, method.columns, method.keys) == (base.loss, base.columns, base.keys)
    assert method.max_responses == base.max_responses
    assert plugins.scores_start_policy(method) == plugins.scores_start_policy(base) == (base.name == "dpo")
    assert method.defaults.keys() - {"omega"} == (base.defaults.keys() if base.block == "deft" else set())
    assert all(method.defaults[key] == base.defaults[key] for key in method.defaults.keys() - {"omega"})


def test_defaults_are_the_papers() -> None:
    """Appendix A.1 names an omega for two of them; RRHF's SFT weight is Eq. 10's."""
    found = {method.name: dict(method.defaults) for method in WRAPPED}
    papers = {
        "deft_pro": {"sft_weight": 0.05, "omega": 2.5e-5},
        "deft_dpo": {"sft_weight": 0.05, "omega": 2.5e-6},
        "deft_rrhf": {"sft_weight": 1.0, "omega": None},
        "deft_sft": {"sft_weight": 1.0, "omega": None},
    }
    assert {name: found[name] for name in papers} == papers
    unread = {method.name: method.unread for method in WRAPPED}
    assert {name: unread[name] for name in papers} == {
        "deft_pro": (), **dict.fromkeys(("deft_rrhf", "deft_dpo", "deft_sft"), ("pro_temperature",))
    }  # fmt: skip


def test_a_ranked_method_of_another_package_gets_its_deft_form() -> None:
    registered(RANKED_TOY)
    found = plugins.registry().methods["deft_toy"]
    assert found == replace(
        RANKED_TOY,
        name="deft_toy",
        paper="DEFT (anonymous ACL submission) around none",
        block="deft",
        config="poft_plugin.config:DeftConfig",
        step="poft_plugin.trainers.deft:deft_step",
        preprocessors=("response_scores", "toy_rewards", "toy_counts", "grades"),
        defaults={"omega": None},  # its own are those of its own block
        unread=("sft_weight", "pro_temperature"),
        check="poft_plugin.preprocessors.response_scores:check_deft",
        base=RANKED_TOY,
    )
    assert plugins.registry().methods["toy"] is RANKED_TOY


def test_responses_are_scored_for_a_method_that_asks_for_no_scores() -> None:
    registered(replace(RANKED_TOY, preprocessors=("toy_rewards",)))
    assert plugins.registry().methods["deft_toy"].preprocessors == ("response_scores", "toy_rewards", "grades")


def test_a_method_of_conversations_of_another_package_gets_none() -> None:
    registered(TOY)
    assert plugins.registry().methods.keys() == {*(method.name for method in (*METHODS, *WRAPPED)), "toy"}


def test_a_wrapped_method_is_not_wrapped_again() -> None:
    assert all(deft(method) is None for method in WRAPPED)


class ToyBlock(Block):
    """The block `toy:`."""

    strength: float | None = None
    batch_tokens: int | None = None
    sft_weight: float | None = None


def test_a_preprocessor_gets_the_block_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper's own come first; a method's own block is read where the wrapper's is none of its kind."""
    from poft_plugin.hosts.axolotl.run import MethodRun

    monkeypatch.setitem(sys.modules, "toy", SimpleNamespace(Config=ToyBlock))
    registered(replace(RANKED_TOY, name="deep", preprocessors=("toy_rewards",), config="toy:Config"), reads=ToyBlock)
    inner, outer = ToyBlock(), DeftConfig(omega=0.0)
    run = MethodRun(plugins.registry().methods["deft_deep"], outer, (), None, inner)
    (scores, first), (rewards, second) = run.preprocessors("all")
    assert (scores, first) == (plugins.registry().preprocessors["response_scores"], outer)
    assert (rewards, second) == (plugins.registry().preprocessors["toy_rewards"], inner)
    assert [block for _, block in run.preprocessors("training")] == [outer]


@pytest.fixture
def take_over() -> Callable[..., Any]:
    """What the host's plugin does first with a raw config."""
    from poft_plugin.hosts.axolotl import run

    return lambda **config: run.take_over({"datasets": [{"path": "x", "type": "poft_plugin.ranked"}], **config})


@pytest.fixture
def toy_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranked toy, its block in a module that can be imported."""
    monkeypatch.setitem(sys.modules, "toy", SimpleNamespace(Config=ToyBlock))
    registered(replace(RANKED_TOY, keys=None, unread=(), config="toy:Config", preprocessors=("toy_rewards",)))


@pytest.mark.usefixtures("toy_in_reach")
@pytest.mark.parametrize(("key", "value"), [("sft_weight", 0.5), ("sft_weight", 0), ("pro_temperature", "reward")])
def test_deft_around_another_block_refuses_what_is_not_read(
    take_over: Callable[..., Any], key: str, value: object
) -> None:
    """The method inside has its own block, and its own word for such a weight."""
    with pytest.raises(ValueError, match=rf"^deft\.{key}: {value!r}(\.0)? is not read by `rl: deft_toy`; remove it$"):
        take_over(rl="deft_toy", deft={"omega": 0.1, key: value})


@pytest.mark.usefixtures("toy_in_reach")
def test_a_key_of_both_blocks_is_read_from_one(take_over: Callable[..., Any]) -> None:
    """Scoring is DEFT's; a weight that DEFT leaves to the method inside is that method's own."""
    message = r"^toy\.batch_tokens: 64 is not read by `rl: deft_toy`, which takes it from `deft\.batch_tokens`; move it"
    with pytest.raises(ValueError, match=message):
        take_over(rl="deft_toy", deft={"omega": 0.1}, toy={"batch_tokens": 64})
    run = take_over(rl="deft_toy", deft={"omega": 0.1, "batch_tokens": 32}, toy={"sft_weight": 0.5})
    assert (run.settings.batch_tokens, run.base_settings.batch_tokens, run.base_settings.sft_weight) == (32, 32, 0.5)


@pytest.mark.usefixtures("toy_in_reach")
def test_deft_around_another_block_reads_both(take_over: Callable[..., Any]) -> None:
    run = take_over(rl="deft_toy", deft={"omega": 0.1})
    assert (run.settings.omega, run.settings.sft_weight, run.base_settings.strength) == (0.1, None, 2.0)
    run = take_over(rl="deft_toy", deft={"omega": 0.1}, toy={"strength": 5})
    assert run.base_settings.strength == 5.0


@pytest.mark.parametrize("name", ["deft_rrhf", "deft_dpo", "deft_sft", "rrhf"])
def test_only_pro_reads_its_temperature(take_over: Callable[..., Any], name: str) -> None:
    message = rf"^deft\.pro_temperature: 'reward' is not read by `rl: {name}`; remove it$"
    with pytest.raises(ValueError, match=message):
        take_over(rl=name, deft={"pro_temperature": "reward"})
    assert take_over(rl="deft_pro", deft={"pro_temperature": "reward"}).settings.pro_temperature == "reward"
