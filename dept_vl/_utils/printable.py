"""Safe display of untrusted text, such as text from adapters, data and models.

Escape sequences could control a terminal, added lines could pass for ours, and Markdown could contain tags
and links. So all printing goes through `say`, Markdown through `markdown_text`, tables through
`tables.markdown_table`, and plots through `report.plots.drawn`.
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
"""Characters that start markup in a line: code, emphasis, links, tags, entities, cells, mathematics. A lone
`[1]` and `<=` are not markup."""
JOINERS = "\u200c\u200d"
"""Invisible characters that shape the letters beside them, as in Persian and Hindi, and join emoji."""


def printable(text: object, *, lines: bool = False) -> str:
    """Return a text with unprintable characters escaped; `lines` keeps line ends and tabs."""
    kept = JOINERS + "\n\t" if lines else JOINERS
    # Spaces of other scripts are printable, although `isprintable` denies it.
    return "".join(
        c if c.isprintable() or c in kept or category(c) == "Zs" else repr(c)[1:-1] for c in str(text)
    )


def markdown_text(text: object) -> str:
    """Return a text on one line that Markdown and HTML show literally. `Markup` of markupsafe is kept."""
    if hasattr(text, "__html__"):
        return str(text)
    return MARKDOWN.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), printable(text))


def say(*lines: object, error: bool = False, each: bool = False) -> None:
    """Print lines of untrusted text safely; each stays one line.

    Args:
        *lines: Lines without line ends.
        error: Whether to print to stderr instead of stdout.
        each: Whether every process prints, instead of only the main process.
    """
    if not each and os.environ.get("RANK", "0") != "0":
        return
    stream, bars = sys.stderr if error else sys.stdout, sys.modules.get("tqdm")
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = (printable(line).encode(encoding, "backslashreplace").decode(encoding) for line in lines)
    # Clears progress bars while printing.
    with bars.tqdm.external_write_mode(file=stream) if bars else nullcontext():
        print(*shown, sep="\n", file=stream, flush=True)


def warn(text: str, stacklevel: int = 1) -> None:
    """Issue a Python warning with untrusted text; `stacklevel` counts from the caller."""
    warnings.warn(printable(text), stacklevel=stacklevel + 1)
