"""Rewards against a plain float64 loop, whatever the batches; what a scorer's identity depends on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from poft_plugin.data.rows import RowError, Turn
from poft_plugin.scorers import chat_templates
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.run import prepare_missing
from poft_plugin.scoring.shares import Share
from scoring.support import as_rows, plain_reward, rows_of, score_missing, scorer

RELATIVE = 1e-4
ROWS = tiny.chat_rows(12, seed=3) + tiny.chat_rows(4, seed=4, turns=3)


def rewards(
    models: SimpleNamespace, folder: Path, order: list[int], batch_tokens: int, shares: int = 1
) -> dict[str, float]:
    cache = ScoreCache(folder)
    rows = as_rows([ROWS[i] for i in order])
    for index in range(shares):
        reference = scorer(models.ref_a, cache)
        score_missing(reference, rows, cache, share=Share(index, shares), device="cpu", batch_tokens=batch_tokens)
    lookup = cache.lookup(scorer(models.ref_a, cache).identity, rows.keys)
    assert not lookup.missing.any()
    return dict(zip(rows.keys.to_pylist(), lookup.values.tolist(), strict=True))


@pytest.fixture(scope="module")
def expected(models: SimpleNamespace) -> dict[str, tuple[float, int]]:
    keys = as_rows(ROWS).keys.to_pylist()
    return {key: plain_reward(models.ref_a, row) for key, row in zip(keys, ROWS, strict=True)}


@pytest.mark.parametrize(
    ("batch_tokens", "shares", "reverse"), [(1, 1, False), (100, 1, True), (8192, 1, False), (256, 3, True)]
)
def test_rewards_equal_the_plain_loop(
    models: SimpleNamespace, expected: dict[str, tuple[float, int]], tmp_path: Path, batch_tokens: int, shares: int,
    reverse: bool,
) -> None:  # fmt: skip
    order = list(range(len(ROWS)))[:: -1 if reverse else 1]
    found = rewards(models, tmp_path, order, batch_tokens, shares)
    assert found.keys() == expected.keys()
    for key, (reward, _) in expected.items():
        assert found[key] == pytest.approx(reward, rel=RELATIVE)


def test_token_counts(models: SimpleNamespace, expected: dict[str, tuple[float, int]], tmp_path: Path) -> None:
    cache, rows = ScoreCache(tmp_path), as_rows(ROWS)
    reference = scorer(models.ref_a, cache)
    score_missing(reference, rows, cache, share=Share(0, 1), device="cpu", batch_tokens=512)
    counts = cache.lookup(reference.identity, rows.keys).num_tokens.tolist()
    assert counts == [count for _, count in expected.values()]


def test_end_of_turn_adds_one_token_a_turn(models: SimpleNamespace, tmp_path: Path) -> None:
    cache, rows = ScoreCache(tmp_path), as_rows(ROWS)
    without, with_it = scorer(models.ref_a, cache), scorer(models.ref_a, cache, include_end_of_turn=True)
    for index, row in enumerate(ROWS):
        turns = len(row["messages"]) // 2
        counts = [int(s.prepare("00", rows.conversation(index), "x").counted.sum()) for s in (without, with_it)]
        assert counts[1] - counts[0] == turns


def test_truncation_cuts_the_end(models: SimpleNamespace, tmp_path: Path) -> None:
    cache, rows = ScoreCache(tmp_path), as_rows(tiny.chat_rows(20, seed=1, turns=2))
    whole, cut = scorer(models.short, cache), scorer(models.short, cache, on_long_row="truncate")
    long = next(i for i in range(20) if len(whole.prepare("00", rows.conversation(i), "x")) > 32)
    assert len(cut.prepare("00", rows.conversation(long), "x")) == 32
    prompt_only = as_rows(
        [{"messages": [{"role": "user", "content": "alpha " * 99}, {"role": "assistant", "content": "b"}]}]
    )
    with pytest.raises(RowError, match="row 7.*context of 32"):
        cut.prepare("00", prompt_only.conversation(0), "row 7")


def test_identity_follows_content_not_place(models: SimpleNamespace, tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "cache")
    moved = Path(shutil.copytree(models.ref_a, tmp_path / "moved"))
    original = scorer(models.ref_a, cache).identity.digest
    assert scorer(moved, cache, name="other", attn_implementation="eager", devices=1).identity.digest == original
    assert scorer(models.ref_b, cache).identity.digest != original


def test_identity_changes_with_what_a_score_depends_on(models: SimpleNamespace, tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "cache")
    digests = [
        scorer(models.ref_a, cache).identity.digest,
        scorer(models.ref_a, cache, dtype="bfloat16").identity.digest,
        scorer(models.ref_a, cache, quantization="nf4").identity.digest,
        scorer(models.ref_a, cache, chat_template=tiny.CHATML).identity.digest,
        scorer(models.ref_a, cache, system_turns="merge").identity.digest,
        scorer(models.ref_a, cache, on_long_row="truncate").identity.digest,
        scorer(models.ref_a, cache, include_end_of_turn=True).identity.digest,
    ]
    assert len(set(digests)) == len(digests)
    # null and auto are resolved before hashing: spelling out the default changes nothing
    assert scorer(models.ref_a, cache, dtype="float32", chat_template=tiny.INST).identity.digest == digests[0]
    assert scorer(models.ref_a, cache, on_long_row="drop").identity.digest == digests[0]


def test_edited_weights_and_tokenizer_change_the_identity(models: SimpleNamespace, tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "cache")
    folder = Path(shutil.copytree(models.ref_a, tmp_path / "edited"))
    before = scorer(folder, cache).identity.digest
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    after = scorer(folder, cache).identity.digest
    assert after != before
    stat = weights.stat()
    data[-1] ^= 2
    weights.write_bytes(bytes(data))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as copies and archives do
    assert scorer(folder, cache).identity.digest not in (before, after)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert scorer(folder, cache).identity.digest not in (before, after)


def test_a_reference_without_template_is_refused(models: SimpleNamespace, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.ref_a, tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"'plain'.*no chat template.*chat_template:"):
        _ = scorer(folder, ScoreCache(tmp_path)).chat_template
    with pytest.raises(ValueError, match="nowhere.jinja.*no such file"):
        _ = scorer(folder, ScoreCache(tmp_path), chat_template="nowhere.jinja").chat_template
    (tmp_path / "t.jinja").write_text(tiny.INST)
    assert scorer(folder, ScoreCache(tmp_path), chat_template=str(tmp_path / "t.jinja")).chat_template == tiny.INST


def test_template_names_that_the_host_gives(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "NAMED", {"chatml": tiny.CHATML})
    own = (models.ref_a / "chat_template.jinja").read_text()
    bare = Path(shutil.copytree(models.ref_a, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    cache = ScoreCache(tmp_path)
    for folder, name, text in (
        (models.ref_a, "chatml", tiny.CHATML), (models.ref_a, "tokenizer_default", own),
        (models.ref_a, "tokenizer_default_fallback_chatml", own),
        (bare, "tokenizer_default_fallback_chatml", tiny.CHATML),
    ):  # fmt: skip
        assert scorer(folder, cache, chat_template=name).chat_template == text
    with pytest.raises(ValueError, match=r"'ref_a': chat_template 'chat_ml': .*Names: tokenizer_default, .*, chatml$"):
        _ = scorer(models.ref_a, cache, chat_template="chat_ml").chat_template
    with pytest.raises(ValueError, match=r"'bare'.*no chat template"):
        _ = scorer(bare, cache, chat_template="tokenizer_default").chat_template


SKIPS = "{% for m in messages if m.role in ['user', 'assistant'] %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


def test_turns_that_a_template_leaves_out_are_said_once(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the text occurs elsewhere: the tool's `five` is in the answer."""
    roles = ("system", "user", "assistant", "tool", "assistant")
    texts = ("Say five.", "2+2?", "call", "five", "five.")
    whole = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    rows = as_rows([{"messages": whole}, {"messages": whole[1:]}, {"messages": whole[1:3]}])
    cache = ScoreCache(tmp_path)
    prepare_missing(scorer(models.ref_a, cache, chat_template=SKIPS), rows, cache, Share(0, 1))
    printed = capsys.readouterr().out
    assert printed.count("WARNING: reference 'ref_a': its chat template leaves out turns") == 1
    assert "role 'system' in 1 of 3 rows" in printed
    assert "role 'tool' in 2 of 3 rows" in printed
    assert "`system_turns: merge`" in printed
    prepare_missing(scorer(models.ref_a, cache, chat_template=tiny.CHATML), rows, cache, Share(0, 1))
    assert "leaves out" not in capsys.readouterr().out


def test_rows_without_an_end_of_turn_token_are_counted(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    turns = [[Turn("user", "one?"), Turn("assistant", text, True, ends)] for text, ends in (("two", 1), ("six", 0))]
    rows = rows_of(turns)
    cache = ScoreCache(tmp_path)
    reference = scorer(models.ref_a, cache, chat_template=bare, include_end_of_turn="auto")
    prepare_missing(reference, rows, cache, Share(0, 1))
    assert "reference 'ref_a': 1 of 2 rows are scored without an end-of-turn token" in capsys.readouterr().out


def test_a_template_that_is_no_jinja_is_the_references_fault(models: SimpleNamespace, tmp_path: Path) -> None:
    broken = scorer(models.ref_a, ScoreCache(tmp_path), chat_template="{% for m in messages %}{{ m.content")
    with pytest.raises(ValueError, match=r"^reference 'ref_a': its chat template is not valid Jinja"):
        _ = broken.renderer


def test_real_tokenizers(shared_data: Path, tmp_path: Path) -> None:
    """Random models under two real tokenizers, a few real rows, against the plain loop."""
    import gzip

    lines = gzip.decompress((shared_data / "alpaca" / "alpaca.jsonl.gz").read_bytes()).decode().splitlines()[:6]
    rows = [
        {"messages": [{"role": "user", "content": f"{r['instruction']} {r['input']}".strip()},
                      {"role": "assistant", "content": r["output"].strip()}]}
        for r in map(json.loads, lines)
    ]  # fmt: skip
    for name, size in (("gpt2", 50_257), ("mistral-v3", 32_768)):
        folder = Path(shutil.copytree(shared_data / "tokenizers" / name, tmp_path / name, copy_function=shutil.copy))
        folder.chmod(0o755)
        tiny.llama(folder, vocab_size=size, seed=1, hidden=16, layers=1, context=2048)
        cache, table = ScoreCache(tmp_path / "cache"), as_rows(rows)
        reference = scorer(folder, cache)
        score_missing(reference, table, cache, share=Share(0, 1), device="cpu", batch_tokens=700)
        found = cache.lookup(reference.identity, table.keys).values
        for row, reward in zip(rows, found, strict=True):
            assert reward == pytest.approx(plain_reward(folder, row)[0], rel=RELATIVE)
