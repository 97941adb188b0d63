"""Policies whose rotary frequencies follow the longest sequence of a batch: what may share a batch in training.

References are scored as each row alone (`scoring.rope`). The policy is trained in packs and batches, where transformers
takes one set of frequencies for all: by the highest position id, which restarts with each sequence of a pack.
"""

from collections.abc import Callable, Sequence

import numpy as np
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault

from poft_plugin.scoring.rope import RopeBounds, rope_bounds

APART = ", or let no rows share a batch (`sample_packing: false`, `micro_batch_size: 1`, `eval_batch_size: 1`)"


def varies(cfg: DictDefault) -> bool:
    """Whether the policy's frequencies depend on what shares a batch with a row."""
    bounds = _bounds(cfg)
    return bool(bounds.longrope) or bounds.dynamic is not None


def check_frequencies(
    cfg: DictDefault, lengths: Callable[[], Sequence[np.ndarray]], *, together: bool, name: str
) -> None:
    """Refuses rows that would be trained on, or evaluated, under frequencies that are not those of the row alone.

    Args:
        cfg: the host's config.
        lengths: gives the lengths of each row's sequences; those of one row always share a batch.
        together: whether rows share batches.
        name: of the set, in messages.

    Raises:
        ValueError: with how many rows there are, and the remedies.
    """
    if not varies(cfg):
        return
    bounds, rows = _bounds(cfg), lengths()
    # dynamic frequencies stay in the model until a short batch comes: no row is alone
    together = together or bounds.dynamic is not None
    if not any(_differ(bounds, batch) for batch in ([np.concatenate(rows)] if together and len(rows) else rows)):
        return
    bound = min((*bounds.longrope, *(() if bounds.dynamic is None else (bounds.dynamic,))))
    long = sum(int(row.max()) > bound for row in rows)
    apart = "" if bounds.dynamic is not None or any(len(row) > 1 for row in rows) else APART
    raise ValueError(
        f"base_model {cfg.base_model}: beyond {bound} tokens its rotary positions have other frequencies (dynamic NTK, "
        f"LongRoPE), for all that shares a batch. {long} of {len(rows)} rows of {name} are longer; beside them, the "
        "others would be trained as another model than they are scored with. Set "
        f"`sequence_len: {bound}`, which leaves the longer ones out{apart}"
    )


def _differ(bounds: RopeBounds, batch: np.ndarray) -> bool:
    """Whether sequences of these lengths have different frequencies."""
    return len({bounds.group(int(length)) for length in np.unique(batch)}) > 1


def _bounds(cfg: DictDefault) -> RopeBounds:
    return rope_bounds(load_model_config(cfg).get_text_config())
