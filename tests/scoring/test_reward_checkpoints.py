"""Reward models as people have them: OpenRLHF's heads, soft-caps, tokenizers that are larger than the weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.checkpoints import resolve_checkpoint
from poft_plugin.scoring.run import Share, prepare_missing
from poft_plugin.scoring.start_policy import StartPolicyScorer
from scoring.support import as_rows, grader, score_missing, scorer

DATA = tiny.chat_rows(6, seed=3)
ROWS = as_rows(DATA)
WEIGHTS = "model.safetensors"
CLOSE: dict[str, Any] = {"rel": 1e-4, "abs": 1e-4}
GEMMA: dict[str, Any] = {
    "vocab_size": 330, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "max_position_embeddings": 512,
    "initializer_range": 0.5, "sliding_window": 64, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def scores(one: Any, cache: ScoreCache) -> list[float]:
    one.check()
    score_missing(one, ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=400)
    return list(cache.lookup(one.identity, ROWS.keys).rewards.tolist())


def rendered(folder: Path) -> list[torch.Tensor]:
    tokenizer: Any = hf.AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in DATA]
    return [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]


def openrlhf(source: Path, folder: Path, head: str = "score", **config: Any) -> Path:
    """As OpenRLHF saves one: its own architecture, no number of labels, the head under a name of the config's."""
    shutil.copytree(source, folder)
    weights = load_file(folder / WEIGHTS)
    weights[f"{head}.weight"] = weights.pop("score.weight")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text()) | {"architectures": ["RewardModel"], **config}
    kept = {k: v for k, v in stored.items() if k not in ("num_labels", "id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model. Read only."""
    return tiny.reward_model(tmp_path_factory.mktemp("judges") / "judge")


def last_token_scores(folder: Path) -> list[float]:
    """OpenRLHF's own forward: the head on the last token, whichever it is, in float64."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        hidden = [model.model(ids).last_hidden_state[0, -1] for ids in rendered(folder)]
    return [float(model.score(one)[0]) for one in hidden]


@pytest.mark.parametrize(
    ("head", "config"),
    [
        ("score", {}),
        ("value_head", {}),
        ("value_head", {"value_head_prefix": "value_head"}),
        ("rm_head", {"value_head_prefix": "rm_head"}),
        ("score", {"value_head_prefix": "value_head"}),
        ("score", {"architectures": ["LlamaForSequenceClassification"]}),
    ],
)
def test_openrlhf_heads(judge: Path, tmp_path: Path, head: str, config: dict[str, Any]) -> None:
    """Its rows end with the padding token here, which OpenRLHF does not pass over."""
    folder, cache = openrlhf(judge, tmp_path / "x", head, **config), ScoreCache(tmp_path / "cache")
    found = scores(grader(folder, cache), cache)
    if "architectures" in config:
        assert found == scores(grader(judge, ScoreCache(tmp_path / "own")), ScoreCache(tmp_path / "own"))
    else:
        assert found == pytest.approx(last_token_scores(judge), **CLOSE)
    assert np.ptp(found) > 100 * CLOSE["abs"]


def test_openrlhf_in_shards(judge: Path, tmp_path: Path) -> None:
    folder = openrlhf(judge, tmp_path / "x", "value_head")
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    held = {name: f"model-{1 + (name == 'value_head.weight')}.safetensors" for name in weights}
    for file in set(held.values()):
        save_file({name: w for name, w in weights.items() if held[name] == file}, folder / file, {"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": held}))
    cache = ScoreCache(tmp_path / "cache")
    assert scores(grader(folder, cache), cache) == pytest.approx(last_token_scores(judge), **CLOSE)


@pytest.mark.parametrize(
    ("head", "config", "message"),
    [
        ("other", {"value_head_prefix": "rm_head"}, r"no head named rm_head\.weight or score\.weight or .*Rename it"),
        ("score", {"normalize_reward": True}, r"normalize_reward: true .*Set it to false there"),
    ],
)
def test_openrlhf_models_that_are_not_scored(
    judge: Path, tmp_path: Path, head: str, config: dict[str, Any], message: str
) -> None:
    folder = openrlhf(judge, tmp_path / "x", head, **config)
    with pytest.raises(ValueError, match=rf"^reward model 'x': .*{message}"):
        grader(folder, ScoreCache(tmp_path / "cache")).check()


def test_tokens_without_weights_are_refused(judge: Path, models: SimpleNamespace, tmp_path: Path) -> None:
    """By the rows that have them: rows without them are scored."""
    turn = "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    cache = ScoreCache(tmp_path / "cache")
    for make, source, kind in ((grader, judge, "reward model"), (scorer, models.ref_a, "reference")):
        folder = Path(shutil.copytree(source, tmp_path / kind.split()[0]))
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        tokenizer.save_pretrained(folder)
        prepare_missing(make(folder, cache), ROWS, cache, Share(0, 1))  # type: ignore[operator]
        message = (
            rf"^{kind} '{folder.name}' .*its tokenizer has 331 tokens, its weights 330: '<\|turn\|>' \(id 330, in data"
        )
        with pytest.raises(ValueError, match=message):
            prepare_missing(make(folder, cache, chat_template=turn), ROWS, cache, Share(0, 1))  # type: ignore[operator]


def test_the_check_at_loading_reads_rendered_rows(judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward of its own that differs where a special token is: made-up rows have none."""
    original = hf.LlamaForSequenceClassification.forward

    def forward(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        outputs = original(self, input_ids=input_ids, **inputs)
        outputs.logits = outputs.logits + 3.0 * (input_ids == 0).any(1)[:, None]
        return outputs

    monkeypatch.setattr(hf.LlamaForSequenceClassification, "forward", forward)
    cache = ScoreCache(tmp_path / "cache")
    grader(judge, cache).load("cpu")  # nothing of the data has been read
    with pytest.raises(ValueError, match=r"^reward model 'judge': Llama.*score differs by 3 from the model's own forw"):
        scores(grader(judge, cache), cache)


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A reward model and a reference with a soft-cap that changes their scores. Read only."""
    found = {}
    for name, model, more in (
        ("judge", hf.Gemma2ForSequenceClassification, {"num_labels": 1}), ("reference", hf.Gemma2ForCausalLM, {})
    ):  # fmt: skip
        folder = tmp_path_factory.mktemp("capped") / name
        specials = ["<s>", "</s>", "<|pad|>"]
        tiny.bpe_tokenizer(folder, vocab_size=330, template=tiny.INST, specials=specials, eos="</s>")
        torch.manual_seed(0)
        model(hf.Gemma2Config(**GEMMA, **more, attn_logit_softcapping=1.0)).save_pretrained(folder)
        found[name] = folder
    return SimpleNamespace(**found)


def own_logits(folder: Path, attention: str) -> list[float]:
    auto = hf.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention).eval()
    with torch.no_grad():
        return [float(model(ids).logits[0, 0]) for ids in rendered(folder)]


def test_a_soft_cap_is_applied(capped: SimpleNamespace, tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "cache")
    found = scores(grader(capped.judge, cache), cache)
    assert found == pytest.approx(own_logits(capped.judge, "eager"), **CLOSE)
    dropped = np.array(own_logits(capped.judge, "sdpa"))
    assert np.abs(dropped - found).max() > 100 * CLOSE["abs"]


@pytest.mark.parametrize("kind", ["judge", "reference"])
def test_the_attention_of_a_model_with_a_soft_cap(capped: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    folder, make = getattr(capped, kind), grader if kind == "judge" else scorer
    cache = ScoreCache(tmp_path / "cache")
    for chosen in (None, "eager"):
        one: Any = make(folder, cache, attn_implementation=chosen)  # type: ignore[operator]
        one.check()
        one.load("cpu")
        assert one._model.config._attn_implementation == "eager"
    with pytest.raises(
        ValueError, match=rf"'{kind}': attn_implementation: sdpa leaves out the soft-cap .*1\.0\).*eager"
    ):
        make(folder, cache, attn_implementation="sdpa").check()  # type: ignore[operator]


def test_the_start_policy_has_the_policys_attention(capped: SimpleNamespace, tmp_path: Path) -> None:
    """Whatever it leaves out: both are to be one function."""
    from poft_plugin.config import ReferenceConfig

    folder, cache = str(capped.reference), ScoreCache(tmp_path / "cache")
    one = StartPolicyScorer(ReferenceConfig(model=folder, attn_implementation="sdpa"),
                            resolve_checkpoint(folder, None, cache))  # fmt: skip
    assert one.attention == "sdpa"


@pytest.mark.parametrize("kind", ["judge", "reference"])
def test_attn_implementation_is_honoured(judge: Path, models: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    make, folder = (grader, judge) if kind == "judge" else (scorer, models.ref_a)
    found = {}
    for chosen in (None, "sdpa", "eager"):
        cache = ScoreCache(tmp_path / str(chosen))
        one: Any = make(folder, cache, attn_implementation=chosen)  # type: ignore[operator]
        assert one.attention == chosen
        found[chosen] = scores(one, cache)
    assert found["eager"] == pytest.approx(found["sdpa"], **CLOSE)
    assert found[None] == found["sdpa"]
    wrong: Any = make(folder, ScoreCache(tmp_path / "x"), attn_implementation="fast")  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"'{folder.name}': its weights cannot be loaded .*attn_implementation.*fast"):
        wrong.load("cpu")
