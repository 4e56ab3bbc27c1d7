"""Parquet copies of the data sets, as on the Hub, written as the official files that the tasks read.

So each task has one reader, and official scorers work on what was fetched. What the copies hold:

    lmms-lab/VQAv2           val, test-dev, test; no train
    lmms-lab/GQA             every official split, images and questions apart, joined by imageId
    lmms-lab/NLVR2           dev, test1, test2 as two subsets, five sixths of each; no train
    yerevann/coco-karpathy   Karpathy's splits and captions; no images
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dept_vl._utils.errors import UnknownNameError
from dept_vl._utils.images import confined
from dept_vl.tasks import coco, gqa, nlvr2, vqav2
from dept_vl.tasks.io.published import Published
from dept_vl.tasks.io.records import field as checked
from dept_vl.tasks.prepare.parquet import Part, Source, open_source, placing
from dept_vl.tasks.prepare.staging import Output, joined, json_list, publish, refuse_existing

logger = logging.getLogger(__name__)

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
        raise UnknownNameError("task", task, COPIES)
    copy = COPIES[task]
    name = copy.short.get(split, split)
    if name not in copy.parts:
        known = ", ".join((*copy.short, *copy.parts))
        raise ValueError(
            f"{copy.hub} has the splits {known}; got {split!r}. The official files of others are published "
            f"at {copy.official}"
        )
    opened = open_source(source, copy.hub, copy.official)
    output_dir = output_dir.resolve()  # a link's own neighbours may lie on another disk
    note = f"SOURCE-{name}.md"
    files = (*copy.files(name), note)
    refuse_existing(output_dir, files)

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
        publish(staging, output_dir, files)
    return counts


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
            json_list(output.staging / questions_file, header | {"task_type": "Open-Ended"}, "questions")
        )
        answers = [
            stack.enter_context(json_list(output.staging / name, header, "annotations"))
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
    with joined(output.staging / _gqa_files(split)[0], "{", "}") as add:
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
            f"{placing(source.hub)}"
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
    with json_list(output.staging / coco.KARPATHY_FILE, {"dataset": "coco"}, "images") as add:
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
