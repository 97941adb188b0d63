"""From a raw row, as the host's own strategy reads it, to the conversation that references get to see.

What counts as the response is decided here, once per row, from the host's masks: whole assistant turns. A mask that is
not whole turns is refused by name.
"""

from collections.abc import Mapping

from axolotl.prompt_strategies.alpaca_w_system import InstructionWSystemPromptTokenizingStrategy
from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy
from axolotl.prompt_strategies.input_output import RawInputOutputStrategy
from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy, PromptTokenizingStrategy

from poft_plugin.data.rows import RowError
from poft_plugin.hosts.axolotl.chat_rows import ChatReader
from poft_plugin.hosts.axolotl.entries import SUPPORTED_TYPES, Entry
from poft_plugin.hosts.axolotl.field_rows import FieldReader
from poft_plugin.hosts.axolotl.prompt_completion import PromptCompletionReader
from poft_plugin.hosts.axolotl.ranked_fields import shown
from poft_plugin.hosts.axolotl.reading import HOST_ERRORS, Read, Reader, described
from poft_plugin.hosts.axolotl.segment_rows import SegmentReader


def conversation_reader(strategy: PromptTokenizingStrategy, entry: Entry) -> Reader:
    """How rows of a dataset entry are read.

    Args:
        strategy: the host's own strategy for the entry.
        entry: the entry as the user wrote it.

    Raises:
        ValueError: for a strategy, or a mask, that a response cannot be taken from.
    """
    if isinstance(strategy, ChatTemplateStrategy):
        _check_masks(strategy, entry.label)
        chat = ChatReader(strategy)
        return chat if entry.completion is None else PromptCompletionReader(chat, entry.completion)
    if isinstance(strategy, (InstructionPromptTokenizingStrategy, InstructionWSystemPromptTokenizingStrategy)):
        return FieldReader(strategy)
    if isinstance(strategy, RawInputOutputStrategy):
        return SegmentReader(strategy)
    raise ValueError(
        f"{entry.label}: the response of its `type` ({type(strategy).__name__}) cannot be told to references. "
        f"What works: {SUPPORTED_TYPES}"
    )


def host_tokens(strategy: PromptTokenizingStrategy, read: Read, where: str) -> Mapping[str, list[int]]:
    """The host's own tokens of a row.

    Args:
        strategy: the host's own strategy for the entry.
        read: the row.
        where: names the row in errors.

    Raises:
        RowError: for whatever the host, the tokenizer or the policy's chat template raises.
    """
    try:
        if not strategy.supports_batched:
            return dict(strategy.tokenize_prompt(dict(read.row)))
        # the host hands such strategies batches, and takes a lone row whose fields are all text for one
        batch = strategy.tokenize_prompt({name: [value] for name, value in read.row.items()})
        return {name: values[0] for name, values in batch.items()}
    except HOST_ERRORS as error:
        raise _refused(strategy, read, error, where) from error


def _refused(strategy: PromptTokenizingStrategy, read: Read, error: BaseException, where: str) -> RowError:
    drop = "or set `poft.on_bad_row: drop` to leave such rows out"
    if not isinstance(strategy, ChatTemplateStrategy):
        return RowError(
            f"{where}: Axolotl cannot tokenize the row ({described(error)}): {shown(dict(read.row))}. Check the "
            f"`type:` of the dataset entry, mend the row, {drop}"
        )
    roles = [turn.role for turn in read.conversation]
    system = "remove the system turn, " if "system" in roles else ""
    return RowError(
        f"{where}: the policy's chat template refuses the turns {roles} under {strategy.prompter.field_messages!r}: "
        f"{described(error)}. Set another `chat_template:`, {system}mend the row, {drop}"
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
