"""Dropout off, wherever an architecture has it: as modules, and as numbers that it hands to functions."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from poft_plugin.hosts.dropout import RANDOM, check_no_chance, disable_dropout
from poft_plugin.losses import install_response_forward

VOCABULARY = 53
IDS = torch.arange(3, 35)[None] % VOCABULARY
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.5,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "biogpt": {}, "bloom": {"n_layer": 2, "n_head": 2}, "cohere": {}, "ctrl": {**GPT2, "dff": 24}, "falcon": {},
    "gemma2": {"head_dim": 8}, "gpt2": GPT2, "gpt_bigcode": GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}, "gpt_neox": {},
    "gptj": {**GPT2, "rotary_dim": 4}, "granite": {}, "llama": {}, "mistral": {}, "mixtral": {"num_local_experts": 2},
    "olmo2": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16}, "persimmon": {}, "phi": {}, "phi3": {}, "qwen2": {}, "qwen3": {},
    "stablelm": {}, "starcoder2": {},
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2},
}  # fmt: skip
EAGER_ALONE = {"bloom", "gptj", "gpt_neo", "xglm"}
EVERY = [(kind, "eager") for kind in ARCHITECTURES]
EVERY += [(kind, "sdpa") for kind in ARCHITECTURES if kind not in EAGER_ALONE]


def build(kind: str, attention: str) -> Any:
    """A tiny model in training mode, every probability of its config at 0.1."""
    config = AutoConfig.for_model(kind, **SIZES | ARCHITECTURES[kind], attn_implementation=attention)
    names = [n for n, v in vars(config).items() if RANDOM.search(n) and type(v) in (int, float)]
    assert names
    for name in names:
        setattr(config, name, 0.1)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of a few tokens."""
    found: Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(("kind", "attention"), EVERY)
def test_two_forwards_in_training_mode_are_equal(kind: str, attention: str) -> None:
    """Exactly, and equal to evaluation mode; the config that is saved with the model stays as it was."""
    model = build(kind, attention)
    assert not torch.equal(logits(model), logits(model))
    written = copy.deepcopy(model.config.to_dict())
    disable_dropout(model)
    first = logits(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.eval()), first)
    assert model.config.to_dict() == written


class Shaking(nn.Module):
    """Chance that nobody could know of."""

    strength = 0.1

    def forward(self, hidden: Tensor) -> Tensor:
        """The same, and a little noise in training."""
        return hidden + self.strength * torch.randn_like(hidden) if self.training else hidden


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shaken", [True, False])
def test_what_is_left_to_chance_is_found(*, shaken: bool, training: bool) -> None:
    """Beyond the known kinds: the model is asked in both modes, and what it is asked in stays."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, resid_pdrop=0.25, **GPT2)).train(training)
    disable_dropout(model)
    if shaken:
        model.transformer.ln_f = nn.Sequential(model.transformer.ln_f, Shaking())
    install_response_forward(model)
    state = torch.random.get_rng_state()
    if shaken:
        with pytest.raises(
            ValueError, match=r"GPT2LMHeadModel: in training .* differ .* resid_pdrop: 0\.25.*has 0 there"
        ):
            check_no_chance(model, VOCABULARY, CPU)
    else:
        check_no_chance(model, VOCABULARY, CPU)
    assert model.training is training
    assert torch.equal(torch.random.get_rng_state(), state)
