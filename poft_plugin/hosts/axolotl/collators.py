"""The host's collators inside our batch layout."""

from typing import Any

from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq

from poft_plugin.data.collate import MethodCollator
from poft_plugin.data.columns import ROW_INDEX


def host_collator(cfg: Any, columns: tuple[str, ...], *, is_eval: bool) -> type[MethodCollator]:
    """A collator class that the host constructs with its tokenizer and padding settings.

    Args:
        cfg: the host's config.
        columns: per-sequence columns of the method.
        is_eval: for the evaluation set, which is never packed.
    """
    packed = bool(cfg.sample_packing) and not is_eval
    tokens = V2BatchSamplerDataCollatorForSeq2Seq if packed else DataCollatorForSeq2Seq

    class HostCollator(MethodCollator):
        """`MethodCollator` over the collator that the host would have used."""

        def __init__(self, tokenizer: Any, **kwargs: Any) -> None:
            super().__init__(tokens(tokenizer, **kwargs), (*columns, ROW_INDEX), tokenizer.padding_side)

    return HostCollator
