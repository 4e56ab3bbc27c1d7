"""References to images stored inside a table, as bytes or data URLs, so that they are read from the table."""

import mmap
from pathlib import Path
from typing import Any

from dept_vl._utils.checksums import checksum
from dept_vl._utils.embedded import COLUMNAR, data_url_bytes, data_urls, embedded_path
from dept_vl._utils.errors import UsageError

WRITINGS = [(codec, slash) for codec in ("ascii", "utf-16-le", "utf-16-be") for slash in ("/", "\\/")]
"""Ways to write a data URL in a file: text encoding, and slash, which some JSON writers escape."""
EMBEDDED = "embedded:"
"""Prefix of references to images inside a table."""


class Embedded(str):
    """Reference to an image inside a table. The type distinguishes it from the table's own text."""

    __slots__ = ()

    @classmethod
    def at(cls, path: Path, column: str, row: int, item: int | None = None) -> "Embedded":
        """Return the reference to the image of a row (from 0), or to item `item` of several images."""
        return cls(EMBEDDED + embedded_path(str(path.absolute()), column, row, item))


class InlineImages:
    """Finder of the data URLs in a table. Records are passed in file order.

    References are relative to `base`, the folder of the data, so that it can be moved.
    """

    def __init__(self, path: Path, base: Path) -> None:
        self.path = path
        self._name = str(path.absolute()).removeprefix(f"{base.absolute()}/")
        self._known: dict[str, str] = {}
        self._file: mmap.mmap | None = None
        self._writings = list(WRITINGS)
        self._start = self._end = 0

    def next_record(self) -> None:
        """Move to the next record, which starts after the previous one."""
        self._start = self._end

    def reference(self, url: str, record: dict[str, Any], number: int, where: str) -> str:
        """Return the reference to an image; equal images share one reference. Records are counted from 1."""
        try:
            key = checksum(data_url_bytes(url, where))
        except ValueError as error:
            raise UsageError(str(error)) from None
        if key not in self._known:
            columnar = self.path.suffix.lower() in COLUMNAR
            place = self._cell(url, record, number) if columnar else self._span(url, where)
            self._known[key] = EMBEDDED + place
        return self._known[key]

    def _cell(self, url: str, record: dict[str, Any], number: int) -> str:
        """Return the location in a Parquet or Arrow file: column, row, and position in the cell."""
        column, urls = next(
            (name, urls) for name, value in record.items() if url in (urls := list(data_urls(value)))
        )
        return embedded_path(self._name, column, number - 1, urls.index(url))

    def _span(self, url: str, where: str) -> str:
        """Return the location in a text file: first byte and number of bytes."""
        if self._file is None:
            with self.path.open("rb") as opened:
                self._file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        for number, (codec, slash) in enumerate(self._writings):
            written = url.replace("/", slash).encode(codec, errors="replace")
            start = self._file.find(written, self._start)
            if start >= 0:
                self._writings.insert(0, self._writings.pop(number))  # likely for the next one too
                self._end = max(self._end, start + len(written))
                return embedded_path(self._name, "bytes", start, len(written))
        raise UsageError(
            f"{where}: the data URL {url[:40]!r} is written with escapes, or is not ASCII; encode the image "
            "in base64 (data:image/png;base64,...)"
        )
