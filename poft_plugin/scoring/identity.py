"""What a score is, and what it depends on: its address in the cache."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROUNDING = 1e-6
"""How far above its bound a score may lie."""


@dataclass(frozen=True)
class Identity:
    """Everything that a score depends on, and nothing else (no batch size, ranks, run names or folders).

    Args:
        fields: JSON-able settings, with `auto` and null already resolved.
        highest: no score can be above it (0 for a log-probability); None where any number is possible. Part of no
            address: it follows from the rest.
    """

    fields: Mapping[str, Any]
    highest: float | None = None

    @property
    def bound(self) -> float:
        """`highest`, with room for rounding."""
        return math.inf if self.highest is None else self.highest + ROUNDING

    def dumps(self) -> str:
        """Canonical JSON."""
        return json.dumps(self.fields, sort_keys=True, ensure_ascii=False)

    @property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over the canonical JSON: the name of the scorer's folder in the cache."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Score:
    """A row's score.

    Args:
        key: row key.
        value: what the scorer measures: a causal LM the mean log-probability per response token, nats; a reward
            model the logit of its one label, of any sign.
        num_tokens: tokens that were measured: the response's; of a reward model the whole row's.
    """

    key: str
    value: float
    num_tokens: int
