"""The step of the best response alone."""

import pytest
import torch
from batches import LISTS, assert_equal, batch, check_laws, gradient_of, logged, mean, ranking
from torch import Tensor

from poft_plugin.config import RankingConfig
from poft_plugin.losses import sft_loss
from poft_plugin.trainers.sft import SftStep, sft_step
from poft_plugin.trainers.step import StepSetup


@pytest.mark.parametrize("sft_weight", [1.0, 0.0, 0.4])
def test_losses_are_the_best_responses_summed_log_probability(sft_weight: float) -> None:
    """Eq. 9: a sum over tokens; no other response has a part."""
    assert_equal(SftStep(sft_loss, sft_weight)(batch(LISTS)).losses, [-sft_weight * g.sums[0] for g in LISTS])


def test_metrics() -> None:
    """The loss before its weight; accuracies and margins of means per token."""
    assert logged(SftStep(sft_loss, 0.4)(batch(LISTS)).metrics) == pytest.approx(
        {
            "sft/loss": mean([-group.sums[0] for group in LISTS]),
            **ranking(LISTS, [group.means for group in LISTS]),
        }
    )


def test_laws_of_a_step() -> None:
    check_laws(SftStep(sft_loss, 0.4), LISTS)


def test_gradients_reach_the_best_response_alone() -> None:
    given = batch(LISTS)
    gradient = gradient_of(SftStep(sft_loss, 0.4)(given).losses, given.sum_logps)
    assert gradient == pytest.approx([-0.4 * (number == 0) for group in LISTS for number in range(len(group.sums))])


def test_settings_reach_the_registered_loss() -> None:
    def loss(best_sum_logps: Tensor) -> Tensor:
        return best_sum_logps**2

    step = sft_step(StepSetup(RankingConfig(sft_weight=0.3), loss))
    assert step == SftStep(loss, 0.3)
    torch.testing.assert_close(step(batch(LISTS)).losses, torch.tensor([0.3 * g.sums[0] ** 2 for g in LISTS]).double())
