"""Scores of a reward model against its own forward, row by row, in float64; cuts, refusals, the cache."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaForSequenceClassification,
)

from poft_plugin.data.rows import RowError, Turn
from poft_plugin.scorers import reward_model
from poft_plugin.scorers.reward_model import RewardModelScorer
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.plan import plan_scoring, probe
from poft_plugin.scoring.run import RunContext
from poft_plugin.scoring.shares import Share
from scoring.support import as_rows, grader, score_missing

DATA = tiny.chat_rows(12, seed=3) + tiny.chat_rows(4, seed=4, turns=3)
ROWS = as_rows(DATA)
KINDS = ("llama", "gpt2", "bert", "neox-mean", "neox-last")
WHOLE = Share(0, 1)
CLOSE: dict[str, Any] = {"rel": 1e-4, "abs": 1e-4}
NEOX_TEXT = "<|prompter|>{}<|endoftext|><|assistant|>{}<|endoftext|>"


@pytest.fixture(scope="module")
def graders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reward model of each kind. Read only."""
    folder = tmp_path_factory.mktemp("graders")
    models = {kind: tiny.reward_model(folder / kind, kind) for kind in ("llama", "gpt2", "bert")}
    models["neox-mean"] = tiny.neox_reward_model(folder / "neox-mean", pooling="mean", shards=3)
    models["neox-last"] = tiny.neox_reward_model(folder / "neox-last", pooling="last")
    return models


def rendered_ids(folder: Path, row: dict[str, Any]) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    else:
        pairs = zip(row["messages"][::2], row["messages"][1::2], strict=True)
        text = "".join(NEOX_TEXT.format(user["content"], assistant["content"]) for user, assistant in pairs)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def plain_neox(folder: Path) -> Any:
    """Body, pooling and linear layer by hand, out of the files; their old buffers are not looked at."""
    config = json.loads((folder / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    body = GPTNeoXModel(GPTNeoXConfig(**{key: config[key] for key in keys})).double().eval()
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.bin"):
        weights |= torch.load(file)
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    body.load_state_dict({k.removeprefix("gpt_neox."): weights[k] for k in weights if body_has(body, k)})

    def score(ids: torch.Tensor) -> torch.Tensor:
        hidden = body(ids).last_hidden_state[0]
        pooled = hidden.mean(0) if config["pooling"] == "mean" else hidden[-1]
        return (pooled * weights["out_proj.weight"][0].double()).sum() + weights["out_proj.bias"][0].double()

    return score


def body_has(body: torch.nn.Module, name: str) -> bool:
    return name.removeprefix("gpt_neox.") in body.state_dict()


def plain_sequence_classifier(folder: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    return lambda ids: model(ids).logits[0, 0]


def plain_scores(folder: Path, rows: list[list[int]]) -> list[float]:
    """Each row alone, without padding or mask, in float64."""
    score = (plain_neox if "neox" in folder.name else plain_sequence_classifier)(folder)
    with torch.no_grad():
        return [float(score(torch.tensor([ids]))) for ids in rows]


def expected_scores(folder: Path) -> dict[str, float]:
    """By row key, each row alone."""
    found = plain_scores(folder, [rendered_ids(folder, row) for row in DATA])
    return dict(zip(ROWS.keys.to_pylist(), found, strict=True))


def scores(scorer: RewardModelScorer, rows: Any, cache: ScoreCache, *, batch_tokens: int = 8192) -> dict[str, float]:
    score_missing(scorer, rows, cache, share=WHOLE, device="cpu", batch_tokens=batch_tokens)
    return dict(zip(rows.keys.to_pylist(), cache.lookup(scorer.identity, rows.keys).values.tolist(), strict=True))


@pytest.fixture(scope="module")
def expected(graders: dict[str, Path]) -> dict[str, dict[str, float]]:
    found = {kind: expected_scores(folder) for kind, folder in graders.items()}
    assert all(np.ptp(list(values.values())) > 100 * CLOSE["abs"] for values in found.values())
    assert any(max(values.values()) > 0 > min(values.values()) for values in found.values())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch_tokens", "shares", "reverse"), [(1, 1, False), (100, 1, True), (8192, 1, False), (256, 3, True)]
)
def test_scores_are_the_models_own_whatever_the_batches(
    graders: dict[str, Path], expected: dict[str, dict[str, float]], tmp_path: Path, kind: str, batch_tokens: int,
    shares: int, reverse: bool,
) -> None:  # fmt: skip
    cache, rows = ScoreCache(tmp_path), as_rows(DATA[:: -1 if reverse else 1])
    for index in range(shares):
        one = grader(graders[kind], cache)
        one.check()
        score_missing(one, rows, cache, share=Share(index, shares), device="cpu", batch_tokens=batch_tokens)
    found = cache.lookup(grader(graders[kind], cache).identity, rows.keys)
    assert found.num_tokens.tolist() == [len(rendered_ids(graders[kind], row)) for row in DATA[:: -1 if reverse else 1]]
    assert dict(zip(rows.keys.to_pylist(), found.values, strict=True)) == pytest.approx(expected[kind], **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox-last"])
def test_scores_follow_the_models_padding_token_and_nothing_of_the_tokenizers(
    graders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """transformers' classifiers pool the last token that is no padding, which they know from their own config."""
    found = []
    folder = Path(shutil.copytree(graders[kind], tmp_path / kind))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.convert_ids_to_tokens(20)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for pad in (None, 20, 1):  # none at all, a word of the rows, the token that ends them
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
        cache = ScoreCache(tmp_path / f"cache{pad}")
        found.append(scores(grader(folder, cache), ROWS, cache, batch_tokens=400))
        assert found[-1] == pytest.approx(expected_scores(folder), **CLOSE)
    ends_in_padding = max(abs(found[2][key] - found[0][key]) for key in found[0])
    assert (ends_in_padding > 100 * CLOSE["abs"]) == (kind != "neox-last")  # which pools the last, whatever it is


@pytest.mark.parametrize("kind", ["llama", "neox-mean"])
def test_half_precision(
    graders: dict[str, Path], expected: dict[str, dict[str, float]], tmp_path: Path, kind: str
) -> None:
    """No worse, batched, than twice what the rows alone lose to bfloat16."""
    worst = {}
    for batch_tokens in (1, 8192):
        cache = ScoreCache(tmp_path / str(batch_tokens))
        found = scores(grader(graders[kind], cache, dtype="bfloat16"), ROWS, cache, batch_tokens=batch_tokens)
        worst[batch_tokens] = max(abs(found[key] - value) for key, value in expected[kind].items())
    assert 0 < worst[8192] <= 2 * worst[1]


def test_old_defaults_of_neox(graders: dict[str, Path], tmp_path: Path) -> None:
    """`pooling: null` is `last`, in every respect but the file."""
    folder = Path(shutil.copytree(graders["neox-last"], tmp_path / "neox-null"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pooling": None}))
    cache = ScoreCache(tmp_path / "cache")
    assert grader(folder, cache).identity.fields["pooling"] == "last"
    assert scores(grader(folder, cache), ROWS, cache) == pytest.approx(
        scores(grader(graders["neox-last"], cache), ROWS, cache), **CLOSE
    )


def test_the_neox_format(graders: dict[str, Path], tmp_path: Path) -> None:
    one = grader(graders["neox-mean"], ScoreCache(tmp_path))
    turns = (Turn("system", "be kind"), Turn("user", "alpha"), Turn("assistant", "beta", counted=True))
    expected = "<|system|>be kind<|endoftext|><|prompter|>alpha<|endoftext|><|assistant|>beta<|endoftext|>"
    assert one.render(turns, "x").text == expected
    assert one.tokenizer.convert_ids_to_tokens(one.render(turns, "x").input_ids[0]) == "<|system|>"
    with pytest.raises(RowError, match=r"row 7: the chat template of reward model 'neox-mean' refuses.*tool"):
        one.prepare("00", (Turn("tool", "x"), *turns), "row 7")
    given = grader(graders["neox-mean"], ScoreCache(tmp_path), chat_template=tiny.CHATML)
    assert given.render(turns, "x").text.startswith("<|im_start|>system")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "neox-mean"])
def test_long_rows_lose_their_left(
    graders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, cache = graders[kind], ScoreCache(tmp_path)
    whole = [rendered_ids(folder, row) for row in DATA]
    length = sorted(map(len, whole))[3]
    one = grader(folder, cache, max_length=length)
    begins = {AutoTokenizer.from_pretrained(folder).bos_token_id}
    cut = [
        ids if len(ids) <= length else [ids[0], *ids[1 - length :]] if ids[0] in begins else ids[-length:]
        for ids in whole
    ]
    assert {ids[0] in begins for ids in whole} == {"neox" not in kind}
    prepared = [one.prepare(k, ROWS.conversation(i), "x") for i, k in enumerate(ROWS.keys.to_pylist())]
    assert [row.input_ids.tolist() for row in prepared] == cut
    counts = [one.render(ROWS.conversation(i), "x").num_counted for i in range(len(ROWS))]
    lost = sum(int(row.counted.sum()) < count for row, count in zip(prepared, counts, strict=True))
    long = sum(len(ids) > length for ids in whole)
    assert 0 < lost < long < len(DATA)
    found = scores(one, ROWS, cache)
    assert list(found.values()) == pytest.approx(plain_scores(folder, cut), **CLOSE)
    said = f"reward model {kind!r}: {long} of 16 rows longer than {length} tokens, cut on the left; {lost} lost part of"
    assert capsys.readouterr().out.count(said) == 1
    assert not cache.lookup(one.identity, ROWS.keys).too_long.any()


def test_nothing_is_said_where_nothing_is_cut(
    graders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores(grader(graders["llama"], ScoreCache(tmp_path)), ROWS, ScoreCache(tmp_path))
    assert "cut on the left" not in capsys.readouterr().out


def test_a_template_that_ends_with_much_text(graders: dict[str, Path], tmp_path: Path) -> None:
    one = grader(graders["llama"], ScoreCache(tmp_path), max_length=8, chat_template=tiny.INST + " alpha beta" * 9)
    with pytest.raises(RowError, match=r"row 7: reward model 'llama': its template writes 8 tokens or more after"):
        one.prepare("00", ROWS.conversation(0), "row 7")


def test_the_models_context_is_the_default_length(graders: dict[str, Path], tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    assert [grader(graders[kind], cache).max_length for kind in KINDS] == [1024, 1024, 1024, 512, 512]
    assert grader(graders["llama"], cache, max_length=9).max_length == 9
    assert grader(graders["llama"], cache).context_length is None
    assert not grader(graders["llama"], cache).drops_long_rows
    short = tiny.reward_model(tmp_path / "roberta", "roberta", context=26)
    one = grader(short, cache)
    assert one.max_length == 24  # two positions of its table are never a token's
    assert max(len(one.prepare("00", ROWS.conversation(i), "x")) for i in range(16)) == 24
    assert all(np.isfinite(list(scores(one, ROWS, cache).values())))


def test_only_what_is_new_is_scored(graders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, scored, original = ScoreCache(tmp_path), [], RewardModelScorer.score

    def stopping(self: RewardModelScorer, batch: Any) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.extend(row.key for row in batch)
        return original(self, batch)

    monkeypatch.setattr(RewardModelScorer, "score", stopping)
    run = {"share": WHOLE, "device": "cpu", "batch_tokens": 1}
    with pytest.raises(KeyboardInterrupt):
        score_missing(grader(graders["gpt2"], cache), ROWS, cache, **run)  # type: ignore[arg-type]
    monkeypatch.setattr(RewardModelScorer, "score", original)
    assert score_missing(grader(graders["gpt2"], cache), ROWS, cache, **run) == len(DATA) - 3  # type: ignore[arg-type]
    monkeypatch.setattr(RewardModelScorer, "load", lambda *_: pytest.fail("loaded"))
    assert score_missing(grader(graders["gpt2"], cache), ROWS, cache, **run) == 0  # type: ignore[arg-type]


def test_identity_is_what_a_score_depends_on(graders: dict[str, Path], tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "cache")
    digests = [
        grader(graders["llama"], cache, **settings).identity.digest
        for settings in (
            {},
            {"dtype": "bfloat16"},
            {"max_length": 99},
            {"system_turns": "drop"},
            {"chat_template": tiny.CHATML},
        )
    ]
    assert len(set(digests)) == len(digests)
    moved = Path(shutil.copytree(graders["llama"], tmp_path / "moved"))
    spelled = {"dtype": "float32", "max_length": 1024, "chat_template": tiny.INST, "trust_remote_code": True}
    assert grader(moved, cache, **spelled).identity.digest == digests[0]
    fields = {kind: grader(graders[kind], cache).identity.fields for kind in KINDS}
    assert [fields[kind].get("pooling") for kind in KINDS] == [None, None, None, "mean", "last"]
    assert fields["llama"]["contract"] == "reward model, logit of the one label, version 2"


def edited(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**stored, **config}))
    return target


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("llama", {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}},
         r"^reward model 'x': a reward model with several labels \(2\).*num_labels: 1"),
        ("llama", {"architectures": ["LlamaForCausalLM"]},
         r"^reward model 'x' .*a LlamaForCausalLM, no reward model; its head would be random.*SequenceClassification"),
        ("llama", {"is_encoder_decoder": True}, r"^reward model 'x': an encoder-decoder"),
        ("neox-last", {"pooling": "max"}, r"^reward model 'x': pooling 'max' in its config.json.*mean and last"),
    ],
)  # fmt: skip
def test_what_is_no_reward_model_is_refused_before_its_weights(
    graders: dict[str, Path], tmp_path: Path, kind: str, config: dict[str, Any], message: str
) -> None:
    folder = edited(graders[kind], tmp_path / "x", **config)
    for weights in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        weights.unlink()
    with pytest.raises(ValueError, match=message):
        grader(folder, ScoreCache(tmp_path / "cache")).check()


def test_templates_tokenizers_and_lengths_that_do_not_serve(graders: dict[str, Path], tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "cache")
    plain = Path(shutil.copytree(graders["llama"], tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"^reward model 'plain' .*no chat template.*trained on as `chat_template:`"):
        grader(plain, cache).check()
    other = Path(shutil.copytree(graders["neox-mean"], tmp_path / "other"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, other / name)
    with pytest.raises(ValueError, match=r"^reward model 'other' .*no chat template"):  # its roles are no tokens here
        grader(other, cache).check()
    with pytest.raises(ValueError, match=r"^reward model 'llama': chat_template 'nowhere.jinja': no such file"):
        grader(graders["llama"], cache, chat_template="nowhere.jinja").check()
    with pytest.raises(ValueError, match=r"^reward model 'llama': its chat template is not valid Jinja"):
        grader(graders["llama"], cache, chat_template="{% for").check()
    with pytest.raises(ValueError, match=r"^reward model 'llama': max_length: 2000 is above the 1024 tokens"):
        grader(graders["llama"], cache, max_length=2000).check()
    slow = grader(graders["llama"], cache, chat_template=tiny.CHATML)
    slow.__dict__["tokenizer"] = ByT5Tokenizer()
    with pytest.raises(ValueError, match=r"^reward model 'llama': ByT5Tokenizer gives no character offsets"):
        slow.check()
    with pytest.raises(ValueError, match=r"^reward model .*gone: no such folder"):
        grader(tmp_path / "gone", cache)


@pytest.mark.parametrize(("kind", "lacking"), [("llama", "score.weight"), ("neox-last", "out_proj.bias")])
def test_a_checkpoint_without_its_head_is_refused(
    graders: dict[str, Path], tmp_path: Path, kind: str, lacking: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(graders[kind], tmp_path / "headless"))
    file = next(iter([*folder.glob("*.bin"), *folder.glob("*.safetensors")]))
    weights = torch.load(file) if file.suffix == ".bin" else load_file(file)
    del weights[lacking]
    file.unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    one = grader(folder, ScoreCache(tmp_path / "cache"))
    one.check()
    with pytest.raises(ValueError, match=rf"^reward model 'headless': its checkpoint lacks 1 weights, {lacking}"):
        one.load("cpu")


def test_a_head_that_does_more_than_is_known_is_refused(
    graders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, original = ScoreCache(tmp_path), LlamaForSequenceClassification.forward

    def doubled(self: Any, **inputs: Any) -> Any:
        outputs = original(self, **inputs)
        outputs.logits = outputs.logits * 2
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForSequenceClassification, "forward", doubled)
        with pytest.raises(
            ValueError, match=r"'llama': LlamaForS.* differs by .* from the model's own forward .*0\.\d"
        ):
            grader(graders["llama"], cache).load("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "pooled_hidden", lambda hidden, *_: hidden[:, -1])
        with pytest.raises(ValueError, match=r"differs by .* in a padded batch .*float32.*cannot be used"):
            grader(graders["llama"], cache).load("cpu")
    grader(graders["llama"], cache).load("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_parameters_and_work(graders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    cache, one = ScoreCache(tmp_path), grader(graders[kind], ScoreCache(tmp_path))
    plan, prepared = plan_scoring(one, ROWS, cache.lookup(one.identity, ROWS.keys))
    tokens = sum(len(rendered_ids(graders[kind], row)) for row in DATA)
    assert (plan.to_score, plan.too_long, plan.tokens) == (16, 0, tokens)
    measured = probe(one, prepared, count=2, batch_tokens=300, run=RunContext("score"))
    assert measured.tokens_per_second > 0
    one.load("cpu")
    total = sum(p.numel() for p in one._model.parameters())
    base = sum(p.numel() for p in one._model.base_model.parameters())
    embedding = one._model.get_input_embeddings().weight.numel()
    assert one.num_parameters() == (total, total - base)
    assert plan.flops == 2 * (base - embedding) * tokens
    one.unload()


def test_real_tokenizers(shared_data: Path, tmp_path: Path) -> None:
    """Random models under two real tokenizers, a few real rows, against the plain loop."""
    lines = gzip.decompress((shared_data / "alpaca" / "alpaca.jsonl.gz").read_bytes()).decode().splitlines()[:6]
    data = [
        {"messages": [{"role": "user", "content": f"{r['instruction']} {r['input']}".strip()},
                      {"role": "assistant", "content": r["output"].strip()}]}
        for r in map(json.loads, lines)
    ]  # fmt: skip
    for name, size in (("gpt2", 50_257), ("mistral-v3", 32_768)):
        folder = Path(shutil.copytree(shared_data / "tokenizers" / name, tmp_path / name, copy_function=shutil.copy))
        folder.chmod(0o755)
        tiny.llama(folder, vocab_size=size, seed=1, hidden=16, layers=1, context=2048)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.save_pretrained(folder)
        cache, rows = ScoreCache(tmp_path / "cache"), as_rows(data)
        found = scores(grader(folder, cache), rows, cache, batch_tokens=700)
        expected = plain_scores(folder, [rendered_ids(folder, row) for row in data])
        assert list(found.values()) == pytest.approx(expected, **CLOSE)
        assert np.ptp(expected) > 100 * CLOSE["abs"]
