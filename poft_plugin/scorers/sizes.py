"""How large a model is."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """Parameters of a model, each counted once.

    Args:
        total: of the whole model.
        head: of its head (of the embeddings too, where the two are tied).
        body: what every token passes through: neither embeddings nor head.
    """

    total: int
    head: int
    body: int
