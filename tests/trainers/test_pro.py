"""The step of PRO: the ranking loss per token, the best response's SFT loss, and what the log shows."""

from typing import Any

import oracles
import pytest
import torch
from batches import LISTS, assert_equal, batch, check_laws, gradient_of, logged, mean, ranking
from torch import Tensor

from poft_plugin.config import RankingConfig
from poft_plugin.losses import pro_loss
from poft_plugin.trainers.pro import ProStep, pro_step
from poft_plugin.trainers.step import StepSetup

FORMS = [ProStep(pro_loss, 0.05), ProStep(pro_loss, 0.05, by_reward=True)]


@pytest.mark.parametrize("sft_weight", [0.0, 0.05, 1.0])
def test_losses_of_the_papers_form(sft_weight: float) -> None:
    """Eq. 11 on means per token, and Eq. 9 on the sum of the best one's (Eq. 12)."""
    expected = [oracles.pro_loss(group.means, group.ranks) - sft_weight * group.sums[0] for group in LISTS]
    assert_equal(ProStep(pro_loss, sft_weight)(batch(LISTS)).losses, expected)


@pytest.mark.parametrize("sft_weight", [0.0, 0.05, 1.0])
def test_losses_of_the_released_form(sft_weight: float) -> None:
    """Temperatures from scores, and the SFT weight times (C - 1)^2 of each sample's own C."""
    assert {len(group.sums) for group in LISTS} == {2, 3, 5}
    expected = [
        oracles.pro_loss(group.means, group.ranks, group.scores)
        - sft_weight * (len(group.sums) - 1) ** 2 * group.sums[0]
        for group in LISTS
    ]
    assert_equal(ProStep(pro_loss, sft_weight, by_reward=True)(batch(LISTS)).losses, expected)


@pytest.mark.parametrize("by_reward", [False, True])
def test_metrics(by_reward: bool) -> None:
    """The two losses apart, before the weight; accuracies and margins of means per token."""
    losses = [oracles.pro_loss(g.means, g.ranks, g.scores if by_reward else None) for g in LISTS]
    assert logged(ProStep(pro_loss, 0.05, by_reward=by_reward)(batch(LISTS)).metrics) == pytest.approx(
        {
            "pro/loss": mean(losses),
            "sft/loss": mean([-group.sums[0] for group in LISTS]),
            **ranking(LISTS, [group.means for group in LISTS]),
        }
    )


@pytest.mark.parametrize("step", FORMS, ids=["paper", "reward"])
def test_laws_of_a_step(step: ProStep) -> None:
    check_laws(step, LISTS)


@pytest.mark.parametrize("by_reward", [False, True])
def test_gradients_reach_every_response_and_sft_the_best_one(by_reward: bool) -> None:
    given, one = batch(LISTS), batch(LISTS)
    whole = gradient_of(ProStep(pro_loss, 0.3, by_reward=by_reward)(given).losses, given.sum_logps)
    ranking_only = gradient_of(ProStep(pro_loss, 0.0, by_reward=by_reward)(one).losses, one.sum_logps)
    sft = [0.3 * (len(g.sums) - 1) ** (2 * by_reward) * (n == 0) for g in LISTS for n in range(len(g.sums))]
    assert whole == pytest.approx([r - s for r, s in zip(ranking_only, sft, strict=True)])
    untied = [len(set(group.ranks)) > 1 for group in LISTS for _ in group.sums]
    assert [gradient != 0 for gradient in ranking_only] == untied


def test_the_papers_form_needs_no_scores() -> None:
    given = batch(LISTS)
    del given.columns["scores"]  # type: ignore[attr-defined]
    assert ProStep(pro_loss, 0.05)(given).losses.isfinite().all()
    with pytest.raises(KeyError, match="scores"):
        ProStep(pro_loss, 0.05, by_reward=True)(given)


@pytest.mark.parametrize("temperature", [None, "reward"])
def test_settings_reach_the_registered_loss(temperature: Any) -> None:
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def loss(mean_logps: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        calls.append((mean_logps, mask, settings))
        return mean_logps.sum(1)

    settings = RankingConfig(sft_weight=0.3, pro_temperature=temperature)
    step = pro_step(StepSetup(settings, loss))
    assert step == ProStep(loss, 0.3, by_reward=temperature == "reward")
    output = step(batch(LISTS))
    ((means, mask, given),) = calls
    assert means[mask].tolist() == pytest.approx([m for group in LISTS for m in group.means])
    assert given["ranks"][mask].tolist() == [rank for group in LISTS for rank in group.ranks]
    assert given.keys() == {"ranks", "rewards"}
    if temperature is None:
        assert given["rewards"] is None
        torch.testing.assert_close(output.losses, means.sum(1) - 0.3 * torch.tensor([g.sums[0] for g in LISTS]))
    else:
        assert given["rewards"][mask].tolist() == [score for group in LISTS for score in group.scores]
