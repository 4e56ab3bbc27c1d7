"""A split while it is written: official files and images, which appear whole or not at all."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dept_vl._utils.images import FULL_CHROMA, JPEG_QUALITY, confined, read_image

JPEG = b"\xff\xd8\xff"
"""How every JPEG file begins."""
ANNOTATORS = 10


@dataclass
class Output:
    """The split being written.

    Attributes:
        staging: Where it is written.
        final: Where it will lie.
        examples: How many were written.
    """

    staging: Path
    final: Path
    examples: int = 0
    images: set[str] = field(default_factory=set)
    kept: int = 0
    reencoded: int = 0

    def image(self, name: str, value: Any, where: str) -> None:
        """Write an image under its official name, once; a `.jpg` that is none becomes a JPEG.

        Raises:
            ValueError: If the name leads out of the folder, or the bytes are no image.
        """
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
            raise ValueError(f"{where}: the bytes of {name} are no image ({error})") from None
        if path.suffix == ".jpg":
            pixels.save(path, quality=JPEG_QUALITY, subsampling=FULL_CHROMA)
            self.reencoded += 1

    def counts(self) -> dict[str, int]:
        """Return what became of the images; empty where there are none."""
        if not self.images:
            return {}
        return {"images": len(self.images), "images_kept": self.kept, "images_reencoded": self.reencoded}


def refuse_existing(folder: Path, files: Sequence[str]) -> None:
    """Raise FileExistsError if a folder holds one of the files: nothing is overwritten."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"expected {folder} to be a folder, found a file")
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise FileExistsError(
            f"{folder} holds {', '.join(there)} already, and nothing is overwritten; choose another folder, "
            "or remove them to have the split written anew"
        )


def publish(staging: Path, folder: Path, files: Sequence[str]) -> None:
    """Move a finished split to its place, beside other splits if there are any."""
    if not folder.exists():
        staging.rename(folder)
        return
    refuse_existing(folder, files)
    # Annotation files last: they make the split one that tasks find.
    images = (path for path in staging.rglob("*") if path.is_file() and path.parent != staging)
    for path in chain(images, (staging / name for name in reversed(files))):
        target = folder / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


@contextmanager
def staging_for(output_dir: Path) -> Iterator[Path]:
    """An empty folder to fill and then rename; what is left of it is removed."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays within one file system.
    with TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as temporary:
        # One level down: the temporary folder itself is readable to its owner only.
        staging = Path(temporary) / output_dir.name
        staging.mkdir()
        yield staging


def dump(path: Path, content: object) -> None:
    """Write a JSON file in one line, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def unanimous(answer: str) -> dict[str, Any]:
    """Part of an annotation of VQAv2: an answer that all ten annotators give."""
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number in range(1, ANNOTATORS + 1)
    ]
    return {"multiple_choice_answer": answer, "answers": answers}


@contextmanager
def joined(path: Path, opening: str, closing: str) -> Iterator[Callable[[str], None]]:
    """A file written item by item, with commas between them."""
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
    """A JSON object whose last member is a list, written item by item."""
    with joined(path, f'{json.dumps(header)[:-1]}, "{key}": [', "]}") as add:
        yield lambda item: add(json.dumps(item))
