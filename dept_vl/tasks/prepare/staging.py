"""Writing of a split's official files and images, so that they appear complete or not at all."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dept_vl._utils.images import FULL_CHROMA, JPEG_QUALITY, confined, read_image

JPEG = b"\xff\xd8\xff"
"""Start of every JPEG file."""


@dataclass
class Output:
    """The split being written."""

    staging: Path  # folder where it is written
    final: Path  # folder where it will be moved
    examples: int = 0  # number of examples written
    images: set[str] = field(default_factory=set)
    kept: int = 0
    reencoded: int = 0

    def image(self, name: str, value: Any, where: str) -> None:
        """Write an image once, under its official name. A name in `.jpg` makes other formats JPEG."""
        if name in self.images:
            return
        self.images.add(confined(name, where))
        if (self.final / name).is_file():
            self.kept += 1
            return
        data = value.get("bytes") if isinstance(value, dict) else None
        if not data:
            raise ValueError(f"{where}: expected the bytes of the image {name}, found {value!r:.60}")
        path = self.staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if data.startswith(JPEG):
            return
        try:
            pixels = read_image(path)
        except ValueError as error:
            raise ValueError(f"{where}: the bytes of {name} are not an image ({error})") from None
        if path.suffix == ".jpg":
            pixels.save(path, quality=JPEG_QUALITY, subsampling=FULL_CHROMA)
            self.reencoded += 1

    def counts(self) -> dict[str, int]:
        """Return the number of images, and of those kept and re-encoded; empty if there are no images."""
        if not self.images:
            return {}
        return {"images": len(self.images), "images_kept": self.kept, "images_reencoded": self.reencoded}


def refuse_existing(folder: Path, files: Sequence[str]) -> None:
    """Raise FileExistsError if a folder has one of the files, since nothing is overwritten."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"expected {folder} to be a folder, found a file")
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise FileExistsError(
            f"{folder} holds {', '.join(there)} already, and nothing is overwritten; choose another folder, "
            "or remove them to have the split written anew"
        )


def publish(staging: Path, folder: Path, files: Sequence[str]) -> None:
    """Move a finished split to its folder, which may hold other splits."""
    if not folder.exists():
        staging.rename(folder)
        return
    refuse_existing(folder, files)
    # Annotation files are moved last, since tasks find a split by them.
    images = (path for path in staging.rglob("*") if path.is_file() and path.parent != staging)
    for path in chain(images, (staging / name for name in reversed(files))):
        target = folder / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


@contextmanager
def staging_for(output_dir: Path) -> Iterator[Path]:
    """Yield an empty folder to fill and then rename; it is removed if it is still there."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent folder, so that the rename stays on one file system.
    place = TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.")
    with _ended_by_sigterm(), place as temporary:
        # One level down, since the temporary folder itself is only readable by its owner.
        staging = Path(temporary) / output_dir.name
        staging.mkdir()
        yield staging


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that what is temporary is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def joined(path: Path, opening: str, closing: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that appends an item to a file, with commas between items."""
    with path.open("w", encoding="utf-8") as file:
        file.write(opening)
        before = "\n"

        def add(item: str) -> None:
            nonlocal before
            file.write(before + item)
            before = ",\n"

        yield add
        file.write(closing + "\n")


@contextmanager
def json_list(path: Path, header: dict[str, Any], key: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that appends an item to the list that is the last member of a JSON object."""
    with joined(path, f'{json.dumps(header)[:-1]}, "{key}": [', "]}") as add:
        yield lambda item: add(json.dumps(item))
