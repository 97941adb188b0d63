"""What preference methods refuse, by name: settings at config load, models before data, rows with their place."""

import gc
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graded
import hosting
import pytest
import tiny
from axolotl.integrations.base import PluginManager
from axolotl.utils.schemas.config import AxolotlInputConfig
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
)

from poft_plugin.config import DeftConfig, DpoKeys
from poft_plugin.hosts.axolotl.args import TAKEN_KEYS, TAKEN_OVER
from poft_plugin.hosts.axolotl.entries import SALT_FIELD, STRATEGY
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.methods import PRO, deft

PAIRS, LISTS = "chat_template.default", "poft_plugin.ranked"
RAW = tiny.pair_rows(8)
LONG_LISTS = [{"prompt": f"{n}?", "responses": ["a", "b", "c"], "scores": [3.0, 2.0, n]} for n in range(6)]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host prepares data in this process."""
    monkeypatch.setenv("AXOLOTL_DATASET_NUM_PROC", "0")


def config(models: SimpleNamespace, folder: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """A config of `rl: deft_dpo` on pairs with scores, which loads; plain methods get the block as it is given."""
    data = tiny.write_jsonl(folder / "data.jsonl", RAW if rows is None else rows)
    kind = settings.pop("type", PAIRS)
    deft, plain = settings.pop("deft", {}), settings.get("rl") in ("pro", "rrhf")
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "datasets": [{"path": str(data), "ds_type": "json", "type": kind, **settings.pop("entry", {})}],
        "plugins": ["poft_plugin.PoftPlugin"],
        "rl": "deft_dpo",
        "deft": deft if plain else {"score_cache": str(folder / "scores"), "top_percent": 50, **deft},
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 0,
    }
    return tiny.write_config(folder / "config.yml", **{**defaults, **settings})


def plugin() -> Any:
    return PluginManager.get_instance().plugins["poft_plugin.PoftPlugin"]


def prepare(path: Path) -> Any:
    """The data sets that `axolotl train` would get."""
    return graded.host_datasets(path)[1]


POFT = {"references": [{"model": "a"}]}
NOT_READ = r": .* is not read by `rl: deft_\w+`; remove it"
NOT_HONOURED = r"cannot be honoured with `rl: deft_\w+`: "
RM = {"model": "./grader"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poft": POFT}, r"poft: this block is there, but `rl: deft_dpo` does not read it.* to poft, or remove"),
        ({"rl": "poft", "poft": POFT}, r"deft: this block is there, but `rl: poft` does not read it"),
        ({"rl": "dpo"}, r"deft: .* `rl: dpo` does not .* to pro or rrhf or deft_pro or deft_rrhf or deft_dpo or deft_"),
        ({"rl": None}, r"deft: this block is there, but `rl: None` does not read it"),
        ({"rl": "sft"}, r"rl: .sft. is no rl type; did you mean `rl: deft_sft`"),
        ({"deft": {"top_percnt": 5}}, r"deft\.top_percnt: unknown key; allowed here: batch_tokens, bottom_percent"),
        ({"deft": {"reward_model": {**RM, "devices": 2}}}, r"deft\.reward_model\.devices: unknown key; allowed"),
        ({"deft": {"reward_model": {}}}, r"deft\.reward_model\.model: missing; Hub id or local folder"),
        ({"deft": {"top_percent": 60, "bottom_percent": 41}}, "deft: top_percent 60.* is more than 100"),
        ({"deft": {"train_on": "C"}}, r"deft\.train_on: .*'A', 'A\+B' or 'all'.*'C'"),
        ({"deft": {"grade_within": "x"}, "row_filters": [{"name": "keep_top_percent", "percent": 5, "within": "y"}]},
         r"rows can be ranked within one column only, not \['x', 'y'\]"),
        ({"entry": {"field_chosn": "c"}}, r"datasets\[0\]\.field_chosn: unknown key; allowed here: field_chosen"),
        ({"entry": {"train_on_inputs": True}}, r"datasets\[0\]\.train_on_inputs: unknown key"),
        ({"type": "chatml"}, r"type 'chatml' reads whichever.*Write this instead"),
        ({"type": "completion"}, r"type 'completion' is not supported by `rl: deft_dpo`.*poft_plugin\.hh_rlhf"),
        ({"type": "alpaca"}, r"type 'alpaca' is not supported by `rl: deft_dpo`, which takes preference rows"),
        ({"type": {"field_output": "p"}}, r"type \{'field_output': 'p'\} has unknown keys"),
        ({"rl": "rrhf", "deft": {"top_percent": 5}}, r"deft\.top_percent: unknown key; allowed here: batch_tokens, m"),
        ({"rl": "pro", "deft": {"top_percent": 5}}, r"deft\.top_percent: unknown key; allowed here: batch_tokens, m"),
        ({"rl": "rrhf", "deft": {"pro_temperature": "reward"}}, "pro_temperature: .* is not read by `rl: rrhf`"),
        ({"rl": "deft_rrhf", "deft": {"pro_temperature": "reward"}}, "pro_temperature" + NOT_READ),
        ({"deft": {"pro_temperature": "reward"}}, "pro_temperature" + NOT_READ),
        ({"rl": "deft_pro", "rl_beta": 0.1}, rf"rl_beta: 0\.1 {NOT_HONOURED}not read by this method"),
        ({"rl": "deft_pro", "dpo_loss_type": ["ipo"]}, "dpo_loss_type" + NOT_READ),
        ({"rl": "deft_pro", "precompute_ref_log_probs": True}, rf"precompute_ref_log_probs: True {NOT_HONOURED}"),
        ({"dpo_loss_type": ["kto_pair"]}, r"dpo_loss_type\.0: .*'sigmoid', 'hinge', 'ipo' or 'robust'.*'kto_pair'"),
        ({"dpo_loss_weights": [1.0, 2.0]}, r"dpo_loss_weights has 2 numbers for 1 loss types"),
        ({"dpo_label_smoothing": 0.1}, r"dpo_label_smoothing: 0\.1 does nothing with dpo_loss_type sigmoid"),
        ({"rl_beta": 0}, r"rl_beta: .*greater than 0"),
        ({"precompute_ref_log_probs": False}, r"precompute_ref_log_probs: .*\(given: False\)"),
        ({"trl": {"beta": 0.1}}, rf"trl: .*{NOT_HONOURED}TRL's settings are not read"),
        ({"max_prompt_len": 512}, rf"max_prompt_len: 512 {NOT_HONOURED}prompts are not cut"),
        ({"roles_to_train": ["assistant"]}, rf"roles_to_train: .*{NOT_HONOURED}the response alone is trained on"),
        ({"excess_length_strategy": "truncate"}, rf"excess_length_strategy: 'truncate' {NOT_HONOURED}"),
        ({"reward_model": True}, rf"reward_model: True {NOT_HONOURED}this trains a reward model"),
        ({"datasets": None}, r"datasets: missing; `rl: deft_dpo` needs rows to train on"),
    ],
)  # fmt: skip
def test_refused_at_config_load(
    models: SimpleNamespace, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = config(models, tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        hosting.load_config(path)


PREFERENCES = sorted(
    key for key in AxolotlInputConfig.model_fields if key.startswith(("dpo_", "kto_", "simpo_", "cpo_"))
)


@pytest.mark.parametrize("method", ["deft_dpo", "deft_pro"])
def test_every_key_of_the_hosts_preference_trainers_is_read_or_refused(
    models: SimpleNamespace, tmp_path: Path, method: str
) -> None:
    read = set(DpoKeys.model_fields) if method == "deft_dpo" else set()
    assert len(PREFERENCES) > 8 and "dpo_use_weighting" in PREFERENCES
    for key in set(PREFERENCES) - read:
        with pytest.raises(ValueError, match=f"{key}: 1 is not read by `rl: {method}`; remove it"):
            hosting.load_config(config(models, tmp_path, rl=method, **{key: 1}))


def test_a_wrapped_method_keeps_its_own_check_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's method has settings of its own, also inside `deft_`."""

    def check(settings: Any) -> None:
        raise ValueError(f"toy: {settings.strength}")

    monkeypatch.setitem(sys.modules, "toy", SimpleNamespace(check=check))
    inner, block = replace(PRO, name="toy", block="toy", check="toy:check"), SimpleNamespace(strength=3)
    wrapped = deft(inner)
    assert wrapped is not None
    run = MethodRun(wrapped, DeftConfig(omega=0.5), (), None, block)
    with pytest.raises(ValueError, match="toy: 3"):
        run.check()
    with pytest.raises(ValueError, match=r"deft\.omega: missing"):
        MethodRun(wrapped, DeftConfig(), (), None, block).check()


START = {
    "reinit_weights": True,
    "overrides_of_model_config": {"rope_theta": 1.0},
    "overrides_of_model_kwargs": {"use_cache": False},
    "base_model_config": "./other",
    "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"},
    "gptq": True,
    "quantize_moe_experts": True,
}


@pytest.mark.parametrize("key", START)
def test_a_start_that_is_not_the_checkpoint_is_refused(models: SimpleNamespace, tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}: .* {NOT_HONOURED}"):
        hosting.load_config(config(models, tmp_path, **{key: START[key]}))


def test_methods_without_a_reference_begin_as_they_like(models: SimpleNamespace, tmp_path: Path) -> None:
    cfg = hosting.load_config(
        config(models, tmp_path, rl="deft_pro", overrides_of_model_config=START["overrides_of_model_config"])
    )
    assert cfg[TAKEN_OVER] == "deft_pro"


def test_taken_over(models: SimpleNamespace, tmp_path: Path) -> None:
    keys = {"rl_beta": 0.3, "dpo_loss_type": ["ipo", "hinge"], "dpo_loss_weights": [1.0, 0.5]}
    cfg = hosting.load_config(config(models, tmp_path, sample_packing=True, **keys))
    assert cfg.rl is None
    assert cfg[TAKEN_OVER] == "deft_dpo"
    assert dict(cfg[TAKEN_KEYS]) == keys
    assert cfg.rl_beta is None
    assert cfg.eval_sample_packing is False
    assert (cfg.datasets[0]["type"], len(cfg.datasets[0][SALT_FIELD])) == (STRATEGY, 16)
    run = plugin().method_run
    assert (run.settings.top_percent, run.settings.omega, run.settings.sft_weight) == (50, 2.5e-6, 0.05)
    assert (run.keys.rl_beta, run.keys.dpo_loss_type) == (0.3, ("ipo", "hinge"))
    assert run.filters == (("keep_levels", {"levels": "A"}),)


def test_a_saved_config_still_names_its_method_and_its_keys(models: SimpleNamespace, tmp_path: Path) -> None:
    """What the host logs has neither `rl` nor its keys; training again from it must not become plain SFT."""
    saved = {TAKEN_OVER: "deft_dpo", TAKEN_KEYS: {"rl_beta": 0.3, "dpo_loss_type": ["ipo"]}}
    cfg = hosting.load_config(config(models, tmp_path, rl=None, **saved))
    assert plugin().method_run.method.name == "deft_dpo"
    assert (plugin().method_run.keys.rl_beta, plugin().method_run.keys.dpo_loss_type) == (0.3, ("ipo",))
    assert dict(cfg[TAKEN_KEYS]) == saved[TAKEN_KEYS]


def test_the_salt_follows_method_and_fields(models: SimpleNamespace, tmp_path: Path) -> None:
    def salt(**settings: Any) -> str:
        return str(hosting.load_config(config(models, tmp_path, **settings)).datasets[0][SALT_FIELD])

    first = salt()
    assert salt(deft={"omega": 1.0, "train_on": "all"}) == first
    assert salt(rl="deft_pro") != first
    assert salt(deft={"grade_within": "topic"}) != first
    assert salt(entry={"field_scores": "other"}) != first
    assert salt(rows=RAW[:-1]) != first


@pytest.fixture(scope="module")
def graders(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One that serves, one with several labels."""
    folder = tmp_path_factory.mktemp("graders")
    many = tiny.reward_model(folder / "many")
    LlamaForSequenceClassification(
        LlamaConfig(vocab_size=330, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    num_labels=3)
    ).save_pretrained(many)  # fmt: skip
    return SimpleNamespace(good=tiny.reward_model(folder / "good"), many=many, causal=models.ref_a)


@pytest.mark.parametrize(
    ("grader", "settings", "message"),
    [
        ("many", {}, r"reward model 'many': a reward model with several labels \(3\)"),
        ("causal", {}, r"reward model 'ref_a' .*LlamaForCausalLM, no reward model; its head would be random"),
        ("gone", {}, r"reward model ./gone: no such folder.*axolotl poft import"),
        ("good", {"rl": "pro"}, r"deft\.reward_model: nothing reads its scores here; set `rank_by: reward`"),
        ("good", {"rl": "rrhf"}, r"deft\.reward_model: nothing reads its scores here"),
        ("good", {"rl": "deft_rrhf"}, r"deft\.omega: missing; the paper names it for deft_dpo.*and deft_pro"),
        ("good", {"rl": "deft_sft"}, r"deft\.omega: missing"),
        ("good", {"lora_model_dir": "./a", "adapter": "lora"}, r"lora_model_dir: './a': `rl: deft_dpo` would begin"),
        ("good", {"sample_packing": True, "attn_implementation": None}, "sample_packing: true with attn_impl"),
    ],
)  # fmt: skip
def test_refused_before_data_are_read(
    models: SimpleNamespace, in_folder: Path, graders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
    grader: str, settings: dict[str, Any], message: str,
) -> None:  # fmt: skip
    model = {"model": str(getattr(graders, grader, "./gone"))}
    block = {"reward_model": model}
    path = config(models, in_folder, deft=block, **settings)
    monkeypatch.setattr(
        "poft_plugin.hosts.axolotl.host_rows.load_host_datasets", lambda **_: pytest.fail("data were read first")
    )
    with pytest.raises(ValueError, match=message):
        prepare(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_packing": False}, r"share_prompt: true with sample_packing: False: .*Set `sample_packing: true`, or"),
        ({"rl": "rrhf", "sample_packing": None}, "share_prompt: true with sample_packing: None"),
        ({"attn_implementation": "eager"}, "share_prompt: true with attn_implementation: 'eager': .*`attn_.*: sdpa`"),
        ({"attn_implementation": "flex_attention"}, "with attn_implementation: 'flex_attention': .* sdpa alone"),
        ({"attn_implementation": "flash_attention_2"}, "share_prompt: true with attn_implementation: 'flash_attenti"),
        (
            {"base_model": "window", "micro_batch_size": 2, "multipack_real_batches": False},
            r"base_model window: its sliding_window of 600 tokens .* a pack of 1024\. Set `share",
        ),
    ],
)
def test_prompts_that_cannot_be_shared_are_refused_before_data_are_read(
    models: SimpleNamespace, in_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    window = MistralConfig.from_pretrained(tiny.policy(in_folder / "window"), sliding_window=600)
    window.save_pretrained(in_folder / "window")
    path = config(models, in_folder, deft={"share_prompt": True}, **{"sample_packing": True, **settings})
    monkeypatch.setattr(
        "poft_plugin.hosts.axolotl.host_rows.load_host_datasets", lambda **_: pytest.fail("data were read first")
    )
    with pytest.raises(ValueError, match=message):
        prepare(path)


def without(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows[:-1], {key: value for key, value in rows[-1].items() if key != name}]


def with_scores(*scores: Any) -> list[dict[str, Any]]:
    return [*RAW[:-1], {**RAW[-1], "scores": list(scores)}]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (LONG_LISTS, {"type": LISTS}, r"data\.jsonl row 0: 3 responses; this method takes 2\. Use `rl: deft_pro`"),
        ([*LONG_LISTS, {"prompt": "x", "responses": ["a"], "scores": [1.0]}], {"type": LISTS, "rl": "deft_pro"},
         r"data\.jsonl row 6: 1 response\(s\); a ranked row needs at least two"),
        (without("chosen", RAW), {}, r"data\.jsonl row 7: no 'chosen'; the row has \['.*'messages', 'rejected'"),
        (without("scores", RAW), {}, r"data\.jsonl row 7 \(key .*no scores in the row \(1 such rows\).*reward_model"),
        (with_scores(1.0, float("nan")), {}, r"data\.jsonl row 7: the score of response 1 is nan, not a finite number"),
        (with_scores(1.0, float("inf")), {}, r"data\.jsonl row 7: the score of response 1 is inf, not a finite number"),
        (with_scores(1.0), {}, r"data\.jsonl row 7: 1 scores for 2 responses"),
        (RAW, {"gradient_accumulation_steps": 5},
         r"4 rows are left to train on, fewer than the 5 of one optimizer step.*Raise `deft\.top_percent`.*A\+B"),
            ],
)  # fmt: skip
def test_rows_that_cannot_be_trained_on(
    models: SimpleNamespace, tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(config(models, tmp_path, rows, **settings))


@pytest.mark.parametrize("apart", [True, False])
def test_a_pack_holds_the_largest_group(models: SimpleNamespace, tmp_path: Path, apart: bool) -> None:
    """The remedy that is named is one: with it the same rows go."""
    gc.collect()
    gc.freeze()  # the host collects garbage at every packing: let it find little
    plain = {"rl": "deft_pro", "deft": {"train_on": "all"}, "multipack_real_batches": apart}
    rows = prepare(config(models, tmp_path, **plain)).train_dataset
    limit, largest = max(max(row) for row in rows["sequence_lengths"]) + 1, max(rows["length"])
    assert largest > limit
    remedy = {"sequence_len": largest} if apart else {"micro_batch_size": -(-largest // limit)}
    key, value = next(iter(remedy.items()))
    message = rf"row \d+ \(key .* has {largest} tokens in all its responses, a pack holds {limit} .*`{key}: {value}` or"
    with pytest.raises(ValueError, match=message):
        prepare(config(models, tmp_path, **plain, sample_packing=True, sequence_len=limit))
    enough = {"sample_packing": True, "sequence_len": limit, **remedy}
    assert len(prepare(config(models, tmp_path, **plain, **enough)).train_dataset) == len(RAW)
    assert len(prepare(config(models, tmp_path, **plain, sequence_len=limit)).train_dataset) == len(RAW)


def test_a_pack_holds_the_largest_group_with_its_prompt_once(models: SimpleNamespace, tmp_path: Path) -> None:
    """Evaluation is unpacked: its rows stay as they are, however long."""
    gc.collect()
    gc.freeze()
    plain = {"rl": "deft_pro", "deft": {"train_on": "all", "share_prompt": True}, "sample_packing": True}
    whole = prepare(config(models, tmp_path, **plain, val_set_size=4, multipack_real_batches=True))
    train, evaluation = whole.train_dataset, whole.eval_dataset
    limit = max(train["length"])
    assert all(n == sum(lengths) for n, lengths in zip(train["length"], train["sequence_lengths"], strict=True))
    assert limit < max(evaluation["length"])
    settings = {**plain, "val_set_size": 4, "multipack_real_batches": True}
    assert len(prepare(config(models, tmp_path, **settings, sequence_len=limit)).train_dataset) == len(train)
    with pytest.raises(ValueError, match=f"has {limit} tokens in all its responses, a pack holds {limit - 1}"):
        prepare(config(models, tmp_path, **settings, sequence_len=limit - 1))
    assert all(row["position_ids"][n] == 0 for row in evaluation for n in (0, row["sequence_lengths"][0]))


def test_tokens_without_weights_are_refused_for_a_reference(models: SimpleNamespace, tmp_path: Path) -> None:
    """New rows of the embedding would begin at random: there is no log-probability under the start weights."""
    small = tiny.policy(tmp_path / "small")
    tokens = len(AutoTokenizer.from_pretrained(small))
    tiny.llama(small, vocab_size=tokens, seed=1)
    settings = {"base_model": str(small), "tokens": ["<|new|>"]}
    message = rf"its tokenizer has {tokens + 1} tokens, its weights {tokens}\. New rows would begin at random"
    with pytest.raises(ValueError, match=message):
        prepare(config(models, tmp_path, **settings))
    assert len(prepare(config(models, tmp_path, rl="deft_pro", **settings)).train_dataset) == 4
    assert len(prepare(config(models, tmp_path, base_model=str(small))).train_dataset) == 4


def test_a_soft_capped_model_has_no_distribution_reward(models: SimpleNamespace, tmp_path: Path) -> None:
    """Without it, it trains."""
    capped = tiny.policy(tmp_path / "capped")
    Gemma2ForCausalLM(
        Gemma2Config(vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=2,
                     final_logit_softcapping=30.0)
    ).save_pretrained(capped)  # fmt: skip
    settings = {"rl": "deft_pro", "base_model": str(capped), "max_steps": 1, "attn_implementation": "eager"}
    with pytest.raises(ValueError, match=r"base_model .*: it soft-caps its logits \(at 30\.0\).*Set `omega: 0`"):
        hosting.train(config(models, tmp_path, **settings))
    recorder = {"plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"]}
    run = hosting.train(config(models, tmp_path, **settings, **recorder, deft={"omega": 0}))
    assert run.trainer.state.global_step == 1
