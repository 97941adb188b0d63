"""Ranked samples: order, ties, keys, the text that they travel in, and every refusal."""

import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poft_plugin.data.ranked import RankedSample, dense_ranks, pair, ranked_list
from poft_plugin.data.rows import RowError, Turn

PROMPT = (Turn("user", "hi"),)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SPOKEN = TEXT.filter(str.strip)
SCORES = st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=6)
SAMPLES = st.builds(
    RankedSample,
    st.lists(st.builds(Turn, TEXT, TEXT), max_size=3).map(tuple),
    st.lists(TEXT, max_size=3).map(tuple),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.none() | st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
)


def ranked(*responses: Any, prompt: Any = PROMPT, scores: Any = None) -> RankedSample:
    """A list of responses."""
    return ranked_list(prompt, list(responses), scores=scores, where="data row 3")


def test_a_pair_keeps_its_order() -> None:
    assert pair(PROMPT, "ho", "no", where="row 0") == RankedSample(PROMPT, ("ho", "no"), (0, 1), None)


def test_a_pairs_label_stands_whatever_its_scores_say() -> None:
    for scores in ([1.0, 2.0], [2.0, 2.0]):
        sample = pair(PROMPT, "ho", "no", scores=scores, where="row 0")
        assert (sample.responses, sample.ranks, sample.scores) == (("ho", "no"), (0, 1), tuple(scores))


def test_a_list_without_scores_is_in_order_without_ties() -> None:
    sample = ranked("c", "a", "b", "a")
    assert (sample.responses, sample.ranks, sample.scores) == (("c", "a", "b", "a"), (0, 1, 2, 3), None)


def test_a_list_with_scores_is_sorted_by_them() -> None:
    """Highest first; equal ones stay in the order of the data and share a rank."""
    sample = ranked("a", "b", "c", "d", "e", scores=[0.5, -1.0, 0.5, 2.0, -1.0])
    assert sample.responses == ("d", "a", "c", "b", "e")
    assert sample.ranks == (0, 1, 1, 2, 2)
    assert sample.scores == (2.0, 0.5, 0.5, -1.0, -1.0)


def test_all_scores_equal_are_all_ties() -> None:
    sample = ranked("b", "a", scores=[1, 1])
    assert (sample.responses, sample.ranks) == (("b", "a"), (0, 0))


@settings(deadline=None)
@given(SCORES, st.data())
def test_sorting_equals_the_loop_over_pairs(scores: list[float], data: st.DataObject) -> None:
    """A response's place: those above it, and those as good that came before; its rank: distinct scores above."""
    texts = data.draw(st.lists(SPOKEN, min_size=len(scores), max_size=len(scores)))
    sample = ranked(*texts, scores=scores)
    everyone = range(len(scores))
    for i in everyone:
        place = sum(scores[j] > scores[i] or (scores[j] == scores[i] and j < i) for j in everyone)
        assert sample.responses[place] == texts[i]
        assert sample.scores is not None
        assert sample.scores[place] == scores[i]
        assert sample.ranks[place] == len({s for s in scores if s > scores[i]})


@settings(deadline=None)
@given(SCORES)
def test_ranks_depend_on_the_order_of_scores_alone(scores: list[float]) -> None:
    ranks = dense_ranks(scores)
    assert set(ranks) == set(range(len(set(scores))))
    assert dense_ranks([math.exp(s) - 7 for s in scores]) == ranks
    assert [(a > b) - (a < b) for a in scores for b in scores] == [(a < b) - (a > b) for a in ranks for b in ranks]


def test_integer_scores_become_floats() -> None:
    sample = ranked("a", "b", scores=[3, 1])
    assert [type(score) for score in sample.scores or ()] == [float, float]


@settings(deadline=None)
@given(SAMPLES)
def test_loads_undoes_dumps(sample: RankedSample) -> None:
    """Scores to the last bit, and none is not an empty list. No turn of a prompt counts."""
    assert RankedSample.loads(sample.dumps()) == sample


def test_dumps_by_hand() -> None:
    sample = RankedSample((Turn("user", "hä"),), ("a", "b"), (0, 1), (0.1, -2.0))
    assert json.loads(sample.dumps()) == [[["user", "hä"]], ["a", "b"], [0, 1], [0.1, -2.0]]
    assert "hä" in sample.dumps()


def test_key_by_hand() -> None:
    """The first 128 bits of SHA-256 over prompt and responses as JSON; stored scores are found by it."""
    text = '[[["user","hi"]],["hö\\n","no"]]'
    assert pair(PROMPT, "hö\n", "no", where="row 0").key == hashlib.sha256(text.encode()).hexdigest()[:32]


@settings(deadline=None)
@given(SAMPLES, SAMPLES)
def test_keys_are_equal_where_the_texts_are(a: RankedSample, b: RankedSample) -> None:
    assert (a.key == b.key) == ((a.prompt, a.responses) == (b.prompt, b.responses))
    assert a.key == RankedSample(a.prompt, a.responses, b.ranks, b.scores).key


def test_the_order_of_responses_is_part_of_the_key() -> None:
    assert ranked("a", "b").key != ranked("b", "a").key
    assert ranked("a", "b").key == ranked("b", "a", scores=[0.0, 1.0]).key
    assert ranked("a", "b").key != ranked("a", "b", prompt=(Turn("system", "hi"),)).key


def test_a_scorer_sees_the_prompt_and_one_response_that_counts() -> None:
    prompt = (Turn("system", "be"), Turn("user", "hi"))
    assert ranked("a", "b", prompt=prompt).conversation(1) == (*prompt, Turn("assistant", "b", counted=True))


NO_TEXT = r"has no text \({}\)\. Remove the row, or check the field names of the dataset entry$"


@pytest.mark.parametrize("prompt", [(), (Turn("user", ""),), (Turn("system", " \n"), Turn("user", "\t"))])
def test_an_empty_prompt_is_refused(prompt: tuple[Turn, ...]) -> None:
    for make in (
        lambda: ranked("a", "b", prompt=prompt),
        lambda: pair(prompt, "a", "b", where="data row 3"),
    ):
        with pytest.raises(RowError, match=r"^data row 3: an empty prompt\. Remove the row, or check the field names"):
            make()


def test_one_turn_with_text_makes_a_prompt() -> None:
    prompt = (Turn("system", ""), Turn("user", "hi"))
    assert ranked("a", "b", prompt=list(prompt)).prompt == prompt


@pytest.mark.parametrize(("text", "shown"), [("", "''"), (" \n\t", r"' \\n\\t'"), (None, "None"), (3, "3")])
def test_a_response_without_text_is_refused(text: Any, shown: str) -> None:
    message = NO_TEXT.format(shown)
    with pytest.raises(RowError, match=f"^data row 3: response 2 of 3 {message}"):
        ranked("a", "b", text)
    with pytest.raises(RowError, match=f"^row 0: response 0 of 2 {message}"):
        pair(PROMPT, text, "no", where="row 0")
    with pytest.raises(RowError, match=f"^row 0: response 1 of 2 {message}"):
        pair(PROMPT, "ho", text, where="row 0")


@pytest.mark.parametrize("responses", [[], ["a"]])
def test_fewer_than_two_responses_are_refused(responses: list[str]) -> None:
    message = rf"^data row 3: {len(responses)} response\(s\); a ranked row needs at least two\. Remove the row$"
    with pytest.raises(RowError, match=message):
        ranked(*responses, scores=[1.0] * len(responses))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "1 scores for 2 responses; give one each"),
        ([], "0 scores for 2 responses; give one each"),
        ([1.0, 2.0, 3.0], "3 scores for 2 responses; give one each"),
        ([1.0, math.nan], "the score of response 1 is nan, not a finite number"),
        ([-math.inf, 0.0], "the score of response 0 is -inf, not a finite number"),
        ([1.0, None], "the score of response 1 is None, not a finite number"),
        ([True, 0.0], "the score of response 0 is True, not a finite number"),
        ([0.0, "1.5"], "the score of response 1 is '1.5', not a finite number"),
        (3.0, "the scores are 3.0, not a list of numbers; check `field_scores`"),
        ("ab", "the scores are 'ab', not a list of numbers"),
        ({"a": 1.0, "b": 2.0}, "the scores are {'a': 1.0, 'b': 2.0}, not a list of numbers"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores: Any, message: str) -> None:
    with pytest.raises(RowError, match=f"^data row 3: {message}"):
        ranked("a", "b", scores=scores)
    with pytest.raises(RowError, match=f"^row 0: {message}"):
        pair(PROMPT, "a", "b", scores=scores, where="row 0")
