"""The block `poft:`: its defaults, and every refusal with key, value and remedy."""

from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from poft_plugin.config import PoftConfig, ReferenceConfig, RowFilterConfig, ScoringBlock, parse_block, settings_model


def poft(**settings: Any) -> PoftConfig:
    """A block with one reference, unless others are given."""
    return parse_block(PoftConfig, {"references": [{"model": "org/zephyr"}], **settings}, "poft")


def reference(**settings: Any) -> ReferenceConfig:
    """A block with one reference."""
    return poft(references=[settings]).references[0]


def test_defaults_are_the_papers_form() -> None:
    assert poft().model_dump(exclude={"references"}) == {
        "beta": 1.0,
        "gamma": 0.0,
        "include_end_of_turn": "auto",
        "keep_top_percent": 100.0,
        "keep_within": "none",
        "on_bad_row": "error",
        "missing_scores": "score",
        "batch_tokens": None,
        "score_cache": None,
    }


def test_a_references_defaults() -> None:
    assert reference(model="org/zephyr").model_dump(exclude_none=True) == {
        "model": "org/zephyr",
        "dtype": "auto",
        "devices": 1,
        "system_turns": "keep",
        "on_long_row": "error",
        "trust_remote_code": False,
    }


@pytest.mark.parametrize(
    ("settings", "label", "source"),
    [
        ({"model": "HuggingFaceH4/zephyr-7b-sft-full"}, "zephyr-7b-sft-full", "HuggingFaceH4/zephyr-7b-sft-full"),
        ({"model": "./models/yi/"}, "yi", "./models/yi/"),
        ({"model": "org/zephyr", "name": "z"}, "z", "org/zephyr"),
        ({"scores": "scores.parquet", "name": "gpt"}, "gpt", "gpt"),
    ],
)
def test_labels_and_sources(settings: dict[str, str], label: str, source: str) -> None:
    block = reference(**settings)
    assert (block.label, block.source) == (label, source)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 1e-9},
        {"beta": 1000.0},
        {"gamma": -3.5},
        {"gamma": -100.0},
        {"gamma": 100.0},
        {"keep_top_percent": 100},
        {"keep_top_percent": 0.1},
        {"keep_within": "dataset", "keep_top_percent": 50.0},
        {"keep_within": "topic", "keep_top_percent": 50.0},
        {"missing_scores": "error"},
        {"batch_tokens": 1},
        {"score_cache": "/data/scores"},
        {"include_end_of_turn": True},
    ],
)
def test_allowed_values_are_taken_as_given(settings: dict[str, Any]) -> None:
    assert poft(**settings).model_dump(include=set(settings)) == settings


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    """YAML 1.1 reads `1e-6` as a string."""
    assert poft(beta="1e-6").beta == 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, r"poft\.beta: .*greater than 0 \(given: 0\)"),
        ({"keep_within": "dataset"}, r"poft: keep_within: dataset does nothing without `keep_top_percent:`"),
        ({"beta": True}, r"poft\.beta: expected a number, not true or false"),
        ({"keep_top_percent": True}, r"poft\.keep_top_percent: expected a number"),
        ({"keep_within": ""}, r"poft\.keep_within: .*at least 1 character"),
        ({"beta": -1.5}, r"poft\.beta: .*greater than 0 \(given: -1\.5\)"),
        ({"beta": float("inf")}, r"poft\.beta: .*finite number \(given: inf\)"),
        ({"beta": "much"}, r"poft\.beta: .*valid number.* \(given: 'much'\)"),
        ({"beta": 1000.1}, r"poft\.beta: .*less than or equal to 1000 \(given: 1000\.1\)"),
        ({"beta": "1e30"}, r"poft\.beta: .*less than or equal to 1000 \(given: '1e30'\)"),
        ({"gamma": float("nan")}, r"poft\.gamma: .*finite number \(given: nan\)"),
        ({"gamma": 101}, r"poft\.gamma: .*less than or equal to 100 \(given: 101\)"),
        ({"gamma": -1e9}, r"poft\.gamma: .*greater than or equal to -100 \(given: -1000000000\.0\)"),
        (
            {"include_end_of_turn": "perhaps"},
            r"poft\.include_end_of_turn: .*'auto', True or False \(given: 'perhaps'\)",
        ),
        ({"keep_top_percent": 0}, r"poft\.keep_top_percent: .*greater than 0 \(given: 0\)"),
        ({"keep_top_percent": 101}, r"poft\.keep_top_percent: .*less than or equal to 100 \(given: 101\)"),
        ({"keep_within": 3}, r"poft\.keep_within: .*valid string \(given: 3\)"),
        ({"missing_scores": "skip"}, r"poft\.missing_scores: .*'score' or 'error' \(given: 'skip'\)"),
        ({"batch_tokens": 0}, r"poft\.batch_tokens: .*greater than or equal to 1 \(given: 0\)"),
        ({"references": []}, r"poft\.references: empty; One or more aligned"),
        ({"references": 3}, r"poft\.references: expected a list of references.*\(given: 3\)"),
        ({"betta": 1}, r"poft\.betta: unknown key; allowed here: batch_tokens, beta, gamma, include_end_of_turn, keep"),
    ],
)
def test_refusals_of_the_block(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        poft(**settings)


def test_a_wrong_reference_is_the_only_complaint() -> None:
    with pytest.raises(ValueError, match=r"^poft\.references\.0\.dtyp: unknown key[^\n]*$"):
        poft(references=[{"model": "org/yi", "dtyp": "auto"}])


def test_settings_of_a_filter_with_any_keyword() -> None:
    def keep(rows: object, *, words: int = 3, **settings: object) -> None: ...

    model = settings_model(keep)
    assert parse_block(model, {"more": 1}, "row_filters[0]").model_dump() == {"words": 3, "more": 1}
    with pytest.raises(ValueError, match=r"row_filters\[0\]\.words"):
        parse_block(model, {"words": "many"}, "row_filters[0]")


def test_missing_references_are_named_with_what_they_are() -> None:
    with pytest.raises(ValueError, match=r"^poft\.references: missing; One or more aligned LLMs"):
        parse_block(PoftConfig, {"beta": 1.0}, "poft")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp8"}, r"\.dtype: .*'auto', 'float32', 'bfloat16' or 'float16' \(given: 'fp8'\)"),
        ({"quantization": "int4"}, r"\.quantization: .*'int8' or 'nf4' \(given: 'int4'\)"),
        ({"devices": 0}, r"\.devices: .*greater than or equal to 1 \(given: 0\)"),
        ({"system_turns": "strip"}, r"\.system_turns: .*'keep', 'merge' or 'drop' \(given: 'strip'\)"),
        ({"on_long_row": "cut"}, r"\.on_long_row: .*'error', 'drop' or 'truncate' \(given: 'cut'\)"),
        ({"revision": 123}, r"\.revision: .*valid string \(given: 123\)"),
        (
            {"template": "x"},
            r"\.template: unknown key; allowed here: attn_implementation, chat_template, devices, dtype",
        ),
        ({"scores": "s.parquet"}, r": a reference is either `model:` .* or `scores:` .*, not both"),
    ],
)
def test_refusals_of_a_reference(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^poft\.references\.1{message}"):
        poft(references=[{"model": "org/yi"}, {"model": "org/zephyr", **settings}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"a reference is either `model:` .* or `scores:`"),
        ({"scores": "s.parquet"}, r"a reference with `scores:` needs a `name:`"),
        (
            {"scores": "s.parquet", "name": "gpt", "revision": "main", "dtype": "auto"},
            r"dtype, revision: not used with `scores:`; remove",
        ),
    ],
)
def test_refusals_of_a_reference_without_a_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^poft\.references\.0: {message}"):
        reference(**settings)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([{"model": "a/x"}, {"model": "a/x", "name": "y"}], "the model 'a/x'; give each its own `model:`"),
        ([{"model": "a/x"}, {"model": "b/x"}], "the name 'x'; give each its own `name:`"),
        ([{"model": "a/x"}, {"scores": "s.parquet", "name": "x"}], "the name 'x'; give each its own `name:`"),
    ],
)
def test_two_references_of_one_name_are_refused(references: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^poft: references: two of them have {message}"):
        poft(references=references)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="poft") as error:
        poft(beta=0, betta=1, references=[{"model": "x", "devices": -1}, {"model": "y"}])
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["poft.references.0.devices", "poft.beta", "poft.betta"]


@pytest.mark.parametrize("raw", [None, [], "yes", True])
def test_a_block_that_is_no_block_is_refused(raw: Any) -> None:
    with pytest.raises(ValueError, match=r"^poft: expected a block of keys, found "):
        parse_block(PoftConfig, raw, "poft")


def test_blocks_are_frozen() -> None:
    for block, key in ((poft(), "beta"), (reference(model="x"), "model"), (RowFilterConfig(name="x"), "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(block, key, 2)


def test_every_key_says_what_it_is() -> None:
    for block in (PoftConfig, ReferenceConfig, RowFilterConfig, ScoringBlock):
        assert [name for name, field in block.model_fields.items() if not field.description] == []


def test_a_row_filter_hands_its_own_settings_on() -> None:
    entry = parse_block(RowFilterConfig, {"name": "short", "max_words": 9, "by": "turn"}, "row_filters.0")
    assert entry.settings() == {"max_words": 9, "by": "turn"}
    assert RowFilterConfig(name="all").settings() == {}
    with pytest.raises(ValueError, match=r"^row_filters\.0\.name: missing; Name of a registered row filter"):
        parse_block(RowFilterConfig, {"max_words": 9}, "row_filters.0")


def keep_short(rows: Any, *, words: Annotated[int, Field(ge=1)], by: str = "turn") -> None:
    """A row filter of another package."""


def keep_unknown(rows: Any, *, words: "Nowhere", by: "str" = "turn") -> None:  # type: ignore[name-defined]  # noqa: F821
    """A row filter whose annotation only a type checker can read."""


def test_a_filters_settings_are_its_keyword_only_parameters() -> None:
    assert parse_block(settings_model(keep_short), {"words": "3"}, "short").model_dump() == {"words": 3, "by": "turn"}
    assert parse_block(settings_model(keep_unknown), {"words": "3"}, "x").model_dump() == {"words": "3", "by": "turn"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"words: missing"),
        ({"words": 0}, r"words: .*greater than or equal to 1 \(given: 0\)"),
        ({"words": 3, "word": 3}, r"word: unknown key; allowed here: by, words"),
        ({"words": 3, "rows": []}, r"rows: unknown key"),
    ],
)
def test_refusals_of_a_filters_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^row_filters\.0\.{message}"):
        parse_block(settings_model(keep_short), settings, "row_filters.0")
