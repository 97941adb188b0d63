"""A reward model that was just loaded, tried on a few rows: its scores here must be its own forward's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poft_plugin.scorers.pooling import right_padded
from poft_plugin.scorers.pretrained import PROBE_TOKENS, PROBE_TOLERANCE


def probe_sequences(vocabulary: int, special: set[int | None], longest: int | None, last: int | None) -> list[Any]:
    """Rows of two lengths, all of them words, and one that ends with another token.

    Args:
        vocabulary: ids are below it.
        special: ids that are no words.
        longest: tokens that the model can read, or None.
        last: the other token, padding for models that look for it; None for no such row.

    Examples:
        >>> [len(row) for row in probe_sequences(50, {0}, 8, last=0)]
        [8, 4, 8, 4, 8, 4, 8]
    """
    words = [number for number in range(vocabulary) if number not in special][:1000]
    long = min(PROBE_TOKENS, longest or PROBE_TOKENS)
    random = np.random.default_rng(0)
    rows = [random.choice(words, size) for size in (long, long // 2) * 3]
    return rows if last is None else [*rows, np.append(rows[0][:-1], last)]


def own_scores(model: Any, rows: Sequence[np.ndarray], padding: int | None, device: str) -> Tensor:
    """`(B,)`, by the model's own forward, of each row alone.

    Args:
        model: a sequence classifier.
        rows: token ids.
        padding: the id that its pooling is to pass over; None for none (OpenRLHF's models were trained without).
        device: where the model is.
    """
    config = model.config.get_text_config()
    known, config.pad_token_id = config.pad_token_id, padding
    with torch.inference_mode():
        logits = [model(input_ids=right_padded([row], 0)[0].to(device)).logits[:, 0] for row in rows]
    config.pad_token_id = known
    return torch.cat(logits).double()


def check_alike(alone: Tensor, others: Mapping[str, Tensor], dtype: torch.dtype, title: str) -> None:
    """Compares scores that must be the same up to rounding.

    Args:
        alone: `(B,)`, each row's score by itself.
        others: the same rows' scores, by what is different about them.
        dtype: of the weights.
        title: the model in errors.

    Raises:
        ValueError: if they differ.
    """
    allowed = PROBE_TOLERANCE[dtype] * float(alone.abs().max())
    for what, other in others.items():
        worst = float((alone - other).abs().max())
        if not worst <= allowed:
            raise ValueError(
                f"{title}: a row's score differs by {worst:.3g} {what} (allowed: {allowed:.3g}, in "
                f"{str(dtype).removeprefix('torch.')}); what its head does is not known here. This architecture "
                "cannot be used"
            )
