"""What a scorer is: it turns rows into numbers, and says exactly what it is, so that its scores can be cached."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from poft_plugin.data.preparation import Rows
from poft_plugin.data.render import Rendered
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.identity import Identity, Score


@dataclass(frozen=True)
class PreparedRow:
    """A row as token ids, compact enough to hold a whole data set.

    Args:
        key: row key.
        input_ids: int32 `(T,)`.
        counted: bool `(T,)`, the response's tokens: those whose log-probability counts.
        skipped: roles of turns of the prompt that the model's template leaves out.
        lacks_end: the policy is trained on a token that ends the response, and the template writes none.
    """

    key: str
    input_ids: np.ndarray
    counted: np.ndarray
    skipped: tuple[str, ...] = ()
    lacks_end: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


class Scorer(Protocol):
    """Scores rows with one model. Preparing needs the tokenizer only; `load` brings the weights."""

    @property
    def name(self) -> str:
        """Short name in tables."""
        ...

    @property
    def kind(self) -> str:
        """What it is in messages, such as `reference`."""
        ...

    @property
    def checkpoint(self) -> Checkpoint:
        """Where its weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        ...

    @property
    def identity(self) -> Identity:
        """What its scores depend on."""
        ...

    @property
    def context_length(self) -> int | None:
        """Longest row it can read, in tokens; None for no bound."""
        ...

    @property
    def drops_long_rows(self) -> bool:
        """Whether rows longer than that are dropped; an error otherwise."""
        ...

    @property
    def devices(self) -> int:
        """Accelerators that one copy takes."""
        ...

    def batch_group(self, length: int) -> Hashable:
        """Rows of this many tokens share batches only with rows of the same group; most models know one group."""
        ...

    def prepare_row(self, rows: Rows, index: int) -> PreparedRow:
        """Tokenizes one of the rows, whatever its length; `RowError` where it cannot be scored."""
        ...

    def render_row(self, rows: Rows, index: int) -> Rendered | None:
        """One of the rows as the model reads it, counted tokens marked; None where a row is tokens already."""
        ...

    def tally(self, prepared: Sequence[PreparedRow]) -> dict[str, int]:
        """What preparing did to these rows that a user should know, as numbers that add up over processes."""
        ...

    def remark(self, counts: Mapping[str, int]) -> str | None:
        """The same in words, of such numbers; None for nothing."""
        ...

    def num_parameters(self) -> tuple[int, int]:
        """Parameters of the model, and of its head, from the config alone."""
        ...

    def flops(self, tokens: int, response_tokens: int) -> float:
        """Of one forward over rows of so many tokens in all."""
        ...

    def load(self, device: str) -> None:
        """Loads the weights."""
        ...

    @property
    def pack_length(self) -> int:
        """Tokens of the longest row that the loaded model reads in a pack, prefixes once; 0 where it reads none."""
        ...

    def score(self, batch: Sequence[PreparedRow]) -> list[Score]:
        """Scores one batch of prepared rows."""
        ...

    def unload(self) -> None:
        """Frees the weights."""
        ...
