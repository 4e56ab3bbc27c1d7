"""Safe display and comparison of untrusted text, such as text from adapters, data and models.

Escape sequences could control a terminal, added lines could pass for ours, and Markdown could contain tags
and links. So all printing goes through `say`, Markdown through `markdown_text`, tables through
`tables.markdown_table`, and plots through `report.plots.drawn`.
"""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unicodedata import category as category_of
from unicodedata import normalize

MARKDOWN = re.compile(
    r"[\\`*|$~#]|\[(?!\d\](?![\[(:]))|\](?<!\[\d\])|[<>](?!=)|&(?=[#\w])|(?<!\w)_|_(?!\w)|!(?=\[)|(?<=:)//|www\.",
    re.IGNORECASE,
)
"""Characters that start markup in a line: code, emphasis, links, tags, entities, cells, mathematics. A lone
`[1]` and `<=` are not markup."""
JOINERS = "\u200c\u200d"
"""Invisible characters that shape the letters beside them, as in Persian and Hindi, and join emoji."""

DROPPED = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Control characters, lone surrogates, and invisible characters that affect no letters beside them."""
SPACES = re.compile(r"[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
LINE_ENDS = re.compile(r"[\x0b\x0c\x85\u2028\u2029]")


def printable(text: object, *, lines: bool = False) -> str:
    """Return a text with unprintable characters escaped; `lines` keeps line ends and tabs."""
    text, kept = str(text), JOINERS + "\n\t" if lines else JOINERS
    if text.isprintable():
        return text
    # Spaces of other scripts are printable, although `isprintable` denies it.
    return "".join(
        c if c.isprintable() or c in kept or category_of(c) == "Zs" else repr(c)[1:-1] for c in text
    )


def plain(text: str) -> str:
    """Return a text in NFC form, with plain spaces and without invisible characters.

    Texts that look the same but were typed or saved differently become equal.
    """
    if text.isascii() and text.isprintable():
        return text.strip()
    text = LINE_ENDS.sub("\n", SPACES.sub(" ", DROPPED.sub("", text)))
    return normalize("NFC", text).strip(JOINERS + " \t\r\n")


def one_line(text: str) -> str:
    """Return a text as by `plain`, on one line with single spaces. Answers are compared in this form."""
    return " ".join(plain(text).split())


def markdown_text(text: object) -> str:
    """Return a text on one line that Markdown and HTML show literally. `Markup` of markupsafe is kept."""
    if hasattr(text, "__html__"):
        return str(text)
    return MARKDOWN.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), printable(text))


def say(*lines: object, error: bool = False, each: bool = False) -> None:
    """Print lines of untrusted text safely; each stays one line.

    `error` prints to stderr instead of stdout; `each` prints on every process, not only on the main one.
    """
    if not each and os.environ.get("RANK", "0") != "0":
        return
    stream, bars = sys.stderr if error else sys.stdout, sys.modules.get("tqdm")
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = (printable(line).encode(encoding, "backslashreplace").decode(encoding) for line in lines)
    # Clears progress bars while printing.
    with bars.tqdm.external_write_mode(file=stream) if bars else nullcontext():
        print(*shown, sep="\n", file=stream, flush=True)


class Note(UserWarning):
    """A warning of this package, which commands print as a note."""


def warn(text: str, stacklevel: int = 1) -> None:
    """Issue a Python warning with untrusted text; `stacklevel` counts from the caller."""
    warnings.warn(printable(text), Note, stacklevel=stacklevel + 1)


@contextmanager
def notes_caught() -> Iterator[list[str]]:
    """Collect the warnings of this package; those of other packages, of other threads too, are left out."""
    notes = list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Note)
        try:
            yield notes
        finally:
            notes += [str(one.message) for one in caught if issubclass(one.category, Note)]


@contextmanager
def notes_shown() -> Iterator[None]:
    """Print warnings of this package as notes of one line, without the line of the program."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Note):
            say(f"note: {message}", error=True)
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual
