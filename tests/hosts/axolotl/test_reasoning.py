"""Reasoning in a response, or in a field beside it: trained on whole, scored whole, or refused with what helps."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.render import Renderer
from poft_plugin.data.rows import RowError, Turn, load_conversation
from poft_plugin.hosts.axolotl.chat_templates import name_host_templates
from poft_plugin.hosts.axolotl.entries import take_over_entries
from poft_plugin.hosts.axolotl.strategy import load
from poft_plugin.hosts.axolotl.trained_text import TrainedText
from poft_plugin.losses.logps import IGNORED
from poft_plugin.plugins import registry
from poft_plugin.scorers.chat_templates import NAMED

THOUGHT = "<think>\nadd them\n</think>\n\nfour"
FIELD = tiny.CHATML.replace(
    "\n{{ m['content'] }}",
    "\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m['content'] }}",
)
"""Writes the field where it is there, and texts as they are."""

ALWAYS = tiny.CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m['content'] }}",
)
"""Opens a think block of its own, whether there is reasoning or not."""

R1 = tiny.CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
"""Deletes reasoning from every text."""

ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}
REASONED = {**SAY, "reasoning_content": "add them"}


@pytest.fixture(scope="module")
def tokenizer(models: SimpleNamespace) -> Any:
    name_host_templates()
    return AutoTokenizer.from_pretrained(models.policy)


def prepared(tokenizer: Any, rows: list[dict[str, Any]], template: str, method: str = "poft", **entry: Any) -> Dataset:
    """Rows as the host gets them from the strategy."""
    named = {"chat_template": template}
    if "{" in template:
        named = {"chat_template": "jinja", "chat_template_jinja": template}
    settings = {"path": "data.jsonl", "type": "chat_template", **named, **entry}  # as the host spreads it
    cfg = DictDefault({"datasets": [settings], "sequence_len": 512, "base_model": "none"})
    take_over_entries(cfg, registry().methods[method], None)
    return load(tokenizer, cfg, cfg["datasets"][0]).wrap_dataset(Dataset.from_list(rows))


def trained(tokenizer: Any, labels: list[int]) -> str:
    """The text that labels train."""
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5", "chatml"])
def test_reasoning_of_the_last_turn_is_trained_on_whole(tokenizer: Any, template: str) -> None:
    """The host leaves `<think>` unlabelled, which Qwen3's template writes before an answer without one, too."""
    rows = [
        {"messages": [ASK, {**SAY, "content": THOUGHT}]},
        {"messages": [ASK, SAY, ASK, {**SAY, "content": THOUGHT}]},
    ]
    single, later = prepared(tokenizer, rows, template)
    assert trained(tokenizer, single["labels"]) == f"{THOUGHT}<|im_end|>"
    assert trained(tokenizer, later["labels"]) == f"four<|im_end|>{THOUGHT}<|im_end|>"
    for row in (single, later):  # what a reference under the same template counts
        conversation = load_conversation(row["conversation"])
        rendered = Renderer(tokenizer, NAMED[template], "self", include_end_of_turn="auto")(conversation, "row")
        assert list(rendered.input_ids) == row["input_ids"]
        assert list(rendered.counted) == [label != IGNORED for label in row["labels"]]


@pytest.mark.parametrize(("template", "where"), [("qwen3", "earlier"), ("exaone4", "last"), (R1, "last")])
def test_what_a_template_deletes_is_refused_with_what_helps(tokenizer: Any, template: str, where: str) -> None:
    messages = [ASK, {**SAY, "content": THOUGHT}, *([ASK, SAY] if where == "earlier" else [])]
    message = r"row 0: what the policy is trained on is not .*Write it in the data as the template does.*`chatml`"
    with pytest.raises(RowError, match=message):
        prepared(tokenizer, [{"messages": messages}], template)
    assert len(prepared(tokenizer, [{"messages": messages}], "chatml")) == 1  # the remedies do help
    assert len(prepared(tokenizer, [{"messages": [ASK, SAY, ASK, SAY]}], template)) == 1


@pytest.mark.parametrize("template", ["qwen3", FIELD, ALWAYS])
def test_a_field_is_the_text_that_the_template_makes_of_it(tokenizer: Any, template: str) -> None:
    (row,) = prepared(tokenizer, [{"messages": [ASK, REASONED]}], template)
    assert load_conversation(row["conversation"])[-1].content == THOUGHT
    assert trained(tokenizer, row["labels"]) == f"{THOUGHT}<|im_end|>"


@pytest.mark.parametrize("template", ["qwen3", FIELD, ALWAYS])
def test_so_it_is_in_preference_rows(tokenizer: Any, template: str) -> None:
    worse = {**SAY, "content": "five", "reasoning_content": "guess"}
    layouts: list[tuple[str, dict[str, Any]]] = [
        ("chat_template", {"messages": [ASK], "chosen": REASONED, "rejected": [worse]}),
        ("chat_template.argilla_chat", {"chosen": [ASK, REASONED], "rejected": [ASK, worse]}),
        ("poft_plugin.ranked", {"messages": [ASK], "responses": [REASONED, worse]}),
    ]
    for kind, row in layouts:
        (found,) = prepared(tokenizer, [row], template, "deft_pro", type=kind)
        sample = RankedSample.loads(found["conversation"])
        assert sample.responses == (THOUGHT, "<think>\nguess\n</think>\n\nfive")
        assert found["row_key"] == sample.key
        ids, lengths = found["ranked_input_ids"], found["sequence_lengths"]
        assert tokenizer.decode(ids[: lengths[0]]).endswith(f"<|im_start|>assistant\n{THOUGHT}<|im_end|>\n")
        both = trained(tokenizer, found["ranked_labels"])
        assert both == f"{THOUGHT}<|im_end|><think>\nguess\n</think>\n\nfive<|im_end|>"


def test_reasoning_in_the_prompt_of_a_preference_row_is_what_the_template_writes(tokenizer: Any) -> None:
    row = {"messages": [ASK, REASONED, ASK], "chosen": "six", "rejected": "ten"}
    for template, content in ((FIELD, THOUGHT), ("qwen3", "four")):
        (found,) = prepared(tokenizer, [row], template, "deft_dpo")
        assert RankedSample.loads(found["conversation"]).prompt[1] == Turn("assistant", content)
        held = "".join(tokenizer.decode(found["ranked_input_ids"]).split())
        assert ("addthem" in held) == (template == FIELD)


def test_reasoning_that_the_template_does_not_write_is_refused(tokenizer: Any) -> None:
    row = {"messages": [ASK], "chosen": REASONED, "rejected": "ten"}
    with pytest.raises(RowError, match=r"row 0 response 0: .* does not write 'reasoning_content' of the turn 1 as it"):
        prepared(tokenizer, [row], "chatml", "deft_dpo")
    with pytest.raises(RowError, match="not one of its 1 rows can be used.*does not write 'reasoning_content'"):
        prepared(tokenizer, [row], "chatml", "deft_dpo", on_unusable_row="drop")


def test_the_same_answer_after_other_reasoning_is_another_response(tokenizer: Any) -> None:
    row = {"messages": [ASK], "chosen": REASONED, "rejected": {**REASONED, "reasoning_content": "guess"}}
    (found,) = prepared(tokenizer, [row], FIELD, "deft_dpo")
    assert len(found["sequence_lengths"]) == 2


@settings(deadline=None, max_examples=100)
@given(
    contents=st.lists(st.text("ab <>\n", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=3),
    cut=st.lists(st.integers(0, 6), min_size=3, max_size=3),
)
def test_only_what_stands_before_a_label_word_for_word_is_labelled(
    tokenizer: Any, contents: list[str], cut: list[int]
) -> None:
    """Labels that begin later than the response are made whole; with another text there, they stay as they are."""
    ids, labels, whole, other = [], [], [], []
    for content, less in zip(contents, cut, strict=False):
        header = tokenizer("q<|im_start|>", add_special_tokens=False)["input_ids"]
        own = tokenizer(content.strip(), add_special_tokens=False)["input_ids"]
        less = min(less, len(own) - 1)
        ids += [*header, *own, tokenizer.eos_token_id]
        labels += [*[IGNORED] * (len(header) + less), *own[less:], IGNORED]
        whole += [*[IGNORED] * len(header), *own, IGNORED]
        other += [*header, *[tokenizer.convert_tokens_to_ids("Z")] * less, *own[less:], tokenizer.eos_token_id]
    turns = [Turn("assistant", content, True) for content in contents]
    reader = TrainedText(tokenizer)
    assert reader.completed(turns, ids, labels) == whole
    kept = reader.completed(turns, other, labels)
    assert all(label == IGNORED for label, id_, right in zip(kept, other, ids, strict=True) if id_ != right)
