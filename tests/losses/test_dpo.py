"""DPO and its relatives: Eq. 5, 6."""

import math
from collections.abc import Sequence
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from poft_plugin.losses import dpo_loss, dpo_rewards
from poft_plugin.losses.dpo import LOSS_TYPES

LOGPS = st.tuples(st.floats(-60.0, 0.0), st.floats(-60.0, 0.0))
TOKENS = torch.tensor([[4, 9]])


def pair(*values: float) -> Tensor:
    """One sample in float64: chosen, rejected."""
    return torch.tensor([values], dtype=torch.float64)


def loss_of(policy: Sequence[float], reference: Sequence[float], *loss_types: str, **settings: Any) -> float:
    """The loss of one sample."""
    return dpo_loss(pair(*policy), pair(*reference), loss_types=loss_types, **settings).item()


def test_values_by_hand() -> None:
    """Log-ratios 2 and -1, so a difference of 3."""
    policy, reference = (-4.0, -8.0), (-6.0, -7.0)
    assert loss_of(policy, reference, "sigmoid", beta=0.5) == pytest.approx(math.log1p(math.exp(-0.5 * 3)))
    assert loss_of(policy, reference, "hinge", beta=0.25) == pytest.approx(1 - 0.25 * 3)
    assert loss_of(policy, reference, "hinge", beta=0.5) == 0
    robust = (0.9 * math.log1p(math.exp(-1.5)) - 0.1 * math.log1p(math.exp(1.5))) / 0.8
    assert loss_of(policy, reference, "robust", beta=0.5, label_smoothing=0.1) == pytest.approx(robust)


def test_ipo_takes_log_ratios_per_token() -> None:
    """Log-ratios 2 over 4 tokens and -1 over 5."""
    loss = loss_of((-4.0, -8.0), (-6.0, -7.0), "ipo", beta=0.5, num_tokens=torch.tensor([[4, 5]]))
    assert loss == pytest.approx((2 / 4 - -1 / 5 - 1 / (2 * 0.5)) ** 2)


def test_a_response_without_tokens_counts_as_one() -> None:
    loss = loss_of((-4.0, 0.0), (-6.0, 0.0), "ipo", beta=0.5, num_tokens=torch.tensor([[4, 0]]))
    assert loss == pytest.approx((2 / 4 - 1) ** 2)


def test_default_is_the_papers_form() -> None:
    """The sigmoid loss with beta 0.1 (DEFT, A.1)."""
    policy, reference = pair(-4.0, -8.0), pair(-6.0, -7.0)
    torch.testing.assert_close(dpo_loss(policy, reference), torch.tensor([math.log1p(math.exp(-0.3))]).double())


@settings(deadline=None)
@given(LOGPS, LOGPS, st.sampled_from(LOSS_TYPES), st.sampled_from([0.01, 0.1, 0.5]), st.sampled_from([0.0, 0.1, 0.4]))
def test_equals_the_probabilities_written_out(
    policy: tuple[float, float], reference: tuple[float, float], name: str, beta: float, smoothing: float
) -> None:
    smoothing = smoothing if name == "robust" else 0.0
    ours = loss_of(policy, reference, name, beta=beta, label_smoothing=smoothing, num_tokens=TOKENS)
    exact = oracles.dpo_loss(name, policy, reference, beta, smoothing, TOKENS[0].tolist())
    assert ours == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_several_losses_are_added_with_their_weights() -> None:
    policy, reference = (-4.0, -8.0), (-6.0, -7.0)
    given: dict[str, Any] = {"beta": 0.2, "label_smoothing": 0.1, "num_tokens": TOKENS}
    each = [
        oracles.dpo_loss(name, policy, reference, 0.2, 0.1 if name == "robust" else 0.0, TOKENS[0].tolist())
        for name in LOSS_TYPES
    ]
    assert loss_of(policy, reference, *LOSS_TYPES, **given) == pytest.approx(sum(each))
    weights = [0.8, 0.0, -1.0, 2.0]
    weighted = sum(w * loss for w, loss in zip(weights, each, strict=True))
    assert loss_of(policy, reference, *LOSS_TYPES, loss_weights=weights, **given) == pytest.approx(weighted)


@settings(deadline=None)
@given(LOGPS, st.floats(0.01, 5.0))
def test_where_the_policy_is_the_reference(logps: tuple[float, float], beta: float) -> None:
    """Nothing is known yet: log 2, 1, `1 / (2 beta)^2`, and log 2 whatever the label smoothing."""
    assert loss_of(logps, logps, "sigmoid", beta=beta) == pytest.approx(math.log(2), rel=1e-15)
    assert loss_of(logps, logps, "hinge", beta=beta) == 1
    assert loss_of(logps, logps, "ipo", beta=beta, num_tokens=TOKENS) == pytest.approx((1 / (2 * beta)) ** 2)
    assert loss_of(logps, logps, "robust", beta=beta, label_smoothing=0.3) == pytest.approx(math.log(2))


@settings(deadline=None)
@given(LOGPS, LOGPS)
def test_robust_without_flipped_labels_is_the_sigmoid_loss(
    policy: tuple[float, float], reference: tuple[float, float]
) -> None:
    assert loss_of(policy, reference, "robust") == pytest.approx(loss_of(policy, reference, "sigmoid"), rel=1e-15)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """Its mean over labels that are flipped with probability e is the sigmoid loss of the true label."""
    policy, reference, e = (-4.0, -8.0), (-6.0, -7.0), 0.2
    right = loss_of(policy, reference, "robust", label_smoothing=e)
    flipped = loss_of(policy[::-1], reference[::-1], "robust", label_smoothing=e)
    assert (1 - e) * right + e * flipped == pytest.approx(loss_of(policy, reference, "sigmoid"))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_gradients_are_right(name: str) -> None:
    policy = torch.tensor([[-4.0, -8.0], [-9.0, -2.0]], dtype=torch.float64, requires_grad=True)
    reference, tokens = torch.tensor([[-6.0, -7.0], [-6.0, -7.0]]).double(), TOKENS.expand(2, 2)
    smoothing = 0.1 if name == "robust" else 0.0
    assert gradcheck(
        lambda p: dpo_loss(p, reference, loss_types=[name], label_smoothing=smoothing, num_tokens=tokens), (policy,)
    )


def test_gradient_of_the_sigmoid_loss_by_hand() -> None:
    """`-beta sigmoid(-beta d)` for the chosen response, the opposite for the rejected one; none for the reference."""
    policy, reference = pair(-4.0, -8.0).requires_grad_(), pair(-6.0, -7.0).requires_grad_()
    dpo_loss(policy, reference, beta=0.5).sum().backward()
    slope = 0.5 / (1 + math.exp(0.5 * 3))
    torch.testing.assert_close(policy.grad, pair(-slope, slope))
    assert reference.grad is None


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_for_extreme_log_ratios(dtype: torch.dtype, name: str) -> None:
    policy = torch.tensor([[-1e5, 0.0], [0.0, -1e5]], dtype=dtype, requires_grad=True)
    loss = dpo_loss(policy, torch.zeros_like(policy), loss_types=[name], beta=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    torch.testing.assert_close(loss, torch.tensor([1e4, 0.0], dtype=dtype))
    torch.testing.assert_close(gradient, torch.tensor([[-0.1, 0.1], [0.0, 0.0]], dtype=dtype))


def test_losses_are_not_reduced() -> None:
    for count in (3, 0):
        logps = torch.zeros(count, 2)
        loss = dpo_loss(logps, logps, loss_types=LOSS_TYPES, num_tokens=torch.ones(count, 2))
        assert (loss.shape, loss.dtype) == ((count,), torch.float32)


def test_rewards_by_hand() -> None:
    policy, reference = pair(-4.0, -8.0).requires_grad_(), pair(-6.0, -7.0)
    rewards = dpo_rewards(policy, reference, beta=0.5)
    assert rewards.tolist() == [[0.5 * 2, 0.5 * -1]]
    assert not rewards.requires_grad


def test_rewards_differ_by_what_the_loss_sees() -> None:
    policy, reference = pair(-4.0, -8.0), pair(-6.0, -7.0)
    chosen, rejected = dpo_rewards(policy, reference, beta=0.3)[0]
    assert dpo_loss(policy, reference, beta=0.3).item() == pytest.approx(math.log1p(math.exp(rejected - chosen)))


@pytest.mark.parametrize("shapes", [((2,), (2,)), ((3, 1), (3, 2)), ((3, 3), (3, 3)), ((1, 2), (3, 2))])
def test_another_shape_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    policy, reference = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"policy_logps \(.*reference_logps \(.*: expected \(G, 2\) both"):
        dpo_loss(policy, reference)
    with pytest.raises(ValueError, match=r"expected \(G, 2\) both"):
        dpo_rewards(policy, reference, beta=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_types": ["sigmoid", "kto"]}, r"loss_types: \['kto'\]; one or more of sigmoid, hinge, ipo, robust"),
        ({"loss_types": []}, r"loss_types: \[\]; one or more of"),
        (
            {"loss_types": ["hinge"], "loss_weights": [1.0, 2.0]},
            r"loss_weights: \[1.0, 2.0\]; one number for each .*hinge",
        ),
        ({"loss_weights": []}, r"loss_weights: \[\]; one number for each"),
        ({"loss_types": ["robust"], "label_smoothing": 0.5}, "label_smoothing: 0.5; at least 0 and below 0.5"),
        ({"loss_types": ["robust"], "label_smoothing": -0.1}, "label_smoothing: -0.1; at least 0 and below 0.5"),
        ({"label_smoothing": 0.1}, "label_smoothing: 0.1; only the loss type robust uses it, sigmoid would ignore it"),
        ({"beta": 0.0}, "beta: 0.0; above 0"),
        ({"beta": float("nan")}, "beta: nan; above 0"),
        ({"loss_types": ["ipo"]}, r"num_tokens: None; the loss type ipo needs \(G, 2\) = \(1, 2\) token counts"),
        ({"loss_types": ["ipo"], "num_tokens": torch.ones(2)}, r"num_tokens: \(2,\); the loss type ipo needs"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(torch.zeros(1, 2), torch.zeros(1, 2), **settings)


@pytest.mark.parametrize("loss_types", [("sigmoid",), ("hinge",), ("ipo",), ("robust",), ("sigmoid", "ipo")])
def test_a_tie_prefers_nothing(loss_types: tuple[str, ...]) -> None:
    """The loss of a policy that equals its reference, whatever the policy says, without gradient; others as ever."""
    policy = torch.tensor([[-3.0, -9.0], [-3.0, -9.0], [-8.0, -1.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-4.0, -5.0], [-4.0, -5.0], [-8.0, -1.0]], dtype=torch.float64)
    settings = {"loss_types": loss_types, "num_tokens": torch.tensor([[2, 3]] * 3)}
    losses = dpo_loss(policy, reference, ranks=torch.tensor([[0, 0], [0, 1], [0, 1]]), **settings)
    plain = dpo_loss(policy, reference, **settings)
    undecided = plain[2]
    torch.testing.assert_close(losses, torch.stack([undecided, plain[1], undecided]))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert gradient[0].tolist() == [0.0, 0.0]
    assert gradient[1].abs().min() > 0


def test_ranks_of_another_shape_are_refused() -> None:
    logps = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"ranks: \(2,\); expected \(G, 2\)"):
        dpo_loss(logps, logps, ranks=torch.zeros(2))
