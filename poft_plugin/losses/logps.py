"""Log-probabilities of given tokens from hidden states: the only place that projects through a language-model head.

Axes: N predicted tokens, D hidden size, V vocabulary, B sequences. Log-probabilities are natural logs (nats).

The head of a current model maps 4 k hidden numbers to 128 k logits, and only response tokens need it. `token_logps`
takes the hidden states that predict them, walks through them a chunk at a time, keeps nothing of a chunk but its
log-probabilities and computes its logits again in backward. The plain form is kept beside it as the oracle.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax

IGNORED = -100
"""Label of a token that does not count, as everywhere in transformers."""

CHUNK_TOKENS = 128
"""Tokens whose logits exist at one time, at least. 128 x 128,256 logits in float32 are 63 MiB."""

CHUNK_LOGITS = 2**23
"""A small head takes more tokens at a time, up to so many logits: 32 MiB in float32."""

CACHED_LOGITS = 2**18
"""Logits that the cache of a CPU core keeps, 1 MiB in float32: the log-softmax goes through so many at a time."""


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
    chunk_tokens: int | None = None,
) -> Tensor:
    r"""`log softmax(transform(hidden @ weight.T + bias))[targets]`, never more than `chunk_tokens` rows of logits.

    Args:
        hidden: `(N, D)`: `hidden[n]` is what enters the head at the position *before* token n. Carries gradient.
        weight: `(V, D)`, the head's weight. Carries gradient where it requires it.
        targets: `(N,)`, integer token ids in `[0, V)`.
        bias: `(V,)` or None.
        transform: what the model does to its logits after the head.
        chunk_tokens: tokens per chunk; it changes memory, not the result. By default 128, with a small head as many as
            have `CHUNK_LOGITS` logits.

    Returns:
        `(N,)` in float32 (float64 for float64 inputs), nats.

    Raises:
        ValueError: if the shapes do not fit one another, or `chunk_tokens` is below 1.

    Examples:
        >>> logps = token_logps(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]))
        >>> bool(torch.isclose(logps, -torch.tensor([4.0]).log()).all())
        True

    Products are taken in the dtype that the model itself would use (the autocast dtype where autocast is on), the
    soft-max in float32, as transformers does. Gradients of the weight are summed over chunks in float32.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}: "
            "expected (N, D), (V, D), (N,)"
        )
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_TOKENS, CHUNK_LOGITS // max(1, len(weight)))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: {chunk_tokens}; at least 1")
    dtype = _compute_dtype(hidden)
    logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, transform, chunk_tokens, dtype
    )
    return logps


def sum_logps(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    r"""Per-sequence log-probability `sum_t logp_t` and token count `T` from flat token values.

    Args:
        logps: `(N,)`, nats. Carries gradient.
        sequence_ids: `(N,)`, the sequence (0 .. num_sequences - 1) that each token belongs to.
        num_sequences: B.

    Returns:
        `(B,)` sums in nats, and `(B,)` counts (same dtype). A sequence without tokens gets 0 and 0.

    Examples:
        >>> sums, counts = sum_logps(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1]), 2)
        >>> sums.tolist(), counts.tolist()
        ([-4.0, -5.0], [2.0, 1.0])
    """
    sums = logps.new_zeros(num_sequences).index_add(0, sequence_ids, logps)
    return sums, logps.new_zeros(num_sequences).index_add(0, sequence_ids, torch.ones_like(logps))


def mean_logps(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    r"""Per-sequence mean log-probability `(1 / T) * sum_t logp_t` and token count `T` from flat token values.

    Args:
        logps: `(N,)`, nats. Carries gradient.
        sequence_ids: `(N,)`, the sequence (0 .. num_sequences - 1) that each token belongs to.
        num_sequences: B.

    Returns:
        `(B,)` means in nats per token, and `(B,)` counts (same dtype). A sequence without tokens gets mean 0, count 0.

    Examples:
        >>> means, counts = mean_logps(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1]), 2)
        >>> means.tolist(), counts.tolist()
        ([-2.0, -5.0], [2.0, 1.0])
    """
    sums, counts = sum_logps(logps, sequence_ids, num_sequences)
    return sums / counts.clamp(min=1), counts


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)


class _Logits:
    """The head's logits, a chunk of rows after the other in one buffer: a chunk's are gone with the next.

    Fresh memory for every chunk costs more time than the soft-max: the system clears it page by page.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, transform: LogitTransform, *, dtype: torch.dtype, rows: int
    ):
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.logits = weight.new_empty((rows, len(weight)), dtype=_sum_dtype(dtype))
        self._transform, self._dtype = transform, dtype
        self._products = self.logits if dtype == self.logits.dtype else torch.empty_like(self.logits, dtype=dtype)

    def of(self, hidden: Tensor) -> Tensor:
        """Transformed logits `(n, V)` of rows `(n, D)`."""
        logits = self.logits[: len(hidden)]
        products = _project(hidden.to(self._dtype), self.weight, self.bias, self._products[: len(hidden)])
        return self._transform.apply(logits if self._products is self.logits else logits.copy_(products))


def _write_logps(logps: Tensor, logits: Tensor, targets: Tensor, block: Tensor) -> None:
    """Log-probabilities of the targets into `logps`, with log-softmax of as many rows at a time as `block` holds."""
    for start in range(0, len(logps), len(block)):
        rows = slice(start, start + len(block))
        normalised = block[: len(logps[rows])]
        torch.log_softmax(logits[rows], -1, out=normalised)
        logps[rows] = normalised.gather(-1, targets[rows, None]).squeeze(-1)


def _block(logits: Tensor) -> Tensor:
    """A buffer for some rows of logits: on a CPU as many as its caches hold, so that they never go to memory."""
    cached = torch.get_num_threads() * max(1, CACHED_LOGITS // max(1, logits.shape[1]))
    return torch.empty_like(logits[:cached] if logits.device.type == "cpu" else logits)


class _TokenLogps(torch.autograd.Function):
    """Chunked log-probabilities with their gradient written out: `d logp / d logits = onehot(target) - softmax`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        logps = hidden.new_empty(len(hidden), dtype=_sum_dtype(dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Logits(weight, bias, transform, dtype=dtype, rows=min(chunk_tokens, len(hidden)))
            block = _block(head.logits)
            for start in range(0, len(hidden), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                _write_logps(logps[rows], head.of(hidden[rows]), targets[rows], block)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.transform, ctx.chunk_tokens, ctx.dtype = transform, chunk_tokens, dtype
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        transform, step, dtype = ctx.transform, ctx.chunk_tokens, ctx.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sum_dtype = grad_outputs[0].dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Logits(weight, bias, transform, dtype=dtype, rows=min(step, len(hidden)))
            buffer = torch.empty_like(head.logits)
            for start in range(0, len(hidden), step):
                rows = slice(start, start + step)
                chunk = hidden[rows].to(dtype)
                logits, grad = head.of(chunk), buffer[: len(chunk)]
                torch.softmax(logits, -1, out=grad).neg_()
                grad.scatter_add_(-1, targets[rows, None], torch.ones_like(grad[:, :1]))
                grad *= grad_outputs[0][rows, None]
                grad = transform.backward(logits, grad)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad.to(dtype) @ head.weight).to(hidden.dtype)
                if grad_weight is not None:
                    _add_outer(grad_weight, grad, chunk)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip


def _add_outer(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """`total += grad.T @ hidden`, the product in hidden's dtype, the sum in total's."""
    if hidden.dtype == total.dtype:
        total.addmm_(grad.t(), hidden)
    else:
        total += grad.to(hidden.dtype).t() @ hidden
