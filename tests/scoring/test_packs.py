"""Packs of rows that begin alike: every prefix once, and of each row exactly what a forward of its own gives."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.packs import lay_out, pack_batches, predictions, probe_rows, shared_lengths
from poft_plugin.scoring.run import batches_for
from poft_plugin.scoring.scorer import PreparedRow
from scoring.support import grader, scorer

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=7)
EXACT = 1e-10


def rows_of(texts: list[list[int]]) -> list[PreparedRow]:
    return [
        PreparedRow(f"{number:02x}", np.array(ids, np.int32), np.arange(len(ids)) > 0)
        for number, ids in enumerate(texts)
    ]


@given(st.lists(IDS, min_size=1, max_size=12))
def test_a_pack_holds_every_row_whole(texts: list[list[int]]) -> None:
    rows = rows_of(texts)
    pack = lay_out(rows)
    for row, places in zip(rows, pack.places, strict=True):
        assert pack.input_ids[places].tolist() == row.input_ids.tolist()
        assert pack.position_ids[places].tolist() == list(range(len(row)))
        assert (np.diff(places) > 0).all(), "no token sees what comes after it"


@given(st.lists(IDS, min_size=1, max_size=12, unique_by=tuple))
def test_sorted_rows_take_a_prefix_tree(texts: list[list[int]]) -> None:
    """One token per node of the tree; a row that another begins with whole keeps a last token of its own."""
    (batch,) = pack_batches(rows_of(texts), batch_tokens=10_000)
    nodes = {tuple(ids[: length + 1]) for ids in texts for length in range(len(ids))}
    assert len(lay_out(batch).input_ids) == len(nodes)


@given(st.lists(IDS, max_size=12), st.integers(1, 12))
def test_batches_hold_every_row_once_within_the_budget(texts: list[list[int]], budget: int) -> None:
    rows = rows_of(texts)
    batches = list(pack_batches(rows, budget))
    assert sorted(row.key for batch in batches for row in batch) == sorted(row.key for row in rows)
    for batch in batches:
        assert len(batch) == 1 or len(lay_out(batch).input_ids) <= budget


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=8))
def test_a_token_is_predicted_by_the_one_before_it(texts: list[list[int]]) -> None:
    rows = rows_of(texts)
    pack = lay_out(rows)
    positions, targets, numbers = predictions(rows, pack)
    expected = [(ids[t - 1], ids[t], n) for n, ids in enumerate(texts) for t in range(1, len(ids))]
    assert list(zip(pack.input_ids[positions].tolist(), targets.tolist(), numbers.tolist(), strict=True)) == expected


def test_the_probe_has_prefixes_within_prefixes() -> None:
    assert {0, 3, 6, 9} <= set(shared_lengths(probe_rows(500)))


@pytest.fixture(scope="module")
def kinds(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A loaded scorer of each kind that reads packs."""
    folder = tmp_path_factory.mktemp("packs")
    cache = ScoreCache(folder / "cache")
    found = {
        "reference": scorer(models.ref_a, cache),
        "llama": grader(tiny.reward_model(folder / "llama", "llama"), cache),
        "neox-mean": grader(tiny.neox_reward_model(folder / "neox-mean", pooling="mean"), cache),
        "neox-last": grader(tiny.neox_reward_model(folder / "neox-last", pooling="last"), cache),
    }
    for one in found.values():
        one.load("cpu")
    return found


def texts_with_prefixes(vocabulary: int) -> list[PreparedRow]:
    """A header for all, prompts of several responses, a row inside another, one apart."""
    random = np.random.default_rng(1)
    words = lambda count: random.integers(10, vocabulary, count).astype(np.int32)  # noqa: E731
    header, prompts = words(5), [words(9), words(3)]
    ids = [np.concatenate([header, prompt, words(n)]) for prompt in prompts for n in (4, 7, 1)]
    ids += [ids[0][:-2], np.concatenate([header, words(6)]), words(8)]
    return [PreparedRow(f"{number:02x}", row, np.arange(len(row)) >= 3) for number, row in enumerate(ids)]


@contextlib.contextmanager
def in_float64(one: Any) -> Iterator[None]:
    """PyTorch's default follows, since some architectures make masks and rotations in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    one._model.double()
    try:
        yield
    finally:
        one._model.float()
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["reference", "llama", "neox-mean", "neox-last"])
def test_packs_give_what_separate_forwards_give(kinds: dict[str, Any], kind: str) -> None:
    one, rows = kinds[kind], texts_with_prefixes(300)
    assert one.pack_length > 0
    single = {row.key: one._scores([row], packed=False)[0].value for row in rows}
    for budget in (30, 10_000):
        for batch in batches_for(one, rows, budget):
            for score in one.score(batch):
                assert score.value == pytest.approx(single[score.key], rel=1e-5, abs=1e-5)
    with in_float64(one):
        exact = {row.key: one._scores([row], packed=False)[0].value for row in rows}
        # the others round to float32 somewhere: the head's sums, or a score at the end
        tolerance = EXACT if kind == "llama" else 1e-6
        for score in one._scores(sorted(rows, key=lambda row: row.input_ids.tobytes()), packed=True):
            assert score.value == pytest.approx(exact[score.key], rel=tolerance, abs=tolerance)


def with_model(folder: Path, base: Path, model: Any) -> Path:
    """The tokenizer of `base` beside another model."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def test_a_window_keeps_long_rows_out(models: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, initializer_range=0.3,
    )  # fmt: skip
    one = scorer(with_model(tmp_path / "mistral", models.ref_a, MistralForCausalLM(config)), ScoreCache(tmp_path / "c"))
    one.load("cpu")
    assert one.pack_length == 16
    rows = texts_with_prefixes(300)
    assert min(map(len, rows)) <= 16 < max(map(len, rows))
    single = {row.key: one._scores([row], packed=False)[0].value for row in rows}
    for batch in batches_for(one, rows, 64):
        for score in one.score(batch):
            assert score.value == pytest.approx(single[score.key], rel=1e-5)


def test_an_architecture_that_cannot_says_so_once(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OPT counts its positions itself, by the attention mask."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=500, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, init_std=0.3, max_position_embeddings=64,
    )  # fmt: skip
    one = scorer(with_model(tmp_path / "opt", models.ref_a, OPTForCausalLM(config)), ScoreCache(tmp_path / "c"))
    one.load("cpu")
    assert one.pack_length == 0
    out = capsys.readouterr().out
    assert out.count("reads each row whole") == 1
    assert "OPTForCausalLM" in out
    rows = texts_with_prefixes(300)
    for batch in batches_for(one, rows, 64):
        one.score(batch)


def test_a_leak_is_seen(models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs whose rows do not see what they go on from are not used."""
    from poft_plugin.attention import shared
    from poft_plugin.attention.packed import packed_attention

    monkeypatch.setattr(shared, "shared_attention", packed_attention)
    one = scorer(models.ref_a, ScoreCache(tmp_path / "c"))
    one.load("cpu")
    assert one.pack_length == 0


def test_fewer_tokens_are_read(kinds: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, rows = kinds["llama"], texts_with_prefixes(300)
    read = []
    original = type(one._model.base_model).forward

    def count(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        read.append(input_ids.numel())
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(one._model.base_model), "forward", count)
    for batch in batches_for(one, rows, 10_000):
        one.score(batch)
    assert read == [len({tuple(r.input_ids[: n + 1]) for r in rows for n in range(len(r))})]
