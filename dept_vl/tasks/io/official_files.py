"""Search for official files by name, and published facts about them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """Published facts about a split."""

    files: tuple[tuple[str, ...], ...]  # possible names of each annotation file, the usual one first
    folders: tuple[tuple[str, ...], ...]  # possible names of each image folder, the usual one first
    source: str  # where the files are published
    examples: int  # number of questions, sentences or captioned images
    images: int | None = None  # number of different images; None if not published
    answers: int | None = None  # number of human answers or captions; None if there are none, or unpublished


def find(root: Path, names: Sequence[str], what: str, source: str) -> Path:
    """Return the first of these files that exists; raise FileNotFoundError if none does."""
    for name in names:
        if (root / name).is_file():
            return root / name
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    raise FileNotFoundError(
        f"{what} file not found: expected {names[0]}{others} in {root}; it is published at {source}"
    )


def find_folder(root: Path, names: Sequence[str], holds: str, source: str) -> Path:
    """Return the first of these folders that exists; raise FileNotFoundError if none does."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(
        f"no image folder for {names[0]}: expected {root / names[0]} with {holds}; "
        f"the images are published at {source}"
    )


def check_split(split: str, known: Iterable[str], what: str) -> None:
    """Raise ValueError if the name of a split is unknown."""
    if split not in (names := tuple(known)):
        raise ValueError(f"{what} has the splits {', '.join(names)}; got {split!r}")
