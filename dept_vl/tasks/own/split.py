"""Splits: those in the data, those held out of the training images, and what is to be told about them."""

from collections.abc import Sequence
from random import Random

import numpy as np

from dept_vl._utils.checksums import checksum
from dept_vl._utils.embedded import embedded_bytes
from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.rows import Indices, Rows
from dept_vl.tasks.own.formats import SPLITS
from dept_vl.tasks.own.images import ImageFolder
from dept_vl.tasks.own.inline import EMBEDDED
from dept_vl.tasks.own.options import OwnOptions

TRAIN, VALIDATION, TEST, ALL, AUTO = "train", "validation", "test", "all", "auto"


def choose(rows: Rows, split: str, options: OwnOptions, folder: ImageFolder) -> Indices:
    """Return the indices of the rows of a split; raise UsageError if the data have no such split.

    auto is the test split, or all rows without one. For a missing validation or test split, training images
    are held out.
    """
    encoded = rows.column("split").combine_chunks().dictionary_encode()
    present = [SPLITS.get(name.lower(), name) for name in encoded.dictionary.to_pylist()]
    split = SPLITS.get(split.lower(), split)
    if split == AUTO:
        split = TEST if TEST in present else ALL
    if split == ALL:
        return np.arange(len(rows))
    names = np.array([name or TRAIN for name in present])[encoded.indices.to_numpy()]
    if split not in (TRAIN, VALIDATION, TEST) and split not in present:
        known = dict.fromkeys([TRAIN, VALIDATION, TEST, ALL, *filter(None, present)])
        raise UsageError(f"the data have the splits {', '.join(known)}; got {split!r}")
    missing = [name for name in (VALIDATION, TEST) if name not in present]
    if split in present and split != TRAIN:
        return np.flatnonzero(names == split)
    train = np.flatnonzero(names == TRAIN)
    if not len(train):
        raise UsageError(
            f"the data have no rows to train on: found the splits {', '.join(filter(None, present))}"
        )
    if not missing:
        return train
    sides = hold_out(rows, train, len(missing), options, folder)
    held = dict(zip((*missing, TRAIN), sides, strict=True))
    return held[split]


def hold_out(
    rows: Rows, places: Indices, parts: int, options: OwnOptions, folder: ImageFolder
) -> list[Indices]:
    """Split rows without sharing images: the held-out parts, then the rest; UsageError if impossible."""
    groups = image_groups(rows, places, folder)
    count = int(groups.max()) + 1
    if count <= parts:
        raise UsageError(
            f"{options.data or folder.base}: cannot hold out images of {parts} splits (validation, test) "
            f"from {count} in train; give more images, or name the splits in a column `split` or in files "
            "train, validation and test"
        )
    size = max(1, min(round(options.holdout_share * count), (count - 1) // parts))
    order = Random(options.split_seed).sample(range(count), parts * size)
    side = np.full(count, parts)
    for number in range(parts):
        side[order[number * size : (number + 1) * size]] = number
    return [places[side[groups] == number] for number in range(parts + 1)]


def image_groups(rows: Rows, places: Sequence[int] | Indices, folder: ImageFolder) -> Indices:
    """Return a group number per row. Rows that share an image, also by way of other rows, share a group."""
    chosen = rows if len(places) == len(rows) else rows.subset(places)
    images = chosen.column("images").combine_chunks()
    starts = images.offsets.to_numpy()
    encoded = images.flatten().dictionary_encode()
    numbered: dict[str, int] = {}
    contents = _contents(encoded.dictionary.to_pylist(), folder)
    same = [numbered.setdefault(image, len(numbered)) for image in contents]
    codes = np.array(same, np.int64)[encoded.indices.to_numpy()]
    first: Indices = codes[starts[:-1] - starts[0]]
    if len(codes) == len(first):  # one each
        return first
    parent = list(range(int(codes.max()) + 1))

    def least(code: int) -> int:
        while parent[code] != code:
            parent[code] = code = parent[parent[code]]
        return code

    for place in np.flatnonzero(np.diff(starts) > 1):
        for code in codes[starts[place] - starts[0] : starts[place + 1] - starts[0]]:
            parent[least(int(code))] = least(int(first[place]))
    first = np.array([least(int(code)) for code in first])
    numbers: Indices = np.unique(first, return_inverse=True)[1]
    return numbers


def _contents(references: Sequence[str], folder: ImageFolder) -> list[str]:
    """Return a key per image: the checksum of bytes in a table, or the file, which may have several names."""

    def content(reference: str) -> str:
        try:
            path = folder.find(reference)
            return checksum(embedded_bytes(path)) if reference.startswith(EMBEDDED) else str(path)
        except ValueError:  # No bytes, or an ambiguous name: reading the image reports it.
            return reference

    return [content(one) for one in references]


def unused(rows: Rows) -> list[str]:
    """Return messages about rows that are in no usual split, and about rows without one among others."""
    counts = {one["values"]: one["counts"] for one in rows.column("split").value_counts().to_pylist()}
    empty = counts.pop("", 0)
    others = [name for name in counts if SPLITS.get(name.lower(), name) not in (TRAIN, VALIDATION, TEST)]
    told = []
    if empty and counts:
        told.append(f"{empty:,} of {len(rows):,} rows have an empty split and count as {TRAIN}")
    if others:
        told.append(
            f"{sum(counts[name] for name in others):,} of {len(rows):,} rows are of the splits "
            f"{', '.join(map(repr, others))}, which are used only where an option names them"
        )
    return told


def leaks(rows: Rows, folder: ImageFolder) -> list[str]:
    """Return a message for each pair of splits that share images; rows without a split are of train."""
    names: dict[str, list[str]] = {}
    for name in rows.column("split").unique().to_pylist():
        names.setdefault(SPLITS.get(name.lower(), name) or TRAIN, []).append(name)
    if len(names) < 2:
        return []
    present = list(names)
    images = {}
    for name, given in names.items():
        references = rows.where("split", given).column("images").combine_chunks().flatten().unique()
        images[name] = set(_contents(references.to_pylist(), folder))
    return [
        f"{len(shared):,} of the {len(images[other]):,} images of {other} are in {name} too"
        for place, name in enumerate(present)
        for other in present[place + 1 :]
        if (shared := images[name] & images[other])
    ]


def unknown_labels(rows: Rows, labels: Sequence[str]) -> list[str]:
    """Return a message if answers are none of an adapter's labels; nothing without labels."""
    known, answers = set(labels), [row[0] for row in rows.column("answers").to_pylist() if row]
    others = [answer for answer in answers if answer not in known] if known else []
    if not others:
        return []
    first = list(dict.fromkeys(others))
    return [
        f"{len(others):,} of {len(answers):,} answers are none of the adapter's {len(known):,} labels: "
        f"{', '.join(f'{label!r:.60}' for label in first[:3])}{', ...' if len(first) > 3 else ''}"
    ]
