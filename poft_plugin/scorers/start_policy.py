"""DPO's reference: the policy's own start weights, scored once before training, over the tokens that it trains on.

So no second model is in memory while the policy trains, with an adapter or without. Rows are known by their tokens, not
by their texts: the policy's template, its end-of-turn tokens and its labels are all in them.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from transformers import BitsAndBytesConfig

from poft_plugin.data.preparation import Rows
from poft_plugin.losses.logps import IGNORED
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring.identity import Identity
from poft_plugin.scoring.scorer import PreparedRow

CONTRACT = "causal LM, mean log-probability of the labels of given tokens, version 2"
KIND = "start policy"
TOKENS, LABELS = "input_ids", "labels"


@dataclass
class StartPolicyScorer(CausalLMScorer):
    """Scores token sequences with the policy's start weights.

    Args:
        settings: where the policy is, as a reference.
        checkpoint: the same, resolved.
        quantization: keywords of `BitsAndBytesConfig` that the policy is loaded with, or None.
    """

    quantization: dict[str, Any] | None = field(default=None, kw_only=True)

    @property
    def kind(self) -> str:
        """What it is in messages."""
        return KIND

    @property
    def attention(self) -> str | None:
        """As the policy's, whatever it leaves out: both are to be the same function."""
        return self.settings.attn_implementation

    @cached_property
    def identity(self) -> Identity:
        """What its scores depend on: neither tokenizer nor template, since rows are tokens."""
        return Identity(
            {
                "contract": CONTRACT,
                **self.checkpoint.identity,
                "dtype": str(self.dtype).removeprefix("torch."),
                "quantization": self.quantization,
                **self.stored_quantization,
            },
            highest=0.0,
        )

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """As the policy's."""
        return None if self.quantization is None else BitsAndBytesConfig(**self.quantization)

    @property
    def context_length(self) -> int | None:
        """No bound: rows over `sequence_len` are not asked for."""
        return None

    def render_row(self, rows: Rows, index: int) -> None:
        """Nothing: its rows are tokens already, the policy's own."""

    def prepare_row(self, rows: Rows, index: int) -> PreparedRow:
        """One of the rows of `token_rows`, as it is; the first token is predicted by nothing."""
        ids, labels = (np.asarray(rows.table[name][index].values) for name in (TOKENS, LABELS))
        counted = labels != IGNORED
        counted[0] = False
        return PreparedRow(rows.keys[index].as_py(), ids, counted)
