"""What preprocessors have to know of the policy, out of the host's config; the weights are not loaded."""

from pathlib import Path
from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from poft_plugin.data.preparation import Policy
from poft_plugin.scorers.attention import SOFT_CAP, drops_soft_cap
from poft_plugin.scorers.loading import load_complete

LOG = get_logger("axolotl.poft_plugin")


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


def check_policy_weights(cfg: DictDefault, *, train: bool) -> None:
    """Refuses a checkpoint that does not fill the policy: the host would train what is missing from random numbers.

    Names and shapes are read, no weights. Not looked at: checkpoints that are quantised already (their tensors have
    other names), random policies that were asked for, and before training those that are not on this machine.

    Args:
        cfg: the host's config.
        train: whether the host loads the policy next.

    Raises:
        ValueError: naming the tensors.
    """
    config, folder = load_model_config(cfg), Path(cfg.base_model)
    if drops_soft_cap(config.get_text_config(), cfg.attn_implementation):
        LOG.warning(
            f"base_model {cfg.base_model}: attn_implementation: {cfg.attn_implementation or 'sdpa'} leaves out the "
            f"soft-cap of its attention scores ({SOFT_CAP}): it is trained as another model than was published. Set "
            "`attn_implementation: eager`, flash_attention_2 or flex_attention"
        )
    there = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) if folder.is_dir() else train
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and getattr(config, "quantization_config", None) is None
    if not there or not known or cfg.reinit_weights:
        return
    load_complete(
        AutoModelForCausalLM,
        str(cfg.base_model),
        f"base_model {cfg.base_model}",
        config=config,
        revision=cfg.revision_of_model or "main",
        trust_remote_code=bool(cfg.trust_remote_code),
        device_map={"": "meta"},
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
