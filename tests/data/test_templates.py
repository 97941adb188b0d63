"""A chat template's failures are one kind of error, and none takes for ever."""

import signal
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from poft_plugin.data import templates
from poft_plugin.data.render import Renderer
from poft_plugin.data.rows import RowError, Turn
from poft_plugin.data.templates import EndlessTemplateError, TemplateFailedError, render_template

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]

FAILING = {
    "refuses": ("{{ raise_exception('no system turns') }}", "no system turns"),
    "syntax": ("{% for m in messages %}", "Unexpected end of template"),
    "undefined": ("{{ messages[0].nothing.more }}", "has no attribute"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without an end"),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "overflow": ("{{ 10.0 ** 1000 }}", "out of range"),
    "memory": ("{{ 'x' * 10 ** 18 }}", "writes more than fits into memory"),
    "type": ("{{ 'a' + 1 }}", "can only concatenate str"),
    "attribute": ("{{ messages|map(attribute=3)|list|first + none }}", "unsupported operand|Undefined|has no"),
    "key": ("{{ '{x}'.format() }}", "x"),
    "index": ("{{ '{0}'.format() }}", "[Ii]ndex"),
    "range": ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
}

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": LOOP,
    "powers": "{{ 9 ** (9 ** 9) }}",
    "writes": "{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def tokenizer(models: SimpleNamespace) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(models.ref_a)
    return loaded


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)


@pytest.mark.parametrize("name", FAILING)
def test_every_failure_is_the_templates(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    template, reason = FAILING[name]
    with pytest.raises(TemplateFailedError, match=reason):
        render_template(tokenizer, MESSAGES, chat_template=template)


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.usefixtures("impatient")
def test_no_template_takes_for_ever(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    begin = time.process_time()
    with pytest.raises(EndlessTemplateError, match=r"does not end|writes 9,999,900 characters"):
        render_template(tokenizer, MESSAGES, chat_template=ENDLESS[name])
    assert time.process_time() - begin < 5


@pytest.mark.usefixtures("impatient")
def test_a_row_of_an_endless_template_stops_the_run(tokenizer: PreTrainedTokenizerBase) -> None:
    """It is no fault of the row: dropping one row after the other would take for ever, too."""
    renderer = Renderer(tokenizer, LOOP, "reference 'a'")
    turns = (Turn("user", "hi"), Turn("assistant", "ho", counted=True))
    with pytest.raises(ValueError, match=r"data row 3: the chat template of reference 'a': it does not end") as caught:
        renderer(turns, "data row 3")
    assert not isinstance(caught.value, RowError)


def test_the_clock_is_put_back(tokenizer: PreTrainedTokenizerBase) -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    render_template(tokenizer, MESSAGES)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == before


def test_in_another_thread_it_renders_without_a_clock(tokenizer: PreTrainedTokenizerBase) -> None:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(render_template(tokenizer, MESSAGES)))
    thread.start()
    thread.join()
    assert texts == [render_template(tokenizer, MESSAGES)]


@given(content=st.text(max_size=200), times=st.integers(1, templates.REPEATS))
@settings(max_examples=25, deadline=None)
def test_what_repeats_the_conversation_is_no_explosion(
    tokenizer: PreTrainedTokenizerBase, content: str, times: int
) -> None:
    messages = [{"role": "user", "content": content}]
    template = "{{ messages[0].content * " + str(times) + " }}"
    assert render_template(tokenizer, messages, chat_template=template) == content * times
