"""The step of `rl: poft`: losses of the samples, and what the log shows."""

import math
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from poft_plugin.config import PoftConfig
from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.losses import poft_loss
from poft_plugin.trainers.poft import PoftStep, poft_step
from poft_plugin.trainers.step import Metric, SequenceBatch, StepSetup

POLICY, REFERENCE, TOKENS = [-1.0, -2.5, -0.5], [-2.0, -1.0, -0.5], [4.0, 1.0, 5.0]


def batch(policy: Tensor | None = None) -> SequenceBatch:
    """Three samples: one that the policy wins, one that it loses, one even."""
    means = torch.tensor(POLICY, requires_grad=True) if policy is None else policy
    return SequenceBatch(
        sum_logps=means * torch.tensor(TOKENS),
        num_tokens=torch.tensor(TOKENS),
        group_ids=torch.arange(3),
        columns={REFERENCE_LOGP: torch.tensor(REFERENCE, dtype=torch.float64)},
    )


def mean_and_std(metric: Metric) -> oracles.Moments:
    """What is logged."""
    return oracles.moments(metric.values.tolist(), None if metric.weights is None else metric.weights.tolist())


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.5, -1.0)])
def test_losses_by_hand(beta: float, gamma: float) -> None:
    losses = PoftStep(poft_loss, beta=beta, gamma=gamma)(batch()).losses
    margins = [beta * (p - r) + gamma for p, r in zip(POLICY, REFERENCE, strict=True)]
    torch.testing.assert_close(losses, torch.tensor([math.log1p(math.exp(-m)) for m in margins]))


def test_the_gradient_is_the_coefficient_that_is_logged() -> None:
    """With respect to a mean log-probability: minus the row's weight, also where beta and gamma are set."""
    policy = torch.tensor(POLICY, requires_grad=True)
    output = PoftStep(poft_loss, beta=0.5, gamma=-1.0)(batch(policy))
    (gradient,) = torch.autograd.grad(output.losses.sum(), policy)
    torch.testing.assert_close(output.metrics["poft/coefficient"].values, -gradient)


def test_metrics_by_hand() -> None:
    metrics = PoftStep(poft_loss)(batch()).metrics
    logged = {name: mean_and_std(metric).mean for name, metric in metrics.items()}
    coefficients = [1 / (1 + math.exp(p - r)) for p, r in zip(POLICY, REFERENCE, strict=True)]
    assert logged == pytest.approx(
        {
            "poft/policy_reward": (-1 - 2.5 - 0.5) / 3,
            "poft/reference_reward": (-2 - 1 - 0.5) / 3,
            "poft/coefficient": sum(coefficients) / 3,
            "poft/win_rate": 1 / 3,
            "poft/ce_loss": (4 * 1 + 1 * 2.5 + 5 * 0.5) / (4 + 1 + 5),
        }
    )
    assert [name for name, metric in metrics.items() if metric.with_std] == ["poft/coefficient"]


def test_metrics_carry_no_gradient_and_losses_do() -> None:
    output = PoftStep(poft_loss)(batch())
    assert output.losses.requires_grad
    for metric in output.metrics.values():
        assert not metric.values.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_in_the_policys_dtype(dtype: torch.dtype) -> None:
    policy = torch.tensor(POLICY, dtype=dtype, requires_grad=True)
    assert PoftStep(poft_loss)(batch(policy)).losses.dtype == dtype


def test_settings_reach_the_registered_loss() -> None:
    calls: list[dict[str, Any]] = []

    def loss(policy_logp: Tensor, reference_logp: Tensor, **settings: Any) -> Tensor:
        calls.append(settings)
        return policy_logp - reference_logp

    settings = PoftConfig.model_validate({"references": [{"model": "a"}], "beta": 0.3, "gamma": -0.2})
    setup = StepSetup(settings, loss)
    output = poft_step(setup)(batch())
    assert calls == [{"beta": 0.3, "gamma": -0.2}]
    torch.testing.assert_close(output.losses, torch.tensor(POLICY) - torch.tensor(REFERENCE))
    assert poft_step(setup) == PoftStep(loss, beta=0.3, gamma=-0.2)
