"""Settings of the host that a method cannot honour, refused by name before anything is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from poft_plugin.methods import Method
from poft_plugin.plugins import load_object


@dataclass(frozen=True)
class Refusal:
    """A key that is refused.

    Args:
        key: top-level key.
        refused: whether a value is refused.
        remedy: why, and what to do.
    """

    key: str
    refused: Callable[[Any], bool]
    remedy: str


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_set(value: Any) -> bool:
    return value is not None


def _is_a_model(value: Any) -> bool:
    return isinstance(value, (str, Mapping))


def _shares_sequences(value: Any) -> bool:
    """A block whose `size` is above 1, or that is not understood here."""
    return not isinstance(value, Mapping) or value.get("size", 1) != 1


def _is_gguf(value: Any) -> bool:
    return str(value).endswith(".gguf")


REFUSALS = (
    Refusal(
        "base_model",
        _is_gguf,
        "a GGUF file can be a reference, not a policy; give the folder or repository that it was made from, or one "
        "that transformers makes of it: `AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE)` and the "
        "`AutoTokenizer` alike, each with `.save_pretrained(NEW)`",
    ),
    Refusal("streaming", bool, "rows must be there to be scored; remove it"),
    Refusal("pretraining_dataset", bool, "a pretraining set has no responses; use `datasets:`"),
    Refusal("train_on_inputs", bool, "the response alone is scored and trained on; set it to false"),
    Refusal(
        "excess_length_strategy",
        lambda value: value == "truncate",
        "policy and references would see different texts; use `drop` or `raise`",
    ),
    Refusal("skip_prepare_dataset", bool, "the plugin has to prepare the data set; remove it"),
    Refusal("reward_model", lambda value: value is True, "this trains a reward model, not a policy; remove it"),
    Refusal("reward_model", _is_a_model, "true or false here; a model that grades belongs inside the block `deft:`"),
    Refusal("process_reward_model", bool, "this trains a reward model, not a policy; remove it"),
    Refusal("trainer_cls", bool, "the method brings its own trainer; remove it"),
    Refusal("processor_type", bool, "only text can be scored by references of another kind; remove it"),
    Refusal("use_eaft", bool, "it is another loss; remove it or `rl:`"),
    Refusal("use_dft", bool, "it is another loss; remove it or `rl:`"),
    Refusal("diffusion_lm", _is_set, "it is another loss; remove it or `rl:`"),
    Refusal("diffusion_decision", _is_set, "it is another loss; remove it or `rl:`"),
    Refusal("balance_labels", bool, "the loss is a mean over samples, and batches are the method's own; remove it"),
    Refusal("label_balance_window_optim_steps", _above_one, "the loss is a mean over samples; remove it"),
    Refusal("adapter", lambda value: value == "mixlora", "it brings a trainer of its own; use `lora` or `qlora`"),
    Refusal("orpo_alpha", bool, "it is another loss; remove it or `rl:`"),
    Refusal("label_smoothing_factor", bool, "the loss has no labels to smooth; remove it"),
    Refusal("batch_flattening", bool, "use `sample_packing: true`"),
    Refusal("use_pose", bool, "its position ids hide where a sequence begins; remove it"),
    Refusal(
        "eval_sample_packing", bool, "packed evaluation may lose rows in this host; remove it (evaluation is unpacked)"
    ),
    Refusal("remove_unused_columns", bool, "the method's columns would be removed; remove it"),
    Refusal("context_parallel_size", _above_one, "a sequence must stay on one device; remove it"),
    Refusal("context_parallel", _shares_sequences, "a sequence must stay on one device; remove it"),
    Refusal("sequence_parallel_degree", _above_one, "a sequence must stay on one device; remove it"),
    Refusal("tensor_parallel_size", _above_one, "the output head must stay whole; remove it"),
    Refusal("rl_beta", _is_set, "not read by this method; remove it"),
    Refusal("trl", bool, "TRL's settings are not read by this method; remove the block"),
    Refusal("precompute_ref_log_probs", _is_set, "not read by this method; remove it"),
    Refusal("max_prompt_len", _is_set, "prompts are not cut; rows over `sequence_len` are left out"),
)

RANKED_REFUSALS = (
    Refusal("roles_to_train", bool, "the response alone is trained on; remove it"),
    Refusal("tokenizer_use_mistral_common", bool, "its templates give no response mask; use the model's chat template"),
)
"""What preference methods refuse besides."""

START_REFUSALS = (
    Refusal("reinit_weights", bool, "random weights are no reference; remove it"),
    Refusal(
        "overrides_of_model_config", bool, "the start weights are scored as the checkpoint says; save such a model"
    ),
    Refusal(
        "overrides_of_model_kwargs", bool, "the start weights are scored as the checkpoint says; save such a model"
    ),
    Refusal("base_model_config", bool, "the start weights are scored as the checkpoint says; remove it"),
    Refusal("bnb_config_kwargs", bool, "the start weights are scored with the host's own quantization; remove it"),
    Refusal("gptq", bool, "GPTQ weights cannot be scored; use `load_in_4bit: true`"),
    Refusal("quantize_moe_experts", bool, "such weights cannot be scored; remove it"),
)
"""Settings under which the policy does not begin as its checkpoint: methods that score it refuse them."""

PREFIXES = ("dpo_", "kto_", "simpo_", "cpo_")
"""Keys of the host's own preference trainers."""


def check_settings(cfg: Mapping[str, Any], method: Method) -> None:
    """Refuses host settings that cannot be honoured.

    Args:
        cfg: the raw config.
        method: the method; the top-level keys that it reads are not refused.

    Raises:
        ValueError: naming every such key, its value and the remedy.
    """
    rl = method.name
    read = set() if method.keys is None else set(load_object(method.keys).model_fields)
    refusals = [*REFUSALS, *(RANKED_REFUSALS if method.ranked else ())]
    refusals += START_REFUSALS if method.needs_start_policy else ()
    found = [r for r in refusals if r.key not in read and cfg.get(r.key) is not None and r.refused(cfg.get(r.key))]
    lines = [f"{r.key}: {cfg.get(r.key)!r} cannot be honoured with `rl: {rl}`: {r.remedy}" for r in found]
    others = [key for key in cfg if str(key).startswith(PREFIXES) and cfg.get(key) is not None and key not in read]
    lines += [f"{key}: {cfg.get(key)!r} is not read by `rl: {rl}`; remove it" for key in others]
    if lines:
        raise ValueError("\n".join(lines))
    if not cfg.get("datasets"):
        raise ValueError(f"datasets: missing; `rl: {rl}` needs rows to train on")


def check_packing(cfg: Mapping[str, Any]) -> None:
    """Refuses packing where the attention implementation lets the sequences of a pack see each other.

    Raises:
        ValueError: naming the key and the remedy.
    """
    if cfg.get("sample_packing") and not cfg.get("attn_decontaminates_packing"):
        raise ValueError(
            f"sample_packing: true with attn_implementation: {cfg.get('attn_implementation')!r}: the sequences of a "
            "pack would see each other. Set `attn_implementation:` to flash_attention_2, flex_attention, sdpa or eager"
        )


def check_share_prompt(cfg: Mapping[str, Any]) -> None:
    """Refuses prompts that are shared without packing, or under an attention that cannot do it.

    Raises:
        ValueError: naming key, value and remedy.
    """
    for key, needed in (("sample_packing", True), ("attn_implementation", "sdpa")):
        if cfg.get(key) != needed:
            remedy = f"`{key}: {'true' if needed is True else needed}`"
            raise ValueError(
                f"share_prompt: true with {key}: {cfg.get(key)!r}: prompts can be shared in packs under sdpa alone. "
                f"Set {remedy}, or `share_prompt: false`"
            )
