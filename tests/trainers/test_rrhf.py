"""The step of RRHF: the hinge on means per token, the best response's SFT loss, and what the log shows."""

from typing import Any

import oracles
import pytest
import torch
from batches import LISTS, LOST, TIED, WON, assert_equal, batch, check_laws, gradient_of, logged, mean, ranking
from torch import Tensor

from poft_plugin.config import RankingConfig
from poft_plugin.losses import rrhf_loss
from poft_plugin.trainers.rrhf import RrhfStep, rrhf_step
from poft_plugin.trainers.step import StepSetup


@pytest.mark.parametrize("sft_weight", [0.0, 1.0, 0.4])
def test_losses(sft_weight: float) -> None:
    """Eq. 8 on means per token, and Eq. 9 on the sum of the best one's (Eq. 10)."""
    ranks = [oracles.rrhf_loss(group.means, group.ranks) for group in LISTS]
    assert sum(loss > 0 for loss in ranks) > 1
    expected = [loss - sft_weight * group.sums[0] for loss, group in zip(ranks, LISTS, strict=True)]
    assert_equal(RrhfStep(rrhf_loss, sft_weight)(batch(LISTS)).losses, expected)


def test_pairs_by_hand() -> None:
    """Lost by -1/4 + 8/2 a token, won, and tied."""
    losses = RrhfStep(rrhf_loss, 1.0)(batch([LOST, WON, TIED])).losses
    assert_equal(losses, [8 / 2 - 1 / 4 + 8, 0 + 3, 0 + 4])


def test_metrics() -> None:
    assert logged(RrhfStep(rrhf_loss, 0.4)(batch(LISTS)).metrics) == pytest.approx(
        {
            "rrhf/loss": mean([oracles.rrhf_loss(group.means, group.ranks) for group in LISTS]),
            "sft/loss": mean([-group.sums[0] for group in LISTS]),
            **ranking(LISTS, [group.means for group in LISTS]),
        }
    )


def test_laws_of_a_step() -> None:
    check_laws(RrhfStep(rrhf_loss, 1.0), LISTS)


def test_gradients_by_hand() -> None:
    """A lost pair: up for the better one, down for the worse one, over their tokens; SFT: the best one, by its sum."""
    given = batch([LOST, WON, TIED])
    gradient = gradient_of(RrhfStep(rrhf_loss, 0.4)(given).losses, given.sum_logps)
    assert gradient == pytest.approx([-1 / 2 - 0.4, 1 / 4, -0.4, 0, -0.4, 0])


def test_settings_reach_the_registered_loss() -> None:
    calls: list[dict[str, Any]] = []

    def loss(mean_logps: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        calls.append(settings)
        return (mean_logps * mask).sum(1)

    step = rrhf_step(StepSetup(RankingConfig(sft_weight=0.3), loss))
    assert step == RrhfStep(loss, 0.3)
    losses = step(batch(LISTS)).losses
    torch.testing.assert_close(losses, torch.tensor([sum(g.means) - 0.3 * g.sums[0] for g in LISTS]).double())
    ((given),) = calls
    assert given.keys() == {"ranks"}
    assert given["ranks"].shape == (len(LISTS), 5)
