"""One text for everyone: what the host's labels train is the response, and references count the same tokens."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import numpy as np
import pytest
import tiny
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from poft_plugin.data.render import FIXED_DATE, Renderer
from poft_plugin.data.rows import RowError, Turn, load_conversation, row_key
from poft_plugin.hosts.axolotl.chat_templates import name_host_templates
from poft_plugin.hosts.axolotl.entries import Entry
from poft_plugin.hosts.axolotl.strategy import MethodStrategy
from poft_plugin.hosts.axolotl.trained_text import TextDiffersError, TrainedText, walk
from poft_plugin.losses.logps import IGNORED
from poft_plugin.scorers.chat_templates import NAMED

name_host_templates()

HEADERLESS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
)
THINK = "<think>\nadd them\n</think>\n\nfour"


@pytest.fixture(scope="module")
def tokenizer(models: SimpleNamespace) -> Any:
    """The tiny policy's."""
    return AutoTokenizer.from_pretrained(models.policy)


def prepared(tokenizer: Any, rows: list[dict[str, Any]], template: str, **entry: Any) -> Dataset:
    """The host's own tokens of chat rows under a template, as the strategy gives them to the run."""
    raw = {"path": "data.jsonl", "ds_type": "json", "type": "chat_template", **entry}
    named = (
        {"chat_template": "jinja", "chat_template_jinja": template} if "{" in template else {"chat_template": template}
    )
    cfg = DictDefault({"sequence_len": 8192, "train_on_inputs": False, **named})
    strategy = MethodStrategy(tokenizer, cfg, DictDefault(raw), Entry(raw, "data.jsonl", None))
    return strategy.wrap_dataset(Dataset.from_list(rows))


def chat(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict[str, Any]:
    """Turns whose roles alternate."""
    turns = [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]
    return {"messages": turns}


# Law 1: what is trained on is the response


@pytest.mark.parametrize(
    "content",
    ["{{ m.content | upper }}", "{{ m.content[4:] }}", "{{ m.content[:-3] }}", "{{ m.content | replace('o', '0') }}",
     "{{ m.content }}{{ m.content }}", "{{ m.content.split('</think>')[-1] }}", "{{ m.content | replace('  ', ' ') }}",
     "{% if loop.last %}{{ m.content }}{% endif %}"],
    ids=["upper", "no-beginning", "no-end", "replaced", "doubled", "think-dropped", "spaces-squeezed", "left-out"],
)  # fmt: skip
def test_a_policy_template_that_alters_a_response_is_refused(tokenizer: Any, content: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n{% endfor %}"
    good, bad = chat("?", "k", "?", "k"), chat("?", "<think>so</think>no  oh no", "?", "<think>so</think>no  oh no")
    with pytest.raises(RowError, match=r"data.jsonl row [01].*trained on.*`chat_template:`.*remove"):
        prepared(tokenizer, [good, bad], template)


def test_the_error_names_the_first_row_the_number_of_rows_and_the_two_texts(tokenizer: Any) -> None:
    template = tiny.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    rows = [chat("?", "one"), chat("?", "<think>a</think>two"), chat("?", "<think>b</think>three")]
    with pytest.raises(
        RowError, match=r"row 1: .*response 1 is '<think>a</think>two', trained on is 'two'.*\(2 of 3 r"
    ):
        prepared(tokenizer, rows, template)


def test_qwen3_deletes_the_thinking_of_earlier_turns(tokenizer: Any) -> None:
    with pytest.raises(RowError, match="row 0: what the policy is trained on is not the response: response 1"):
        prepared(tokenizer, [chat("2+2?", THINK, "3+3?", "six")], "qwen3")


@pytest.mark.parametrize("template", ["mistral_v7_tekken", "chatml", "llama3", "qwen3", HEADERLESS])
def test_turns_may_follow_each_other_without_a_header(tokenizer: Any, template: str) -> None:
    row = chat("go", "one", "two", roles=("user", "assistant", "assistant"))
    (conversation,) = prepared(tokenizer, [row], template)["conversation"]
    assert [turn.content for turn in load_conversation(conversation) if turn.counted] == ["one", "two"]


@pytest.mark.parametrize("content", ["[[dummy_message]] zz", "a[[dummy_message]]"])
def test_the_hosts_own_placeholder_in_a_text_does_no_harm(tokenizer: Any, content: str) -> None:
    (labels,) = prepared(tokenizer, [chat(content, content, "?", content)], "chatml")["labels"]
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == f"{content}<|im_end|>" * 2


@pytest.mark.parametrize("content", ["[[dummy_message]]", "zzdummymessagezz"])
def test_where_it_moves_the_labels_the_row_is_refused(tokenizer: Any, content: str) -> None:
    """The host finds a turn by the difference that these words make."""
    with pytest.raises(RowError, match=r"row 1: what the policy is trained on is not .*change that word"):
        prepared(tokenizer, [chat("?", "two"), chat("?", content, "?", content)], "chatml")


TEXT = st.text(st.sampled_from("ab .,\n<>é東👍\u200b"), min_size=1, max_size=12).filter(str.strip)


@settings(deadline=None, max_examples=200)
@given(contents=st.lists(TEXT, min_size=1, max_size=4), data=st.data())
def test_walking_accepts_exactly_the_contents_in_order(contents: list[str], data: st.DataObject) -> None:
    gaps = data.draw(st.lists(st.sampled_from(["", " ", "\n\n"]), min_size=len(contents), max_size=len(contents)))
    text = "".join(gap + content.strip() for gap, content in zip(gaps, contents, strict=True))
    assert len(walk(text, contents)) == len(contents)
    place = data.draw(st.integers(0, len(text)))
    with pytest.raises(TextDiffersError):
        walk(text[:place] + "Z" + text[place:], contents)
    visible = [i for i, char in enumerate(text) if char.strip()]
    gone = data.draw(st.sampled_from(visible))
    if text[:gone] + text[gone + 1 :] != text:
        with pytest.raises(TextDiffersError):
            walk("".join(text[:gone] + text[gone + 1 :]) if len(visible) > 1 else "", contents)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, no accents, no white space, control characters dropped."""
    words = [
        "[UNK]",
        "[SEP]",
        "[PAD]",
        *"abcdefghijklmnopqrstuvwxyz.,!?:<>|#",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = token_decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]", pad_token="[PAD]")


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text, bytes for what it does not know."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh.,:?"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = token_decoders.Sequence(
        [
            token_decoders.Replace("▁", " "),
            token_decoders.ByteFallback(),
            token_decoders.Fuse(),
            token_decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def normalising(models: SimpleNamespace, normalizer: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(models.policy)
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


KINDS = ["byte-level", "trimmed", "nfc", "nfkc", "wordpiece", "metaspace", "swallowing"]


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest, models: SimpleNamespace) -> Any:
    """Tokenizers that keep every character, and ones that change, drop or add some."""
    if request.param == "trimmed":
        tokenizer = AutoTokenizer.from_pretrained(models.policy)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return tokenizer
    if request.param == "swallowing":
        tokenizer = AutoTokenizer.from_pretrained(models.policy)
        tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True), AddedToken("<|im_end|>", lstrip=True)], True)
        return tokenizer
    return {
        "byte-level": lambda: AutoTokenizer.from_pretrained(models.policy),
        "nfc": lambda: normalising(models, normalizers.NFC()),
        "nfkc": lambda: normalising(models, normalizers.NFKC()),
        "wordpiece": wordpiece,
        "metaspace": metaspace,
    }[request.param]()


ODD = ["a", "b c", "e\u0301", "\u1112\u1161\u11ab", "\u200b", "\ufb01", " ", "\n", ".", "A", "<|im_end|>", "\u0301"]
ODD_TEXT = st.lists(st.sampled_from(ODD), min_size=1, max_size=5).map("".join)


@settings(deadline=None, max_examples=60)
@given(contents=st.lists(ODD_TEXT.map("a".__add__), min_size=1, max_size=2))
def test_any_tokenizers_labels_are_read_back(any_tokenizer: Any, contents: list[str]) -> None:
    """Tokens of `text + end of turn` are the text, whatever the tokenizer made of it; of another text they are not."""
    eos = any_tokenizer.eos_token
    turns = tuple(Turn("assistant", content, True) for content in contents)
    labels = []
    for content in contents:
        labels += [*any_tokenizer(content + eos, add_special_tokens=False)["input_ids"], IGNORED]
    found = TrainedText(any_tokenizer).check(turns, labels, "row")
    assert [turn.ends for turn in found] == [1] * len(turns)
    more = any_tokenizer("c", add_special_tokens=False)["input_ids"]
    without = [label for label in labels if label != any_tokenizer.eos_token_id]
    assert all(turn.ends == 0 for turn in TrainedText(any_tokenizer).check(turns, without, "row"))
    with pytest.raises(RowError, match="row: what the policy is trained on is not the response"):
        TrainedText(any_tokenizer).check((*turns, Turn("assistant", "c", True)), labels, "row")
    with pytest.raises(RowError, match="row: what the policy is trained on is not the response"):
        TrainedText(any_tokenizer).check(turns, [*labels, *more], "row")


def test_a_space_that_the_tokenizer_puts_before_a_response_is_not_trained_on() -> None:
    """`type: alpaca` encodes an answer apart, so that SentencePiece writes one; one of the response's own stays."""
    tokenizer = metaspace()
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "a"]
    reader, labels = TrainedText(tokenizer), [*ids, tokenizer.eos_token_id]
    assert reader.completed((Turn("assistant", "a", True),), labels, labels) == [IGNORED, *labels[1:]]
    assert reader.completed((Turn("assistant", " a", True),), labels, labels) == labels


# Law 2: a token counts only by characters of the response


@settings(deadline=None, max_examples=60)
@given(content=ODD_TEXT, before=st.sampled_from(["", "\n", " ", ": "]))
def test_neither_header_nor_end_counts(any_tokenizer: Any, content: str, before: str) -> None:
    content = f"a{content}"
    eos = any_tokenizer.eos_token
    template = "{{ 'q' + eos_token }}" + before + "{{ messages[0].content }}{{ eos_token }}{{ '\nq' + eos_token }}"
    rendered = Renderer(any_tokenizer, template, "ref")((Turn("assistant", content, True),), "row")
    ids = np.asarray(rendered.input_ids)
    ends = np.flatnonzero(ids == any_tokenizer.eos_token_id)
    first, last = ends[0], ends[-2]  # the one after the header, and the one that ends the response
    counted = np.flatnonzero(rendered.counted)
    assert counted.min() > first
    assert counted.max() < last
    assert eos == any_tokenizer.decode([ids[last]]).strip()


# Law 4: a policy that is its own only reference, under one template, counts the very same tokens


def plain_templates(tokenizer: Any) -> list[str]:
    """The host's templates that render a plain conversation with this tokenizer."""
    names = []
    for name, text in sorted(NAMED.items()):
        renderer = Renderer(tokenizer, text, name, needs_response=False)
        turns = (Turn("user", "one"), Turn("assistant", "two", True))
        try:
            if "two" in renderer(turns, "row").text:
                names.append(name)
        except RowError:
            continue
    return names


LAW_ROWS = [
    chat("one?", "k"),
    chat("one?", "two three.", "four?", "five six."),
    chat("one?", "  two", "three?", "four \n"),
    chat("one?", "two\n\nthree", "four?", "[five]", "six", "seven"),
]


@pytest.mark.parametrize("train_on_eos", ["turn", "last", "none"])
def test_a_policy_that_is_its_own_reference_counts_what_it_is_trained_on(tokenizer: Any, train_on_eos: str) -> None:
    """So that both means are over the same tokens: the coefficient begins at 0.5."""
    names = [*plain_templates(tokenizer), tiny.CHATML, HEADERLESS, ALPACA]
    assert len(names) > 25
    for name in names:
        text = NAMED.get(name, name)
        rows = prepared(tokenizer, LAW_ROWS, name, train_on_eos=train_on_eos)
        renderer = Renderer(tokenizer, text, "reference 'self'", include_end_of_turn="auto")
        for row in rows:
            conversation = load_conversation(row["conversation"])
            assert row["row_key"] == row_key(conversation)
            rendered = renderer(conversation, name)
            assert list(rendered.input_ids) == row["input_ids"], name
            assert list(rendered.counted)[1:] == [label != IGNORED for label in row["labels"]][1:], (
                name,
                rendered.text,
            )


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral_v1"])
@pytest.mark.parametrize(
    "row",
    [
        {**chat("one?", "two"), "system": ""},
        {**chat("one?", "two"), "system": None},
        chat(" \n", "one?", "two", roles=("system", "user", "assistant")),
    ],
)
def test_a_blank_system_text_is_no_system_turn(tokenizer: Any, template: str, row: dict[str, Any]) -> None:
    """For the policy, and in the row's key, so for references too."""
    (plain,), (found,) = (prepared(tokenizer, [each], template) for each in (chat("one?", "two"), row))
    assert found["input_ids"] == plain["input_ids"]
    assert found["row_key"] == plain["row_key"]


def test_policy_and_references_see_one_date(tokenizer: Any) -> None:
    template = "{{ strftime_now('%d %b %Y') }}\n" + tiny.CHATML
    (row,) = prepared(tokenizer, [chat("one?", "two")], template)
    assert tokenizer.decode(row["input_ids"]).startswith(FIXED_DATE.strftime("%d %b %Y"))


def test_ends_are_counted_where_the_labels_hold_them(tokenizer: Any) -> None:
    for train_on_eos, ends in (("turn", [1, 1]), ("last", [0, 1]), ("none", [0, 0])):
        (row,) = prepared(tokenizer, [chat("one?", "two", "three?", "four")], "chatml", train_on_eos=train_on_eos)
        assert [turn.ends for turn in load_conversation(row["conversation"]) if turn.counted] == ends


def test_the_coefficient_begins_at_one_half(models: SimpleNamespace, tmp_path: Path) -> None:
    """The host's tokens and the real trainer: chats with short answers and alpaca rows, the policy as reference."""
    chats = tiny.write_jsonl(tmp_path / "chats.jsonl", LAW_ROWS * 2)
    path = tiny.write_config(
        tmp_path / "config.yml",
        base_model=str(models.policy),
        datasets=[{"path": str(chats), "ds_type": "json", "type": "chat_template"}],
        plugins=["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        rl="poft",
        poft={
            "references": [{"model": str(models.policy), "dtype": "float32"}],
            "score_cache": str(tmp_path / "scores"),
        },
        output_dir=str(tmp_path / "out"),
        dataset_prepared_path=str(tmp_path / "prepared"),
        learning_rate=1e-12,
    )
    interrupt = signal.getsignal(signal.SIGINT)
    logs = hosting.train(path).logs
    assert signal.getsignal(signal.SIGINT) == interrupt  # the host's own would save the model into `./out`
    assert len(logs) == 2 * len(LAW_ROWS)
    for log in logs:
        assert log["poft/coefficient"] == pytest.approx(0.5, abs=1e-5)
