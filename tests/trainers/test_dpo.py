"""The step of DPO: losses of pairs from sums of log-probabilities, and what the log shows."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from batches import PAIRS, assert_equal, batch, check_laws, gradient_of, logged, mean, ranking
from torch import Tensor

from poft_plugin.config import DpoKeys, RankingConfig
from poft_plugin.losses import dpo_loss
from poft_plugin.trainers.dpo import DpoStep, dpo_step
from poft_plugin.trainers.step import StepSetup

BETA = 0.3
STEP = DpoStep(partial(dpo_loss, beta=BETA), BETA, 0.05)


def made(sft_weight: float = 0.0, **keys: Any) -> DpoStep:
    """A step out of its config."""
    return dpo_step(StepSetup(RankingConfig(sft_weight=sft_weight), dpo_loss, DpoKeys(**keys)))


def oracle(kind: str, beta: float, smoothing: float = 0.0) -> list[float]:
    """The loss of each pair."""
    return [oracles.dpo_loss(kind, g.sums, g.reference, beta, smoothing, g.tokens, g.ranks) for g in PAIRS]


@pytest.mark.parametrize("sft_weight", [0.0, 0.05, 1.0])
def test_losses_and_the_sft_weight(sft_weight: float) -> None:
    """Eq. 5 and 6, and Eq. 9 on the chosen response's sum."""
    expected = [loss - sft_weight * group.sums[0] for loss, group in zip(oracle("sigmoid", BETA), PAIRS, strict=True)]
    assert_equal(made(sft_weight, rl_beta=BETA)(batch(PAIRS)).losses, expected)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_each_loss_type(kind: Any, beta: float) -> None:
    """`ipo` takes log-ratios per token, so that it is given their counts."""
    assert_equal(made(rl_beta=beta, dpo_loss_type=(kind,))(batch(PAIRS)).losses, oracle(kind, beta))


def test_several_loss_types_with_weights_and_smoothing() -> None:
    kinds: Sequence[Any] = ("robust", "ipo")
    step = made(rl_beta=BETA, dpo_loss_type=kinds, dpo_loss_weights=(0.5, 2.0), dpo_label_smoothing=0.1)
    robust, ipo = oracle("robust", BETA, 0.1), oracle("ipo", BETA)
    assert_equal(step(batch(PAIRS)).losses, [0.5 * r + 2.0 * i for r, i in zip(robust, ipo, strict=True)])


def test_the_hosts_default_beta() -> None:
    assert_equal(made()(batch(PAIRS)).losses, oracle("sigmoid", 0.1))
    assert made().beta == 0.1


def test_metrics() -> None:
    """Rewards are beta times the log-ratio of sums; accuracies and margins are theirs."""
    rewards = [[BETA * (p - r) for p, r in zip(g.sums, g.reference, strict=True)] for g in PAIRS]
    expected = {
        "dpo/loss": mean(oracle("sigmoid", BETA)),
        "sft/loss": mean([-group.sums[0] for group in PAIRS]),
        "rewards/chosen": mean([chosen for chosen, _ in rewards]),
        "rewards/rejected": mean([rejected for _, rejected in rewards]),
        **ranking(PAIRS, rewards),
    }
    assert logged(STEP(batch(PAIRS)).metrics) == pytest.approx(expected)
    assert expected["rewards/margins"] == pytest.approx(expected["rewards/chosen"] - expected["rewards/rejected"])
    assert expected["rewards/accuracies"] == 1 / 2


def test_laws_of_a_step() -> None:
    check_laws(STEP, PAIRS)


def test_gradients_by_hand() -> None:
    """Of `-log sigmoid(d)`: `sigmoid(-d) = 1 - exp(-loss)`, against the chosen response and for the rejected one.

    Nothing of it in a tie, whose first response has its SFT term alone.
    """
    given = batch(PAIRS)
    gradient = gradient_of(STEP(given).losses, given.sum_logps)
    expected = []
    for group, loss in zip(PAIRS, oracle("sigmoid", BETA), strict=True):
        tied = group.ranks == (0, 0)
        doubt = 0.0 if tied else -torch.expm1(torch.tensor(-loss, dtype=torch.float64)).item()
        expected += [-BETA * doubt - 0.05, BETA * doubt]
    assert gradient == pytest.approx(expected)


def test_keys_reach_the_registered_loss() -> None:
    calls: list[dict[str, Any]] = []

    def loss(policy: Tensor, reference: Tensor, **settings: Any) -> Tensor:
        calls.append({"policy": policy.tolist(), "reference": reference.tolist(), **settings})
        return policy[:, 0] - reference[:, 1]

    keys = DpoKeys(
        rl_beta=0.7, dpo_loss_type=("robust", "hinge"), dpo_loss_weights=(1.0, 0.25), dpo_label_smoothing=0.2
    )
    step = dpo_step(StepSetup(RankingConfig(sft_weight=0.5), loss, keys))
    assert (step.beta, step.sft_weight) == (0.7, 0.5)
    losses = step(batch(PAIRS)).losses
    assert_equal(losses, [g.sums[0] - g.reference[1] - 0.5 * g.sums[0] for g in PAIRS])
    (call,) = calls
    assert call.pop("num_tokens").tolist() == [list(group.tokens) for group in PAIRS]
    assert call.pop("ranks").tolist() == [list(group.ranks) for group in PAIRS]
    assert call == {
        "policy": [list(group.sums) for group in PAIRS],
        "reference": [list(group.reference) for group in PAIRS],
        "beta": 0.7,
        "loss_types": ("robust", "hinge"),
        "loss_weights": (1.0, 0.25),
        "label_smoothing": 0.2,
    }


def test_a_batch_without_reference_numbers_is_an_error() -> None:
    given = batch(PAIRS)
    del given.columns["reference_sum_logps"]  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match="reference_sum_logps"):
        STEP(given)
