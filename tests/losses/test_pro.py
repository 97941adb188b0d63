"""PRO's loss: Eq. 11, and the form with reward temperatures."""

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import pad

from poft_plugin.losses import pro_loss

SCORES = st.lists(st.floats(-20.0, 0.0), min_size=1, max_size=5)
FORMS: list[dict[str, list[float]]] = [
    {},
    {"ranks": [0, 1, 1, 2]},
    {"rewards": [3.0, 1.0, 0.5, -2.0]},
    {"rewards": [3.0, 1.0, 1.0, -2.0]},
    {"rewards": [1.0, 2.0, 0.5, -2.0]},
    {"ranks": [0, 0, 1, 1], "rewards": [3.0, 1.0, 0.5, -2.0]},
]


def group(*values: float) -> Tensor:
    """One sample in float64."""
    return torch.tensor([values], dtype=torch.float64)


def present(scores: Tensor) -> Tensor:
    """A mask without padding."""
    return torch.ones_like(scores, dtype=torch.bool)


def loss_of(*scores: float, **settings: Any) -> float:
    """The loss of one sample."""
    given = {name: group(*value) for name, value in settings.items()}
    return pro_loss(group(*scores), present(group(*scores)), **given).item()


def test_values_by_hand() -> None:
    """Scores log 1/2, log 1/3, log 1/6: probabilities 1/2 of 1, then 1/3 of 1/2; the last one has nobody to beat."""
    assert loss_of(*map(math.log, (1 / 2, 1 / 3, 1 / 6))) == pytest.approx(-math.log(1 / 2) - math.log(2 / 3))
    assert loss_of(math.log(1 / 4), math.log(3 / 4)) == pytest.approx(-math.log(1 / 4))


def test_tied_responses_do_not_compete() -> None:
    """With two at the top, each against the third only; with all equal nobody has a rival."""
    scores = [math.log(p) for p in (1 / 2, 1 / 3, 1 / 6)]
    assert loss_of(*scores, ranks=[0, 0, 1]) == pytest.approx(-math.log(3 / 4) - math.log(2 / 3))
    assert loss_of(*scores, ranks=[0, 1, 1]) == pytest.approx(-math.log(1 / 2))
    assert loss_of(*scores, ranks=[4, 4, 4]) == 0


def test_ranks_need_not_be_in_order() -> None:
    assert loss_of(-1.0, -3.0, -2.0, ranks=[7, 0, 3]) == pytest.approx(loss_of(-3.0, -2.0, -1.0))


def test_reward_temperatures_by_hand() -> None:
    """Rewards 3, 2, 0: the first has temperature 3 and rivals at 1 and 3, the second 2 and a rival at 2."""
    a, b, c = -1.0, -0.5, -2.0
    first = math.exp(3 * a) / (math.exp(3 * a) + math.exp(b) + math.exp(3 * c))
    second = math.exp(2 * b) / (math.exp(2 * b) + math.exp(2 * c))
    assert loss_of(a, b, c, rewards=[3.0, 2.0, 0.0]) == pytest.approx(-math.log(first) - math.log(second))


def test_equal_rewards_do_not_compete() -> None:
    assert loss_of(-1.0, -2.0, rewards=[0.7, 0.7]) == 0
    assert loss_of(-1.0, -2.0, -3.0, rewards=[2.0, 1.0, 1.0]) == pytest.approx(
        -math.log(math.exp(-1) / (math.exp(-1) + math.exp(-2) + math.exp(-3)))
    )


def test_a_reward_against_the_order_makes_no_round() -> None:
    """The label says better, the reward says worse: no negative temperature."""
    assert loss_of(-1.0, -2.0, rewards=[0.0, 1.0]) == 0


@settings(deadline=None)
@given(SCORES, st.data())
def test_equals_the_rounds(scores: list[float], data: st.DataObject) -> None:
    count = len(scores)
    drawn = {
        "ranks": data.draw(st.none() | st.lists(st.integers(0, 3), min_size=count, max_size=count)),
        "rewards": data.draw(
            st.none() | st.lists(st.sampled_from([-1.5, 0.0, 0.3, 2.0]), min_size=count, max_size=count)
        ),
    }
    settings = {name: value for name, value in drawn.items() if value is not None}
    assert loss_of(*scores, **settings) == pytest.approx(oracles.pro_loss(scores, **settings), rel=1e-11, abs=1e-13)


def test_lists_of_any_length_share_a_batch() -> None:
    scores = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0], [9.0, 9.0, 9.0]]).double()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    expected = [oracles.pro_loss([-1.0, -2.0, -3.0]), oracles.pro_loss([-1.0, -2.0]), 0.0, 0.0]
    torch.testing.assert_close(pro_loss(scores, mask), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("garbage", [0.0, 1e30, -math.inf, math.inf, math.nan])
def test_padding_changes_neither_values_nor_gradients(garbage: float, form: dict[str, list[float]]) -> None:
    scores = group(-1.0, -3.0, -0.5, -2.0).requires_grad_()
    given = {name: group(*value) for name, value in form.items()}
    (expected,) = torch.autograd.grad(pro_loss(scores, present(scores), **given).sum(), scores)
    longer = pad(scores.detach(), (0, 2), value=garbage).requires_grad_()
    mask = pad(present(scores), (0, 2))
    loss = pro_loss(longer, mask, **{name: pad(value, (0, 2), value=garbage) for name, value in given.items()})
    torch.testing.assert_close(loss, pro_loss(scores, present(scores), **given))
    (gradient,) = torch.autograd.grad(loss.sum(), longer)
    torch.testing.assert_close(gradient, pad(expected, (0, 2)))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("with_rewards", [True, False])
@pytest.mark.parametrize("garbage", [-1.0, math.inf, math.nan])
def test_one_response_or_none_is_0_with_a_zero_gradient(garbage: float, with_rewards: bool, count: int) -> None:
    scores = torch.tensor([[-2.0] * count + [garbage] * (3 - count)], requires_grad=True)
    mask = torch.arange(3)[None] < count
    loss = pro_loss(scores, mask, rewards=scores.detach().clone() if with_rewards else None)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.0] * 3]


@settings(deadline=None)
@given(SCORES, st.floats(-5.0, 5.0))
def test_a_shift_of_all_scores_changes_nothing(scores: list[float], shift: float) -> None:
    assert loss_of(*[s + shift for s in scores]) == pytest.approx(loss_of(*scores), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_right(form: dict[str, list[float]]) -> None:
    scores = torch.tensor([[-1.0, -3.0, -0.5, -2.0], [-2.0, -1.0, -4.0, 7.0]]).double().requires_grad_()
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    given = {name: group(*value).expand(2, 4) for name, value in form.items()}
    assert gradcheck(lambda s: pro_loss(s, mask, **given), (scores,))


def test_no_gradient_flows_into_rewards() -> None:
    scores, rewards = group(-1.0, -2.0).requires_grad_(), group(1.0, 0.0).requires_grad_()
    pro_loss(scores, present(scores), rewards=rewards).sum().backward()
    assert scores.grad is not None
    assert rewards.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_for_extreme_scores(dtype: torch.dtype) -> None:
    """Where exponentials under- or overflow, a lost round costs the difference, and a won one nothing."""
    scores = torch.tensor([[-1e4, 1e4], [1e4, -1e4], [-1e4, -1e4]], dtype=dtype, requires_grad=True)
    loss = pro_loss(scores, present(scores))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    torch.testing.assert_close(loss, torch.tensor([2e4, 0.0, math.log(2)], dtype=dtype))
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0], [0.0, 0.0], [-0.5, 0.5]], dtype=dtype))


@pytest.mark.parametrize("rewards", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_not_reduced_and_keep_their_dtype(dtype: torch.dtype, rewards: torch.dtype | None) -> None:
    for count in (3, 0):
        scores = torch.zeros(count, 2, dtype=dtype)
        given = None if rewards is None else torch.zeros(count, 2, dtype=rewards)
        loss = pro_loss(scores, present(scores), rewards=given)
        assert (loss.shape, loss.dtype) == ((count,), dtype)


def test_another_shape_is_refused() -> None:
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rewards \(2,\): expected the shape of mean_logps, \(2, 3\)"):
        pro_loss(scores, present(scores), rewards=torch.zeros(2))
    with pytest.raises(ValueError, match=r"ranks \(3,\): expected the shape of mean_logps, \(2, 3\)"):
        pro_loss(scores, present(scores), ranks=torch.zeros(3))
    with pytest.raises(ValueError, match=r"mean_logps \(2, 3\), mask \(3,\) of torch.bool: expected \(G, C\) both"):
        pro_loss(scores, torch.ones(3).bool())
