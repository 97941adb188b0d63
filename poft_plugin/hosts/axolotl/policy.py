"""What preprocessors have to know of the policy, out of the host's config; the weights are not loaded."""

from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault

from poft_plugin.data.preparation import Policy


def policy_of(cfg: DictDefault) -> Policy:
    """The policy of a validated config, with its tokenizer as the host sets it up."""
    dtype = str(cfg.torch_dtype or "float32").removeprefix("torch.")
    return Policy(
        model=str(cfg.base_model),
        tokenizer=load_tokenizer(cfg),
        sequence_len=int(cfg.sequence_len),
        revision=cfg.revision_of_model,
        dtype=dtype,
        quantization=_quantization(cfg, dtype),
        attn_implementation=cfg.attn_implementation,
        trust_remote_code=bool(cfg.trust_remote_code),
    )


def check_linear_head(cfg: DictDefault) -> None:
    """Refuses a policy whose logits are no linear function of its hidden states, before anything is scored.

    Raises:
        ValueError: naming the model, its soft-cap and the remedies.
    """
    cap = getattr(load_model_config(cfg).get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        raise ValueError(
            f"base_model {cfg.base_model}: it soft-caps its logits (at {cap}), and the distribution reward needs "
            "logits that are linear in the hidden states. Set `omega: 0`, or take another model"
        )


def check_no_window(cfg: DictDefault, pack_tokens: int) -> None:
    """Refuses a policy whose tokens do not see all that comes before them in a pack, where prompts are shared.

    A sequence is no longer than `sequence_len`, but the host pads a pack with a run of tokens that may be.

    Args:
        cfg: the host's config.
        pack_tokens: that a pack holds.

    Raises:
        ValueError: naming the model, its window and the remedies.
    """
    config = load_model_config(cfg).get_text_config()
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if window is not None and window < pack_tokens:
            raise ValueError(
                f"share_prompt: true with base_model {cfg.base_model}: its {name} of {window} tokens is shorter than a "
                f"pack of {pack_tokens}. Set `share_prompt: false`, or lower `sequence_len` or `micro_batch_size`"
            )


def _quantization(cfg: DictDefault, dtype: str) -> dict[str, Any] | None:
    """What the host passes to bitsandbytes; full fine-tuning has none."""
    if cfg.load_in_8bit:
        return {"load_in_8bit": True}
    if not cfg.load_in_4bit:
        return None
    return {
        "load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_type": "nf4",
    }
