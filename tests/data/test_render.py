"""Which tokens of a rendered conversation are the response."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import oracles
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from poft_plugin.data.render import FIXED_DATE, Rendered, Renderer, SystemTurns, apply_system_turns
from poft_plugin.data.rows import Conversation, RowError, Turn

WHERE = "data.jsonl row 3 (key 00)"
SPECIALS = ["<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
PIECES = ["a", "beta", "Ä", "東", "✓", "👍", " ", "  ", "\n", "\t", ".", "<|im_end|>", "xqTURN1qx", "\u00a0", "é"]
CONTENT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=9).map("".join).filter(str.strip)


@pytest.fixture(scope="module", params=["whole-offsets", "trimmed-offsets"])
def byte_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer; as GPT-2's, it may leave spaces out of its tokens' offsets, down to empty ones."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.bpe_tokenizer(folder, vocab_size=400, template=tiny.CHATML, specials=SPECIALS, eos="<|im_end|>")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    trim = request.param == "trimmed-offsets"
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return tokenizer


def user(content: str) -> Turn:
    """A question."""
    return Turn("user", content)


def assistant(content: str, counted: bool = True) -> Turn:
    """An answer."""
    return Turn("assistant", content, counted)


def chatml(turns: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """What ChatML writes, and where the counted contents are in it: by adding up lengths."""
    text, spans = "", []
    for turn in turns:
        text += f"<|im_start|>{turn.role}\n"
        if turn.counted:
            spans.append((len(text), len(text) + len(turn.content)))
        text += f"{turn.content}<|im_end|>\n"
    return text, spans


def counted_text(tokenizer: Any, rendered: Rendered) -> str:
    """The counted tokens, decoded together."""
    ids = [i for i, counted in zip(rendered.input_ids, rendered.counted, strict=True) if counted]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def by_bytes(tokenizer: Any, rendered: Rendered, spans: list[tuple[int, int]]) -> list[bool]:
    """The oracle for byte-level tokenizers."""
    special = set(tokenizer.all_special_tokens) | set(SPECIALS)
    tokens = tokenizer.convert_ids_to_tokens(list(rendered.input_ids))
    pieces = [t.encode() if t in special else oracles.token_bytes(t) for t in tokens]
    return oracles.counted_by_bytes(pieces, rendered.text, spans)


def test_single_turn_by_hand(byte_level: Any) -> None:
    turns = (user("alpha?"), assistant("beta gamma."))
    rendered = Renderer(byte_level, tiny.CHATML, "reference 'ref'")(turns, WHERE)
    assert rendered.text == chatml(turns)[0]
    assert list(rendered.input_ids) == byte_level(rendered.text, add_special_tokens=False)["input_ids"]
    assert counted_text(byte_level, rendered) == "beta gamma."
    assert rendered.num_counted == len(byte_level("beta gamma.", add_special_tokens=False)["input_ids"])


def test_only_the_template_writes_special_tokens(byte_level: Any, tmp_path: Path) -> None:
    """Most templates write the BOS token that the tokenizer would write once more."""
    byte_level.save_pretrained(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    added = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = added
    assert tokenizer("one")["input_ids"][0] == tokenizer.bos_token_id
    rendered = Renderer(tokenizer, "{{ bos_token }}" + tiny.CHATML, "reference 'ref'")(
        (user("one"), assistant("two")), WHERE
    )
    assert rendered.input_ids.count(tokenizer.bos_token_id) == 1


def test_only_counted_turns_count(byte_level: Any) -> None:
    turns = (
        user("one"),
        assistant("two", counted=False),
        user("three"),
        assistant("four"),
        user("six"),
        assistant("."),
    )
    rendered = Renderer(byte_level, tiny.CHATML, "reference 'ref'")(turns, WHERE)
    assert counted_text(byte_level, rendered) == "four."
    assert list(rendered.counted) == by_bytes(byte_level, rendered, chatml(turns)[1])


@pytest.mark.parametrize("content", ["alpha", "assistant", "user\n", "<|im_end|>", "xqTURN1qx", "xxqTURN3qxx", "a|b("])
def test_an_answer_that_occurs_elsewhere_too_is_found_at_its_own_place(byte_level: Any, content: str) -> None:
    turns = (user(content), assistant(content), user(content), assistant(content))
    rendered = Renderer(byte_level, tiny.CHATML, "reference 'ref'")(turns, WHERE)
    assert list(rendered.counted) == by_bytes(byte_level, rendered, chatml(turns)[1])


@settings(deadline=None, max_examples=100)
@given(turns=st.lists(st.tuples(CONTENT, CONTENT, st.booleans()), min_size=1, max_size=3))
def test_byte_level_tokens_count_where_they_hold_a_byte_of_a_response(
    byte_level: Any, turns: list[tuple[str, str, bool]]
) -> None:
    """Runs of spaces, characters of several bytes, tokens that begin or end with white space."""
    pairs = [(user(question), assistant(answer, counted)) for question, answer, counted in turns]
    conversation = (*[turn for pair in pairs for turn in pair], user("?"), assistant("last"))
    rendered = Renderer(byte_level, tiny.CHATML, "reference 'ref'")(conversation, WHERE)
    text, spans = chatml(conversation)
    assert rendered.text == text
    assert list(rendered.counted) == by_bytes(byte_level, rendered, spans)


@pytest.mark.parametrize(("before", "after"), [(" ", ""), ("\n\n", " "), ("", "\n"), ("[/INST] ", " </s>")])
@pytest.mark.parametrize("filters", ["", "| trim"])
@pytest.mark.parametrize("content", ["alpha beta", " alpha\n", "\n alpha", "alpha  ", "alpha "])
def test_templates_may_strip_and_add_white_space(
    byte_level: Any, before: str, after: str, filters: str, content: str
) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:" + before + "{{ m.content " + filters + " }}" + after + "{% endfor %}"
    )
    rendered = Renderer(byte_level, template, "reference 'ref'")((user("one"), assistant(content), user("two")), WHERE)
    kept = content.strip() if filters else content
    question = len(f"user:{before}one{after}assistant:{before}")
    assert rendered.text[question:].startswith(kept + after)
    assert list(rendered.counted) == by_bytes(byte_level, rendered, [(question, question + len(kept))])


def test_generation_markers_are_not_needed_and_do_no_harm(byte_level: Any) -> None:
    marked = tiny.CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    assert "generation %}" in marked
    turns = (user("one"), assistant("two three"))
    plain, other = (
        Renderer(byte_level, template, "reference 'ref'")(turns, WHERE) for template in (tiny.CHATML, marked)
    )
    assert plain == other


FOUR_TURNS = (user("one"), assistant("two  three four five"), user("six"), assistant("seven eight nine ten"))


@pytest.mark.parametrize(
    "content",
    ["{{ m.content | upper }}", "{{ m.content | replace('e', 'E') }}", "{{ m.content[:6] }}", "{{ m.content[:12] }}",
     "{{ m.content | replace('  ', ' ') }}"],
    ids=["upper", "replaced", "short", "cut", "spaces-squeezed"],
)  # fmt: skip
def test_a_template_that_alters_a_response_is_an_error(byte_level: Any, content: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>" + content + "{% endfor %}"
    with pytest.raises(RowError, match=r"^data.jsonl row 3 .*reference 'ref'.*template changes the response.*remove"):
        Renderer(byte_level, template, "reference 'ref'")(FOUR_TURNS, WHERE)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{{ m.content }}{{ m.content }}", "turn 1, a response, stands 2 time.* cannot be told"),
        ("{% if loop.last %}{{ m.content }}{% endif %}", "leaves out turn 1, a response"),
        ("", "leaves out turn 1, a response"),
    ],
)
def test_a_response_that_is_left_out_or_doubled_is_an_error(byte_level: Any, content: str, what: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>" + content + "{% endfor %}"
    with pytest.raises(RowError, match=rf"^data.jsonl row 3 .*reference 'ref'.*{what}.*remove"):
        Renderer(byte_level, template, "reference 'ref'")(FOUR_TURNS, WHERE)


def test_a_left_out_response_that_the_question_holds_is_not_found_there(byte_level: Any) -> None:
    template = "{% for m in messages if m.role == 'user' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with pytest.raises(RowError, match="leaves out turn 1, a response"):
        Renderer(byte_level, template, "reference 'ref'")((user("say two"), assistant("two")), WHERE)


@pytest.mark.parametrize(
    "content",
    ["{{ '-' if m.content[0] == 't' }}{{ m.content }}", "{{ m.content }}{{ '!' if loop.last and 'n' in m.content }}",
     "{{ '+' if loop.first and 'n' in messages[-1].content else '-' }}{{ m.content }}", "{{ m.content[:20] }}"],
    ids=["looks-at-it", "afterthought", "other-beginning", "just-not-cut"],
)  # fmt: skip
def test_a_template_may_look_at_a_response_that_it_writes_word_for_word(byte_level: Any, content: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>" + content + "{% endfor %}"
    rendered = Renderer(byte_level, template, "reference 'ref'")(FOUR_TURNS, WHERE)
    spans = [(rendered.text.find(t.content), rendered.text.find(t.content) + len(t.content)) for t in FOUR_TURNS[1::2]]
    assert list(rendered.counted) == by_bytes(byte_level, rendered, spans)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("keep", (Turn("system", "Be kind."), user("one"), Turn("system", "And short."), assistant("two"))),
        ("merge", (user("Be kind.\n\nAnd short.\n\none"), assistant("two"))),
        ("drop", (user("one"), assistant("two"))),
    ],
)
def test_system_turns(byte_level: Any, mode: SystemTurns, expected: Conversation) -> None:
    turns = (Turn("system", "Be kind."), user("one"), Turn("system", "And short."), assistant("two"))
    assert apply_system_turns(turns, mode) == expected
    rendered = Renderer(byte_level, tiny.CHATML, "reference 'ref'", system_turns=mode)(turns, WHERE)
    assert rendered.text == chatml(expected)[0]
    assert counted_text(byte_level, rendered) == "two"


def test_system_turns_without_a_user_turn_are_merged_into_one() -> None:
    assert apply_system_turns((Turn("system", "a"), assistant("b")), "merge") == (user("a"), assistant("b"))


@pytest.mark.parametrize("mode", ["keep", "merge", "drop"])
def test_without_system_turns_nothing_changes(mode: SystemTurns) -> None:
    assert apply_system_turns((user("one"), assistant("two")), mode) == (user("one"), assistant("two"))


def test_a_template_that_refuses_the_turns_names_row_reference_and_remedy(byte_level: Any) -> None:
    renderer = Renderer(byte_level, tiny.INST, "reference 'ref'")
    turns = (Turn("system", "Be kind."), user("one"), assistant("two"))
    with pytest.raises(RowError, match=r"^data.jsonl row 3 .*'ref' refuses.*only user and assistant.*`system_turns: m"):
        renderer(turns, WHERE)
    with pytest.raises(RowError, match="refuses the turns") as refusal:
        renderer((user("one"), assistant("two"), Turn("tool", "three")), WHERE)
    assert "system_turns" not in str(refusal.value)
    merged = Renderer(byte_level, tiny.INST, "reference 'ref'", system_turns="merge")(turns, WHERE)
    assert merged.text == "<|bos|>[INST] Be kind.\n\none [/INST] two<|im_end|>"


@pytest.mark.parametrize("gap", ["", "\n"])
def test_end_of_turn_tokens_count_where_asked(byte_level: Any, gap: str) -> None:
    template = tiny.CHATML.replace("<|im_end|>", gap + "<|im_end|>")
    turns = (user("one"), assistant("two", counted=False), user("three"), assistant("two"))
    without, with_end = (
        Renderer(byte_level, template, "reference 'ref'", include_end_of_turn=asked)(turns, WHERE)
        for asked in (False, True)
    )
    assert counted_text(byte_level, without) == "two"
    assert counted_text(byte_level, with_end) == "two<|im_end|>"
    assert with_end.num_counted == without.num_counted + 1
    assert with_end.input_ids == without.input_ids


QWEN3 = """{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- set r = '' -%}{%- set c = m.content -%}
{%- if '</think>' in c -%}{%- set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
{%- if loop.last -%}{{- '<|im_start|>assistant\\n<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' + c -}}
{%- else -%}{{- '<|im_start|>assistant\\n' + c -}}{%- endif -%}{{- '<|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"""
GLM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
    "{{ '<think>' + m.content.split('</think>')[0].split('<think>')[-1].strip() + '</think>\n' }}"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content.strip() }}{% endif %}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "content"),
    [(QWEN3, "<think>\nadd them\n</think>\n\nfour"), (QWEN3, "four"), (QWEN3, "<think>\n\n</think>\n\nfour"),
     (QWEN3, "<think>\nadd them\n</think>"), (GLM, "<think>hm</think>\nyo"), (GLM, " yo\n")],
)  # fmt: skip
def test_a_template_that_takes_thinking_apart_and_writes_it_again(byte_level: Any, template: str, content: str) -> None:
    turns = (user("one"), assistant("before", counted=False), user("2+2?"), assistant(content))
    rendered = Renderer(byte_level, template, "reference 'ref'")(turns, WHERE)
    start = rendered.text.rfind(content.strip())
    assert list(rendered.counted) == by_bytes(byte_level, rendered, [(start, start + len(content.strip()))])


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (QWEN3, (user("2+2?"), assistant("<think>\nso\n</think>\n\nfour"), user("3+3?"), assistant("six"))),
        (QWEN3, (user("2+2?"), assistant("<think>so</think>four"))),
        (GLM, (user("2+2?"), assistant("<think>\nso\n</think>\nfour"))),
    ],
)
def test_thinking_that_a_template_drops_or_lays_out_anew_is_refused(
    byte_level: Any, template: str, turns: Conversation
) -> None:
    with pytest.raises(RowError, match="changes the response, turn 1: the rendered text does not hold it word for"):
        Renderer(byte_level, template, "reference 'ref'")(turns, WHERE)
    rendered = Renderer(byte_level, template, "reward model 'ref'", needs_response=False)(turns, WHERE)
    assert not any(rendered.counted)
    assert list(rendered.input_ids) == byte_level(rendered.text, add_special_tokens=False)["input_ids"]


def test_end_of_turn_tokens_count_where_the_labels_hold_one(byte_level: Any) -> None:
    turns = (user("one"), Turn("assistant", "two", True, 0), user("three"), Turn("assistant", "four", True, 1))
    rendered = Renderer(byte_level, tiny.CHATML, "reference 'ref'", include_end_of_turn="auto")(turns, WHERE)
    assert counted_text(byte_level, rendered) == "twofour<|im_end|>"
    assert not rendered.lacks_end
    bare = Renderer(
        byte_level, "{% for m in messages %}{{ m.content }}\n{% endfor %}", "ref", include_end_of_turn="auto"
    )
    assert counted_text(byte_level, bare(turns, WHERE)) == "twofour"
    assert bare(turns, WHERE).lacks_end
    assert not bare((user("one"), assistant("two")), WHERE).lacks_end


@pytest.mark.parametrize(("ends", "counted"), [(1, "two<|im_end|>"), (2, "two<|pad|><|im_end|>")])
def test_the_end_that_counts_is_the_tokenizers_own_where_the_template_writes_two(
    byte_level: Any, ends: int, counted: str
) -> None:
    """As Phi-3's: `<|end|>`, and the end of text after the last turn. The host's labels hold the latter."""
    template = "{% for m in messages %}{{ m.content }}<|pad|>\n{% endfor %}<|im_end|>"
    rendered = Renderer(byte_level, template, "ref", include_end_of_turn="auto")(
        (user("one"), Turn("assistant", "two", True, ends)), WHERE
    )
    assert counted_text(byte_level, rendered).replace("\n", "") == counted


def test_a_template_without_an_end_of_turn_token_is_refused_where_one_counts(byte_level: Any) -> None:
    template = "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    turns = (user("one"), assistant("two"), user("three"))
    with pytest.raises(RowError, match=r"row 3 .*'ref'.*`include_end_of_turn: true`.*'\\n### user\\nthree\\n'.*false"):
        Renderer(byte_level, template, "reference 'ref'", include_end_of_turn=True)(turns, WHERE)


@pytest.mark.parametrize("content", ["alpha", "  alpha", "\nalpha", "alpha \n", "al<|end|> pha"])
@pytest.mark.parametrize("include", [True, False])
def test_role_tokens_that_swallow_white_space_are_not_the_response(
    byte_level: Any, tmp_path: Path, content: str, include: bool
) -> None:
    """As Phi-3's: `rstrip` makes the role token take in the white space that begins the response."""
    byte_level.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True), AddedToken("<|end|>", lstrip=True)], True)
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    rendered = Renderer(tokenizer, template, "reference 'ref'", include_end_of_turn=include)(
        (user("one"), assistant(content)), ""
    )
    tokens = tokenizer.convert_ids_to_tokens(list(rendered.input_ids))
    counted = [token for token, counts in zip(tokens, rendered.counted, strict=True) if counts]
    assert "<|assistant|>" not in counted
    assert counted.count("<|end|>") == content.count("<|end|>") + include
    assert not content.strip() or counted_text(tokenizer, rendered).startswith(content.strip()[:2])


def test_templates_that_print_the_date_print_a_fixed_one(byte_level: Any) -> None:
    """A score must not depend on the day it was made."""
    template = "{{ strftime_now('%d %b %Y') }}\n" + tiny.CHATML
    rendered = Renderer(byte_level, template, "reference 'ref'")((user("one"), assistant("two")), WHERE)
    assert rendered.text.startswith("26 Jul 2024\n")
    assert datetime.date(2024, 7, 26) == FIXED_DATE
    assert counted_text(byte_level, rendered) == "two"


def test_the_first_token_never_counts(byte_level: Any) -> None:
    """Nothing predicts it."""
    renderer = Renderer(byte_level, "{% for m in messages %}{{ m.content }}{% endfor %}", "reference 'ref'")
    rendered = renderer((assistant("alpha beta"),), WHERE)
    assert rendered.counted == (False, *[True] * (len(rendered.input_ids) - 1))
    with pytest.raises(RowError, match=r"row 3 .*'ref': the response has no token"):
        renderer((assistant("a"),), WHERE)


def test_a_tokenizer_that_drops_the_response_is_an_error() -> None:
    """Words that it does not know vanish, having no unknown token."""
    words = Tokenizer(models.BPE({"o": 0, "n": 1, "e": 2}, []))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    renderer = Renderer(tokenizer, "{% for m in messages %}{{ m.content }} {% endfor %}", "reference 'ref'")
    with pytest.raises(RowError, match=r"row 3 .*'ref': the response has no token"):
        renderer((user("one"), assistant("1 2")), WHERE)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reference 'ref': ByT5Tokenizer gives no character offsets.*fast tokenizer"):
        Renderer(ByT5Tokenizer(), tiny.CHATML, "reference 'ref'")


@pytest.mark.parametrize("name", ["gpt2", "mistral-v3"])
@pytest.mark.parametrize("include", [True, False])
def test_real_tokenizers_on_real_rows(shared_data: Path, name: str, include: bool) -> None:
    """The counted tokens say the answer, the whole answer, and nothing but the answer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    with gzip.open(shared_data / "alpaca" / "alpaca.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row, _ in zip(map(json.loads, lines), range(200), strict=False)]
    renderer = Renderer(tokenizer, tokenizer.chat_template, name, include_end_of_turn=include)
    seen = 0
    for row in rows:
        if not row["output"].strip():
            continue
        rendered = renderer((user(f"{row['instruction']}\n{row['input']}"), assistant(row["output"])), WHERE)
        end = tokenizer.eos_token if include else ""
        assert counted_text(tokenizer, rendered).strip() == (row["output"] + end).strip()
        seen += 1
    assert seen > 150
