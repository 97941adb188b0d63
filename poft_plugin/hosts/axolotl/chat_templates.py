"""The host's chat templates: by their names for references and reward models, and with the date that these see."""

from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import ChatTemplate

from poft_plugin.data.render import FIXED_DATE
from poft_plugin.scorers.chat_templates import NAMED


def name_host_templates() -> None:
    """Makes the host's template names work as `chat_template:` of what scores; `jinja` and the tokenizer's are none."""
    for choice in ChatTemplate:
        try:
            NAMED[choice.value] = get_chat_template(choice.value)
        except ValueError:  # needs a text or a tokenizer besides its name, or has no file
            continue


def with_fixed_date(cfg: DictDefault) -> DictDefault:
    """The config with the date that references see in the policy's template, where it prints today's.

    Else the two would read different prompts, and rows would be other ones tomorrow.
    """
    given = cfg.chat_template_kwargs or {}
    return DictDefault({**cfg, "chat_template_kwargs": {"strftime_now": FIXED_DATE.strftime, **given}})
