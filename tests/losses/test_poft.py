"""PoFT's loss and the weight it gives to a row: Eq. 5 to 8."""

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from poft_plugin.losses import poft_coefficient, poft_loss

SETTINGS = [(1.0, 0.0), (0.1, 0.0), (2.5, 0.0), (1.0, -0.7), (1.0, 1.5), (0.3, -2.0), (5.0, 0.25)]
REWARDS = st.floats(-20.0, 0.0)


def doubles(*values: float) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def test_values_by_hand() -> None:
    loss = poft_loss(doubles(-1.0, -1.0, -3.0), doubles(-1.0, -3.0, -1.0))
    by_hand = doubles(math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2)))
    torch.testing.assert_close(loss, by_hand)
    coefficient = poft_coefficient(doubles(-1.0, -1.0, -3.0), doubles(-1.0, -3.0, -1.0))
    torch.testing.assert_close(coefficient, doubles(1 / 2, 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))))


def test_beta_scales_the_difference_and_gamma_is_added_in_logits() -> None:
    policy, reference = doubles(-1.0), doubles(-3.0)
    loss = poft_loss(policy, reference, beta=0.5, gamma=-3.0)
    torch.testing.assert_close(loss, doubles(math.log1p(math.exp(-(0.5 * 2 - 3)))))
    coefficient = poft_coefficient(policy, reference, beta=0.5, gamma=-3.0)
    torch.testing.assert_close(coefficient, doubles(0.5 / (1 + math.exp(0.5 * 2 - 3))))


def test_losses_are_not_reduced() -> None:
    assert poft_loss(torch.zeros(3), torch.zeros(3)).shape == (3,)
    assert poft_loss(torch.zeros(0), torch.zeros(0)).shape == (0,)


@settings(deadline=None)
@given(REWARDS, st.lists(REWARDS, min_size=1, max_size=4), st.sampled_from(SETTINGS))
def test_equals_the_fraction_of_exponentials(
    policy: float, references: list[float], setting: tuple[float, float]
) -> None:
    beta, gamma = setting
    ours = poft_loss(doubles(policy), doubles(*references).mean()[None], beta=beta, gamma=gamma)
    assert ours.item() == pytest.approx(oracles.poft_loss(policy, references, beta, gamma), rel=1e-12, abs=1e-14)


@settings(deadline=None)
@given(st.data())
def test_coefficient_is_equation_8(data: st.DataObject) -> None:
    """From token probabilities, with a token count of its own for each model."""
    tokens = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6)
    policy, references = data.draw(tokens), data.draw(st.lists(tokens, min_size=1, max_size=3))
    rewards = doubles(*[oracles.mean_logp(p) for p in references])
    tau = poft_coefficient(doubles(oracles.mean_logp(policy)), rewards.mean()[None])
    assert tau.item() == pytest.approx(oracles.poft_tau(policy, references), rel=1e-12)


@pytest.mark.parametrize(("beta", "gamma"), SETTINGS)
def test_coefficient_is_the_ratio_of_the_gradients(beta: float, gamma: float) -> None:
    """Eq. 4 against Eq. 7: the gradient of a length-normalised SFT loss, times one number per row."""
    torch.manual_seed(0)
    logits = torch.randn(4, 7, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (4, 7, 1))
    reference = torch.randn(4, dtype=torch.float64) - 2
    policy = logits.log_softmax(-1).gather(-1, targets).squeeze(-1).mean(-1)
    (sft,) = torch.autograd.grad(-policy.sum(), logits, retain_graph=True)
    (poft,) = torch.autograd.grad(poft_loss(policy, reference, beta=beta, gamma=gamma).sum(), logits)
    coefficient = poft_coefficient(policy, reference, beta=beta, gamma=gamma)
    torch.testing.assert_close(poft, sft * coefficient[:, None, None], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("beta", "gamma"), SETTINGS)
def test_gradients_are_right(beta: float, gamma: float) -> None:
    policy = doubles(-0.5, -2.0, -9.0).requires_grad_()
    assert gradcheck(lambda p: poft_loss(p, doubles(-1.5, -2.0, -1.0), beta=beta, gamma=gamma), (policy,))


def test_no_gradient_flows_into_the_reference_nor_out_of_the_coefficient() -> None:
    policy, reference = doubles(-1.0).requires_grad_(), doubles(-2.0).requires_grad_()
    poft_loss(policy, reference).sum().backward()
    assert policy.grad is not None
    assert policy.grad.item() != 0
    assert reference.grad is None
    assert not poft_coefficient(policy, reference).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_for_extreme_rewards(dtype: torch.dtype) -> None:
    """Where the sigmoid under- or overflows, the loss is linear or 0 and its gradient -1 or 0."""
    policy = torch.tensor([-1e4, 1e4, 1e4, -1e4], dtype=dtype, requires_grad=True)
    reference = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype)
    loss = poft_loss(policy, reference)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    log_2 = torch.tensor(2.0, dtype=dtype).log()
    torch.testing.assert_close(loss, torch.stack([log_2 * 0 + 2e4, log_2 * 0, log_2, log_2]))
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.0, -0.5, -0.5], dtype=dtype))
    torch.testing.assert_close(poft_coefficient(policy, reference), -gradient)


@settings(deadline=None)
@given(REWARDS, REWARDS, st.sampled_from(SETTINGS))
def test_coefficient_lies_between_0_and_beta_and_falls_as_the_policy_wins(
    policy: float, reference: float, setting: tuple[float, float]
) -> None:
    beta, gamma = setting
    worse, better = doubles(policy), doubles(policy + 0.5)
    low = poft_coefficient(better, doubles(reference), beta=beta, gamma=gamma).item()
    high = poft_coefficient(worse, doubles(reference), beta=beta, gamma=gamma).item()
    assert 0 <= low <= high <= beta


def test_another_shape_is_refused() -> None:
    """`(B, 1)` against `(B,)` would broadcast to `(B, B)` in silence."""
    for function in (poft_loss, poft_coefficient):
        with pytest.raises(ValueError, match=r"policy_logp \(3, 1\) and reference_logp \(3,\).*same shape"):
            function(torch.zeros(3, 1), torch.zeros(3))
