"""From a raw row, as the host's own strategy reads it, to the conversation that references get to see.

What counts as the response is decided here, once per row, from the host's masks: whole assistant turns. A mask that is
not whole turns is refused by name.
"""

import re
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from axolotl.prompt_strategies.alpaca_w_system import InstructionWSystemPromptTokenizingStrategy
from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy
from axolotl.prompt_strategies.input_output import RawInputOutputStrategy
from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy, PromptTokenizingStrategy
from axolotl.utils.dict import remove_none_values

from poft_plugin.data.render import special_tokens
from poft_plugin.data.rows import Conversation, RowError, Turn, checked_conversation
from poft_plugin.hosts.axolotl.entries import SUPPORTED_TYPES

HEADERS = ("system", "user", "assistant")

Row = Mapping[str, Any]
Reader = Callable[[Row, str], Conversation]


def conversation_reader(strategy: PromptTokenizingStrategy, entry: str) -> Reader:
    """How rows of a dataset entry are read.

    Args:
        strategy: the host's own strategy for the entry.
        entry: names the entry in messages.

    Raises:
        ValueError: for a strategy, or a mask, that a response cannot be taken from.
    """
    if isinstance(strategy, ChatTemplateStrategy):
        _check_masks(strategy, entry)
        return lambda row, where: _from_messages(strategy, row, where)
    if isinstance(strategy, (InstructionPromptTokenizingStrategy, InstructionWSystemPromptTokenizingStrategy)):
        return lambda row, where: _from_fields(strategy, row, where)
    if isinstance(strategy, RawInputOutputStrategy):
        return lambda row, where: _from_segments(strategy, row, where)
    raise ValueError(
        f"{entry}: the response of its `type` ({type(strategy).__name__}) cannot be told to references. "
        f"What works: {SUPPORTED_TYPES}"
    )


def _check_masks(strategy: ChatTemplateStrategy, entry: str) -> None:
    if strategy.prompter.message_field_training_detail:
        raise ValueError(
            f"{entry}: message_field_training_detail trains parts of a turn; only whole assistant turns can be scored "
            "by references. Remove it, or use `message_field_training`"
        )
    others = sorted(set(strategy.roles_to_train) - {"assistant"})
    if others:
        raise ValueError(f"{entry}: roles_to_train: {others} is trained on; only whole assistant turns can be scored")
    for key in ("train_on_eos", "train_on_eot"):
        if getattr(strategy, key) == "all":
            raise ValueError(f"{entry}: {key}: all trains on ends of turns that are no response; use `turn` or `last`")
    if strategy.split_thinking:
        raise ValueError(f"{entry}: split_thinking: true takes a part out of the response; remove it")


def _from_messages(strategy: ChatTemplateStrategy, row: Row, where: str) -> Conversation:
    prompt = remove_none_values(dict(row))
    messages, tools = prompt.get(strategy.prompter.field_messages), prompt.get(strategy.prompter.field_tools)
    if not messages:
        raise RowError(
            f"{where}: a row without a response: no messages under {strategy.prompter.field_messages!r}. "
            f"The row has {sorted(row)}; set `field_messages`"
        )
    if tools:
        raise RowError(f"{where}: it has tools, which references of other kinds cannot be given; remove such rows")
    turns = strategy.get_conversation_thread(prompt)
    last_only = not (strategy.roles_to_train or strategy.train_on_eos or strategy.train_on_eot)
    last_only &= not strategy.prompter.message_field_training
    counted = [
        index == len(turns) - 1 if last_only else turn.get("training", turn.get("role") in strategy.roles_to_train)
        for index, turn in enumerate(turns)
    ]
    return checked_conversation(
        [_turn(turn, bool(flag), where) for turn, flag in zip(turns, counted, strict=True)], where
    )


def _turn(turn: Row, counted: bool, where: str) -> Turn:
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            raise RowError(
                f"{where}: a turn without text under {key!r}: {dict(turn)!r}. Set `message_property_mappings` to the "
                "names in your data"
            )
    extra = sorted(key for key in turn if key not in ("role", "content", "training") and turn[key])
    if extra:
        raise RowError(f"{where}: a turn has {', '.join(extra)}, which references cannot be given as text")
    return Turn(turn["role"], turn["content"], counted)


def _from_fields(strategy: Any, row: Row, where: str) -> Conversation:
    try:
        instruction, input_text, response, *system = strategy.parse_instruction_fields(row)
    except KeyError as error:
        raise RowError(f"{where}: no field {error} in the row; it has {sorted(row)}") from None
    if not isinstance(instruction, str):
        raise RowError(f"{where}: the instruction is {instruction!r}, not text")
    turns = [Turn("system", system[0])] if system and system[0] else []
    turns.append(Turn("user", "\n\n".join(filter(None, [instruction, input_text]))))
    turns.append(Turn("assistant", response if isinstance(response, str) else "", counted=True))
    return checked_conversation(turns, where)


def _from_segments(strategy: RawInputOutputStrategy, row: Row, where: str) -> Conversation:
    """Runs of trained segments are the assistant's turns, the rest is the prompt; the policy's markup is taken off."""
    if not row.get("segments"):
        raise RowError(f"{where}: a row without a response: no `segments`; the row has {sorted(row)}")
    markers = sorted(filter(None, special_tokens(strategy.tokenizer)), key=len, reverse=True)
    marker = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
    turns: list[Turn] = []
    for trained, run in groupby(strategy.prompter.build_prompt(row["segments"]), key=lambda segment: bool(segment[0])):
        text = "".join(segment[1] for segment in run)
        turns += [_trained_segment(text, marker, where)] if trained else _prompt_turns(text, marker)
    return checked_conversation(turns, where)


def _trained_segment(text: str, marker: re.Pattern[str], where: str) -> Turn:
    """A response, without the special tokens (and the white space around them) at its ends."""
    text = re.sub(rf"^(?:(?:{marker.pattern})\s*)+", "", text)
    text = re.sub(rf"\s*(?:(?:{marker.pattern})\s*)+$", "", text)
    if inner := marker.search(text):
        raise RowError(
            f"{where}: a trained segment holds {inner.group()!r} inside, the policy's own markup, which references of "
            "other kinds cannot be given. Make it several segments, or use `type: chat_template`"
        )
    return Turn("assistant", text, counted=True)


def _prompt_turns(text: str, marker: re.Pattern[str]) -> list[Turn]:
    """The turns of a prompt in the policy's markup: a role's name right after a special token is a header."""
    if not marker.search(text):
        return [Turn("user", text)] if text.strip() else []
    turns, role = [], "user"
    for number, piece in enumerate(marker.split(text)):
        head, _, rest = piece.strip().partition("\n")
        if number and head.strip() in HEADERS:
            role, piece = head.strip(), rest
        if piece.strip():
            turns.append(Turn(role, piece.strip()))
            role = "user"
    return turns
