"""References that are GGUF files: scored as the same weights in a folder are."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from poft_plugin.scoring import gguf_files
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.checkpoints import MissingCheckpointError
from poft_plugin.scoring.run import Share
from scoring.support import as_rows, grader, score_missing, scorer

ROWS = as_rows(tiny.chat_rows(5, seed=3))
HIDDEN, WIDE, LAYERS, HEADS, KEY_VALUE_HEADS = 32, 64, 2, 4, 2
EOS = 1


def written(folder: Path, tokenizer_folder: Path) -> Path:
    """A random Llama with a byte-level BPE tokenizer, as llama.cpp's converter lays such a file out."""
    folder.mkdir()
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values()}
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in stored["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny.CHATML)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output": (len(tokens), HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (HIDDEN // HEADS * KEY_VALUE_HEADS, HIDDEN),
            f"blk.{layer}.attn_v": (HIDDEN // HEADS * KEY_VALUE_HEADS, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (WIDE, HIDDEN),
            f"blk.{layer}.ffn_up": (WIDE, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, WIDE),
        }
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.3 * random.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return written(folder / "model", tiny.policy(folder / "policy"))


def rewards(path: Path, cache: ScoreCache) -> list[float]:
    one = scorer(path, cache)
    score_missing(one, ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=512)
    return list(cache.lookup(one.identity, ROWS.keys).rewards.tolist())


def test_scores_are_those_of_the_same_weights_in_a_folder(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **gguf_files.dequantized()
    ).save_pretrained(folder)
    one = scorer(file, ScoreCache(tmp_path / "scores"))
    tokenizer = one.tokenizer
    assert tokenizer.eos_token == "<|im_end|>", "transformers reads the token that begins a text"
    tokenizer.save_pretrained(folder)
    found = rewards(file, ScoreCache(tmp_path / "scores"))
    assert found == pytest.approx(rewards(folder, ScoreCache(tmp_path / "again")), rel=1e-6)
    assert len(set(found)) == len(found)


def test_another_file_is_another_scorer(file: Path, tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores")
    before = scorer(file, cache).identity
    other = tmp_path / "other.gguf"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    other.write_bytes(bytes(data))
    assert scorer(other, cache).identity != before
    copy = tmp_path / "elsewhere" / file.name
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    assert scorer(copy, cache).identity == before


def test_what_cannot_be_done_is_said(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ScoreCache(tmp_path)
    with pytest.raises(ValueError, match=r"a GGUF file, which holds a language model and no score head"):
        grader(file, cache).check()
    with pytest.raises(MissingCheckpointError, match=r"missing\.gguf: no such file"):
        scorer(file.with_name("missing.gguf"), cache)
    with pytest.raises(MissingCheckpointError, match=r"a GGUF file is named itself.*tiny\.gguf"):
        scorer(file.parent, cache)
    monkeypatch.setattr(gguf_files, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="`pip install gguf`"):
        _ = scorer(file, cache).tokenizer


def test_a_split_file_is_refused(file: Path, tmp_path: Path) -> None:
    for name in ("tiny-Q8-00001-of-00002.gguf", "tiny-Q8-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
        message = rf"one part of .*`llama-gguf-split --merge {name} tiny-Q8\.gguf`"
        with pytest.raises(MissingCheckpointError, match=message):
            scorer(tmp_path / name, ScoreCache(tmp_path / "cache"))
    with pytest.raises(MissingCheckpointError, match=r"^reference owner/name/q4-00001-of-00003\.gguf: one part of"):
        scorer(Path("owner/name/q4-00001-of-00003.gguf"), ScoreCache(tmp_path / "cache"))


def test_a_folder_with_a_file_and_a_config(file: Path, tmp_path: Path) -> None:
    """As repositories of converted models are, some with a config.json: the file is named in the remedy."""
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MissingCheckpointError, match=r"no weights in it; a GGUF file is named itself.*/tiny\.gguf`"):
        scorer(folder, ScoreCache(tmp_path / "cache"))


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_a_file_that_was_cut_off(file: Path, tmp_path: Path, kept: float) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"^reference 'cut\.gguf': .*cut\.gguf cannot be read.*[Dd]ownload it again"):
        rewards(cut, ScoreCache(tmp_path / "cache"))


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "wavtokenizer-dec")
    writer.add_tensor("x.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"^reference 'odd\.gguf': .*wavtokenizer-dec"):
        scorer(tmp_path / "odd.gguf", ScoreCache(tmp_path / "cache")).check()
