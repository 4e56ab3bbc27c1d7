"""Parquet copies of the data sets, as on the Hub, written as the official files that the tasks read.

So each task has one reader, and official scorers work on what was fetched. What the copies hold:

    lmms-lab/VQAv2           val, test-dev, test; no train
    lmms-lab/GQA             every official split, images and questions apart, joined by imageId
    lmms-lab/NLVR2           dev, test1, test2 as two subsets, five sixths of each; no train
    yerevann/coco-karpathy   Karpathy's splits and captions; no images

A copy is read from the Hub as a stream, or from a folder: its files as downloaded (parquet, under
`data/`, under a folder for each configuration, or under one for each split) or `save_to_disk` of them.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from dept_vl.images import confined, read_image
from dept_vl.tasks import coco, gqa, nlvr2, vqav2
from dept_vl.tasks.easy_vqa import FULL_CHROMA, JPEG_QUALITY
from dept_vl.tasks.records import field as checked
from dept_vl.tasks.sources import Published

logger = logging.getLogger(__name__)

JPEG = b"\xff\xd8\xff"
"""How every JPEG file begins."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SHARD = re.compile(r"-\d+-of-(\d+)")
NO_PUNCTUATION = re.compile(r"[^\s,'\"\[\]]+")

ANSWER_COLUMNS = ("question_type", "answer_type", "answers")
GQA_ANSWER_COLUMNS = ("answer", "groups", "entailed", "types", "semantic")
GQA_UNANSWERED = ("test", "challenge", "submission")
NLVR2_CARRIED = ("left_url", "right_url", "writer", "synset", "query")

VQA_HEADER = {
    "info": {"description": "VQA v2.0, written from a parquet copy", "url": vqav2.SOURCE, "version": "2.0"},
    "license": {
        "url": "http://creativecommons.org/licenses/by/4.0/",
        "name": "Creative Commons Attribution 4.0 International License",
    },
    "data_type": "mscoco",
}

Part = tuple[str | None, str]
"""A configuration of a copy (None for its only one) and a split in it."""


def fetch(task: str, source: str | Path, output_dir: Path, *, split: str) -> dict[str, int]:
    """Write one split of a copy as official files and images.

    The split appears whole or not at all. A folder that holds other splits gains this one. Images
    that lie there under their official names already are kept.

    Args:
        task: Of `COPIES`.
        source: A name on the Hub, such as `lmms-lab/VQAv2`, or a folder that holds the copy.
        output_dir: Folder to write, or to add to.
        split: As the task calls it; `all` for coco, whose one file holds every split.

    Returns:
        The number of examples, by what the task's examples are, and for tasks with images:
        `images` that belong to the split, those `images_kept` from before, and those
        `images_reencoded` as JPEG because of their official names.

    Raises:
        ValueError: If the task or split is unknown, columns are missing, or a row is damaged.
        FileNotFoundError: If the source is no folder and no name on the Hub, or lacks the split.
        FileExistsError: If the split is there already.
        OSError: If the copy cannot be read, for want of a network for example.
    """
    if task not in COPIES:
        raise ValueError(f"unknown task {task!r}; there are copies of {', '.join(COPIES)}")
    copy = COPIES[task]
    name = copy.short.get(split, split)
    if name not in copy.parts:
        known = ", ".join((*copy.short, *copy.parts))
        raise ValueError(
            f"{copy.hub} has the splits {known}; got {split!r}. The official files of others are published "
            f"at {copy.official}"
        )
    opened = _source(source, copy)
    output_dir = output_dir.resolve()  # a link's own neighbours may lie on another disk
    note = f"SOURCE-{name}.md"
    files = (*copy.files(name), note)
    _refuse_existing(output_dir, files)

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays within one file system.
    with TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as temporary:
        # One level down: the temporary folder itself is readable to its owner only.
        staging = Path(temporary) / output_dir.name
        staging.mkdir()
        output = Output(staging, output_dir)
        examples = copy.write(opened, output, name, copy.parts[name])
        counts = {copy.examples: examples, **output.counts()}
        published = copy.published.get(name)
        lines = [copy.note] if copy.note else []
        if published is not None and examples != published.examples:
            lines.append(
                f"{examples:,} {copy.examples} of the {published.examples:,} published: figures on them are "
                "not those of papers."
            )
        for line in lines:
            logger.warning("%s, %s: %s", task, name, line)
        text = [f"# {task}, {name}", f"Written from the parquet copy {source}. Official: {copy.official}"]
        listed = "\n".join(f"- {kind}: {count:,}" for kind, count in counts.items())
        (staging / note).write_text("\n\n".join([*text, *lines, listed]) + "\n", encoding="utf-8")
        _publish(staging, output_dir, files)
    return counts


@dataclass(frozen=True)
class Source:
    """A copy to read from.

    Attributes:
        place: Its folder, or its name on the Hub.
        hub: The usual name on the Hub.
        official: Where the official files are published.
    """

    place: str | Path
    hub: str
    official: str

    def rows(
        self, part: Part, needed: Sequence[str], carried: Sequence[str] = (), images: Sequence[str] = ()
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a part as a stream (Arrow reads some row groups ahead), each named for messages.

        Columns are checked at once, not when the first row is asked for.

        Args:
            part: Configuration and split.
            needed: Columns that have to be there.
            carried: Columns that are written too if they are there.
            images: Those of `needed` that hold images; not decoded, as dicts with `bytes`.

        Raises:
            ValueError: If needed columns are missing.
            FileNotFoundError: If the folder lacks the part.
            OSError: If the copy cannot be read.
        """
        from datasets import Image  # seconds to import

        where = f"{self.place}, {' '.join(name for name in part if name)}"
        dataset = self._open(part, where)
        found = dataset.column_names or []
        missing = [name for name in needed if name not in found]
        if missing:
            raise ValueError(
                f"{where}: expected the columns {', '.join(needed)}; {', '.join(missing)} missing, found "
                f"{', '.join(found)}. The copy has changed, or is another one: take the official files from "
                f"{self.official}, or another copy of {self.hub}"
            )
        absent = [name for name in carried if name not in found]
        if absent:
            logger.warning("%s: no columns %s, so the official file goes without", where, ", ".join(absent))
        dataset = dataset.select_columns([*needed, *(name for name in carried if name in found)])
        try:
            for name in images:
                dataset = dataset.cast_column(name, Image(decode=False))
        except Exception as error:  # Arrow's, of many kinds
            raise OSError(
                f"{where}: expected images in {', '.join(images)}, found {dataset.features} ({error})"
            ) from error
        return self._read(dataset, where)

    def _open(self, part: Part, where: str) -> Any:
        if isinstance(self.place, Path):
            return _open_folder(self.place, part, self.hub)
        from datasets import load_dataset

        config, split = part
        try:
            return load_dataset(self.place, config, split=split, streaming=True)
        except Exception as error:  # the Hub's client raises almost anything
            raise OSError(
                f"cannot read {where} from the Hub, and it is no folder here: {error}. {_placing(self.place)}"
            ) from error

    def _read(self, dataset: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = iter(tqdm(dataset, desc=where, unit=" rows", disable=None))
        number = 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # as above, and Arrow on damaged files
                raise OSError(
                    f"cannot read on in {where} after {number:,} rows: {error}. {_placing(self.hub)}"
                ) from error
            if row is None:
                break
            number += 1
            yield f"{where}, row {number}", row
        if not number:
            raise ValueError(f"{where}: expected rows, found none")


@dataclass
class Output:
    """The split being written.

    Attributes:
        staging: Where it is written.
        final: Where it will lie.
    """

    staging: Path
    final: Path
    images: set[str] = field(default_factory=set)
    kept: int = 0
    reencoded: int = 0

    def image(self, name: str, value: Any, where: str) -> None:
        """Write an image under its official name, once.

        The bytes stay as they are but for a `.jpg` that is none: that becomes a JPEG.

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
        """What became of the images; empty where there are none."""
        if not self.images:
            return {}
        return {
            "images": len(self.images),
            "images_kept": self.kept,
            "images_reencoded": self.reencoded,
        }


@dataclass(frozen=True)
class Copy:
    """What is known of the copy of a task.

    Attributes:
        hub: Its usual name on the Hub.
        official: Where the official files are published.
        parts: Split -> the parts of the copy that it is made of.
        files: Split -> the annotation files to write.
        write: Writes a split from its parts and returns the number of examples.
        examples: What they are.
        published: What the authors say of a split.
        short: Other names of splits.
        note: What the copy has not.
    """

    hub: str
    official: str
    parts: Mapping[str, tuple[Part, ...]]
    files: Callable[[str], tuple[str, ...]]
    write: Callable[[Source, Output, str, Sequence[Part]], int]
    examples: str
    published: Mapping[str, Published] = field(default_factory=dict)
    short: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def _vqav2_files(split: str) -> tuple[str, ...]:
    (subtype,) = vqav2.SUBTYPES[split]
    questions = vqav2.question_names(subtype)[0]
    return (questions, vqav2.annotation_names(subtype)[0]) if subtype in vqav2.ANSWERED else (questions,)


def _vqav2(source: Source, output: Output, split: str, parts: Sequence[Part]) -> int:
    (subtype,) = vqav2.SUBTYPES[split]
    folder = vqav2.folder_names(subtype)[0]
    questions_file, *annotations_file = _vqav2_files(split)
    rows = source.rows(
        parts[0],
        ("question_id", "image_id", "question", "image", *(ANSWER_COLUMNS if annotations_file else ())),
        carried=("multiple_choice_answer",) if annotations_file else (),
        images=("image",),
    )
    header = VQA_HEADER | {"data_subtype": subtype}
    count = 0
    with ExitStack() as stack:
        ask = stack.enter_context(
            _json_list(output.staging / questions_file, header | {"task_type": "Open-Ended"}, "questions")
        )
        answers = [
            stack.enter_context(_json_list(output.staging / name, header, "annotations"))
            for name in annotations_file
        ]
        for where, row in rows:
            count += 1
            ids = {name: checked(row, name, int, where) for name in ("question_id", "image_id")}
            ask({**ids, "question": checked(row, "question", str, where)})
            for answer in answers:
                answer({**ids, **_vqa_annotation(row, where)})
            output.image(f"{folder}/COCO_{folder}_{ids['image_id']:012d}.jpg", row["image"], where)
    return count


def _vqa_annotation(row: dict[str, Any], where: str) -> dict[str, Any]:
    answers = _structs(row["answers"], f"{where}, answers")
    for answer in answers:
        checked(answer, "answer", str, f"{where}, answers")
    types = {name: checked(row, name, str, where) for name in ("question_type", "answer_type")}
    usual = row.get("multiple_choice_answer")
    return {**types, "answers": answers} | ({} if usual is None else {"multiple_choice_answer": usual})


def _gqa_files(split: str) -> tuple[str, ...]:
    return (f"{split}_questions.json",)


def _gqa(source: Source, output: Output, split: str, parts: Sequence[Part]) -> int:
    answered = split.split("_")[0] not in GQA_UNANSWERED
    questions = source.rows(
        parts[0],
        ("id", "imageId", "question", "isBalanced", *(GQA_ANSWER_COLUMNS if answered else ())),
        carried=("fullAnswer", "equivalent", "semanticStr") if answered else (),
    )
    for where, row in source.rows(parts[1], ("id", "image"), images=("image",)):
        output.image(f"{gqa.FOLDERS[0]}/{checked(row, 'id', str, where)}.jpg", row["image"], where)
    count = 0
    pictureless: list[str] = []
    with _joined(output.staging / _gqa_files(split)[0], "{", "}") as add:
        for where, row in questions:
            count += 1
            record = _gqa_record(row, where, answered)
            if f"{gqa.FOLDERS[0]}/{record['imageId']}.jpg" not in output.images:
                pictureless.append(record["imageId"])
            add(f"{json.dumps(checked(row, 'id', str, where))}: {json.dumps(record)}")
    if pictureless:
        raise ValueError(
            f"{source.place}: {len(pictureless):,} of {count:,} questions in {parts[0][0]} ask about images "
            f"that are not in {parts[1][0]} (first: {pictureless[:3]}); the copy is not whole. "
            f"{_placing(source.hub)}"
        )
    return count


def _gqa_record(row: dict[str, Any], where: str, answered: bool) -> dict[str, Any]:
    record = {name: checked(row, name, str, where) for name in ("imageId", "question")}
    if not isinstance(row["isBalanced"], bool):
        raise ValueError(f"{where}: expected 'isBalanced' to be bool, found {row['isBalanced']!r:.60}")
    record["isBalanced"] = row["isBalanced"]
    if not answered:
        return record
    carried = {name: row[name] for name in ("fullAnswer", "semanticStr") if row.get(name) is not None}
    if "equivalent" in row:
        carried["equivalent"] = _ids(row["equivalent"], f"{where}, equivalent")
    return {
        **record,
        "answer": checked(row, "answer", str, where),
        "groups": checked(row, "groups", dict, where),
        "types": checked(row, "types", dict, where),
        "entailed": _ids(row["entailed"], f"{where}, entailed"),
        "semantic": _structs(row["semantic"], f"{where}, semantic"),
        **carried,
    }


def _nlvr2_files(split: str) -> tuple[str, ...]:
    return (f"{split}.json",)


def _nlvr2(source: Source, output: Output, split: str, parts: Sequence[Part]) -> int:
    # All opened before any is read, so that one that is not there is missed at once.
    opened = [
        source.rows(
            part,
            ("identifier", "question", "answer", "left_image", "right_image"),
            carried=NLVR2_CARRIED,
            images=("left_image", "right_image"),
        )
        for part in parts
    ]
    count = 0
    with (output.staging / _nlvr2_files(split)[0]).open("w", encoding="utf-8") as file:
        for where, row in chain.from_iterable(opened):
            count += 1
            identifier = checked(row, "identifier", str, where)
            names = identifier.split("-")
            if len(names) != 4 or names[0] != split or "/" in identifier:
                raise ValueError(
                    f"{where}: expected an identifier {split}-set-pair-sentence, found {identifier!r}"
                )
            label = str(row["answer"])
            if label not in nlvr2.VERBALIZER:
                raise ValueError(
                    f"{where} ({identifier}): expected the answer 'True' or 'False', found {label!r:.60}"
                )
            for side, number in (("left_image", 0), ("right_image", 1)):
                output.image(f"{split}/{'-'.join(names[:3])}-img{number}.png", row[side], where)
            record = {
                "identifier": identifier,
                "sentence": checked(row, "question", str, where),
                "label": label,
                **{name: row[name] for name in NLVR2_CARRIED if row.get(name) is not None},
            }
            file.write(json.dumps(record) + "\n")
    return count


def _coco_files(split: str) -> tuple[str, ...]:
    return (coco.KARPATHY_FILE,)


def _coco(source: Source, output: Output, split: str, parts: Sequence[Part]) -> int:
    opened = [
        (
            COCO_SPLITS[part[1]],
            source.rows(part, ("cocoid", "filepath", "filename", "sentences"), carried=("imgid", "sentids")),
        )
        for part in parts
    ]
    count = 0
    with _json_list(output.staging / coco.KARPATHY_FILE, {"dataset": "coco"}, "images") as add:
        for name, rows in opened:
            for where, row in rows:
                add(_coco_record(row, name, where))
                count += 1
    return count


def _coco_record(row: dict[str, Any], split: str, where: str) -> dict[str, Any]:
    captions = [
        sentence.get("raw") if isinstance(sentence, dict) else sentence
        for sentence in checked(row, "sentences", list, where)
    ]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where}: expected captions under 'sentences', found {row['sentences']!r:.60}")
    carried = {name: row[name] for name in ("imgid", "sentids") if row.get(name) is not None}
    sentences = [{"raw": caption} for caption in captions]
    if len(carried.get("sentids", ())) == len(sentences):
        sentences = [
            {**one, "sentid": number} for one, number in zip(sentences, carried["sentids"], strict=True)
        ]
    return {
        **{name: confined(checked(row, name, str, where), where) for name in ("filepath", "filename")},
        "cocoid": checked(row, "cocoid", int, where),
        "split": split,
        "sentences": sentences,
        **carried,
    }


COCO_SPLITS = {"train": "train", "restval": "restval", "validation": "val", "test": "test"}
"""Split of the copy -> its name in the official file."""

COPIES = {
    "vqav2": Copy(
        hub="lmms-lab/VQAv2",
        official=vqav2.SOURCE,
        parts={
            "val": ((None, "validation"),),
            "test-dev": ((None, "testdev"),),
            "test": ((None, "test"),),
        },
        files=_vqav2_files,
        write=_vqav2,
        examples="questions",
        published=vqav2.PUBLISHED,
    ),
    "gqa": Copy(
        hub="lmms-lab/GQA",
        official=gqa.SOURCE,
        parts={
            split: tuple((f"{split}_{kind}", split.split("_")[0]) for kind in ("instructions", "images"))
            for split in gqa.SPLITS
        },
        files=_gqa_files,
        write=_gqa,
        examples="questions",
        published=gqa.PUBLISHED,
        short=gqa.SHORT,
        note="No choices files, so no validity and plausibility; no annotations of objects (`annotations`).",
    ),
    "nlvr2": Copy(
        hub="lmms-lab/NLVR2",
        official=nlvr2.SOURCE,
        parts={
            split: tuple((None, f"{subset}_{there}") for subset in ("balanced", "unbalanced"))
            for split, there in (("dev", "dev"), ("test1", "test_public"), ("test2", "test_unseen"))
        },
        files=_nlvr2_files,
        write=_nlvr2,
        examples="sentences",
        published=nlvr2.PUBLISHED,
        short={"test": "test1"},
        note="The balanced and the unbalanced subset together; sentences about image pairs that occur once "
        "are in neither. No judgements of validators (`validation`, `extra_validations`).",
    ),
    "coco": Copy(
        hub="yerevann/coco-karpathy",
        official=coco.KARPATHY_SOURCE,
        parts={"all": tuple((None, split) for split in COCO_SPLITS)},
        files=_coco_files,
        write=_coco,
        examples="captioned_images",
        note="No images: put train2014 and val2014 beside the file, published at "
        f"{coco.IMAGE_SOURCE}. No tokens of captions (`tokens`), which nothing here reads.",
    ),
}
"""Task -> its copy."""


def _source(source: str | Path, copy: Copy) -> Source:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Source(folder, copy.hub, copy.official)
    if isinstance(source, Path) or not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            f"no such folder: {source}; expected a folder that holds a copy of {copy.hub}, or that name"
        )
    return Source(source, copy.hub, copy.official)


def _placing(hub: str | Path) -> str:
    return (
        f"Download it where there is a network (hf download {hub} --repo-type dataset --local-dir FOLDER) "
        "and give FOLDER as the source"
    )


def _open_folder(folder: Path, part: Part, hub: str) -> Any:
    """A part of a copy in a folder.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If parquet files of it are missing.
        OSError: If it cannot be read.
    """
    from datasets import load_dataset, load_from_disk

    config, split = part
    root = folder / config if config else folder
    files = [
        path
        for path in sorted(root.rglob("*.parquet"))
        if path.stem == split or path.stem.startswith(f"{split}-") or split in path.relative_to(root).parts
    ]
    expected = {int(match[1]) for path in files if (match := SHARD.search(path.stem))}
    if expected and expected != {len(files)}:
        raise ValueError(
            f"{root}: expected {max(expected)} parquet files of the split {split}, found {len(files)}; "
            f"the copy is not whole. {_placing(hub)}"
        )
    try:
        if files:
            return load_dataset(
                "parquet", data_files={split: [str(path) for path in files]}, split=split, streaming=True
            )
        if (root / split / "state.json").is_file():
            return load_from_disk(str(root / split))
        # Saved alone: it has to say itself which split it is.
        if (root / "state.json").is_file() and str((saved := load_from_disk(str(root))).split) == split:
            return saved
    except Exception as error:  # Arrow's errors and those of `datasets` have no common base
        raise OSError(f"cannot read the split {split} in {root}: {error}. {_placing(hub)}") from error
    others = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))
    raise FileNotFoundError(
        f"no split {split} in {root}: expected {split}-*.parquet, a folder {split} of parquet files, or what "
        f"save_to_disk writes; found {', '.join(others[:5]) or 'no parquet files'} in {folder}. "
        f"{_placing(hub)}"
    )


def _refuse_existing(folder: Path, files: Sequence[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"expected {folder} to be a folder, found a file")
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise FileExistsError(
            f"{folder} holds {', '.join(there)} already, and nothing is overwritten; choose another folder, "
            "or remove them to have the split written anew"
        )


def _publish(staging: Path, folder: Path, files: Sequence[str]) -> None:
    """Move a finished split to its place, beside other splits if there are any."""
    if not folder.exists():
        staging.rename(folder)
        return
    _refuse_existing(folder, files)
    # Annotation files last: they make the split one that tasks find.
    images = (path for path in staging.rglob("*") if path.is_file() and path.parent != staging)
    for path in chain(images, (staging / name for name in reversed(files))):
        target = folder / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


@contextmanager
def _joined(path: Path, opening: str, closing: str) -> Iterator[Callable[[str], None]]:
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
def _json_list(path: Path, header: dict[str, Any], key: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A JSON object whose last member is a list, written item by item."""
    with _joined(path, f'{json.dumps(header)[:-1]}, "{key}": [', "]}") as add:
        yield lambda item: add(json.dumps(item))


def _structs(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of structs; older versions of `datasets` give a struct of lists."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        columns = value.values()
        value = [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{where}: expected a list of structs, found {value!r:.60}")
    return value


def _ids(value: Any, where: str) -> list[str]:
    """A list of ids, which the copy of GQA keeps as text."""
    if value is None:
        return []
    ids = NO_PUNCTUATION.findall(value) if isinstance(value, str) else value
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise ValueError(f"{where}: expected a list of ids, or one as text, found {value!r:.60}")
    return ids
