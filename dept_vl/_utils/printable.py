"""Text of strangers as it may be shown: adapters, data and models come from anybody.

An escape sequence would move a terminal's cursor or retitle it, a line of its own would pass for ours, and in
Markdown a tag or a link would be one.
"""

import re

MARKDOWN = re.compile(r"[\\`*\[\]<>&|$~#]|(?<!\w)_|_(?!\w)|!(?=\[)|(?<=:)//|www\.", re.IGNORECASE)
"""What makes markup anywhere in a line: code, emphasis, links, tags, entities, cells, mathematics."""


def printable(text: object, *, lines: bool = False) -> str:
    """Text with what does not print written as its escape: control characters, half characters, directions.

    Args:
        text: Anything, as `str` shows it.
        lines: Leave the ends of lines as they are.
    """
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in str(text))


def markdown_text(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return MARKDOWN.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), printable(text))
