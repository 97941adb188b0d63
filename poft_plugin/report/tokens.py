"""Which tokens of a row are counted: in colour on a terminal, in marks elsewhere."""

from rich.text import Text

from poft_plugin.data.render import Rendered

COUNTED = ("black on green", "black on bright_green")
OTHER = ("dim", "dim italic")
MARKS = ("«", "»")


def marked(rendered: Rendered, *, in_colour: bool) -> Text:
    """The rendered text with white space made visible and its counted tokens told apart.

    Args:
        rendered: the row.
        in_colour: counted tokens on green, neighbours in other shades; otherwise each of them between marks.
    """
    text, used = Text(), 0
    for number, ((start, end), counted) in enumerate(zip(rendered.offsets, rendered.counted, strict=True)):
        begin = min(start, used)
        if end <= used and begin < end:
            begin = end  # a further piece of a character that was printed
        piece = _visible(rendered.text[max(begin, used) : end])
        if in_colour:
            text.append(piece, (COUNTED if counted else OTHER)[number % 2])
        else:
            text.append(piece.join(MARKS) if counted else piece)
        used = max(used, end)
    return text


def _visible(text: str) -> str:
    return text.replace("\n", "⏎\n").replace("\t", "⇥")
