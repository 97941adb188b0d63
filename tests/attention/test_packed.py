"""Attention over packs on a CPU: exactly what separate forwards give, and `sdpa` wherever a batch is no plain pack."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from poft_plugin.attention import packed as packed_attention
from poft_plugin.attention.packed import NAME, packed_mask, use_packed_attention

LENGTHS = ((5, 1, 7, 3), (9, 7))
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "attn_implementation": "sdpa",
}  # fmt: skip


def llama(dtype: torch.dtype = torch.float64, *, key_value_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=key_value_heads)).to(dtype)


def packed() -> tuple[Tensor, Tensor]:
    """Token ids and position ids, `(2, 16)`."""
    torch.manual_seed(1)
    positions = [torch.cat([torch.arange(length) for length in row]) for row in LENGTHS]
    return torch.randint(0, 50, (2, 16)), torch.stack(positions)


def separate_logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Each sequence in a forward of its own."""
    rows = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        rows.append(torch.cat([model(part[None], use_cache=False).logits[0] for part in row.split(lengths)]))
    return torch.stack(rows)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that attention is called with from now on."""
    calls: list[int] = []
    original = packed_attention.scaled_dot_product_attention

    def count(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(query.shape[2])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", count)
    return calls


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_equals_separate_forwards(monkeypatch: pytest.MonkeyPatch, key_value_heads: int) -> None:
    model = llama(key_value_heads=key_value_heads)
    ids, positions = packed()
    expected = separate_logits(model, ids)
    assert use_packed_attention(model)
    calls = counted(monkeypatch)
    found = model(ids, position_ids=positions, use_cache=False).logits
    assert calls == [length for row in LENGTHS for length in row] * 2, "one call per sequence and layer"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_equal_those_of_separate_forwards() -> None:
    plain, ours = llama(), llama()
    ids, positions = packed()
    weights = torch.randn(2, 16, 50, dtype=torch.float64)
    (separate_logits(plain, ids) * weights).sum().backward()
    assert use_packed_attention(ours)
    (ours(ids, position_ids=positions, use_cache=False).logits * weights).sum().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=0, atol=1e-10, msg=name)


def test_no_token_sees_another_sequence() -> None:
    model = llama()
    assert use_packed_attention(model)
    ids, positions = packed()
    changed = ids.clone()
    changed[0, :6] = (changed[0, :6] + 1) % 50
    before, after = (model(tokens, position_ids=positions, use_cache=False).logits for tokens in (ids, changed))
    assert torch.equal(before[0, 6:], after[0, 6:])
    assert not torch.equal(before[0, :6], after[0, :6])


def test_padded_batches_and_generation_go_the_way_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    ids, _ = packed()
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    given = {"attention_mask": mask, "use_cache": False}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model(ids, **given).logits, model.generate(ids[:1, :5], **settings)
    assert use_packed_attention(model)
    calls = counted(monkeypatch)
    assert torch.equal(model(ids, **given).logits, expected[0])
    assert calls == []
    assert torch.equal(model.generate(ids[:1, :5], **settings), expected[1])


def test_a_sliding_window_shorter_than_a_sequence_goes_the_way_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, positions = packed()
    for window, called in ((4, False), (9, True)):
        torch.manual_seed(0)
        config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window)
        model = MistralForCausalLM(config).double()
        expected = model(ids, position_ids=positions, use_cache=False).logits
        assert use_packed_attention(model)
        calls = counted(monkeypatch)
        found = model(ids, position_ids=positions, use_cache=False).logits
        assert bool(calls) is called
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_prefix_that_sees_itself_is_no_plain_pack() -> None:
    def prefix(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) | ((query < 3) & (key < 3))

    mask = packed_mask(1, 6, 6, mask_function=prefix, allow_is_causal_skip=False)
    assert mask is not None
    assert mask.shape == (1, 1, 6, 6)
    assert bool(mask[0, 0, 0, 2])


def test_other_attention_is_left_alone() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == "eager"


def test_the_saved_config_does_not_name_it(tmp_path) -> None:
    model = llama()
    assert use_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
