"""Attention over packed sequences on a CPU: one causal call per sequence instead of a mask over the whole pack.

PyTorch's attention has no kernel for packs on a CPU. transformers then writes a mask of T x T for a pack of T tokens,
and attention takes the time of one sequence of T tokens, however short the packed ones are. Here the pack is cut at its
sequences: the work is that of the sequences alone, and no mask is written. Everything that is not a plain pack (padding
masks, sliding windows, prefixes that see each other, caches) goes the way of `sdpa`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "poft_packed_sdpa"
"""What `attn_implementation` is called in transformers."""


def use_packed_attention(model: nn.Module) -> bool:
    """Gives a model on a CPU that attends with `sdpa` the attention of this module; leaves any other as it is.

    Args:
        model: a transformers model, or a PEFT model around one.

    Returns:
        Whether it was given.
    """
    found: Any = model
    inner = found.get_base_model() if hasattr(found, "get_base_model") else found
    on_cpu = all(parameter.device.type == "cpu" for parameter in inner.parameters())
    if not on_cpu or inner.config.get_text_config()._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    inner.set_attn_implementation(NAME)
    return True


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Where sequences start, `(R, T)` booleans, if the mask says nothing else; otherwise what `sdpa` would be given.

    Args:
        batch_size: R.
        q_length: T, the tokens that attend.
        kv_length: the tokens that are attended to; T in training.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: `(row, head, query, key)` to whether the query sees the key, elementwise.
        attention_mask: `(R, T)`, a padding mask, or None.
        use_vmap: whether the mask function is somebody's own.
        device: of the mask.
        **kwargs: what else `sdpa` is told.
    """
    plain = attention_mask is None and not use_vmap and q_length == kv_length and q_offset == kv_offset == 0
    starts = _starts(mask_function, batch_size, q_length, device) if plain and q_length > 1 else None
    if starts is not None:
        return starts
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    return mask


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence, `(R, T, heads, size)`.

    Args:
        module: the layer that asks.
        query: `(R, heads, T, size)`.
        key: `(R, key-value heads, T, size)`.
        value: `(R, key-value heads, T, size)`.
        attention_mask: what `packed_mask` returned.
        dropout: of attention weights.
        scaling: of the products; None for one over the square root of the size.
        **kwargs: what else `sdpa` is told.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    assert kwargs.get("position_bias") is None, "a bias on positions is not known here"
    rows = []
    for row, starts in enumerate(attention_mask):
        lengths = sequence_lengths(starts)
        parts = (tensor[row : row + 1].split(lengths, dim=2) for tensor in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        found = [
            scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
            for q, k, v in zip(*parts, strict=True)
        ]
        rows.append(torch.cat(found, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def sequence_lengths(starts: Tensor) -> list[int]:
    """Tokens of each sequence of a row, from where they start, `(T,)`."""
    places = starts.nonzero().squeeze(-1).tolist()
    return [end - start for start, end in zip(places, [*places[1:], len(starts)], strict=True)]


def _starts(mask_function: Callable[..., Tensor], rows: int, length: int, device: torch.device | str) -> Tensor | None:
    """Where sequences start, or None where tokens see more or less than all that comes before them in theirs.

    A token that does not see the one before it starts a sequence. Within one, the last token must see the first (no
    window) and no token the next one (causal); no start may see the first token of the row.
    """
    row, here = torch.arange(rows, device=device)[:, None], torch.arange(length, device=device)[None, :]

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return mask_function(row, torch.zeros_like(row), query, key).expand(rows, query.shape[1])

    starts = torch.ones(rows, length, dtype=torch.bool, device=device)
    starts[:, 1:] = ~sees(here[:, 1:], here[:, :-1])
    first = torch.where(starts, here, 0).cummax(1).values
    far = sees(here.expand(rows, -1), first)
    beyond = sees(here.expand(rows, -1), torch.zeros_like(first)) & (first > 0)
    if not bool(far.all()) or bool(beyond.any()) or bool(sees(here[:, :-1], here[:, 1:]).any()):
        return None
    return starts
