"""Made-up rows, scores and tiny models, for benchmarks of everything but the models' own arithmetic."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import SEED
from poft_plugin.config import PoftConfig
from poft_plugin.data.preparation import Prepared, Rows, RunContext
from poft_plugin.data.rows import Turn, dump_conversation, row_key
from poft_plugin.preprocessors.reference_rewards import reference_job
from poft_plugin.scoring.cache import SCHEMA, ScoreCache
from poft_plugin.scoring.jobs import Preprocessor
from poft_plugin.scoring.opened import open_job
from poft_plugin.scoring.scorer import PreparedRow
from poft_plugin.scoring.stages import Stage

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"]
FILES = 20
"""Files that a cache's scores lie in: processes write every half minute."""


def checkpoint(folder: Path, seed: int, *, vocabulary: int = 320, hidden: int = 32) -> Path:
    """A random Llama of one layer that reads bytes, with a tokenizer and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts(count: int) -> list[tuple[str, str]]:
    """Questions and answers of about 60 and 250 characters, all different."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(4, 16, count), rng.integers(8, 80, count)
    words = np.array(WORDS)
    return [
        (f"{number}: {' '.join(rng.choice(words, asked))}?", f"{' '.join(rng.choice(words, answered))}.")
        for number, asked, answered in zip(range(count), *lengths, strict=True)
    ]


def rows_of(count: int) -> Rows:
    """Rows as the host's preparation hands them on."""
    conversations = [(Turn("user", asked), Turn("assistant", answered, True)) for asked, answered in texts(count)]
    table = {
        "row_key": pa.chunked_array([[row_key(conversation) for conversation in conversations]]),
        "conversation": pa.chunked_array([[dump_conversation(conversation) for conversation in conversations]]),
        "source": pa.chunked_array([["rows.jsonl"] * count]),
        "row_number": pa.chunked_array([range(count)]),
    }
    return Rows(pa.table(table), {})


def random_rows(count: int, vocabulary: int, *, prompt: int, response: int) -> list[PreparedRow]:
    """Rows of random tokens with log-normal lengths around the two medians."""
    rng = np.random.default_rng(SEED)
    asked, answered = (
        np.clip(rng.lognormal(np.log(median), 0.7, count), 3, 1000).astype(int) for median in (prompt, response)
    )
    tokens = rng.integers(3, vocabulary, int(asked.sum() + answered.sum()), dtype=np.int32)
    parts = np.split(tokens, np.cumsum(asked + answered)[:-1])
    return [
        PreparedRow(f"{number:032x}", part, np.arange(len(part)) >= begin)
        for number, (part, begin) in enumerate(zip(parts, asked, strict=True))
    ]


def settings_for(references: Sequence[Path], cache: Path) -> PoftConfig:
    """The block `poft:` with these references."""
    return PoftConfig.model_validate(
        {"references": [{"model": str(folder)} for folder in references], "score_cache": str(cache)}
    )


def prepared(preprocessor: Preprocessor, rows: Rows, settings: BaseModel, context: RunContext) -> Prepared:
    """A preprocessor's columns, with what it asks for scored."""
    return Stage.of([(preprocessor, settings)], rows, context).prepared()


def fill_cache(settings: PoftConfig, keys: pa.ChunkedArray) -> None:
    """Made-up scores of every row by every reference, in several files and an order of their own."""
    assert settings.score_cache is not None
    cache, rng = ScoreCache(Path(settings.score_cache)), np.random.default_rng(SEED)
    quality = rng.normal(-1.5, 0.5, len(keys))
    for job in (reference_job(reference, Rows.none()) for reference in settings.references):
        reference = open_job(job, cache)
        assert reference.identity is not None
        for part in np.array_split(rng.permutation(len(keys)), FILES):
            rewards = quality[part] + rng.normal(0, 0.2, len(part))
            columns = [keys.take(pa.array(part)), pa.array(rewards), pa.array(np.full(len(part), 60))]
            cache.write_table(reference.identity, pa.table(columns, names=SCHEMA.names))
