"""A folder of images that finds files by name: with any extension in their own folder, in any case."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from dept_vl._utils.errors import UsageError
from dept_vl._utils.images import missing_files
from dept_vl.tasks.own.inline import EMBEDDED

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"}
    | {".jp2", ".avif"}
)
SAME = {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}
"""Extensions of the same format."""
DEEPEST = 3
"""Depth of folders to search for an image that is not at its path."""
NUMBER_DIGITS = 12
"""Number of digits of an image number in COCO's file names."""


def names_image(text: str) -> bool:
    """Return whether a text names a file, or an image that may not exist, rather than being a question."""
    return os.path.isfile(text) or (Path(text).suffix.lower() in SUFFIXES and len(text.split()) == 1)


class ImageFolder:
    """A folder of images. Each folder is listed once, when a name in it is first looked up.

    Args:
        root: Folder of the images.
        base: Folder that references to images inside tables are relative to.
    """

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.base = root, base
        self._start = os.path.join(root, "") if root != Path() else ""
        self._real = os.path.realpath(root)
        self._listings: dict[str, dict[str, bool]] = {}
        self._index: dict[str, list[str]] | None = None

    def __reduce__(self) -> tuple[type["ImageFolder"], tuple[Path, Path]]:
        return ImageFolder, (self.root, self.base)

    def find(self, name: str) -> Path:
        """Return the file for an image name; UsageError if it is ambiguous or a link that leads outside."""
        if name.startswith(EMBEDDED):
            return self.base / name.removeprefix(EMBEDDED)
        folder, _, base = name.rpartition("/")
        listing = self._list(folder)
        if base in listing:
            return self._inside(name, listing[base])
        if self._index is None:
            self._index = self._search()
        for key in _keys(name):
            files = [file for file in self._index.get(key, []) if _may_be(file, name)]
            here = [file for file in files if file.rpartition("/")[0] == folder]
            if len(here or files) > 1:
                raise UsageError(
                    f"the image {name!r:.100} may be {' or '.join((here or files)[:3])} in {self.root}; "
                    "write the whole path into the data"
                )
            if files:
                return self._inside((here or files)[0], True)
        return Path(self._start + name)

    def missing(self, names: Iterable[str]) -> list[Path]:
        """Return the files of these images that do not exist; those inside tables are not checked."""
        searched = []
        for name in names:
            if name.startswith(EMBEDDED):
                continue
            folder, _, base = name.rpartition("/")
            if self._list(folder).get(base, True):  # not there under this name, or a link
                searched.append(self.find(name))
        return missing_files(searched)

    def _list(self, folder: str) -> dict[str, bool]:
        """Return the names in a folder, and for each whether it must be checked as a link."""
        if folder not in self._listings:
            try:
                with os.scandir(os.path.join(self.root, folder)) as entries:
                    listing = {entry.name: entry.is_symlink() for entry in entries}
            except OSError:
                listing = {}
            linked = bool(listing) and not self._holds(os.path.join(self.root, folder))
            self._listings[folder] = dict.fromkeys(listing, True) if linked else listing
        return self._listings[folder]

    def _holds(self, path: str) -> bool:
        return os.path.commonpath([self._real, os.path.realpath(path)]) == self._real

    def _inside(self, name: str, is_link: bool) -> Path:
        if is_link and not self._holds(self._start + name):
            raise UsageError(
                f"the image {self._start}{name} is a link to {os.path.realpath(self._start + name)}, outside "
                f"of {self.root}; --images FOLDER says where images are"
            )
        return Path(self._start + name)

    def _search(self) -> dict[str, list[str]]:
        """Return the images below the folder, by all keys under which they can be found."""
        index: defaultdict[str, list[str]] = defaultdict(list)
        for folder, folders, files in os.walk(self.root):
            below = os.path.relpath(folder, self.root).replace(os.sep, "/")
            below = "" if below == "." else below + "/"
            if below.count("/") >= DEEPEST:
                folders.clear()
            folders.sort()
            for file in sorted(files):
                stem, suffix = os.path.splitext(file)
                if suffix.lower() not in SUFFIXES:
                    continue
                for key in {*_keys(below + file), *_keys(file), *_numbers(stem)}:
                    index[key].append(below + file)
        return dict(index)


def _may_be(file: str, name: str) -> bool:
    """Return whether a file with a key of a name is in the name's folder or, for a bare name, of its type."""
    (folder, suffix), (wanted, said) = _folder_and_type(file), _folder_and_type(name)
    # Of b.jpg, a b.png in another folder may be the mask.
    return folder == wanted or (not wanted and said in ("", suffix))


def _folder_and_type(name: str) -> tuple[str, str]:
    """Return the folder of a name and its extension, "" if that is no image's; comparable by `==`."""
    lower = _plain(name)
    suffix = os.path.splitext(lower)[1]
    return lower.rpartition("/")[0], SAME.get(suffix, suffix) if suffix in SUFFIXES else ""


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()  # macOS writes accents as separate characters


def _keys(name: str) -> tuple[str, ...]:
    """Return the lookup keys of a name, the most exact first."""
    lower = _plain(name)
    stem, suffix = os.path.splitext(lower)
    stem = stem if suffix in SUFFIXES else lower
    base = stem.rpartition("/")[2]
    number = (f"#{base.lstrip('0')}",) if base.isascii() and base.isdecimal() else ()
    return tuple(dict.fromkeys((lower, stem, *number)))


def _numbers(stem: str) -> tuple[str, ...]:
    """Return the lookup key for the number that ends COCO's names, as in COCO_train2014_000000000009."""
    digits = stem.rpartition("_")[2]
    is_number = digits.isascii() and digits.isdecimal() and len(digits) in (len(stem), NUMBER_DIGITS)
    return (f"#{digits.lstrip('0')}",) if is_number else ()
