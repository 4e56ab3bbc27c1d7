"""Checksums of files that are trusted later: caches end in one, which is compared before they are used.

XXH3 reads some 15 GB a second, six times as fast as zlib's CRC-32 and ten times as fast as SHA-256; it finds
damage, and keeps no forger out.
"""

import mmap
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from dept_vl._utils.errors import DamagedFileError

if TYPE_CHECKING:  # imported where it is needed: the command line reads options without it
    import pyarrow as pa

SEAL = b"XXH3"
"""In front of the checksum at the end of a file."""
DIGEST_BYTES = 16
CHUNK_BYTES = 1 << 24

_compared: dict[Path, tuple[int, ...]] = {}
"""Files whose checksum this process has compared, and what the system said of them then."""


def checksum(content: "bytes | memoryview | mmap.mmap | pa.Buffer") -> str:
    """32 hexadecimal digits of some bytes."""
    return xxhash.xxh3_128_hexdigest(content)


def file_checksum(path: Path, size: int = sys.maxsize) -> str:
    """32 hexadecimal digits of a file's content, or of its first bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while size > 0 and (chunk := file.read(min(size, CHUNK_BYTES))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def known_checksum(path: Path) -> str:
    """Return a file's checksum, read once in a process as long as size and times stay: splits share files."""
    return _checksum_of(path, _identity(path))


@lru_cache(maxsize=1024)
def _checksum_of(path: Path, identity: tuple[int, ...]) -> str:
    return file_checksum(path)


def seal(path: Path) -> None:
    """Append its checksum to a file."""
    digest = bytes.fromhex(file_checksum(path))
    with path.open("ab") as file:
        file.write(SEAL + digest)


def open_sealed(path: Path) -> "pa.Buffer":
    """Map a sealed file without its seal, compared once in a process; DamagedFileError if it changed."""
    import pyarrow as pa

    size = path.stat().st_size - len(SEAL) - DIGEST_BYTES
    if size < 0:
        raise DamagedFileError(f"{path} is damaged: it is cut short")
    with pa.memory_map(str(path)) as file:
        whole = file.read_buffer()
    content = whole.slice(0, size)
    if not was_compared(path):
        digest = bytes.fromhex(checksum(content))
        if whole.slice(size).to_pybytes() != SEAL + digest:
            raise DamagedFileError(f"{path} is damaged: its content has another checksum")
        note_compared(path)
    return content


def was_compared(path: Path) -> bool:
    """Return whether the checksum of a file as it is now was compared in this process."""
    return _compared.get(path) == _identity(path)


def note_compared(path: Path) -> None:
    """Note that a file's checksum was compared."""
    _compared[path] = _identity(path)


def _identity(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
