"""The step around other steps: `L_m - omega * R_dis`."""

from typing import Any

import pytest
import torch
from batches import LISTS, PAIRS, Group, assert_equal, batch, check_laws, gradient_of, logged, mean

from poft_plugin.config import DeftConfig
from poft_plugin.losses import pro_loss, sft_loss
from poft_plugin.methods import METHODS, Method, deft
from poft_plugin.plugins import load_object, registry
from poft_plugin.trainers.deft import DeftStep, deft_step
from poft_plugin.trainers.pro import ProStep
from poft_plugin.trainers.sft import SftStep
from poft_plugin.trainers.step import Metric, SequenceBatch, Step, StepOutput, StepSetup

OMEGA = 0.25
BASE = ProStep(pro_loss, 0.05)
WRAPPED = [method for base in METHODS if (method := deft(base)) is not None]


def best(group: Group) -> float:
    """The reward of the best response."""
    return group.rewards[0]


def average(group: Group) -> float:
    """The mean reward of all responses."""
    return mean(group.rewards)


FORMS = pytest.mark.parametrize(("over_all", "reward"), [(False, best), (True, average)], ids=["best", "all"])


@FORMS
def test_losses(over_all: bool, reward: Any) -> None:
    """Eq. 18."""
    losses = DeftStep(BASE, OMEGA, over_all=over_all)(batch(LISTS)).losses
    base = BASE(batch(LISTS)).losses.tolist()
    assert_equal(losses, [loss - OMEGA * reward(group) for loss, group in zip(base, LISTS, strict=True)])


def test_by_default_the_best_response_is_rewarded() -> None:
    step = DeftStep(SftStep(sft_loss, 1.0), OMEGA)
    assert_equal(step(batch(LISTS)).losses, [-group.sums[0] - OMEGA * group.rewards[0] for group in LISTS])


@FORMS
def test_metrics(over_all: bool, reward: Any) -> None:
    """The base step's as they are, and the reward beside them, with and without omega."""
    rewards = mean([reward(group) for group in LISTS])
    ours = {"deft/distribution_reward": rewards, "deft/weighted_distribution_reward": OMEGA * rewards}
    step = DeftStep(BASE, OMEGA, over_all=over_all)
    assert logged(step(batch(LISTS)).metrics) == pytest.approx({**logged(BASE(batch(LISTS)).metrics), **ours})
    assert not ours.keys() & BASE(batch(LISTS)).metrics.keys()


@pytest.mark.parametrize("over_all", [False, True])
def test_laws_of_a_step(over_all: bool) -> None:
    check_laws(DeftStep(BASE, OMEGA, over_all=over_all), LISTS)


def test_gradients_of_the_reward_by_hand() -> None:
    """Minus omega, at the best response or shared among all."""
    for over_all in (False, True):
        given = batch(LISTS)
        losses = DeftStep(BASE, OMEGA, over_all=over_all)(given).losses
        shares = [1 / len(g.sums) if over_all else float(n == 0) for g in LISTS for n in range(len(g.sums))]
        gradient = gradient_of(losses, given.distribution_rewards)
        assert gradient == pytest.approx([-OMEGA * share for share in shares])
        assert gradient_of(losses, given.sum_logps) == gradient_of(BASE(given).losses, given.sum_logps)


@pytest.mark.parametrize("rewards", [True, False])
def test_with_omega_0_it_is_the_base_step(rewards: bool) -> None:
    """Its very output, and no reward is asked for: the head then computes none."""
    outputs: list[StepOutput] = []

    def base(given: SequenceBatch) -> StepOutput:
        outputs.append(BASE(given))
        return outputs[-1]

    for over_all in (False, True):
        assert DeftStep(base, 0.0, over_all=over_all)(batch(LISTS, rewards=rewards)) is outputs[-1]
    assert len(outputs) == 2


def test_an_omega_without_rewards_is_an_error() -> None:
    with pytest.raises(AssertionError, match="without a discrepancy distribution"):
        DeftStep(BASE, OMEGA)(batch(LISTS, rewards=False))


def test_rewards_are_taken_in_the_dtype_of_the_losses() -> None:
    given = batch(LISTS)
    assert given.distribution_rewards is not None
    low = SequenceBatch(
        given.sum_logps, given.num_tokens, given.group_ids, given.columns, given.distribution_rewards.bfloat16()
    )
    assert DeftStep(BASE, OMEGA)(low).losses.dtype == torch.float64


@pytest.mark.parametrize("over", ["best", "all"])
def test_made_from_its_block(over: Any) -> None:
    setup = StepSetup(DeftConfig(omega=0.5, reward_over=over), pro_loss, base=BASE)
    assert deft_step(setup) == DeftStep(BASE, 0.5, over_all=over == "all")


def test_a_setup_that_is_not_whole_is_an_error() -> None:
    for setup in (StepSetup(DeftConfig(omega=0.5), pro_loss), StepSetup(DeftConfig(), pro_loss, base=BASE)):
        with pytest.raises(AssertionError):
            deft_step(setup)


def test_the_methods_that_are_wrapped() -> None:
    assert [method.name for method in WRAPPED] == [f"deft_{method.name}" for method in METHODS if method.ranked]
    assert {"deft_pro", "deft_rrhf", "deft_dpo", "deft_sft"} <= {method.name for method in WRAPPED}


def steps(method: Method, **settings: Any) -> tuple[Step, Step]:
    """The step of a wrapped method, and of the method inside, from the table and its blocks."""
    base, loss = method.base, registry().losses[method.loss]
    assert base is not None
    filled = DeftConfig(**settings).model_copy(update={**method.defaults, **settings})
    keys = load_object(method.keys)() if method.keys else None
    own = filled if base.block == method.block else load_object(base.config)().model_copy(update=base.defaults)
    inside = load_object(base.step)(StepSetup(own, loss, keys))
    return load_object(method.step)(StepSetup(filled, loss, keys, inside)), inside


@pytest.mark.parametrize("method", WRAPPED, ids=lambda method: method.name)
def test_every_wrapped_method_is_its_base_minus_the_reward(method: Method) -> None:
    groups = PAIRS if method.max_responses == 2 else LISTS
    outer, inner = steps(method, omega=OMEGA)
    base = inner(batch(groups)).losses.tolist()
    assert_equal(outer(batch(groups)).losses, [loss - OMEGA * best(g) for loss, g in zip(base, groups, strict=True)])
    outer, inner = steps(method, omega=0.0)
    assert_equal(outer(batch(groups, rewards=False)).losses, inner(batch(groups)).losses.tolist())


@pytest.mark.parametrize(("name", "omega"), [("deft_pro", 2.5e-5), ("deft_dpo", 2.5e-6)])
def test_the_papers_omega_and_sft_weight(name: str, omega: float) -> None:
    """Appendix A.1."""
    method = next(method for method in WRAPPED if method.name == name)
    outer, inner = steps(method)
    assert isinstance(outer, DeftStep)
    assert (outer.omega, outer.over_all) == (omega, False)
    assert inner.sft_weight == 0.05  # type: ignore[attr-defined]


def test_any_step_can_be_inside() -> None:
    """Of another package, say: it may log what it likes."""

    def toy(given: SequenceBatch) -> StepOutput:
        return StepOutput(given.mean_logps[:2] * 3, {"toy/number": Metric(torch.ones(2))})

    pair = LISTS[2:3] + LISTS[4:5]
    output = DeftStep(toy, OMEGA)(batch(pair))
    first = [m for group in pair for m in group.means][:2]
    assert_equal(output.losses, [3 * m - OMEGA * group.rewards[0] for m, group in zip(first, pair, strict=True)])
    assert logged(output.metrics)["toy/number"] == 1
