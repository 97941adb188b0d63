"""The block `deft:` and the host's DPO keys: defaults, and every refusal with key, value and remedy."""

from typing import Any

import pytest
from pydantic import ValidationError

from poft_plugin.config import DeftConfig, DpoKeys, RankingConfig, RewardModelConfig, parse_block

SCORING = {"batch_tokens": None, "missing_scores": "score", "score_cache": None}
RANKING = {
    **SCORING,
    "sft_weight": None,
    "pro_temperature": None,
    "rank_by": "label",
    "share_prompt": False,
    "reward_model": None,
}
DEFT = {
    "top_percent": 3.73,
    "bottom_percent": 12.5,
    "grade_within": "dataset",
    "train_on": "A",
    "omega": None,
    "reward_over": "best",
}
REWARD_MODEL = {
    "model": "org/rewards",
    "revision": None,
    "dtype": "auto",
    "attn_implementation": None,
    "chat_template": None,
    "system_turns": "keep",
    "max_length": None,
    "trust_remote_code": False,
}


def deft(**settings: Any) -> DeftConfig:
    """The block of an `rl: deft_...`."""
    return parse_block(DeftConfig, settings, "deft")


def ranking(**settings: Any) -> RankingConfig:
    """The same block under `rl: pro`."""
    return parse_block(RankingConfig, settings, "deft")


def reward_model(**settings: Any) -> RewardModelConfig:
    """The block of a reward model."""
    found = deft(reward_model={"model": "org/rewards", **settings}).reward_model
    assert found is not None
    return found


def dpo(**keys: Any) -> DpoKeys:
    """Top-level keys."""
    return parse_block(DpoKeys, keys, "")


def test_defaults_are_the_papers() -> None:
    """Section 4.1: levels within each subset; what depends on the method is left to its row in the table."""
    assert deft().model_dump() == {**RANKING, **DEFT}
    assert ranking().model_dump() == RANKING
    assert reward_model().model_dump() == REWARD_MODEL
    assert dpo().model_dump() == {
        "rl_beta": 0.1,
        "dpo_loss_type": ("sigmoid",),
        "dpo_loss_weights": None,
        "dpo_label_smoothing": 0.0,
        "precompute_ref_log_probs": None,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"sft_weight": 0.0},
        {"pro_temperature": "reward", "rank_by": "reward"},
        {"top_percent": 100, "bottom_percent": 0},
        {"top_percent": 87.5},
        {"top_percent": 1e-6, "bottom_percent": 99.0},
        {"grade_within": "none"},
        {"grade_within": "topic"},
        {"train_on": "A+B"},
        {"train_on": "all", "omega": 0.0},
        {"omega": 2.5},
        {"reward_over": "all"},
        {"batch_tokens": 1, "missing_scores": "error", "score_cache": "/scores"},
    ],
)
def test_allowed_values_are_taken_as_given(settings: dict[str, Any]) -> None:
    assert deft(**settings).model_dump(include=set(settings)) == settings


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    """YAML 1.1 reads `1e-6` as a string."""
    assert deft(omega="1e-6").omega == 1e-6
    assert dpo(dpo_loss_type="ipo", dpo_loss_weights=["1e-1"], rl_beta="1e-2").dpo_loss_weights == (0.1,)


@pytest.mark.parametrize(("model", "label"), [("org/rm-7b", "rm-7b"), ("./models/rm/", "rm"), ("rm", "rm")])
def test_a_reward_models_label_and_source(model: str, label: str) -> None:
    block = reward_model(model=model)
    assert (block.label, block.source) == (label, model)


@pytest.mark.parametrize(
    ("settings", "grades"),
    [({}, True), ({"train_on": "all"}, True), ({"omega": 0}, True), ({"train_on": "all", "omega": 0}, False)],
)
def test_levels_are_needed_by_the_choice_of_rows_and_by_the_reward(settings: dict[str, Any], grades: bool) -> None:
    assert deft(**settings).grades is grades


NESTED = r"deft\.reward_model\."
KEYS_OF_RANKING = (
    "batch_tokens, missing_scores, pro_temperature, rank_by, reward_model, score_cache, sft_weight, share_prompt"
)
KEYS_OF_DEFT = (
    "batch_tokens, bottom_percent, grade_within, missing_scores, omega, pro_temperature, rank_by, reward_model, "
    "reward_over, score_cache, sft_weight, share_prompt, top_percent, train_on"
)
KEYS_OF_A_REWARD_MODEL = (
    "attn_implementation, chat_template, dtype, max_length, model, revision, system_turns, trust_remote_code"
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sft_weight": -0.1}, r"deft\.sft_weight: .*greater than or equal to 0 \(given: -0\.1\)"),
        ({"sft_weight": True}, r"deft\.sft_weight: expected a number, not true or false \(given: True\)"),
        ({"sft_weight": float("inf")}, r"deft\.sft_weight: .*finite number \(given: inf\)"),
        ({"pro_temperature": "score"}, r"deft\.pro_temperature: .*'reward' \(given: 'score'\)"),
        ({"rank_by": "score"}, r"deft\.rank_by: .*'label' or 'reward' \(given: 'score'\)"),
        ({"rank_by": None}, r"deft\.rank_by: .*\(given: None\)"),
        ({"reward_model": 3}, r"deft\.reward_model: expected a block of keys, found 3"),
        ({"reward_model": {}}, r"deft\.reward_model\.model: missing; Hub id or local folder of the reward model\."),
        ({"reward_model": {"model": ""}}, rf"{NESTED}model: .*at least 1 character"),
    ],
)
def test_refusals_of_what_plain_methods_read_too(settings: dict[str, Any], message: str) -> None:
    for block in (ranking, deft):
        with pytest.raises(ValueError, match=f"^{message}"):
            block(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_percent": 0}, r"deft\.top_percent: .*greater than 0 \(given: 0\)"),
        ({"top_percent": 100.1}, r"deft\.top_percent: .*less than or equal to 100 \(given: 100\.1\)"),
        ({"top_percent": True}, r"deft\.top_percent: expected a number, not true or false"),
        ({"bottom_percent": -1}, r"deft\.bottom_percent: .*greater than or equal to 0 \(given: -1\)"),
        ({"bottom_percent": 101}, r"deft\.bottom_percent: .*less than or equal to 100 \(given: 101\)"),
        ({"bottom_percent": float("nan")}, r"deft\.bottom_percent: .*finite number \(given: nan\)"),
        ({"grade_within": ""}, r"deft\.grade_within: .*at least 1 character"),
        ({"train_on": "B"}, r"deft\.train_on: .*'A', 'A\+B' or 'all' \(given: 'B'\)"),
        ({"omega": -1e-6}, r"deft\.omega: .*greater than or equal to 0 \(given: -1e-06\)"),
        ({"omega": False}, r"deft\.omega: expected a number, not true or false \(given: False\)"),
        ({"reward_over": "worst"}, r"deft\.reward_over: .*'best' or 'all' \(given: 'worst'\)"),
        ({"batch_tokens": 0}, r"deft\.batch_tokens: .*greater than or equal to 1 \(given: 0\)"),
        ({"missing_scores": "skip"}, r"deft\.missing_scores: .*'score' or 'error' \(given: 'skip'\)"),
        ({"score_cache": 3}, r"deft\.score_cache: .*valid string \(given: 3\)"),
    ],
)
def test_refusals_of_what_deft_reads(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        deft(**settings)


@pytest.mark.parametrize("settings", [{"top_percent": 87.6}, {"top_percent": 50, "bottom_percent": 50.01}])
def test_levels_that_overlap_are_refused(settings: dict[str, Any]) -> None:
    top, bottom = float(settings["top_percent"]), settings.get("bottom_percent", 12.5)
    message = rf"^deft: top_percent {top} \+ bottom_percent {bottom} is more than 100; levels A and C would overlap$"
    with pytest.raises(ValueError, match=message):
        deft(**settings)


def test_two_shares_of_two_decimals_that_make_up_100_are_taken() -> None:
    for hundredths in range(1, 10_000):
        assert deft(top_percent=hundredths / 100, bottom_percent=(10_000 - hundredths) / 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, r"dtype: .*'auto', 'float32', 'bfloat16' or 'float16' \(given: 'int8'\)"),
        ({"system_turns": "strip"}, r"system_turns: .*'keep', 'merge' or 'drop' \(given: 'strip'\)"),
        ({"max_length": 7}, r"max_length: .*greater than or equal to 8 \(given: 7\)"),
        ({"max_length": True}, r"max_length: expected a number, not true or false"),
        ({"revision": 3}, r"revision: .*valid string \(given: 3\)"),
        ({"trust_remote_code": "perhaps"}, r"trust_remote_code: .*valid boolean.* \(given: 'perhaps'\)"),
    ],
)
def test_refusals_of_a_reward_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{NESTED}{message}"):
        reward_model(**settings)


def test_unknown_keys_are_answered_with_those_of_their_own_block() -> None:
    for block, key, allowed in (
        (ranking, "top_percent", KEYS_OF_RANKING),
        (deft, "max_length", KEYS_OF_DEFT),
        (reward_model, "top_percent", KEYS_OF_A_REWARD_MODEL),
    ):
        with pytest.raises(ValueError, match=rf"\.{key}: unknown key; allowed here: {allowed}$"):
            block(**{key: 1})
    with pytest.raises(ValueError, match=r"^dpo_beta: unknown key; allowed here: dpo_label_smoothing, .*, rl_beta$"):
        dpo(dpo_beta=1)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="deft") as error:
        deft(top_percent=0, reward_model={"modell": "x"}, omegga=1)
    paths = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert sorted(paths) == [
        "deft.omegga", "deft.reward_model.model", "deft.reward_model.modell", "deft.top_percent",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kinds"),
    [("ipo", ("ipo",)), (["robust"], ("robust",)), (["hinge", "sigmoid"], ("hinge", "sigmoid"))],
)
def test_a_loss_type_is_text_or_a_list(given: Any, kinds: tuple[str, ...]) -> None:
    assert dpo(dpo_loss_type=given).dpo_loss_type == kinds


def test_weights_go_with_loss_types_and_smoothing_with_robust() -> None:
    keys = dpo(dpo_loss_type=["robust", "ipo"], dpo_loss_weights=[1, 0.25], dpo_label_smoothing=0.49)
    assert (keys.dpo_loss_weights, keys.dpo_label_smoothing) == ((1.0, 0.25), 0.49)
    assert dpo(dpo_label_smoothing=0).dpo_label_smoothing == 0
    assert dpo(precompute_ref_log_probs=True).precompute_ref_log_probs is True


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rl_beta": 0}, r"rl_beta: .*greater than 0 \(given: 0\)"),
        ({"rl_beta": 1e4}, r"rl_beta: .*less than or equal to 1000 \(given: 10000\.0\)"),
        ({"rl_beta": float("nan")}, r"rl_beta: .*finite number \(given: nan\)"),
        ({"rl_beta": float("inf")}, r"rl_beta: .*finite number \(given: inf\)"),
        ({"rl_beta": -0.1}, r"rl_beta: .*greater than 0 \(given: -0\.1\)"),
        ({"rl_beta": True}, r"rl_beta: expected a number, not true or false"),
        ({"dpo_loss_type": "kto"}, r"dpo_loss_type\.0: .*'sigmoid', 'hinge', 'ipo' or 'robust' \(given: 'kto'\)"),
        ({"dpo_loss_type": ["ipo", "x"]}, r"dpo_loss_type\.1: .*\(given: 'x'\)"),
        ({"dpo_loss_type": []}, r"dpo_loss_type: empty; sigmoid \| hinge \| ipo \| robust, or a list of them"),
        ({"dpo_loss_type": 3}, r"dpo_loss_type: .*\(given: 3\)"),
        ({"dpo_loss_weights": []}, r"dpo_loss_weights: empty; One weight per loss type"),
        ({"dpo_loss_weights": [True]}, r"dpo_loss_weights: expected a number, not true or false \(given: \[True\]\)"),
        ({"dpo_loss_weights": ["much"]}, r"dpo_loss_weights\.0: .*valid number.* \(given: 'much'\)"),
        ({"dpo_loss_weights": [1, 2]}, r"dpo_loss_weights has 2 numbers for 1 loss types$"),
        (
            {"dpo_loss_type": ["ipo", "hinge"], "dpo_loss_weights": [1]},
            r"dpo_loss_weights has 1 numbers for 2 loss types$",
        ),
        ({"dpo_label_smoothing": 0.5, "dpo_loss_type": "robust"}, r"dpo_label_smoothing: .*less than 0\.5 \(given"),
        ({"dpo_label_smoothing": -0.1}, r"dpo_label_smoothing: .*greater than or equal to 0 \(given: -0\.1\)"),
        ({"dpo_label_smoothing": True}, r"dpo_label_smoothing: expected a number"),
        (
            {"dpo_label_smoothing": 0.1, "dpo_loss_type": ["sigmoid", "ipo"]},
            r"dpo_label_smoothing: 0\.1 does nothing with dpo_loss_type sigmoid, ipo; remove it$",
        ),
        ({"precompute_ref_log_probs": False}, r"precompute_ref_log_probs: .*True \(given: False\)"),
    ],
)
def test_refusals_of_the_hosts_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        dpo(**keys)


@pytest.mark.parametrize("raw", [None, [], "yes", True])
def test_a_block_that_is_no_block_is_refused(raw: Any) -> None:
    for block in (DeftConfig, RankingConfig):
        with pytest.raises(ValueError, match=r"^deft: expected a block of keys, found "):
            parse_block(block, raw, "deft")


def test_blocks_are_frozen() -> None:
    for block, key in ((deft(), "omega"), (ranking(), "sft_weight"), (reward_model(), "model"), (dpo(), "rl_beta")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(block, key, 0.5)


def test_every_key_says_what_it_is() -> None:
    for block in (DeftConfig, RankingConfig, RewardModelConfig, DpoKeys):
        assert [name for name, field in block.model_fields.items() if not field.description] == []
