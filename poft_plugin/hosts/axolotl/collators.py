"""The host's collators inside our batch layout."""

from typing import Any

from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq

from poft_plugin.data.collate import MethodCollator
from poft_plugin.data.columns import ROW_INDEX, SCORES
from poft_plugin.hosts.axolotl.rotary import varies
from poft_plugin.methods import Method


def host_collator(cfg: Any, method: Method, *, is_eval: bool) -> type[MethodCollator]:
    """A collator class that the host constructs with its tokenizer and padding settings.

    Args:
        cfg: the host's config.
        method: whose columns the batches carry; scores of responses too, where the rows have them.
        is_eval: for the evaluation set, which is never packed.
    """
    packed = bool(cfg.sample_packing) and not is_eval
    count_positions = not packed and varies(cfg)
    tokens = V2BatchSamplerDataCollatorForSeq2Seq if packed else DataCollatorForSeq2Seq

    class HostCollator(MethodCollator):
        """`MethodCollator` over the collator that the host would have used."""

        def __init__(self, tokenizer: Any, **kwargs: Any) -> None:
            super().__init__(
                tokens(tokenizer, **kwargs),
                (*method.columns, ROW_INDEX),
                tokenizer.padding_side,
                optional=(SCORES,),
                count_positions=count_positions,
            )

    return HostCollator
