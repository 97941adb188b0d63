"""Rows of differing lengths as one batch, and one vector per row out of their hidden states. Padding never counts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


def right_padded(rows: Sequence[np.ndarray], filler: int) -> tuple[Tensor, Tensor]:
    """A batch of rows, padded on the right.

    Args:
        rows: token ids, `(T,)` each.
        filler: the id of padding; any one will do, since the mask tells it from the rows.

    Returns:
        `(B, L)` ids, and `(B, L)` mask, 1 on real tokens.

    Examples:
        >>> ids, mask = right_padded([np.array([5, 6, 7]), np.array([8])], filler=7)
        >>> ids.tolist(), mask.tolist()
        ([[5, 6, 7], [8, 7, 7]], [[1, 1, 1], [1, 0, 0]])
    """
    shape = len(rows), max(map(len, rows))
    ids, mask = np.full(shape, filler, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def last_hidden(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden state of each row's last real token, found by its position and never by its id.

    Args:
        hidden: `(B, L, D)`.
        mask: `(B, L)`, 1 on real tokens, padding on the right.

    Returns:
        `(B, D)`.

    Examples:
        >>> hidden = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
        >>> last_hidden(hidden, torch.tensor([[1, 1, 0], [1, 1, 1]])).flatten().tolist()
        [2.0, 6.0]
    """
    mask = mask.to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]


def pooled_hidden(hidden: Tensor, ids: Tensor, mask: Tensor, padding: int | None) -> Tensor:
    """Hidden state that transformers' sequence classifiers pool from a row alone: its last token that is no padding.

    They know padding by its id. Where a row ends with that token (a padding token that is the end-of-turn token, as
    TRL sets it), they were trained on the token before, and it is that one here; where nothing else is in a row, the
    first.

    Args:
        hidden: `(B, L, D)`.
        ids: `(B, L)`.
        mask: `(B, L)`, 1 on a row's tokens, padding on the right.
        padding: `pad_token_id` of the config; None where it names none: the row's last token.

    Returns:
        `(B, D)`.

    Examples:
        >>> hidden = torch.arange(8.0).view(2, 4, 1)
        >>> ids, mask = torch.tensor([[5, 6, 2, 2], [5, 6, 7, 8]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
        >>> [pooled_hidden(hidden, ids, mask, padding).flatten().tolist() for padding in (2, None)]
        [[1.0, 6.0], [2.0, 6.0]]
    """
    counted = mask.bool() if padding is None else mask.bool() & (ids != padding)
    positions = (torch.arange(ids.shape[1], device=ids.device) * counted).argmax(dim=1).to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), positions]


def pooled_position(ids: np.ndarray, padding: int | None) -> int:
    """The position that `pooled_hidden` takes in one row.

    Examples:
        >>> [pooled_position(np.array([5, 6, 2]), padding) for padding in (2, None)]
        [1, 2]
    """
    counted = np.flatnonzero(np.ones(len(ids), bool) if padding is None else ids != padding)
    return int(counted[-1]) if len(counted) else 0


def mean_hidden(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row's hidden states over its real tokens.

    Args:
        hidden: `(B, L, D)`.
        mask: `(B, L)`, 1 on real tokens.

    Returns:
        `(B, D)`, float32.

    Examples:
        >>> hidden = torch.tensor([[[1.0], [2.0], [float("nan")]], [[4.0], [5.0], [6.0]]])
        >>> mean_hidden(hidden, torch.tensor([[1, 1, 0], [1, 1, 1]])).flatten().tolist()
        [1.5, 5.0]
    """
    real = mask.to(hidden.device).bool()[:, :, None]
    return hidden.float().masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)


def linear(pooled: Tensor, head: nn.Linear) -> Tensor:
    """`pooled @ weight.T + bias` in float64: scores finer than the steps of a 16-bit float.

    Args:
        pooled: `(B, D)`.
        head: a linear layer of D inputs.

    Returns:
        `(B, outputs)`, float64.

    Examples:
        >>> head = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
        >>> head.weight.data.fill_(1.0).dtype
        torch.bfloat16
        >>> linear(torch.tensor([[1.0, 2.0**-12]]), head).item() - 1.0 == 2.0**-12
        True
    """
    logits = pooled.to(head.weight.device).double() @ head.weight.double().T
    return logits if head.bias is None else logits + head.bias.double()


def right_end(ids: np.ndarray, length: int, *, keep_first: bool) -> np.ndarray:
    """Positions of the last `length` tokens, the first one of the row in the place of the first of these if asked.

    Examples:
        >>> [right_end(np.arange(7), 3, keep_first=keep).tolist() for keep in (False, True)]
        [[4, 5, 6], [0, 5, 6]]
    """
    positions = np.arange(len(ids) - length, len(ids))
    positions[:1] *= not keep_first
    return positions
