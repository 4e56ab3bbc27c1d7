"""Reading and writing of this package's files, JSON and safetensors: written atomically, read with checks.

Any problem with a file is raised as a ValueError of one line, with its path. Content is checked before use.

Files of runs and adapters have their size and checksum in `.checksums.json` beside them, which is compared
whenever a file is read. Files that are not listed there, such as files from elsewhere, are not compared.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from dept_vl._utils.checksums import checksum, file_checksum
from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.options import check
from dept_vl._utils.printable import printable

LONGEST_JSON = 1 << 26
"""Maximum size of a JSON file in bytes; usual files have a few thousand."""
DEEPEST = 200
"""Maximum nesting depth of JSON. The memory of ijson grows with its square."""
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
CHECKSUMS_FILE = ".checksums.json"
"""File with the size and checksum of files in its folder, by name."""
TRIES, PAUSE = 3, 0.05
"""Number of comparisons and seconds between them, since another process may be writing the files."""

Noted = tuple[int, str]
"""Size and checksum of a file, or of the start of a growing file."""
Checksums = dict[str, dict[str, Noted]]
"""Recorded checksums: `files`, and those `before` the current write."""


class RepeatedKeyError(ValueError):
    """A key that occurs twice in one JSON object, so that one of its values would be lost."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r:.60} stands twice in one object; keep one of them")


class UniqueKeys(dict[str, Any]):
    """A JSON object built by ijson that records repeated keys for `check_keys`; ijson ignores errors here."""

    __slots__ = ("repeated",)
    met: ClassVar = False
    """Whether any object in this process has a repeated key."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self.repeated = key
            UniqueKeys.met = True
        dict.__setitem__(self, key, value)


def check_keys(value: Any) -> None:
    """Raise RepeatedKeyError if a value read by ijson contains an object with a repeated key."""
    if not UniqueKeys.met:
        return
    parts = [value]
    while parts:  # not recursive: values may be nested deeply
        part = parts.pop()
        if isinstance(part, UniqueKeys) and hasattr(part, "repeated"):
            raise RepeatedKeyError(part.repeated)
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


class NestedError(ValueError):
    """JSON with more than `DEEPEST` lists and objects in each other."""

    def __init__(self) -> None:
        super().__init__(f"it is nested too deeply: more than {DEEPEST} lists and objects in each other")


class Depth:
    """Nesting depth of a JSON text that is read in parts; brackets in strings do not count."""

    def __init__(self) -> None:
        self.depth = self._in_string = 0
        self._escape = b""

    def add(self, data: bytes) -> None:
        """Follow the next part of the text; raise NestedError if it is nested too deeply."""
        data = (self._escape + data).replace(rb"\\", b"").replace(rb"\"", b"")
        self._escape = b"\\" if data.endswith(b"\\") else b""
        parts = data.split(b'"')
        left = b"".join(parts[self._in_string :: 2]).translate(None, NOT_BRACKETS)
        self._in_string = (self._in_string + len(parts) - 1) % 2
        for _ in range(DEEPEST):  # each time the innermost pairs go; what is left closes and opens others
            before, left = len(left), left.replace(b"[]", b"").replace(b"{}", b"")
            if len(left) == before:
                break
        else:
            raise NestedError
        self.depth += 2 * (left.count(b"[") + left.count(b"{")) - len(left)
        if self.depth > DEEPEST:
            raise NestedError


def parse_json(text: str) -> Any:
    """Parse JSON text like `json.loads`; raise RepeatedKeyError or NestedError."""
    if text.count("[") + text.count("{") > DEEPEST:
        Depth().add(text.encode("utf-8", "surrogatepass"))
    return _DECODER.decode(text)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it, and rename it. An OSError names the file."""
    partial = path.with_name(path.name + ".partial")
    try:
        write_flushed(partial, content, path)
        partial.replace(path)
    except OSError:
        # A partial file would only fill a full disk.
        with suppress(OSError):
            partial.unlink()
        raise


def write_flushed(path: Path, content: bytes, name: Path | None = None) -> None:
    """Write a file and wait until it is on the disk. Errors name `name`, or the path."""
    with writing(name or path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, _json(content, indent))


def _json(content: Any, indent: int | None) -> bytes:
    return (json.dumps(content, indent=indent) + "\n").encode()


def write_noted(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files of a folder atomically, and record their checksums in the folder.

    Until all are written, old and new checksums are both valid, in case of an interruption.
    """
    known = _known(folder)
    before = {}
    for name in files:
        if (folder / name).is_file():
            there = noted(folder / name)
            if name not in known["files"] or there in [entries.get(name) for entries in known.values()]:
                before[name] = there
    now = known["files"] | {name: (len(content), checksum(content)) for name, content in files.items()}
    _write_checksums(folder, now, before)
    for name, content in files.items():
        write_atomically(folder / name, content)
    if before:
        _write_checksums(folder, now, {})


def write_noted_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file and record its checksum; see `write_noted`."""
    write_noted(path.parent, {path.name: _json(content, indent)})


def noted(path: Path) -> Noted:
    """Return the size and checksum of a file as it is now."""
    size = path.stat().st_size
    return size, file_checksum(path, size)


def note(folder: Path, files: Mapping[str, Noted | None]) -> None:
    """Record checksums of other files below a folder; None removes one."""
    known = _known(folder)
    changed = {**known["files"], **files}
    kept = {name: value for name, value in changed.items() if value is not None}
    _write_checksums(folder, kept, known["before"])


def remove_noted(folder: Path, *names: str) -> None:
    """Remove files and their recorded checksums."""
    with suppress(OSError):
        note(folder, dict.fromkeys(names))
    for name in names:
        with suppress(OSError):
            (folder / name).unlink()
    if not _known(folder)["files"]:  # otherwise an empty folder would not look empty
        with suppress(OSError):
            (folder / CHECKSUMS_FILE).unlink()


def is_there(path: Path) -> bool:
    """Return whether a file exists; raise DamagedFileError if it is recorded but missing."""
    if path.is_file():
        return True
    check_noted(path)
    return False


def check_noted(*paths: Path, folder: Path | None = None, grows: bool = False) -> int:
    """Compare files of a folder with their recorded checksums: all with the old ones, or all with the new.

    `folder` holds the checksums (None for that of the first file). With `grows`, files may have grown since.
    Return the number of compared bytes of the last file; -1 if it has no recorded checksum. Raise
    DamagedFileError if a file differs or is missing.
    """
    folder = folder or paths[0].parent
    names = [path.relative_to(folder).as_posix() for path in paths]
    wrong = paths[0]
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE)
        known = _read_checksums(folder)
        for files in (known["files"], known["files"] | known["before"]):
            different = [
                path
                for path, name in zip(paths, names, strict=True)
                if name in files and not _is(path, files[name], grows)
            ]
            if not different:
                return files.get(names[-1], (-1, ""))[0]
            wrong = different[0]
    what = "is damaged, or was changed by hand" if wrong.is_file() else "was removed"
    raise DamagedFileError(
        f"{wrong} {what}: it is not what was written there. Put it back; if it is meant, remove "
        f"{folder / CHECKSUMS_FILE}, and files are taken as they are"
    )


def _is(path: Path, expected: Noted, grows: bool) -> bool:
    size, digest = expected
    try:
        found = path.stat().st_size
        return (found == size or (grows and found > size)) and file_checksum(path, size) == digest
    except FileNotFoundError:
        return False


def _read_checksums(folder: Path) -> Checksums:
    path = folder / CHECKSUMS_FILE
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        found: Checksums = check(content, Checksums)
        if found.keys() != {"files", "before"}:
            raise ValueError(f"it has {sorted(found)}"[:100])
    except FileNotFoundError:
        return {"files": {}, "before": {}}
    except ValueError as error:
        raise DamagedFileError(
            f"{path} is damaged ({one_line(error)}); remove it, and the files beside it are taken as they are"
        ) from None
    return found


def _known(folder: Path) -> Checksums:
    """Return the recorded checksums, for an update; empty if they are damaged."""
    try:
        return _read_checksums(folder)
    except DamagedFileError:
        return {"files": {}, "before": {}}


def _write_checksums(folder: Path, files: Mapping[str, Noted], before: Mapping[str, Noted]) -> None:
    write_json(folder / CHECKSUMS_FILE, {"files": files, "before": before})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the file name to errors of writing it, since the system's message may lack it."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def one_line(error: BaseException) -> str:
    """Return an error message as one printable line of limited length, since it may quote file content."""
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__


def read_json(path: Path, parse: Callable[[str], Any] = parse_json) -> Any:
    """Read a JSON file; raise DamagedFileError if it is damaged or too large.

    `parse` decodes the text; the default rejects repeated keys. Use `json.loads` for files that other
    programs read in that way.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a JSON file at {path}, found none")
    check_noted(path)
    size = path.stat().st_size
    if size > LONGEST_JSON:
        raise DamagedFileError(
            f"{path} is damaged or another file: expected at most {LONGEST_JSON:,} bytes, found {size:,}"
        )
    try:
        return parse(path.read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except RepeatedKeyError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None
    # Very deep nesting raises a RecursionError in `json.loads`.
    except (ValueError, RecursionError) as error:
        reason = NestedError() if isinstance(error, RecursionError) else error
        raise DamagedFileError(f"{path} is damaged: it is not valid JSON: {one_line(reason)}") from None


def read_object(path: Path, kind: Any, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object with the fields of a type; DamagedFileError names other fields, see `read_json`.

    `earlier` has defaults for fields that older files lack.
    """
    content: dict[str, Any] = read_json(path)
    if earlier and isinstance(content, dict):
        content = {**earlier, **content}
    try:
        check(content, kind)
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None
    return content
