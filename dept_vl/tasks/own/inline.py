"""Images inside a table, as bytes or data URLs: where they stand, so that they are read from there."""

import mmap
from pathlib import Path
from typing import Any

from dept_vl._utils.checksums import checksum
from dept_vl._utils.embedded import COLUMNAR, data_url_bytes, data_urls, embedded_path
from dept_vl._utils.errors import UsageError

WRITINGS = [(codec, slash) for codec in ("ascii", "utf-16-le", "utf-16-be") for slash in ("/", "\\/")]
"""How a file may have a data URL: the encoding, and the slash, which some writers of JSON escape."""
EMBEDDED = "embedded:"
"""Begins the reference to an image whose bytes are in the table."""


class Embedded(str):
    """Such a reference, which no text of the table can be."""

    __slots__ = ()

    @classmethod
    def at(cls, path: Path, column: str, row: int, item: int | None = None) -> "Embedded":
        """Refer to the image of a row, counted from 0, or to one of several."""
        return cls(EMBEDDED + embedded_path(str(path.absolute()), column, row, item))


class InlineImages:
    """Finds the data URLs of a table.

    Args:
        path: Of the table.
        base: Folder of the data, below which it is named, since that may be moved.
    """

    def __init__(self, path: Path, base: Path) -> None:
        self.path = path
        self._name = str(path.absolute()).removeprefix(f"{base.absolute()}/")
        self._known: dict[str, str] = {}
        self._file: mmap.mmap | None = None
        self._writings = list(WRITINGS)
        self._start = self._end = 0

    def next_record(self) -> None:
        """Go on to a record, which stands behind the one before."""
        self._start = self._end

    def reference(self, url: str, record: dict[str, Any], number: int, where: str) -> str:
        """Return the reference to an image; the same for the same image of other rows.

        Args:
            url: The data URL.
            record: Record that has it.
            number: Number of the record, from 1.
            where: Names it in messages.

        Raises:
            UsageError: If it is no data URL, or the file has it in an unusual way.
        """
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
        """Name the place in a Parquet or Arrow file: its column, row, and number in the cell."""
        column, urls = next(
            (name, urls) for name, value in record.items() if url in (urls := list(data_urls(value)))
        )
        return embedded_path(self._name, column, number - 1, urls.index(url))

    def _span(self, url: str, where: str) -> str:
        """Name the place in a file of text: its first byte, and how many there are."""
        if self._file is None:
            with self.path.open("rb") as opened:
                self._file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        for number, (codec, slash) in enumerate(self._writings):
            written = url.replace("/", slash).encode(codec)
            start = self._file.find(written, self._start)
            if start >= 0:
                self._writings.insert(0, self._writings.pop(number))  # as the next one will be written
                self._end = max(self._end, start + len(written))
                return embedded_path(self._name, "bytes", start, len(written))
        raise UsageError(f"{where}: expected a data URL without escapes, found them in {url[:40]!r}")
