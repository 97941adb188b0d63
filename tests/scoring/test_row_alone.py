"""A row's score is that of the row alone, whatever the architecture, the order and the batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from poft_plugin.config import ReferenceConfig
from poft_plugin.scorers.start_policy import StartPolicyScorer
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.run import batches
from poft_plugin.scoring.scorer import PreparedRow

BOUND = 32
VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER: dict[str, Any] = {
    **SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128
}  # fmt: skip
WINDOW = {"sliding_window": 8, "head_dim": 8}
ALIBI: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "pad_token_id": 0}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LONGROPE = rope(
    "longrope", short_factor=[1.0] * 4, long_factor=[2.0, 4.0, 8.0, 16.0], original_max_position_embeddings=BOUND
)
CONFIGS = {
    "default": hf.LlamaConfig(**DECODER),
    "linear": hf.LlamaConfig(**DECODER, **rope("linear", factor=2.0)),
    "dynamic": hf.LlamaConfig(**{**DECODER, "max_position_embeddings": BOUND}, **rope("dynamic", factor=4.0)),
    "yarn": hf.LlamaConfig(**DECODER, **rope("yarn", factor=4.0, original_max_position_embeddings=BOUND)),
    "llama3": hf.LlamaConfig(
        **DECODER,
        **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=BOUND),
    ),
    # its own key comes before the one among the rope's parameters
    "longrope": hf.Phi3Config(
        **{**DECODER, "num_key_value_heads": 4}, **LONGROPE, original_max_position_embeddings=BOUND
    ),
    "gemma2": hf.Gemma2Config(**DECODER, **WINDOW, attn_logit_softcapping=1.0),
    "gemma3": hf.Gemma3TextConfig(**DECODER, **WINDOW),
    "mistral": hf.MistralConfig(**DECODER, **WINDOW),
    "mixtral": hf.MixtralConfig(**DECODER, num_local_experts=4),
    "qwen2": hf.Qwen2Config(**DECODER),
    "qwen3": hf.Qwen3Config(**DECODER, head_dim=8),
    "olmo2": hf.Olmo2Config(**DECODER),
    "cohere": hf.CohereConfig(**DECODER),
    "neox": hf.GPTNeoXConfig(**SIZES, intermediate_size=64, max_position_embeddings=128),
    "gpt2": hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": hf.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128),
    "bloom": hf.BloomConfig(**ALIBI, hidden_size=32, n_layer=2, n_head=4),
    "mpt": hf.MptConfig(**ALIBI, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "falcon": hf.FalconConfig(**SIZES, alibi=True, new_decoder_architecture=False),
}
LENGTHS = (3, 61, 33, 31, 7, 32, 60, 34, 12, 50)
BY_THE_LONGEST = ("dynamic", "longrope")


def rows() -> list[PreparedRow]:
    random = np.random.default_rng(5)
    return [
        PreparedRow(f"{number:02}", random.integers(3, VOCABULARY, length).astype(np.int32), np.arange(length) > 1)
        for number, length in enumerate(LENGTHS)
    ]


def saved(name: str, folder: Path) -> StartPolicyScorer:
    """A random model of a config. Rows are tokens, so that it needs no tokenizer."""
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).save_pretrained(folder)
    return StartPolicyScorer(ReferenceConfig(model=str(folder)), Checkpoint(str(folder), None, "0"))


def alone(name: str, folder: Path) -> dict[str, float]:
    """Each row by itself in float64, in a model that has seen no other."""
    model, found = None, {}
    for row in rows():
        if model is None or name in BY_THE_LONGEST:
            dtype = torch.float32 if name == "mixtral" else torch.float64  # experts know no float64
            model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        ids = torch.tensor(row.input_ids, dtype=torch.long)
        with torch.no_grad():
            logps = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
        found[row.key] = float(logps[torch.arange(1, len(ids) - 1), ids[2:]].mean())
    return found


def in_batches(scorer: StartPolicyScorer, order: list[PreparedRow], tokens: int, group: Any) -> dict[str, float]:
    scores = [score for batch in batches(order, tokens, group) for score in scorer.score(batch)]
    return {score.key: score.value for score in scores}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rows_score_is_that_of_the_row_alone(name: str, tmp_path: Path) -> None:
    scorer = saved(name, tmp_path)
    scorer.load("cpu")
    expected = alone(name, tmp_path)
    for tokens in (1, 150, 10_000):
        for order in (rows(), rows()[::-1]):
            assert in_batches(scorer, order, tokens, scorer.batch_group) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("name", BY_THE_LONGEST)
def test_batches_that_straddle_a_bound_would_break_it(name: str, tmp_path: Path) -> None:
    scorer = saved(name, tmp_path)
    scorer.load("cpu")
    expected, mixed = alone(name, tmp_path), in_batches(scorer, rows(), 10_000, lambda length: 0)
    assert max(abs(mixed[key] - expected[key]) for key in expected) > 0.01


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    looking = hf.LlamaConfig(**DECODER)
    CONFIGS["ahead"] = looking
    scorer = saved("ahead", tmp_path)
    CONFIGS.pop("ahead")
    original = hf.LlamaModel.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        outputs = original(self, *arguments, **keywords)
        outputs.last_hidden_state = outputs.last_hidden_state + outputs.last_hidden_state.mean(1, keepdim=True)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.LlamaModel, "forward", forward)
        with pytest.raises(ValueError, match=r"^start policy .*: Llama.* differs by .* in a padded batch .*float32"):
            scorer.load("cpu")
