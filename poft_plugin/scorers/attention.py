"""Which attention a model is scored with: one that applies all that its config asks for."""

import inspect
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SOFT_CAP = "attn_logit_softcapping"
COMPLETE = "eager"


def drops_soft_cap(config: Any, attention: str | None) -> bool:
    """Whether an attention leaves out the soft-cap of a model's attention scores, which it does without a word.

    Args:
        config: transformers' config of the text part.
        attention: name of the implementation; None for transformers' own choice, `sdpa`. One that transformers does
            not know (kernels of the hub) is taken to apply it.

    Examples:
        >>> from transformers import Gemma2Config, LlamaConfig
        >>> capped = Gemma2Config()
        >>> [name for name in (None, "eager", "sdpa", "flash_attention_2") if drops_soft_cap(capped, name)]
        [None, 'sdpa']
        >>> drops_soft_cap(LlamaConfig(), "sdpa")
        False
    """
    name = attention or "sdpa"
    if getattr(config, SOFT_CAP, None) is None or name not in ALL_ATTENTION_FUNCTIONS:
        return False
    return "softcap" not in inspect.signature(ALL_ATTENTION_FUNCTIONS[name]).parameters


def complete_attention(config: Any, chosen: str | None, title: str) -> str | None:
    """The attention to score with: the chosen one, else transformers' own choice, unless that drops a soft-cap.

    Args:
        config: transformers' config of the text part.
        chosen: as the user's config says.
        title: the model in messages.

    Raises:
        ValueError: if the chosen one drops it.
    """
    if not drops_soft_cap(config, chosen):
        return chosen
    if chosen is None:
        return COMPLETE
    raise ValueError(
        f"{title}: attn_implementation: {chosen} leaves out the soft-cap of this model's attention scores "
        f"({SOFT_CAP}: {getattr(config, SOFT_CAP)}): its scores would be another model's. Leave it out ({COMPLETE} "
        "is taken then), or set flash_attention_2 or flex_attention"
    )
