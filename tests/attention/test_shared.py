"""Prompts that lie in a pack once: exactly what separate forwards give, or a refusal."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from poft_plugin.attention import packed as packed_attention
from poft_plugin.attention import shared as shared_attention
from poft_plugin.attention.shared import NAME, check_shared_prompts, use_shared_attention
from poft_plugin.losses import install_response_forward

PACKS = (((5, (3, 2, 4)), (1, (2, 3))), ((3, (1, 1, 2, 1, 3)), (2, (4, 1))))
"""Rows of the batch, the groups of each: tokens of the prompt, and of its responses."""
LENGTH = 20
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "attn_implementation": "sdpa",
}  # fmt: skip
DEVICE = torch.device("cpu")


def llama(dtype: torch.dtype = torch.float64, *, key_value_heads: int = 2) -> LlamaForCausalLM:
    """With PyTorch's norm: transformers' own rounds to float32 whatever the model is in."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=key_value_heads))
    model.model.norm = nn.RMSNorm(32, eps=1e-6)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(32, eps=1e-6), nn.RMSNorm(32, eps=1e-6)
    return model.to(dtype)


def shared() -> tuple[Tensor, Tensor]:
    """Token ids and position ids, `(2, 20)`, the first row padded to the length of the second."""
    torch.manual_seed(1)
    lines = []
    for groups in PACKS:
        line = []
        for prompt, responses in groups:
            line += range(prompt)
            for response in responses:
                line += range(prompt, prompt + response)
        lines.append(line + list(range(LENGTH - len(line))))
    return torch.randint(0, 50, (2, LENGTH)), torch.tensor(lines)


def sequences() -> Iterator[tuple[int, list[int], int]]:
    """Row, places of prompt and response, and tokens of the prompt, of each response."""
    for row, groups in enumerate(PACKS):
        begin = 0
        for prompt, responses in groups:
            place = begin + prompt
            for response in responses:
                yield row, [*range(begin, begin + prompt), *range(place, place + response)], prompt
                place += response
            begin = place


def separate_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Each response with its prompt in a forward of its own; padding is left at 0."""
    found: Any = torch.zeros(2, LENGTH, 50, dtype=torch.float64)
    for row, places, prompt in sequences():
        logits = model(ids[row, places][None], use_cache=False).logits[0].double()
        found = found.index_put((torch.tensor(row), torch.tensor(places[prompt:])), logits[prompt:])
        found = found.index_put((torch.tensor(row), torch.tensor(places[:prompt])), logits[:prompt])
    return found


def own() -> Tensor:
    """`(2, 20)`: which tokens are not padding."""
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, places, _ in sequences():
        mask[row, places] = True
    return mask


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_equals_separate_forwards(key_value_heads: int) -> None:
    model = llama(key_value_heads=key_value_heads)
    ids, positions = shared()
    expected = separate_logits(model, ids)
    use_shared_attention(model)
    found = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found[own()], expected[own()], rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
def test_gradients_equal_those_of_separate_forwards(checkpointing: bool | None) -> None:
    plain, ours = llama(), llama().train()
    ids, positions = shared()
    weights = torch.randn(2, LENGTH, 50, dtype=torch.float64) * own()[..., None]
    (separate_logits(plain, ids) * weights).sum().backward()
    use_shared_attention(ours)
    if checkpointing is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        ours.enable_input_require_grads()
    (ours(ids, position_ids=positions, use_cache=False).logits * weights).sum().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=0, atol=1e-11, msg=name)


def test_float32_is_no_worse_than_separate_forwards() -> None:
    """Against float64, with half again for another order of summation."""
    ids, positions = shared()
    exact, model = llama(), llama(torch.float32)
    with torch.no_grad():
        exact, apart = separate_logits(exact, ids), separate_logits(model, ids)
        use_shared_attention(model)
        together = model(ids, position_ids=positions, use_cache=False).logits.double()
    errors = [float((found - exact)[own()].abs().max()) for found in (together, apart)]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_no_response_sees_another() -> None:
    """Tokens of one response change: nothing else does, to the last bit. Tokens of a prompt: its group does, alone."""
    model = llama()
    use_shared_attention(model)
    ids, positions = shared()
    before = model(ids, position_ids=positions, use_cache=False).logits
    every = list(sequences())
    for row, places, prompt in every:
        changed = ids.clone()
        changed[row, places[prompt:]] = (ids[row, places[prompt:]] + 1) % 50
        after = model(changed, position_ids=positions, use_cache=False).logits
        differs = (after != before).any(-1)
        assert differs.nonzero().tolist() == [[row, place] for place in places[prompt:]]
    row, places, prompt = every[0]
    changed = ids.clone()
    changed[row, places[:prompt]] = (ids[row, places[:prompt]] + 1) % 50
    differs = (model(changed, position_ids=positions, use_cache=False).logits != before).any(-1)
    assert differs.nonzero().tolist() == [[row, place] for place in range(sum([5, 3, 2, 4]))]


def test_a_call_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    use_shared_attention(model)
    calls: list[tuple[int, int]] = []
    original = shared_attention.scaled_dot_product_attention

    def count(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append((query.shape[2], key.shape[2]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(shared_attention, "scaled_dot_product_attention", count)
    ids, positions = shared()
    model(ids[:1], position_ids=positions[:1], use_cache=False)
    assert calls == [(8, 8), (2, 7), (4, 9), (3, 3), (3, 4)] * 2


def test_whole_sequences_are_packed_as_ever() -> None:
    expected, found = llama(), llama()
    assert packed_attention.use_packed_attention(expected)
    use_shared_attention(found)
    ids = shared()[0]
    positions = torch.cat([torch.arange(length) for length in (5, 1, 7, 7)]).expand(2, -1)
    answers = [model(ids, position_ids=positions, use_cache=False).logits for model in (expected, found)]
    assert torch.equal(*answers)


def test_padded_batches_go_the_way_of_sdpa() -> None:
    model = llama()
    ids, _ = shared()
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    use_shared_attention(model.train())
    assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, expected)


def small(config: type, model: type, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return model(config(**{**SIZES, "head_dim": 8, "num_key_value_heads": 2, **more}))


FAMILIES = {
    "llama": lambda: small(LlamaConfig, LlamaForCausalLM),
    "mistral": lambda: small(MistralConfig, MistralForCausalLM, sliding_window=64),
    "qwen2": lambda: small(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: small(Qwen3Config, Qwen3ForCausalLM),
    "gemma": lambda: small(GemmaConfig, GemmaForCausalLM),
    "gemma2": lambda: small(Gemma2Config, Gemma2ForCausalLM, sliding_window=64),
    "cohere": lambda: small(CohereConfig, CohereForCausalLM),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_passes(name: str) -> None:
    model = FAMILIES[name]().train()
    use_shared_attention(model)
    install_response_forward(model)
    check_shared_prompts(model, 50, DEVICE)
    assert model.training


def test_the_check_sees_responses_that_lack_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(torch.float32)
    use_shared_attention(model)
    install_response_forward(model)
    monkeypatch.setitem(shared_attention.AttentionInterface._global_mapping, NAME, packed_attention.packed_attention)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives .* differ by .* nats .*set `share_prompt: false`"):
        check_shared_prompts(model, 50, DEVICE)


def test_the_check_sees_layers_that_pass_their_attention_by() -> None:
    class Leaking(nn.Module):
        """Each token gets something of the one before it in the pack."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            return self.inner(hidden + hidden.roll(1, dims=1), **kwargs)

    model = llama(torch.float32)
    use_shared_attention(model)
    install_response_forward(model)
    model.model.layers[0].mlp = Leaking(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="differ by"):
        check_shared_prompts(model, 50, DEVICE)


def test_layers_that_keep_their_position_ids_are_refused() -> None:
    model = llama()
    use_shared_attention(model)
    ids, positions = shared()
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, f=forward, position_ids=None, **kwargs: f(*args, **kwargs)
    with pytest.raises(ValueError, match="LlamaAttention: it does not tell attention its position ids"):
        model(ids, position_ids=positions, use_cache=False)


@pytest.mark.parametrize(("window", "message"), [(4, "it has a mask of its own"), (8, "9 tokens, .* window of 8")])
def test_a_sliding_window_shorter_than_a_sequence_is_refused(window: int, message: str) -> None:
    """Where it is shorter than a run, and where it is not."""
    model = small(MistralConfig, MistralForCausalLM, sliding_window=window)
    use_shared_attention(model.train())
    ids, positions = shared()
    with pytest.raises(ValueError, match=message):
        model(ids, position_ids=positions, use_cache=False)


def test_other_attention_is_refused() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="share_prompt: true with attn_implementation: 'eager': set it to sdpa"):
        use_shared_attention(model)


def test_the_saved_config_does_not_name_it(tmp_path) -> None:
    model = llama()
    use_shared_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
