"""Ranked rows by content, the policy's tokenizer as preprocessors see it, and what a preprocessor gives back."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import tiny
from tokenizers import Tokenizer, models
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from poft_plugin.data.preparation import Policy, Prepared, Rows, RunContext
from poft_plugin.data.ranked import RankedSample, pair, ranked_list
from poft_plugin.data.rows import Turn

PROMPT = (Turn("user", "hi"),)


def sample(*responses: str, scores: Sequence[float] | None = None) -> RankedSample:
    """A ranked sample."""
    return ranked_list(PROMPT, responses, scores=scores, where="row")


def rows(*samples: RankedSample, chunks: int = 1) -> Rows:
    """Rows over ranked samples, numbered from 10, in one chunk or one for each row."""
    table = pa.table(
        {
            "row_key": [s.key for s in samples],
            "conversation": [s.dumps() for s in samples],
            "source": ["data.jsonl"] * len(samples),
            "row_number": list(range(10, 10 + len(samples))),
        }
    )
    parts = [table] if chunks == 1 else [table.slice(number, 1) for number in range(len(samples))]
    return Rows(pa.concat_tables(parts), {})


def test_a_ranked_row_gives_its_sample_back() -> None:
    samples = [sample("a", "b", "c", scores=[0.1, 0.3, 0.1]), pair(PROMPT, "a", "b", where="row")]
    table = rows(*samples)
    assert [table.sample(index) for index in range(len(table))] == samples


@pytest.mark.parametrize("chunks", [1, 2])
def test_equal_samples_are_one(chunks: int) -> None:
    first, second = sample("a", "b", scores=[2.0, 1.0]), sample("b", "a")
    table = rows(first, second, first, first, second, chunks=chunks)
    assert table.unique().table.to_pylist() == table.table.to_pylist()[:2]
    assert table.unique().unique().table == table.unique().table
    assert len(rows().unique()) == 0


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("scores", [None, [2.0, 1.5], [2.0, 2.0]], ids=["none", "other", "ties"])
def test_equal_texts_with_other_scores_are_refused(scores: list[float] | None, chunks: int) -> None:
    """One of the two would be trained on in silence. The first row that differs is named, and what from."""
    first, again = sample("a", "b", scores=[2.0, 1.0]), sample("a", "b", scores=scores)
    other = sample("c", "d")
    assert first.key == again.key
    table = rows(other, first, other, first, again, first, again, chunks=chunks)
    message = (
        rf"^data\.jsonl row 14 \(key {first.key}\) has the same texts as data\.jsonl row 11 \(key {first.key}\) with "
        "other scores; remove one of them$"
    )
    with pytest.raises(ValueError, match=message):
        table.unique()


def policy(tokenizer: object) -> Policy:
    """A policy of which only the tokenizer counts."""
    return Policy("org/model", tokenizer, 512)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Six words, a special one among them that is named; three added, two of them special."""
    words = ["<s>", "hi", "ho", "no", "yes", "</s>"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="hi"))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    fast.add_tokens([AddedToken("plain", special=False)])
    fast.add_tokens([AddedToken("<tool>", special=True)], special_tokens=True)
    fast.add_special_tokens({"additional_special_tokens": ["<s>", "<think>"]})
    return fast


def test_special_tokens_are_named_and_added_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<tool>", "<think>"])
    assert policy(tokenizer).special_token_ids == tuple(sorted(ids)) == (0, 5, 7, 8)


def test_the_vocabulary_reaches_over_added_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert policy(tokenizer).vocab_size == 6 + 3 == tokenizer.convert_tokens_to_ids("<think>") + 1


def test_the_vocabulary_reaches_over_holes() -> None:
    """A token's id may lie beyond the number of tokens."""
    core = Tokenizer(models.WordLevel({"hi": 0, "ho": 41}, unk_token="hi"))
    fast = PreTrainedTokenizerFast(tokenizer_object=core)
    assert len(fast) == 2
    assert policy(fast).vocab_size == 42
    assert policy(fast).text_of(41) == "ho"


def test_a_named_token_counts_even_where_it_is_not_marked() -> None:
    stub = SimpleNamespace(
        added_tokens_decoder={3: AddedToken("a", special=True), 4: AddedToken("b", special=False)}, all_special_ids=[1]
    )
    assert policy(stub).special_token_ids == (1, 3)


def test_a_saved_tokenizer(tmp_path: Path) -> None:
    specials = ["<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    tiny.bpe_tokenizer(tmp_path, vocab_size=300, template=tiny.CHATML, specials=specials, eos="<|im_end|>")
    loaded = policy(AutoTokenizer.from_pretrained(tmp_path))
    assert {loaded.text_of(number) for number in loaded.special_token_ids} == set(specials)
    assert "<|im_start|>" not in loaded.tokenizer.all_special_tokens
    assert loaded.vocab_size == 300
    assert max(loaded.tokenizer(" ".join(tiny.text_corpus()))["input_ids"]) == 299


def test_a_context_takes_policy_and_folder_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    context = RunContext.from_environment("score", policy=policy(None), output_dir=tmp_path)
    assert context == RunContext("score", policy=policy(None), output_dir=tmp_path)


def test_what_a_preprocessor_leaves_out_is_empty() -> None:
    prepared = Prepared({"score": np.zeros(2)})
    assert (prepared.dropped, prepared.statistics, prepared.tensors) == (frozenset(), {}, {})
