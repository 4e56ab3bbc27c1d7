"""Text of strangers as it may be shown: adapters, data and models come from anybody.

An escape sequence would move a terminal's cursor or retitle it, a line of its own would pass for ours, and in
Markdown a tag or a link would be one. So everything that is printed goes through `say`, what becomes Markdown
through `markdown_text`, tables through `tables.markdown_table`, and plots through `report.plots.drawn`.
"""

import os
import re
import sys
import warnings
from contextlib import nullcontext
from unicodedata import category

MARKDOWN = re.compile(
    r"[\\`*|$~#]|\[(?!\d\](?![\[(:]))|\](?<!\[\d\])|[<>](?!=)|&(?=[#\w])|(?<!\w)_|_(?!\w)|!(?=\[)|(?<=:)//|www\.",
    re.IGNORECASE,
)
"""What makes markup anywhere in a line: code, emphasis, links, tags, entities, cells, mathematics; `[1]`
alone and `<=` make none."""
JOINERS = "\u200c\u200d"
"""Do not print, but shape the letters beside them, as in Persian and Hindi, and join emoji."""


def printable(text: object, *, lines: bool = False) -> str:
    """Write what does not print as its escape; `lines` leaves ends of lines and tabs as they are."""
    kept = JOINERS + "\n\t" if lines else JOINERS
    # Spaces of other scripts do print, whatever `isprintable` says.
    return "".join(
        c if c.isprintable() or c in kept or category(c) == "Zs" else repr(c)[1:-1] for c in str(text)
    )


def markdown_text(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line; what is `Markup` (markupsafe's) stays that."""
    if hasattr(text, "__html__"):
        return str(text)
    return MARKDOWN.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), printable(text))


def say(*lines: object, error: bool = False, each: bool = False) -> None:
    """Print lines, whoever has written what they say, whatever the terminal can show: each stays one line.

    Args:
        *lines: Without their ends.
        error: To stderr, not stdout.
        each: Every process tells, not the main one alone.
    """
    if not each and os.environ.get("RANK", "0") != "0":
        return
    stream, bars = sys.stderr if error else sys.stdout, sys.modules.get("tqdm")
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = (printable(line).encode(encoding, "backslashreplace").decode(encoding) for line in lines)
    # What is drawn over on a terminal gives way to what stays.
    with bars.tqdm.external_write_mode(file=stream) if bars else nullcontext():
        print(*shown, sep="\n", file=stream, flush=True)


def warn(text: str, stacklevel: int = 1) -> None:
    """Warn from Python, whoever has written what the text says; `stacklevel` counts from the caller's own."""
    warnings.warn(printable(text), stacklevel=stacklevel + 1)
