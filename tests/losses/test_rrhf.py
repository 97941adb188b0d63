"""RRHF's ranking loss: Eq. 8."""

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from poft_plugin.losses import rrhf_loss
from poft_plugin.losses.rrhf import better_and_worse

SCORES = st.lists(st.floats(-20.0, 0.0), min_size=1, max_size=5)


def group(*values: float) -> Tensor:
    """One sample in float64."""
    return torch.tensor([values], dtype=torch.float64)


def present(scores: Tensor) -> Tensor:
    """A mask without padding."""
    return torch.ones_like(scores, dtype=torch.bool)


def loss_of(*scores: float, **settings: Any) -> float:
    """The loss of one sample."""
    given = {name: torch.tensor([value]) for name, value in settings.items()}
    return rrhf_loss(group(*scores), present(group(*scores)), **given).item()


def test_values_by_hand() -> None:
    """The excess of the worse one counts, in every pair; an order that is right costs nothing."""
    assert loss_of(-1.0, -2.0, -4.0) == 0
    assert loss_of(-3.0, -1.0) == -1.0 - -3.0
    assert loss_of(-4.0, -2.0, -1.0) == (-2.0 - -4.0) + (-1.0 - -4.0) + (-1.0 - -2.0)
    assert loss_of(-2.0, -4.0, -1.0) == (-1.0 - -2.0) + (-1.0 - -4.0)


def test_gradient_by_hand() -> None:
    """Up for the better one, down for the worse one, of violated pairs only."""
    scores = group(-2.0, -4.0, -1.0).requires_grad_()
    rrhf_loss(scores, present(scores)).sum().backward()
    torch.testing.assert_close(scores.grad, group(-1.0, -1.0, 2.0))


def test_ties_form_no_pair() -> None:
    assert loss_of(-3.0, -1.0, ranks=[0, 0]) == 0
    assert loss_of(-3.0, -1.0, -2.0, ranks=[0, 0, 1]) == -2.0 - -3.0


def test_ranks_need_not_be_in_order() -> None:
    assert loss_of(-1.0, -3.0, -2.0, ranks=[7, 0, 3]) == pytest.approx(loss_of(-3.0, -2.0, -1.0))


@settings(deadline=None)
@given(SCORES, st.data())
def test_equals_the_loop_over_pairs(scores: list[float], data: st.DataObject) -> None:
    count = len(scores)
    ranks = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=count, max_size=count))
    ours = loss_of(*scores) if ranks is None else loss_of(*scores, ranks=ranks)
    assert ours == pytest.approx(oracles.rrhf_loss(scores, ranks), rel=1e-12, abs=1e-12)


def test_lists_of_any_length_share_a_batch() -> None:
    scores = torch.tensor([[-3.0, -1.0, 0.0], [-4.0, -2.0, -1.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    torch.testing.assert_close(rrhf_loss(scores, mask), torch.tensor([2.0, 2.0 + 3.0 + 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("garbage", [0.0, 1e30, -math.inf, math.inf, math.nan])
def test_what_stands_in_padding_has_no_influence(garbage: float) -> None:
    scores = torch.tensor([[-3.0, -1.0, garbage], [-2.0, garbage, garbage], [garbage] * 3], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    ranks = torch.tensor([[0.0, 1.0, garbage]] * 3)
    loss = rrhf_loss(scores, mask, ranks=ranks)
    assert loss.tolist() == [2.0, 0.0, 0.0]
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-1.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3]


@settings(deadline=None)
@given(SCORES, st.floats(-5.0, 5.0))
def test_a_shift_of_all_scores_changes_nothing(scores: list[float], shift: float) -> None:
    assert loss_of(*[s + shift for s in scores]) == pytest.approx(loss_of(*scores), abs=1e-12 * len(scores) ** 2)


def test_gradients_are_right() -> None:
    scores = torch.tensor([[-1.0, -2.5, -0.3], [-4.0, -1.0, -9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert gradcheck(lambda s: rrhf_loss(s, mask), (scores,))


def test_losses_are_not_reduced() -> None:
    assert rrhf_loss(torch.zeros(3, 2), torch.ones(3, 2).bool()).shape == (3,)
    assert rrhf_loss(torch.zeros(0, 2), torch.ones(0, 2).bool()).shape == (0,)


def test_pairs_by_hand() -> None:
    pairs = better_and_worse(torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]]).bool(), torch.tensor([[1, 0, 1, 9]]))
    assert pairs.nonzero().tolist() == [[0, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("scores", "mask"),
    [
        (torch.zeros(3), torch.ones(3).bool()),
        (torch.zeros(2, 3), torch.ones(3).bool()),
        (torch.zeros(2, 3), torch.ones(2, 3)),
    ],
)
def test_another_shape_or_mask_is_refused(scores: Tensor, mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"mean_logps \(.*mask \(.*expected \(G, C\) both, and a mask of torch.bool"):
        rrhf_loss(scores, mask)


def test_ranks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks \(3,\): expected the shape of mean_logps, \(2, 3\)"):
        rrhf_loss(torch.zeros(2, 3), torch.ones(2, 3).bool(), ranks=torch.arange(3))
