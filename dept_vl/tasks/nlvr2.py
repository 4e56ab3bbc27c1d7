"""NLVR2 (Suhr et al. 2019): decide whether a sentence is true of two photographs.

    dev.json   {"sentence": "The left image ...", "label": "True", "identifier": "dev-850-0-0", ...} a line
    dev/dev-850-0-img0.png, dev/dev-850-0-img1.png            (train/<directory>/train-... in training)

from https://github.com/lil-lab/nlvr (annotations); the images are sent on request to NLVR2's authors. About
one in twenty of the images' URLs is dead, so images downloaded from them are incomplete.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from dept_vl._utils.images import confined
from dept_vl.tasks.base import Decoding, Example, QuestionCase, Task
from dept_vl.tasks.io.files import Published, check_split, find, find_folder
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat
from dept_vl.tasks.io.records import brief, field, read_lines, same_as_first
from dept_vl.tasks.io.rows import NO_ROWS, Rows, convert
from dept_vl.tasks.metrics.nlvr2 import score_nlvr2

SOURCE = "https://github.com/lil-lab/nlvr/tree/master/nlvr2"
SPLITS = {"train": "train", "dev": "dev", "test": "test1", "test1": "test1", "test2": "test2"}
"""Name in the files, by split. test1 is the public test set, called test-P in papers."""

VERBALIZER = {"True": "true", "False": "false"}
"""Target word by label."""

SCHEMA = pa.schema(
    {
        "identifier": pa.string(),
        "sentence": pa.string(),
        "left": pa.string(),
        "right": pa.string(),
        "answers": pa.list_(pa.string()),
    }
)


def _names(split: str) -> tuple[str, ...]:
    return f"{split}.json", f"data/{split}.json"


def _folders(split: str) -> tuple[str, ...]:
    return split, f"images/{split}"


PUBLISHED = {
    "train": Published((_names("train"),), (_folders("train"),), SOURCE, 86_373, None, 86_373),
    "dev": Published((_names("dev"),), (_folders("dev"),), SOURCE, 6_982, None, 6_982),
    "test1": Published((_names("test1"),), (_folders("test1"),), SOURCE, 6_967, None, 6_967),
}


@dataclass(frozen=True)
class NLVR2(Task):
    """One split of NLVR2. A prediction is one of two words, chosen by the first token in which they differ.

    `flat` is whether training images are in one folder instead of the numbered ones.
    """

    rows: Rows = NO_ROWS
    image_folder: Path = Path()
    flat: bool = False
    question_case: QuestionCase = "lower"

    name = "nlvr2"
    prefix = "nlvr: "
    image_count = 2
    image_columns: ClassVar = (("left",), ("right",))
    max_source_length = 72  # the longest published statement has 71 of T5's tokens
    decoding = Decoding(max_new_tokens=5, candidates=tuple(VERBALIZER.values()))
    id_column = "identifier"
    prediction_format = PredictionFormat("identifier", "prediction", "str", "lines")
    dev_split = "dev"
    test_split = "test1"
    published: ClassVar = PUBLISHED
    example_call = '("left.jpg", "right.jpg"), "both images show a dog"'

    def read(self, root: Path, split: str) -> "NLVR2":
        """Read a split from a folder with the official files. Raises the errors of `load`."""
        check_split(split, SPLITS, "NLVR2")
        name = SPLITS[split]
        rows = read_rows(find(root, _names(name), "NLVR2", SOURCE))
        folder = find_folder(root, _folders(name), f"{name}-*-img0.png", SOURCE)
        flat = any(folder.glob(f"{name}-*-img0.png"))
        return replace(self, rows=rows, image_folder=folder, flat=flat)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        answers = [VERBALIZER[label] for label in row["answers"]]
        return Example(
            example_id=row["identifier"],
            source_text=self.source(row["sentence"]),
            images=(self.image_path(row["left"]), self.image_path(row["right"])),
            targets=tuple((answer, 1.0) for answer in answers),
            question=row["sentence"],
            answer=answers[0] if answers else "",
            answers=tuple(answers),
            kinds=tuple(("label", answer) for answer in answers),
        )

    def image_path(self, name: str) -> Path:
        """Return the file of an image."""
        return self.image_folder / (name.rpartition("/")[2] if self.flat else name)

    def mark(self, example: Example, prediction: str) -> float:
        """Return 1 for the correct word, else 0."""
        return float(prediction.lower() == example.answer)

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute accuracy and consistency in percent."""
        labels = [answers[0] for answers in self.rows.column("answers").to_pylist()]
        ids = map(str, self.example_ids())
        score = score_nlvr2(zip(ids, labels, strict=True), {str(k): v for k, v in predictions.items()})
        return {name: 100 * score[name] for name in ("accuracy", "consistency")}

    def written(self, answer: str) -> str:
        """Return the prediction in the form that the official script reads."""
        return answer.strip().lower()


def read_rows(path: Path) -> Rows:
    """Read a file of sentences, with the columns of `SCHEMA`."""
    sources = [find(path.parent, (path.name,), "NLVR2", SOURCE)]
    return convert(f"nlvr2-{path.stem}", sources, SCHEMA, _records(path), unique="identifier")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    labelled: bool | None = None
    for number, row in enumerate(read_lines(path, SOURCE), start=1):
        where = f"{path}, record {number}"
        identifier = confined(field(row, "identifier", str, where), f"{where}, identifier")
        parts = identifier.split("-")
        if len(parts) != 4 or "/" in identifier:
            raise ValueError(
                f"{where}: expected an identifier split-set-pair-sentence, found {brief(identifier)}"
            )
        shown = repr(identifier)[1:61].rstrip("'")  # escaped, since it may contain a lone surrogate
        label = row.get("label")
        # A tuple, so that lists and objects, which are not hashable, are rejected too.
        if label not in (None, *VERBALIZER):
            raise ValueError(f"{where} ({shown}): expected the label 'True' or 'False', found {brief(label)}")
        labelled = same_as_first(label is not None, labelled, "a label", f"{where} ({shown})")
        # Training images are stored in a hundred numbered folders, the others in one.
        directory = row.get("directory")
        folder = "" if directory is None else confined(f"{directory}", f"{where} ({shown}), directory") + "/"
        pair = "-".join(parts[:3])
        yield {
            "identifier": identifier,
            "sentence": field(row, "sentence", str, where),
            "left": f"{folder}{pair}-img0.png",
            "right": f"{folder}{pair}-img1.png",
            "answers": [] if label is None else [label],
        }


TASK = NLVR2()
