"""Rotary positions whose frequencies transformers picks by the longest row of a batch: what must not share a batch.

LongRoPE takes its short or its long factors, dynamic NTK scales beyond the trained context, both by the batch's last
position. A row's score must be that of the row alone.
"""

from typing import Any, NamedTuple


class RopeBounds(NamedTuple):
    """Lengths at which frequencies change.

    Args:
        longrope: `original_max_position_embeddings` of layers with LongRoPE: longer rows take the long factors.
        dynamic: tokens beyond which each length has frequencies of its own; None without dynamic NTK.
    """

    longrope: tuple[int, ...]
    dynamic: int | None

    def group(self, length: int) -> tuple[int, int]:
        """What rows of one batch must have in common.

        Examples:
            >>> [RopeBounds((64,), None).group(length) for length in (3, 64, 65, 900)]
            [(0, 0), (0, 0), (1, 0), (1, 0)]
            >>> [RopeBounds((), 64).group(length) for length in (3, 64, 65, 900)]
            [(0, 0), (0, 0), (0, 65), (0, 900)]
        """
        beyond = self.dynamic is not None and length > self.dynamic
        return sum(length > bound for bound in self.longrope), length if beyond else 0

    def forgets(self, length: int) -> bool:
        """Whether such a row could meet frequencies that a longer one left behind: the model only forgets below."""
        return self.dynamic is not None and length >= self.dynamic


def rope_bounds(config: Any) -> RopeBounds:
    """The bounds of a model.

    Args:
        config: transformers' config of its text part. Kinds of layers may have parameters of their own.

    Examples:
        >>> from transformers import LlamaConfig
        >>> rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        >>> rope_bounds(LlamaConfig(max_position_embeddings=128, rope_parameters=rope))
        RopeBounds(longrope=(), dynamic=128)
    """
    stored = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = [stored, *(value for value in stored.values() if isinstance(value, dict))]
    kinds = [(str(layer.get("rope_type") or layer.get("type")), layer) for layer in layers]
    context = getattr(config, "max_position_embeddings", None)
    longrope = {
        int(layer.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        for kind, layer in kinds
        if kind in ("longrope", "su")
    }
    is_dynamic = any("dynamic" in kind for kind, _ in kinds)
    return RopeBounds(tuple(sorted(longrope)), context if is_dynamic else None)
