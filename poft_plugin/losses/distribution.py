"""DEFT's distribution reward: how far the policy's output leans towards the tokens of preferred responses.

Axes: B sequences, T tokens of a sequence, N predicted tokens, D hidden size, V vocabulary. Log-probabilities are
natural logs (nats). The discrepancy `q` (the paper's Q_diff) has a number for each token of the vocabulary; their sum
is 0.
Paper: "DEFT: Distribution-guided Efficient Fine-Tuning for Human Alignment".

The paper weighs log-probabilities with q. As q sums to 0, the soft-max's normaliser, which is the same for all tokens
of a vocabulary, drops out: logits do, and a linear head lets q pass through its weight first, once for all tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from poft_plugin.losses.logps import IDENTITY, LogitTransform

CHUNK_ELEMENTS = 2**24
"""Numbers that are cast to the precision of the sums at one time: 64 MiB in float32."""


def distribution_reward(logits: Tensor, mask: Tensor, discrepancy: Tensor) -> Tensor:
    r"""`R_dis = sum_i q_i * mean_t log softmax(z_t)_i` (Eq. 16, 17), which is `mean_t (q . z_t)`.

    Args:
        logits: `(B, T, V)`, what the model gives after all that it does to its logits: `logits[:, t]` predicts token
            t, nothing is shifted here. Carries gradient.
        mask: `(B, T)` booleans, True at the response's tokens.
        discrepancy: `(V,)`, sums to 0. Treated as a constant.

    Returns:
        `(B,)`, nats, in float32 (float64 for float64 inputs). A sequence without tokens gets 0.

    Raises:
        ValueError: if the shapes do not fit one another or the mask is not boolean.

    Examples:
        >>> logits = torch.tensor([[[1.0, 3.0], [2.0, 0.0]]])
        >>> distribution_reward(logits, torch.tensor([[True, False]]), torch.tensor([-0.5, 0.5])).tolist()
        [1.0]

    Departs from the paper in nothing but the order of the sums.
    """
    if logits.shape != (*mask.shape, *discrepancy.shape) or logits.ndim != 3 or mask.dtype != torch.bool:
        raise ValueError(
            f"logits {tuple(logits.shape)}, mask {tuple(mask.shape)} of {mask.dtype}, discrepancy "
            f"{tuple(discrepancy.shape)}: expected (B, T, V), (B, T) of torch.bool, (V,)"
        )
    weights = discrepancy.detach().to(logits.device, _sum_dtype(logits))
    scores: Tensor = _Products.apply(logits, weights)  # type: ignore[no-untyped-call]
    return scores.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def distribution_scores(
    hidden: Tensor,
    weight: Tensor,
    discrepancy: Tensor,
    bias: Tensor | None = None,
    *,
    transform: LogitTransform = IDENTITY,
    direction: Tensor | None = None,
) -> Tensor:
    r"""Each token's part in the reward from hidden states, `q . z_n = scale * (h_n . (W^T q) + q . bias)` (Eq. 16, 17).

    `R_dis` of a sequence is the mean over its tokens (`mean_logps` takes it). There are no logits: the head's weight is
    read once, whatever the number of tokens.

    Args:
        hidden: `(N, D)`: `hidden[n]` is what enters the head at the position *before* token n. Carries gradient.
        weight: `(V, D)`, the head's weight. Carries gradient where it requires it: of rank one, in its own dtype.
        discrepancy: `(V,)`, sums to 0. Treated as a constant.
        bias: `(V,)` or None. Carries gradient where it requires it.
        transform: what the model does to its logits after the head; a factor only.
        direction: `(D,)`, `W^T q` where it is there already (`token_logps_with_direction`): the weight's gradient goes
            through it.

    Returns:
        `(N,)`, nats, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: if the shapes do not fit one another, or the transform has a soft-cap, which is not linear.

    Examples:
        >>> hidden, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> distribution_scores(hidden, weight, torch.tensor([-0.5, 0.5])).tolist()
        [0.5]

    Products and sums are taken in float32 whatever the inputs' dtype and autocast say: q is a small difference, and in
    bfloat16 would no longer sum to 0.
    """
    if transform.soft_cap is not None:
        raise ValueError(
            f"soft_cap: {transform.soft_cap}; the distribution reward goes through the head's weight, which holds only "
            "for logits without a soft-cap"
        )
    shapes = [tuple(tensor.shape) for tensor in (hidden, weight, discrepancy)]
    if hidden.ndim != 2 or discrepancy.ndim != 1 or weight.shape != (*discrepancy.shape, hidden.shape[1]):
        raise ValueError(
            f"hidden {shapes[0]}, weight {shapes[1]}, discrepancy {shapes[2]}: expected (N, D), (V, D), (V,)"
        )
    constants = discrepancy.detach().to(weight.device, _sum_dtype(hidden, weight))
    if direction is None:
        direction = _Combination.apply(weight, constants)  # type: ignore[no-untyped-call]
    scores: Tensor = _Products.apply(hidden[None], direction)[0]  # type: ignore[no-untyped-call]
    if bias is not None:
        scores = scores + (bias.to(constants.dtype) * constants).sum()
    return scores * transform.scale


class _Products(torch.autograd.Function):
    """`rows @ vector` for rows `(B, T, K)` and a vector `(K,)`, in the vector's dtype. Keeps no copy of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, vector: Tensor) -> Tensor:
        ctx.save_for_backward(rows, vector)
        products = vector.new_empty(rows.shape[:-1])
        with torch.autocast(rows.device.type, enabled=False):
            for block, result in zip(rows, products, strict=True):
                for part in _parts(block):
                    result[part] = block[part].to(vector.dtype) @ vector
        return products

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, vector = ctx.saved_tensors
        needs_rows, needs_vector = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_vector = torch.zeros_like(vector) if needs_vector else None
        for number, (block, grad) in enumerate(zip(rows, grad_outputs[0], strict=True)):
            if grad_rows is not None:
                _outer(grad_rows[number], grad, vector)
            if grad_vector is not None:
                grad_vector += _combination(block, grad)
        return grad_rows, grad_vector


class _Combination(torch.autograd.Function):
    """`rows.T @ coefficients` for rows `(V, D)` and constants `(V,)`, in the constants' dtype."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, coefficients: Tensor) -> Tensor:
        # not the rows, which backward does not need: a sharded weight may be gone by then
        ctx.save_for_backward(coefficients)
        ctx.dtype = rows.dtype
        return _combination(rows, coefficients)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (coefficients,) = ctx.saved_tensors
        grad = coefficients.new_empty(len(coefficients), len(grad_outputs[0]), dtype=ctx.dtype)
        return _outer(grad, coefficients, grad_outputs[0]), None


def _sum_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of rows `(N, K)` that hold CHUNK_ELEMENTS numbers at most, and one row at least."""
    step = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _combination(rows: Tensor, coefficients: Tensor) -> Tensor:
    """`rows.T @ coefficients`, a chunk of rows at a time in the coefficients' dtype."""
    total = coefficients.new_zeros(rows.shape[1])
    with torch.autocast(rows.device.type, enabled=False):
        for part in _parts(rows):
            total += rows[part].to(total.dtype).t() @ coefficients[part]
    return total


def _outer(result: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Fills `result` with `column * row`, rounded to its dtype once, a chunk of rows at a time."""
    for part in _parts(result):
        result[part] = column[part, None] * row
    return result
