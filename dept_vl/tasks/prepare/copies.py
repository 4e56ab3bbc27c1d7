"""Parquet copies of the data sets, and conversion of each to the task's official files.

Each task then needs only one reader, and official scorers can read the files.

lmms-lab/VQAv2           val, test-dev, test; no train
lmms-lab/GQA             every official split, images and questions in separate tables, joined by imageId
lmms-lab/NLVR2           dev, test1, test2 as two subsets with five sixths of the examples; no train
yerevann/coco-karpathy   Karpathy's splits and captions; no images
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from dept_vl._utils.errors import UnknownNameError
from dept_vl._utils.images import confined
from dept_vl._utils.printable import markdown_text, say
from dept_vl.tasks import TASKS, coco, gqa, nlvr2, vqav2
from dept_vl.tasks.io.records import brief
from dept_vl.tasks.io.records import field as required
from dept_vl.tasks.prepare.parquet import Part, Source, open_source, placing
from dept_vl.tasks.prepare.staging import Output, joined, json_list, publish, refuse_existing, staging_for

Row = dict[str, Any]


@dataclass(frozen=True)
class Copy:
    """A parquet copy of a task's data."""

    hub: str  # usual name on the Hub
    official: str  # where the official files are published
    parts: Mapping[str, tuple[Part, ...]]  # parts of the copy that make up each split
    files: Callable[[str], tuple[str, ...]]  # returns the annotation files of a split
    write: Callable[[Source, Output, str, Sequence[Part]], None]  # writes a split from its parts
    examples: str  # name of the examples, for messages
    short: Mapping[str, str] = field(default_factory=dict)  # official name of a split, by its other names
    note: str = ""  # what the copy lacks


def _carried(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names if row.get(name) is not None}


def _structs(value: Any, where: str) -> list[Row]:
    """Return a list of structs, also from the struct of lists of older versions of `datasets`."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        columns = value.values()
        value = [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{where}: expected a list of structs, found {value!r:.60}")
    return value


VQAV2_ANSWERS = ("question_type", "answer_type", "answers")
VQAV2_HEADER = {
    "info": {"description": "VQA v2.0, written from a parquet copy", "url": vqav2.SOURCE, "version": "2.0"},
    "license": {
        "url": "http://creativecommons.org/licenses/by/4.0/",
        "name": "Creative Commons Attribution 4.0 International License",
    },
    "data_type": "mscoco",
}


def _vqav2_files(split: str) -> tuple[str, ...]:
    (subtype,) = vqav2.SUBTYPES[split]
    questions = vqav2.question_names(subtype)[0]
    return (questions, vqav2.annotation_names(subtype)[0]) if subtype in vqav2.ANSWERED else (questions,)


def _write_vqav2(source: Source, output: Output, split: str, parts: Sequence[Part]) -> None:
    (subtype,) = vqav2.SUBTYPES[split]
    questions_file, *annotations_file = _vqav2_files(split)
    rows = source.rows(
        parts[0],
        ("question_id", "image_id", "question", "image", *(VQAV2_ANSWERS if annotations_file else ())),
        carried=("multiple_choice_answer",) if annotations_file else (),
        images=("image",),
    )
    header = VQAV2_HEADER | {"data_subtype": subtype}
    asked = json_list(output.staging / questions_file, header | {"task_type": "Open-Ended"}, "questions")
    answered = (json_list(output.staging / name, header, "annotations") for name in annotations_file)
    with asked as ask, next(answered, nullcontext()) as answer:
        for where, row in rows:
            output.examples += 1
            ids = {name: required(row, name, int, where) for name in ("question_id", "image_id")}
            ask({**ids, "question": required(row, "question", str, where)})
            if answer is not None:
                answer({**ids, **_vqav2_annotation(row, where)})
            image = f"{vqav2.image_prefix(subtype)}{ids['image_id']:012d}.jpg"
            output.image(f"{vqav2.folder_names(subtype)[0]}/{image}", row["image"], where)


def _vqav2_annotation(row: Row, where: str) -> Row:
    answers = _structs(row["answers"], f"{where}, answers")
    for answer in answers:
        required(answer, "answer", str, f"{where}, answers")
    types = {name: required(row, name, str, where) for name in ("question_type", "answer_type")}
    return {**types, "answers": answers, **_carried(row, "multiple_choice_answer")}


GQA_ANSWERS = ("answer", "groups", "entailed", "types", "semantic")
GQA_UNANSWERED = ("test", "challenge", "submission")
NO_PUNCTUATION = re.compile(r"[^\s,'\"\[\]]+")


def _write_gqa(source: Source, output: Output, split: str, parts: Sequence[Part]) -> None:
    answered = split.split("_")[0] not in GQA_UNANSWERED
    folder = gqa.FOLDERS[0]
    questions = source.rows(
        parts[0],
        ("id", "imageId", "question", "isBalanced", *(GQA_ANSWERS if answered else ())),
        carried=("fullAnswer", "equivalent", "semanticStr") if answered else (),
    )
    for where, row in source.rows(parts[1], ("id", "image"), images=("image",)):
        output.image(f"{folder}/{required(row, 'id', str, where)}.jpg", row["image"], where)
    pictureless: list[str] = []
    with joined(output.staging / f"{split}_questions.json", "{", "}") as add:
        for where, row in questions:
            output.examples += 1
            record = _gqa_record(row, where, answered)
            if f"{folder}/{record['imageId']}.jpg" not in output.images:
                pictureless.append(record["imageId"])
            add(f"{json.dumps(required(row, 'id', str, where))}: {json.dumps(record)}")
    if pictureless:
        raise ValueError(
            f"{source.place}: {len(pictureless):,} of {output.examples:,} questions in {parts[0][0]} ask "
            f"about images that are not in {parts[1][0]} (first: {pictureless[:3]}); the copy is incomplete. "
            f"{placing(source.hub)}"
        )


def _gqa_record(row: Row, where: str, answered: bool) -> Row:
    record = {name: required(row, name, str, where) for name in ("imageId", "question")}
    if not isinstance(row["isBalanced"], bool):
        raise ValueError(f"{where}: expected 'isBalanced' to be bool, found {brief(row['isBalanced'])}")
    record["isBalanced"] = row["isBalanced"]
    if not answered:
        return record
    equivalent = {"equivalent": _ids(row, "equivalent", where)} if "equivalent" in row else {}
    return {
        **record,
        "answer": required(row, "answer", str, where),
        "groups": required(row, "groups", dict, where),
        "types": required(row, "types", dict, where),
        "entailed": _ids(row, "entailed", where),
        "semantic": _structs(row["semantic"], f"{where}, semantic"),
        **_carried(row, "fullAnswer", "semanticStr"),
        **equivalent,
    }


def _ids(row: Row, name: str, where: str) -> list[str]:
    """Return a list of ids, also from the text form in the copy of GQA."""
    value = row[name]
    if value is None:
        return []
    ids = NO_PUNCTUATION.findall(value) if isinstance(value, str) else value
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise ValueError(f"{where}, {name}: expected a list of ids, or one as text, found {brief(value)}")
    return ids


NLVR2_CARRIED = ("left_url", "right_url", "writer", "synset", "query")


def _write_nlvr2(source: Source, output: Output, split: str, parts: Sequence[Part]) -> None:
    columns = ("identifier", "question", "answer", "left_image", "right_image")
    # All are opened before any is read, so that a missing one is reported at once.
    opened = [source.rows(part, columns, NLVR2_CARRIED, images=columns[3:]) for part in parts]
    with (output.staging / f"{split}.json").open("w", encoding="utf-8") as file:
        for where, row in chain.from_iterable(opened):
            output.examples += 1
            identifier = required(row, "identifier", str, where)
            names = identifier.split("-")
            if len(names) != 4 or names[0] != split or "/" in identifier:
                raise ValueError(
                    f"{where}: expected an identifier {split}-set-pair-sentence, found {identifier!r}"
                )
            label = str(row["answer"])
            if label not in nlvr2.VERBALIZER:
                raise ValueError(
                    f"{where} ({identifier}): expected the answer 'True' or 'False', found {brief(label)}"
                )
            for number, side in enumerate(columns[3:]):
                output.image(f"{split}/{'-'.join(names[:3])}-img{number}.png", row[side], where)
            sentence = required(row, "question", str, where)
            record = {"identifier": identifier, "sentence": sentence, "label": label}
            file.write(json.dumps(record | _carried(row, *NLVR2_CARRIED)) + "\n")


COCO_SPLITS = {"train": "train", "restval": "restval", "validation": "val", "test": "test"}
"""Official name of each split of the copy."""


def _write_coco(source: Source, output: Output, split: str, parts: Sequence[Part]) -> None:
    columns = ("cocoid", "filepath", "filename", "sentences")
    opened = [(COCO_SPLITS[part[1]], source.rows(part, columns, ("imgid", "sentids"))) for part in parts]
    with json_list(output.staging / coco.KARPATHY_FILE, {"dataset": "coco"}, "images") as add:
        for name, rows in opened:
            for where, row in rows:
                add(_coco_record(row, name, where))
                output.examples += 1


def _coco_record(row: Row, split: str, where: str) -> Row:
    captions = [
        sentence.get("raw") if isinstance(sentence, dict) else sentence
        for sentence in required(row, "sentences", list, where)
    ]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where}: expected captions under 'sentences', found {brief(row['sentences'])}")
    carried = _carried(row, "imgid", "sentids")
    sentences = [{"raw": caption} for caption in captions]
    if len(carried.get("sentids", ())) == len(sentences):
        pairs = zip(sentences, carried["sentids"], strict=True)
        sentences = [{**one, "sentid": number} for one, number in pairs]
    return {
        **{name: confined(required(row, name, str, where), where) for name in ("filepath", "filename")},
        "cocoid": required(row, "cocoid", int, where),
        "split": split,
        "sentences": sentences,
        **carried,
    }


COPIES = {
    "vqav2": Copy(
        hub="lmms-lab/VQAv2",
        official=vqav2.SOURCE,
        parts={"val": ((None, "validation"),), "test-dev": ((None, "testdev"),), "test": ((None, "test"),)},
        files=_vqav2_files,
        write=_write_vqav2,
        examples="questions",
    ),
    "gqa": Copy(
        hub="lmms-lab/GQA",
        official=gqa.SOURCE,
        parts={
            split: tuple((f"{split}_{kind}", split.split("_")[0]) for kind in ("instructions", "images"))
            for split in gqa.SPLITS
        },
        files=lambda split: (f"{split}_questions.json",),
        write=_write_gqa,
        examples="questions",
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
        files=lambda split: (f"{split}.json",),
        write=_write_nlvr2,
        examples="sentences",
        short={"test": "test1"},
        note="The balanced and the unbalanced subset together; sentences about image pairs that occur once "
        "are in neither. No judgements of validators (`validation`, `extra_validations`).",
    ),
    "coco": Copy(
        hub="yerevann/coco-karpathy",
        official=coco.KARPATHY_SOURCE,
        parts={"all": tuple((None, split) for split in COCO_SPLITS)},
        files=lambda split: (coco.KARPATHY_FILE,),
        write=_write_coco,
        examples="captioned_images",
        note="No images: put train2014 and val2014 beside the file, published at "
        f"{coco.IMAGE_SOURCE}. No tokens of captions (`tokens`), which nothing here reads.",
    ),
}
"""Copies by task."""


def fetch(task: str, source: str | Path, output_dir: Path, *, split: str) -> dict[str, int]:
    """Write one split of a copy as official files and images, atomically.

    A folder with other splits gains this one; FileExistsError if it has this split already. Images that it
    already has under their official names are kept. An empty `source` is the usual copy on the Hub.

    Returns:
        Number of examples, and for tasks with images the number of `images` of the split, of `images_kept`
        from before, and of `images_reencoded` as JPEG because of their official names.
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
    opened = open_source(source or copy.hub, copy.hub, copy.official)
    output_dir = output_dir.resolve()  # the neighbours of a symbolic link may be on another disk
    note = f"SOURCE-{name}.md"
    files = (*copy.files(name), note)
    refuse_existing(output_dir, files)

    with staging_for(output_dir) as staging:
        output = Output(staging, output_dir)
        copy.write(opened, output, name, copy.parts[name])
        examples = output.examples
        counts = {copy.examples: examples, **output.counts()}
        published = TASKS[task].published.get(name)
        lines = [copy.note] if copy.note else []
        if published is not None and examples != published.examples:
            lines.append(
                f"{examples:,} {copy.examples} of the {published.examples:,} published: figures on them are "
                "not those of papers."
            )
        for line in lines:
            say(f"{task}, {name}: {line}", error=True)
        text = [
            f"# {task}, {name}",
            f"Written from the parquet copy {markdown_text(opened.place)}. Official: {copy.official}",
        ]
        listed = "\n".join(f"- {kind}: {count:,}" for kind, count in counts.items())
        (staging / note).write_text("\n\n".join([*text, *lines, listed]) + "\n", encoding="utf-8")
        publish(staging, output_dir, files)
    return counts
