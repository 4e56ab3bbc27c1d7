"""Read official annotation files a record at a time.

VQAv2's training annotations are 4.4 million answers and GQA's questions 22 million: as Python objects
they fill tens of GiB. Here one record lives at a time, whatever the size of the file.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 20
"""Characters read at a time."""

_DECODER = json.JSONDecoder()
_LONGEST_WORD = len("-Infinity")


def read_list(path: Path, key: str, source: str) -> Iterator[dict[str, Any]]:
    """The objects of the list under one key of a JSON object, such as `{"questions": [{}, {}, ...]}`.

    What stands behind the list is walked through too: a file cut there is damaged all the same.

    Args:
        path: The file.
        key: Of the list.
        source: Where the file is published, for the messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such object, is cut short, or holds no record under the key.
    """
    with _Text(path, source) as text:
        text.expect("{", f"an object with a list under {key!r}")
        found = False
        for name in text.member_names():
            if name != key:
                text.skip()
                continue
            found = True
            text.expect("[", f"a non-empty list under {key!r}")
            yield from text.objects(text.elements(), f"{key}[{{}}]")
        text.expect_end()
    if not found:
        raise text.error(
            f"expected a non-empty list under {key!r}, found no such key; is it another file renamed?"
        )


def read_mapping(path: Path, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys and objects of a JSON object of objects, such as GQA's questions by their ids.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such object, is cut short, or empty.
    """
    with _Text(path, source) as text:
        text.expect("{", "an object of objects")
        names: list[str] = []

        def values() -> Iterator[Any]:
            for name in text.member_names():
                names.append(name)
                yield text.value()

        for record in text.objects(values(), "entry {}"):
            yield names.pop(), record
        text.expect_end()


def read_array(path: Path, source: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that is one JSON list.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no list of objects, is cut short, or empty.
    """
    with _Text(path, source) as text:
        text.expect("[", "a list of objects")
        yield from text.objects(text.elements(), "entry {}")
        text.expect_end()


def read_lines(path: Path, source: str) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line; blank lines are passed over.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON object, or there is none.
    """
    found = False
    with _open(path, source) as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{path}, line {number}: expected a JSON object, found {line[:60]!r} ({error}); "
                        f"download the file again from {source}"
                    ) from None
                if not isinstance(record, dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object, found {line[:60]!r}")
                found = True
                yield record
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error}); download it again from {source}") from None
    if not found:
        raise ValueError(f"{path} is empty: expected one JSON object a line; download it again from {source}")


def field(record: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a record, checked.

    Raises:
        ValueError: If it is missing or of another type; the message names `where`.
    """
    value = record.get(name)
    # True and False are ints to Python, and no id to anyone.
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(one.__name__ for one in kinds)
        found = f"{value!r:.60}" if name in record else "no such field"
        raise ValueError(f"{where}: expected {name!r} to be {expected}, found {found}")
    return value


def _open(path: Path, source: str) -> TextIO:
    try:
        return path.open(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"expected {path.name} in {path.parent}, found no such file; it is published at {source}"
        ) from None


class _Text:
    """A JSON text walked from left to right, a chunk in memory at a time."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.buffer, self.position, self.read_before = "", 0, 0
        self.ended = False

    def __enter__(self) -> "_Text":
        self.file = _open(self.path, self.source)
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {problem}")

    def objects(self, values: Iterable[Any], where: str) -> Iterator[dict[str, Any]]:
        """The values, each checked to be an object, and at least one."""
        count = 0
        for value in values:
            if not isinstance(value, dict):
                raise self.error(f"{where.format(count)}: expected an object, found {value!r:.60}")
            count += 1
            yield value
        if not count:
            raise self.error("expected records, found an empty list; is it another file renamed?")

    def member_names(self) -> Iterator[str]:
        """Keys of the object at hand; whoever takes a key takes the value behind it too."""
        for _ in self._items("}"):
            if self._peek() != '"':
                raise self._damaged("a key in double quotes")
            name: str = self.value()
            self.expect(":", "a colon behind a key")
            yield name

    def elements(self) -> Iterator[Any]:
        """Values of the list at hand."""
        for _ in self._items("]"):
            yield self.value()

    def _items(self, closing: str) -> Iterator[None]:
        if self._peek() == closing:
            self.position += 1
            return
        while True:
            yield
            mark = self._peek()
            self.position += 1
            if mark == closing:
                return
            if mark != ",":
                raise self._damaged(f"',' or {closing!r}")

    def expect(self, mark: str, what: str) -> None:
        """Step over a mark."""
        if self._peek() != mark:
            raise self._damaged(what)
        self.position += 1

    def expect_end(self) -> None:
        """See to it that nothing follows."""
        if self._peek():
            raise self._damaged("the end of the file")

    def skip(self) -> None:
        """Step over the value at hand, of a list or an object one value at a time."""
        mark = self._peek()
        if mark == "[":
            self.position += 1
            for _ in self.elements():
                pass
        elif mark == "{":
            self.position += 1
            for _ in self.member_names():
                self.value()
        else:
            self.value()

    def value(self) -> Any:
        """Decode the value at hand, reading on until it is whole."""
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                # Only a string, or what stands at the very end, may be whole once more is read.
                if self.ended or not (
                    error.msg.startswith("Unterminated string")
                    or error.pos + _LONGEST_WORD > len(self.buffer)
                ):
                    self.position = error.pos
                    raise self._damaged(f"JSON ({error.msg})") from None
            except ValueError as error:
                raise self._damaged(f"a number of fewer digits ({error})") from None
            except RecursionError:
                raise self._damaged("no more than a few hundred nested lists or objects") from None
            else:
                # The 1 at the end of "1", "1." and "1e+" may go on as 1.5 or 1e+5.
                if self.ended or end + 2 < len(self.buffer):
                    self.position = end
                    return value
            # As much again, so that a long value is not decoded anew for every chunk.
            self._read(max(CHUNK, len(self.buffer) - self.position))

    def _peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in " \t\n\r":
                self.position += 1
            if self.position < len(self.buffer) or self.ended:
                return self.buffer[self.position : self.position + 1]
            self._read(CHUNK)

    def _read(self, size: int) -> None:
        try:
            text = self.file.read(size)
        except UnicodeDecodeError as error:
            raise self.error(f"no UTF-8 text ({error}); download it again from {self.source}") from None
        self.ended = not text
        self.read_before += self.position
        self.buffer = self.buffer[self.position :] + text
        self.position = 0

    def _damaged(self, expected: str) -> ValueError:
        at = self.read_before + self.position
        found = self.buffer[self.position : self.position + 40]
        found = repr(found) if found else "the end of the file"
        return self.error(
            f"expected {expected} at character {at:,}, found {found}; the file is cut short or damaged: "
            f"download it again from {self.source}"
        )
