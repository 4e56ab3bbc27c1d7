"""COCO captions (Chen et al. 2015) in the splits of Karpathy & Fei-Fei (2015).

    dataset_coco.json   {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg",
                         "cocoid": 391895, "split": "test", "sentences": [{"raw": "A man ..."} x 5]}]}
    val2014/COCO_val2014_000000391895.jpg

from https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip and https://cocodataset.org.
As usual, the training split joins train and restval.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from dept_vl._utils.images import confined
from dept_vl.tasks.base import Decoding, Example, Task
from dept_vl.tasks.io.files import Published, check_split, find, find_folder
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat
from dept_vl.tasks.io.records import brief, read_list
from dept_vl.tasks.io.records import field as required
from dept_vl.tasks.io.rows import NO_ROWS, Rows, convert
from dept_vl.tasks.metrics.caption import check_scorers, reported, score_captions
from dept_vl.tasks.metrics.text import squad

KARPATHY_FILE = "dataset_coco.json"
KARPATHY_SOURCE = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
IMAGE_SOURCE = "https://cocodataset.org/#download"
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
"""Names in the file, by split."""

SCHEMA = pa.schema(
    {
        "image_id": pa.int64(),
        "folder": pa.string(),
        "file": pa.string(),
        "split": pa.string(),
        "answers": pa.list_(pa.string()),
    }
)


def folder_names(name: str) -> tuple[str, ...]:
    """Return the possible folders of the images of COCO's train2014, val2014 or another."""
    return name, f"images/{name}", f"Images/mscoco/{name}"


_FOLDERS = (folder_names("train2014"), folder_names("val2014"))
PUBLISHED = {
    "train": Published(((KARPATHY_FILE,),), _FOLDERS, KARPATHY_SOURCE, 113_287, 113_287, 566_747),
    "val": Published(((KARPATHY_FILE,),), _FOLDERS[1:], KARPATHY_SOURCE, 5_000, 5_000, 25_010),
    "test": Published(((KARPATHY_FILE,),), _FOLDERS[1:], KARPATHY_SOURCE, 5_000, 5_000, 25_010),
}


@dataclass(frozen=True)
class COCOCaptions(Task):
    """One split of COCO captions. An example is an image with five or more captions, used in turn."""

    rows: Rows = NO_ROWS
    image_folders: Mapping[str, Path] = field(default_factory=dict)
    meteor: bool = True

    name = "coco"
    prefix = "caption:"
    asks = False
    image_columns: ClassVar = (("folder", "file"),)
    primary = "CIDEr"
    marked_by = "word F1 with the closest human caption (no official figure)"
    scales: ClassVar = {"CIDEr": "x100"}
    decoding = Decoding(max_new_tokens=40, num_beams=5)
    id_column = "image_id"
    prediction_format = PredictionFormat("image_id", "caption", "int")
    dev_split = "val"
    test_split = "test"
    published: ClassVar = PUBLISHED
    elsewhere: ClassVar = {"train2014": IMAGE_SOURCE, "val2014": IMAGE_SOURCE}
    example_call = '"image.jpg"'
    pipeline = "image-to-text"

    def read(self, root: Path, split: str) -> "COCOCaptions":
        """Read a split from a folder with `dataset_coco.json` and images. Raises the errors of `load`."""
        check_split(split, SPLITS, "COCO")
        file = find(root, (KARPATHY_FILE,), "Karpathy's splits of COCO", KARPATHY_SOURCE)
        rows = read_rows(file).where("split", SPLITS[split])
        if not len(rows):
            raise ValueError(f"{file}: expected images of the split {split!r}, found none")
        folders = {
            name: find_folder(root, folder_names(name), "*.jpg", IMAGE_SOURCE)
            for (name,) in rows.distinct("folder")
        }
        return replace(self, rows=rows, image_folders=folders)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        return Example(
            example_id=row["image_id"],
            source_text=self.source(""),
            images=(self.image_path(row["folder"], row["file"]),),
            targets=tuple((caption, 1.0) for caption in dict.fromkeys(row["answers"])),
            in_turn=True,
            question=row["answers"][0],
            answers=tuple(row["answers"]),
        )

    def source(self, question: str) -> str:
        """Return the prefix, which is the text for every image; raise ValueError if there is a question."""
        if question.strip():
            raise ValueError(f"a caption answers no question, and {question!r:.60} is one; leave it out")
        return self.prefix

    def draws_per_epoch(self) -> int:
        """Return the number of captions."""
        return int(pc.sum(pc.list_value_length(self.rows.column("answers"))).as_py() or 0)

    def image_path(self, folder: str, file: str) -> Path:
        """Return the file of an image."""
        return self.image_folders[folder] / file

    def mark(self, example: Example, prediction: str) -> float:
        """Return the word F1 with the closest human caption, since CIDEr and others need many images."""
        return squad([prediction], [example.answers])["f1"] / 100

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute CIDEr, BLEU, METEOR and ROUGE-L by `pycocoevalcap`, all times 100.

        CIDEr weighs words by the captions scored, so scores of different subsets do not compare.
        """
        captions = {int(key): caption for key, caption in predictions.items()}
        return reported(score_captions(references_of(self.rows), captions, meteor=self.meteor))

    def without_slow_metrics(self) -> "COCOCaptions":
        """Return the task without METEOR, a Java program that takes seconds."""
        return replace(self, meteor=False)

    def check_requirements(self) -> None:
        """Check that `pycocoevalcap` and Java are installed and METEOR runs."""
        check_scorers(meteor=self.meteor)

    def written(self, answer: str) -> str:
        """Return a decoded caption on one line."""
        return " ".join(answer.split())


def read_rows(path: Path) -> Rows:
    """Read all images of `dataset_coco.json`, with the columns of `SCHEMA`."""
    sources = [find(path.parent, (path.name,), "COCO", KARPATHY_SOURCE)]
    return convert("coco", sources, SCHEMA, _records(path), unique="image_id")


def read_references(path: Path, split: str = "") -> dict[int, list[str]]:
    """Read human captions by image id, from COCO's own annotations or a split of `dataset_coco.json`."""
    if split:
        check_split(split, SPLITS, "COCO")
        return references_of(read_rows(path).where("split", SPLITS[split]))
    if path.name == KARPATHY_FILE:
        raise ValueError(f"{path} holds the splits {', '.join(SPLITS)}; say which with --split")
    captions: dict[int, list[str]] = {}
    for number, row in enumerate(read_list(path, "annotations", IMAGE_SOURCE)):
        where = f"{path}, annotations[{number}]"
        image_id = required(row, "image_id", int, where)
        captions.setdefault(image_id, []).append(required(row, "caption", str, where))
    return captions


def karpathy_split(path: Path, split: str) -> list[int]:
    """Return the COCO image ids of one of Karpathy's splits: train (with restval), val or test."""
    ids: list[int] = read_rows(path).where("split", SPLITS[split]).column("image_id").to_pylist()
    return ids


def references_of(rows: Rows) -> dict[int, list[str]]:
    """Return human captions by image id."""
    return dict(zip(rows.column("image_id").to_pylist(), rows.column("answers").to_pylist(), strict=True))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(read_list(path, "images", KARPATHY_SOURCE)):
        where = f"{path}, images[{number}] (cocoid {brief(row.get('cocoid'))})"
        sentences = required(row, "sentences", list, where)
        captions = []
        for sentence in sentences:
            if not isinstance(sentence, dict):
                raise ValueError(f"{where}: expected each sentence to be an object, found {brief(sentence)}")
            captions.append(" ".join(required(sentence, "raw", str, where).split()))
        captions = [caption for caption in captions if caption]
        if not captions:
            raise ValueError(f"{where}: expected captions under 'sentences', found none")
        yield {
            "image_id": required(row, "cocoid", int, where),
            "folder": confined(required(row, "filepath", str, where), f"{where}, filepath"),
            "file": confined(required(row, "filename", str, where), f"{where}, filename"),
            "split": required(row, "split", str, where),
            "answers": captions,
        }


TASK = COCOCaptions()
