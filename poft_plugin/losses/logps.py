"""Log-probabilities of given tokens from hidden states: the only place that projects through a language-model head.

Axes: N predicted tokens, D hidden size, V vocabulary, B sequences. Log-probabilities are natural logs (nats).

The head of a current model maps 4 k hidden numbers to 128 k logits, and only response tokens need it. `token_logps`
takes the hidden states that predict them and never has more than a tile of their logits: some tokens by some of the
vocabulary. The soft-max's normaliser is summed up over the tiles of a token and kept; everything else of a tile is gone
with the next, and backward computes its logits again. The plain form is kept beside it as the oracle.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax

IGNORED = -100
"""Label of a token that does not count, as everywhere in transformers."""

CPU_TILE = (1024, 2048)
"""Tokens and vocabulary of a tile where none is asked for: 8 MiB of logits in float32, near what CPU caches hold."""

GPU_TILE = (4096, 4096)
"""The same on a GPU, 64 MiB: large products, few kernels."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: `soft_cap * tanh(scale * logits / soft_cap)`.

    Args:
        scale: factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        soft_cap: bound of a tanh soft-cap in logits (Gemma 2), or None.
    """

    scale: float = 1.0
    soft_cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Transforms logits `(..., V)`."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.soft_cap is None else torch.tanh(scaled / self.soft_cap) * self.soft_cap

    def backward(self, transformed: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, from the transformed logits and the gradient at them; in place."""
        if self.soft_cap is not None:
            grad *= 1 - (transformed / self.soft_cap) ** 2
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


IDENTITY = LogitTransform()


def plain_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, transform: LogitTransform = IDENTITY
) -> Tensor:
    """The literal form of `token_logps`: all logits, a log-softmax over them, one gathered. The oracle in tests."""
    logits = transform.apply(
        linear(hidden, weight, bias).float() if hidden.dtype != torch.float64 else linear(hidden, weight, bias)
    )
    return log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    transform: LogitTransform = IDENTITY,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    r"""`log softmax(transform(hidden @ weight.T + bias))[targets]`, with a tile of the logits at a time.

    Args:
        hidden: `(N, D)`: `hidden[n]` is what enters the head at the position *before* token n. Carries gradient.
        weight: `(V, D)`, the head's weight. Carries gradient where it requires it.
        targets: `(N,)`, integer token ids in `[0, V)`.
        bias: `(V,)` or None.
        transform: what the model does to its logits after the head.
        tile: tokens and vocabulary of a tile, at most; it changes memory, not the result. By default `CPU_TILE` or
            `GPU_TILE`.

    Returns:
        `(N,)` in float32 (float64 for float64 inputs), nats.

    Raises:
        ValueError: if the shapes do not fit one another, or a tile has a size below 1.

    Examples:
        >>> logps = token_logps(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]))
        >>> bool(torch.isclose(logps, -torch.tensor([4.0]).log()).all())
        True

    Products are taken in the dtype that the model itself would use (the autocast dtype where autocast is on), the
    soft-max in float32, as transformers does. Gradients are summed over tiles in float32.
    """
    logps, _ = token_logps_with_direction(hidden, weight, targets, bias, None, transform=transform, tile=tile)
    return logps


def token_logps_with_direction(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | None,
    *,
    transform: LogitTransform = IDENTITY,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""`token_logps`, and `W^T c` with it: by itself its gradient would be a second one as large as the weight.

    Args:
        hidden: as in `token_logps`.
        weight: likewise.
        targets: likewise.
        bias: likewise.
        coefficients: `(V,)`, c, in float32 (float64 for float64 inputs). Treated as a constant. None for no second
            result.
        transform: as in `token_logps`; the second result knows nothing of it.
        tile: likewise.

    Returns:
        `(N,)` log-probabilities, and `(D,)` or None.

    Raises:
        ValueError: as `token_logps`.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}: "
            "expected (N, D), (V, D), (N,)"
        )
    if tile is None:
        tile = CPU_TILE if hidden.device.type == "cpu" else GPU_TILE
    if min(tile) < 1:
        raise ValueError(f"tile: {tile}; tokens and vocabulary, at least 1 each")
    tile = max(1, min(tile[0], len(hidden))), min(tile[1], len(weight))
    found: tuple[Tensor, Tensor | None] = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, coefficients, transform, tile, _compute_dtype(hidden)
    )
    return found


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class _Head:
    """The head's logits, a tile after the other in one buffer: a tile's are gone with the next.

    Fresh memory for every tile costs more time than the soft-max: the system clears it page by page.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, how: LogitTransform, *, dtype: torch.dtype, tile: tuple[int, int]
    ):
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self._transform, self._dtype = how, dtype
        self._logits = weight.new_empty(tile, dtype=_sum_dtype(dtype)).flatten()
        same = dtype == self._logits.dtype
        self._products = self._logits if same else torch.empty_like(self._logits, dtype=dtype)

    def tile(self, hidden: Tensor, columns: slice) -> Tensor:
        """Transformed logits `(n, columns)` of rows `(n, D)`, in the dtype of sums."""
        shape = len(hidden), columns.stop - columns.start
        logits, products = (flat[: shape[0] * shape[1]].view(shape) for flat in (self._logits, self._products))
        rows, weight = hidden.to(self._dtype), self.weight[columns]
        if self.bias is None:
            torch.mm(rows, weight.t(), out=products)
        else:
            torch.addmm(self.bias[columns], rows, weight.t(), out=products)
        return self._transform.apply(logits if self._products is self._logits else logits.copy_(products))


class _TokenLogps(torch.autograd.Function):
    """Tiled log-probabilities with their gradient written out: `d logp / d logits = onehot(target) - softmax`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficients: Tensor | None,
        transform: LogitTransform,
        tile: tuple[int, int],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        picked = hidden.new_zeros(len(hidden), dtype=_sum_dtype(dtype))
        highest, total = torch.full_like(picked, -torch.inf), torch.zeros_like(picked)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, transform, dtype=dtype, tile=tile)
            for rows in _slices(len(hidden), tile[0]):
                for columns in _slices(len(weight), tile[1]):
                    logits = head.tile(hidden[rows], columns)
                    picked[rows] += _at_targets(logits, targets[rows], columns)
                    _sum_exponentials(logits, highest[rows], total[rows])
            direction = None if coefficients is None else _combination(weight, coefficients, tile[1])
        ctx.save_for_backward(hidden, weight, bias, targets, coefficients, highest, total)
        ctx.transform, ctx.tile, ctx.dtype = transform, tile, dtype
        return picked - highest - total.log(), direction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, coefficients, highest, total = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        sums = [
            None if given is None or not wants else torch.zeros_like(given, dtype=grad_outputs[0].dtype)
            for given, wants in zip((hidden, weight, bias), wanted, strict=True)
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, ctx.transform, dtype=ctx.dtype, tile=ctx.tile)
            for rows in _slices(len(hidden), ctx.tile[0]):
                chunk = hidden[rows].to(ctx.dtype)
                for columns in _slices(len(weight), ctx.tile[1]):
                    logits = head.tile(chunk, columns)
                    grad = (logits - highest[rows, None]).exp_().div_(total[rows, None]).neg_()
                    _add_at_targets(grad, targets[rows], columns)
                    grad = ctx.transform.backward(logits, grad.mul_(grad_outputs[0][rows, None]))
                    _add_gradients(sums, grad, rows, columns, chunk=chunk, weight=head.weight)
            if coefficients is not None and sums[1] is not None:
                sums[1].addr_(coefficients, grad_outputs[1])
        given = (
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, (hidden, weight, bias), strict=True)
        )
        return (*given, None, None, None, None, None)


def _combination(weight: Tensor, coefficients: Tensor, step: int) -> Tensor:
    """`(D,)`: `weight.T @ coefficients`, some rows at a time in the coefficients' dtype."""
    total = coefficients.new_zeros(weight.shape[1])
    for rows in _slices(len(weight), step):
        total += weight[rows].to(total.dtype).t() @ coefficients[rows]
    return total


def _sum_exponentials(logits: Tensor, highest: Tensor, total: Tensor) -> None:
    """Takes a tile into the normaliser `total * exp(highest)`; the tile's logits are lost.

    Two numbers, since one, the logarithm of the sum, would round every probability by its own size.
    """
    higher = torch.maximum(highest, logits.amax(-1))
    total.mul_((highest - higher).exp_()).add_(logits.sub_(higher[:, None]).exp_().sum(-1))
    highest.copy_(higher)


def _at_targets(logits: Tensor, targets: Tensor, columns: slice) -> Tensor:
    """`(n,)` logits of the targets that lie in these columns, 0 for the others."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    places = torch.where(inside, targets - columns.start, 0)
    return torch.where(inside, logits.gather(-1, places[:, None]).squeeze(-1), 0)


def _add_at_targets(grad: Tensor, targets: Tensor, columns: slice) -> None:
    """Adds 1 at the targets that lie in these columns."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    places = torch.where(inside, targets - columns.start, 0)
    grad.scatter_add_(-1, places[:, None], inside[:, None].to(grad.dtype))


def _add_gradients(
    sums: list[Tensor | None], grad: Tensor, rows: slice, columns: slice, *, chunk: Tensor, weight: Tensor
) -> None:
    """Adds a tile's part to the gradients of hidden states, weight and bias: products in their dtype, sums in sums'."""
    of_hidden, of_weight, of_bias = sums
    products = grad.to(chunk.dtype)
    if of_bias is not None:
        of_bias[columns] += grad.sum(0)
    if of_hidden is not None:
        _add_product(of_hidden[rows], products, weight[columns])
    if of_weight is not None:
        _add_product(of_weight[columns], products.t(), chunk)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
