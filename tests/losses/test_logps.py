"""Log-probabilities from hidden states, the shift and the mask, and means over sequences."""

import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from poft_plugin.losses import LogitTransform, mean_logps, plain_token_logps, token_logps
from poft_plugin.losses import logps as room

TOKENS, HIDDEN, VOCABULARY = 37, 24, 61
TRANSFORMS = [(1.0, None), (0.0625, None), (3.0, None), (1.0, 5.0), (0.5, 2.0)]
HALF = [torch.float32, torch.bfloat16]

Function = Callable[..., Tensor]


def problem(dtype: torch.dtype, *, bias: bool = True, seed: int = 0, tokens: int = TOKENS) -> dict[str, Any]:
    """Hidden states, head, targets and weights of the tokens' gradients: leaves, in one precision."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "hidden": leaf(tokens, HIDDEN),
        "weight": leaf(VOCABULARY, HIDDEN),
        "targets": torch.randint(VOCABULARY, (tokens,), generator=generator),
        "bias": leaf(VOCABULARY) if bias else None,
    }


def values_and_gradients(function: Function, inputs: dict[str, Any], **settings: Any) -> list[Tensor]:
    """Values, then gradients of hidden, weight and bias, each token weighted differently; in float64."""
    logps = function(**inputs, **settings)
    leaves = [inputs[name] for name in ("hidden", "weight", "bias") if inputs[name] is not None]
    weights = torch.linspace(-1, 2, len(logps), dtype=torch.float64)
    gradients = torch.autograd.grad((logps.double() * weights).sum(), leaves)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    return [logps.detach().double(), *(g.double() for g in gradients)]


def assert_no_worse_than_plain(
    function: Function,
    inputs: dict[str, Any],
    after: oracles.Logits = oracles.IDENTITY,
    plain: Function | None = None,
) -> None:
    """The error budget: the plain form's error in the same precision, against float64 on the same inputs.

    A quarter is left for another order of summation. The gradient of a bfloat16 weight is rounded twice, chunk by
    chunk and at the end, where the plain form's is rounded once.
    """
    exact = values_and_gradients(oracles.token_logps, inputs, after=after)
    plain_form = values_and_gradients(plain or oracles.plain_token_logps, inputs, after=after)
    ours = values_and_gradients(function, inputs)
    roundings = [1, 1, 2 if inputs["weight"].dtype == torch.bfloat16 else 1, 1]
    for mine, theirs, truth, times in zip(ours, plain_form, exact, roundings, strict=True):
        budget = 1.25 * math.sqrt(times) * (theirs - truth).square().mean().sqrt()
        assert budget > 0
        assert (mine - truth).square().mean().sqrt() <= budget


def test_values_by_hand() -> None:
    """Logits (0, log 3) and (log 5, 0): probabilities 1/4, 3/4 and 5/6, 1/6."""
    hidden = torch.tensor([[0.0, math.log(3)], [math.log(5), 0.0]], dtype=torch.float64)
    logps = token_logps(hidden, torch.eye(2, dtype=torch.float64), torch.tensor([1, 1]))
    torch.testing.assert_close(logps, torch.tensor([3 / 4, 1 / 6], dtype=torch.float64).log())


@pytest.mark.parametrize(("scale", "soft_cap"), TRANSFORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [token_logps, plain_token_logps])
def test_float64_equals_the_loop(function: Function, bias: bool, scale: float, soft_cap: float | None) -> None:
    inputs = problem(torch.float64, bias=bias)
    ours = values_and_gradients(function, inputs, transform=LogitTransform(scale, soft_cap))
    exact = values_and_gradients(oracles.token_logps, inputs, after=oracles.transform(scale, soft_cap))
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "soft_cap"), TRANSFORMS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tile", [(5, 3), (128, 4096)])
def test_lower_precision_is_no_worse_than_the_plain_form(
    dtype: torch.dtype, scale: float, soft_cap: float | None, tile: tuple[int, int]
) -> None:
    def ours(**inputs: Any) -> Tensor:
        return token_logps(**inputs, transform=LogitTransform(scale, soft_cap), tile=tile)

    assert_no_worse_than_plain(ours, problem(dtype, tokens=150), oracles.transform(scale, soft_cap))


@pytest.mark.parametrize("dtype", HALF)
def test_results_are_float32(dtype: torch.dtype) -> None:
    assert token_logps(**problem(dtype)).dtype == torch.float32


def test_autocast_takes_products_in_its_dtype_like_the_model_would() -> None:
    inputs = problem(torch.float32)

    def plain(**inputs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return oracles.plain_token_logps(**inputs)

    def ours(**inputs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return token_logps(**inputs)

    assert_no_worse_than_plain(ours, inputs, plain=plain)
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    torch.testing.assert_close(ours(**inputs), token_logps(**rounded), rtol=0, atol=0)
    assert ours(**inputs).dtype == torch.float32


def test_autocast_around_backward_changes_nothing() -> None:
    inputs = problem(torch.float32)
    outside = torch.autograd.grad(token_logps(**inputs).sum(), [inputs["hidden"], inputs["weight"]])
    logps = token_logps(**inputs).sum()
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(logps, [inputs["hidden"], inputs["weight"]])
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.tuples(st.integers(1, 25), st.integers(1, 20)), st.integers(0, 100))
def test_the_tile_changes_nothing(tokens: int, tile: tuple[int, int], seed: int) -> None:
    inputs = problem(torch.float64, tokens=tokens, seed=seed)
    whole = values_and_gradients(token_logps, inputs, tile=(1000, 1000))
    tiled = values_and_gradients(token_logps, inputs, tile=tile)
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_no_more_logits_than_a_tile_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, tile = [], room._Head.tile

    def counting(head: Any, hidden: Tensor, columns: slice) -> Tensor:
        logits: Tensor = tile(head, hidden, columns)
        assert logits.untyped_storage().nbytes() == 10 * (VOCABULARY - 1) * 4
        shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(room._Head, "tile", counting)
    token_logps(**problem(torch.float32), tile=(10, VOCABULARY - 1)).sum().backward()
    assert shapes == [(rows, columns) for rows in (10, 10, 10, 7) for columns in (VOCABULARY - 1, 1)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_tokens_the_head_gets_zero_gradients(dtype: torch.dtype) -> None:
    """A rank without response tokens takes part in gradient synchronisation."""
    logps, *gradients = values_and_gradients(token_logps, problem(dtype, tokens=0))
    assert logps.shape == (0,)
    assert [tuple(g.shape) for g in gradients] == [(0, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)]
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize(("scale", "soft_cap"), TRANSFORMS)
def test_gradcheck(scale: float, soft_cap: float | None) -> None:
    inputs = problem(torch.float64, tokens=3)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logps(
            hidden, weight, inputs["targets"], bias, transform=LogitTransform(scale, soft_cap), tile=(2, 3)
        )

    assert gradcheck(function, (inputs["hidden"], inputs["weight"], inputs["bias"]))


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_what_requires_a_gradient_gets_one(wanted: str) -> None:
    """A frozen head under LoRA, for one."""
    inputs, frozen = problem(torch.float64), problem(torch.float64)
    for name in {"hidden", "weight", "bias"} - {wanted}:
        frozen[name].requires_grad_(False)
    token_logps(**inputs).sum().backward()
    token_logps(**frozen).sum().backward()
    torch.testing.assert_close(frozen[wanted].grad, inputs[wanted].grad)
    assert all(frozen[name].grad is None for name in {"hidden", "weight", "bias"} - {wanted})


def test_a_frozen_head_costs_no_gradient_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(torch.float32)
    inputs["weight"].requires_grad_(False)
    products: list[tuple[int, ...]] = []
    add = room._add_product
    monkeypatch.setattr(room, "_add_product", lambda total, *parts: products.append(total.shape) or add(total, *parts))
    token_logps(**inputs).sum().backward()
    assert products == [inputs["hidden"].shape]


def test_a_second_derivative_is_an_error_not_a_wrong_number() -> None:
    inputs = problem(torch.float64)
    (gradient,) = torch.autograd.grad(token_logps(**inputs).sum(), inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_extreme_logits_stay_finite() -> None:
    weight, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    logps = token_logps(hidden, weight, targets)
    logps.sum().backward()
    torch.testing.assert_close(logps.detach(), torch.tensor([0.0, -2e4]))
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [-2.0]]))


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"),
    [
        ((2, 3, 4), (5, 4), (2, 3)),
        ((2, 3, 4), (5, 4), (2,)),
        ((3, 4), (5, 4), (2,)),
        ((3, 4), (5, 4), (3, 1)),
        ((3, 4), (4, 5), (3,)),
        ((3, 4), (0,), (3,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(hidden: Any, weight: Any, targets: Any) -> None:
    """The last one is a head's weight that ZeRO-3 has not gathered."""
    with pytest.raises(ValueError, match=r"hidden \(.*weight \(.*targets \(.*expected \(N, D\), \(V, D\), \(N,\)"):
        token_logps(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.long))


@pytest.mark.parametrize("tile", [(0, 5), (5, 0)])
def test_a_tile_of_nothing_is_refused(tile: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"tile: \(\d, \d\); tokens and vocabulary, at least 1 each"):
        token_logps(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.long), tile=tile)


def test_mean_logps_by_hand() -> None:
    """Sequences may be interleaved; one without tokens has mean 0 and count 0."""
    logps = torch.tensor([-1.0, -2.0, -4.0, -3.0], requires_grad=True)
    means, counts = mean_logps(logps, torch.tensor([0, 2, 0, 0]), 3)
    assert counts.tolist() == [3, 0, 1]
    torch.testing.assert_close(means, torch.tensor([-(1 + 4 + 3) / 3, 0.0, -2.0]))
    means.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([1 / 3, 1.0, 1 / 3, 1 / 3]))
    assert not counts.requires_grad


def test_mean_logps_of_no_tokens() -> None:
    means, counts = mean_logps(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2)
    assert (means.tolist(), counts.tolist()) == ([0, 0], [0, 0])
