"""Which tokens of a row are counted, in colour."""

from rich.text import Text

from poft_plugin.data.render import Rendered

COUNTED = ("black on green", "black on bright_green")
OTHER = ("dim", "dim italic")


def coloured(rendered: Rendered) -> Text:
    """The rendered text with counted tokens on green, neighbours told apart by shade; white space made visible."""
    text, used = Text(), 0
    for number, ((start, end), counted) in enumerate(zip(rendered.offsets, rendered.counted, strict=True)):
        begin = min(start, used)
        if end <= used and begin < end:
            begin = end  # a further piece of a character that was printed
        style = (COUNTED if counted else OTHER)[number % 2]
        text.append(_visible(rendered.text[max(begin, used) : end]), style)
        used = max(used, end)
    return text


def _visible(text: str) -> str:
    return text.replace("\n", "⏎\n").replace("\t", "⇥")
