"""Prediction files in the format of each task's official server: writing, reading and checking."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dept_vl._utils.io import check_noted, parse_json

ExampleId = int | str


@dataclass(frozen=True)
class Submission:
    """A submission file, with the number of predictions and of questions left empty."""

    path: Path
    answered: int
    filled: int


@dataclass(frozen=True)
class PredictionFormat:
    """Format of a server's prediction files.

    Attributes:
        id_key: Name of the field with the example's id.
        answer_key: Name of the field with the prediction.
        id_type: Type of the ids.
        kind: `json` for a list of objects, `lines` for lines of `id,answer` without a header, split at the
            commas only: quotes and spaces belong to a cell, and text after a second comma is ignored.
    """

    id_key: str
    answer_key: str
    id_type: Literal["int", "str"]
    kind: Literal["json", "lines"] = "json"

    @property
    def suffix(self) -> str:
        """File extension of the format."""
        return ".json" if self.kind == "json" else ".csv"

    def content(self, predictions: Mapping[ExampleId, str]) -> bytes:
        """Return the content of a prediction file, in the order of the ids."""
        # 9 comes before 10, for ids that are numbers or text.
        ids = sorted(predictions, key=lambda key: (len(str(key)), str(key)))
        if self.kind == "json":
            rows = [{self.id_key: key, self.answer_key: predictions[key]} for key in ids]
            return (json.dumps(rows) + "\n").encode()
        return "".join(f"{key},{predictions[key]}\n" for key in ids).encode()

    def write(self, predictions: Mapping[ExampleId, str], path: Path) -> None:
        """Write a prediction file."""
        path.write_bytes(self.content(predictions))

    def read(self, path: Path, ids: Iterable[ExampleId] | None = None) -> dict[ExampleId, str]:
        """Read a prediction file like a server; with `ids`, it must have one prediction for each of them.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the format is wrong, or ids are repeated, missing or unknown.
        """
        if not path.is_file():
            raise FileNotFoundError(f"expected a file of predictions at {path}, found none")
        check_noted(path)
        predictions: dict[ExampleId, str] = {}
        for place, row in self._rows(path):
            if not isinstance(row, dict) or not {self.id_key, self.answer_key} <= row.keys():
                raise ValueError(f"{path}, {place}: expected {self._form()}, found {row!r:.80}")
            key, answer = self._id(row[self.id_key], path, place), row[self.answer_key]
            if not isinstance(answer, str):
                raise ValueError(
                    f"{path}, {place}: expected {self.answer_key!r} to be text, found {answer!r:.60}"
                )
            if key in predictions:
                raise ValueError(
                    f"{path}, {place}: {self.id_key} {key!r} is there twice; keep one prediction for each"
                )
            predictions[key] = answer
        if ids is not None:
            check_ids(ids, predictions, str(path))
        return predictions

    def _rows(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the entries of a file, or its lines in the same form, with their location."""
        try:
            # Decoded from bytes, to keep line ends inside answers.
            text = path.read_bytes().decode("utf-8-sig")
            content = parse_json(text) if self.kind == "json" else io.StringIO(text, newline=None)
        except ValueError as error:
            raise ValueError(f"{path}: expected {self._form()}, found something else ({error})") from None
        if self.kind == "json":
            if not isinstance(content, list):
                raise ValueError(f"{path}: expected {self._form()}, found {type(content).__name__}")
            yield from ((f"entry {number}", row) for number, row in enumerate(content))
            return
        for number, line in enumerate(map(str.strip, content), start=1):
            key, comma, rest = line.partition(",")
            # Cells are text; 18 digits fit into 64 bits.
            is_number = self.id_type == "int" and re.fullmatch(r"-?[0-9]{1,18}", key)
            row = {self.id_key: int(key) if is_number else key, self.answer_key: rest.split(",")[0]}
            if line:
                yield f"line {number}", row if comma else line

    def _id(self, value: Any, path: Path, place: str) -> ExampleId:
        if self.id_type == "str" and isinstance(value, str):
            return value
        if self.id_type == "int" and isinstance(value, int) and not isinstance(value, bool):
            return value
        # Servers compare by value, so 262148000.0 and "262148000" match no question.
        raise ValueError(
            f"{path}, {place}: expected {self.id_key!r} to be {self.id_type}, found {value!r:.60}"
        )

    def _form(self) -> str:
        if self.kind != "json":
            return f"lines of {self.id_key},{self.answer_key}"
        return f'a list of {{"{self.id_key}": {self.id_type}, "{self.answer_key}": str}}'


def check_ids(expected: Iterable[ExampleId], found: Iterable[ExampleId], where: str) -> None:
    """Raise ValueError unless there is one prediction per example; the message names the others."""
    wanted, given = dict.fromkeys(expected), dict.fromkeys(found)
    missing = [key for key in wanted if key not in given]
    extra = [key for key in given if key not in wanted]
    if missing or extra:
        problems = [
            f"{len(ids):,} {what} (first: {', '.join(map(repr, ids[:3]))})"
            for ids, what in ((missing, "missing"), (extra, "that belong to no example"))
            if ids
        ]
        raise ValueError(
            f"{where}: expected one prediction for each of the {len(wanted):,} examples, found "
            f"{len(given):,}: {' and '.join(problems)}"
        )
