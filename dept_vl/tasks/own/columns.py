"""Conversion of records into rows. Columns are found by their usual names, or by the names given."""

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dept_vl._utils.embedded import is_data_url
from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import RepeatedKeyError, parse_json
from dept_vl._utils.printable import DROPPED, one_line, plain
from dept_vl.tasks.base import most_usual
from dept_vl.tasks.io.records import brief
from dept_vl.tasks.own.choices import (
    INDEX_COLUMN,
    Meaning,
    Numbered,
    at_index,
    check_chosen,
    is_empty,
    meaning_of,
    whole,
)
from dept_vl.tasks.own.conversations import pairs_of, turns_of
from dept_vl.tasks.own.inline import EMBEDDED, Embedded
from dept_vl.tasks.own.readers import Record

NAMES: dict[str, tuple[str, ...]] = {
    "image": (
        *("images", "image", "image_path", "file_path", "file_name", "filename", "img", "img_path"),
        *("image_file", "image_name", "imageId", "image_id"),
    ),
    "question": ("question", "prompt", "query", "instruction", "sentence", "text"),
    "answer": ("direct_answers", "answers", "answer", "label", "completion", "captions", "caption"),
    "choices": ("choices", "options", "multiple_choices"),
    "id": ("id", "question_id", "questionId", "sample_id", "identifier", "uid"),
    "split": ("split", "set_name"),
    "type": ("answer_type", "question_type"),
}
"""Usual column names by role; the first one present is used."""
CAPTIONS = ("captions", "caption", "text")
ODD = (":", "//", "/.")
"""Substrings that plain relative paths do not contain; paths with one of them are checked in full."""
QUOTED = re.compile(r"\[\s*['\"]")
"""Start of a list of texts."""
PARTS = ("answer", "text", "raw", "caption", "value")
"""Keys that can hold the text of an answer given as an object."""


def read_mapping(columns: Sequence[str]) -> dict[str, str]:
    """Parse `ROLE=COLUMN` pairs such as `image=photo`; raise UsageError for another form or role."""
    mapping = {}
    for given in columns:
        role, equals, name = given.partition("=")
        if role not in NAMES or not equals or not name:
            raise UsageError(
                f"--columns {given!r:.80}: expected ROLE=COLUMN, and ROLE one of {', '.join(NAMES)}"
            )
        mapping[role] = name
    return mapping


class Columns:
    """Converter from records to rows.

    Args:
        mapping: Column name by role, for columns without a usual name.
        all_turns: Whether every question of a conversation becomes an example.
        images_alone: Whether to accept records with neither question nor answer, for captioning or labelling.
        records: Function that reads all records with their locations, in case one alone can be misunderstood.
    """

    def __init__(
        self,
        mapping: Mapping[str, str],
        records: Callable[[], Iterable[tuple[str, Record]]],
        *,
        all_turns: bool = False,
        images_alone: bool = False,
    ) -> None:
        self.mapping, self.all_turns, self.images_alone = mapping, all_turns, images_alone
        self.records = records
        self._numbers: Meaning | None = None
        self._known: dict[tuple[str, ...], dict[str, str]] = {}
        self._cleaned = False

    def rows(self, record: Record, where: str, *, text_cells: bool) -> Iterator[dict[str, Any]]:
        """Make the rows of a record: one row, or one per question of a conversation.

        With `text_cells`, all cells are text, and lists in them JSON.
        """
        self._cleaned = False
        turns = turns_of(record)
        found = self._find(record, where)
        base = self._base(record, found, where)
        if turns is None:
            self._check_images(base["images"], record, where)
            yield base | self._one(record, found, where, text_cells) | {"cleaned": self._cleaned}
            return
        pairs = pairs_of(turns, where)
        for number, (question, answer, inside) in enumerate(pairs if self.all_turns else pairs[:1]):
            numbered = f"{base['id']}-{number + 1}" if base["id"] and len(pairs) > 1 else base["id"]
            images = base["images"]
            # Beside a column of images, placeholders in turns say which of them belong to a question.
            if len(pairs[-1][2]) == len(images):
                images = images[: len(inside)] or images
            if not images:  # all of the conversation, for a question that comes before all of them
                named = [one for one in inside if one is not None]
                named = named or [one for one in pairs[-1][2] if one is not None]
                images = [self._image(one, where) for one in named]
            self._check_images(images, record, where)
            answers = [one_line(self._shown(answer))] if answer and answer.strip() else []
            yield base | {
                "id": numbered if self.all_turns else base["id"],
                "images": images,
                "form": "question",
                "question": plain(self._shown(question)),
                "answers": answers,
                "cleaned": self._cleaned,
            }

    def _find(self, record: Record, where: str) -> dict[str, str]:
        """Return the column of each role, cached by the record's column names."""
        key = tuple(record)
        found = self._known.get(key)
        if found is None:
            # As they look, and in any case where the exact name is none.
            alike = {one_line(name).casefold(): name for name in reversed(key)}
            known = {name: alike.get(name.casefold()) for names in NAMES.values() for name in names}
            known |= {name: name for name in key}
            found = {
                role: column
                for role, names in NAMES.items()
                for name in reversed(names)
                if (column := known[name])
            }
            for role, name in self.mapping.items():
                if name in record:
                    found[role] = name
                elif role in ("image", "question"):
                    raise UsageError(
                        f"{where}: --columns {role}={name}: found no such column; there are {', '.join(key)}"
                    )
                else:
                    found.pop(role, None)
            if found.get("question") == "text" and "answer" not in found and "question" not in self.mapping:
                found["answer"] = found.pop("question")  # usual in folders of images with captions
            self._known[key] = found
        if found.get("question") == "prompt" and isinstance(record["prompt"], list):  # of a conversation
            return {role: column for role, column in found.items() if role != "question"}
        return found

    def check_mapping(self, data: str) -> None:
        """Raise a UsageError if no record so far has a column of the mapping."""
        known = dict.fromkeys(name for names in self._known for name in names)
        for role, name in self.mapping.items():
            if self._known and name not in known:
                raise UsageError(
                    f"{data}: --columns {role}={name}: found no such column; there are {', '.join(known)}"
                )

    def _base(self, record: Record, found: Mapping[str, str], where: str) -> dict[str, Any]:
        split, kind = (_cell(record, found, role, where) for role in ("split", "type"))
        return {
            "id": identity(_cell(record, found, "id", where), f"{where}, column {found.get('id')!r}"),
            "images": self._images(record, found, where),
            "column": found.get("image", "images"),
            "split": one_line(identity(split, f"{where}, column {found.get('split')!r}")),
            "type": one_line(kind) if isinstance(kind, str) else "",
            "choices": [],
            "number_as": "",
        }

    def _images(self, record: Record, found: Mapping[str, str], where: str) -> list[str]:
        if "image" not in found:
            pair = record.get("identifier")
            if isinstance(pair, str) and "sentence" in record:  # NLVR2, with all its images in one folder
                return [f"{pair.rpartition('-')[0]}-img{side}.png" for side in (0, 1)]
            return []
        value = record[found["image"]]
        given = value if isinstance(value, list) else [] if value in (None, "") else [value]
        return [self._image(one, f"{where}, column {found['image']!r}") for one in given]

    def _check_images(self, images: Sequence[str], record: Record, where: str) -> None:
        if not images:
            known = [f", column {name!r}" for name in NAMES["image"] if name in record]
            raise UsageError(
                f"{where}{''.join(known[:1])}: expected an image, found none; the columns are "
                f"{', '.join(map(str, record)) or 'none'}. Understood are {', '.join(NAMES['image'])}; "
                "--columns image=NAME takes another"
            )

    def _image(self, value: Any, where: str) -> str:
        """Return the reference to an image: a path, an `Embedded` reference, or a data URL."""
        if isinstance(value, dict):
            value = value.get("path") or value.get("url") or value.get("image") or value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value:
            raise UsageError(f"{where}: expected the path of an image, found {brief(value)}")
        if isinstance(value, Embedded) or is_data_url(value):
            return value
        if "://" in value:
            raise UsageError(
                f"{where}: {value!r:.80} is an address; put the image into a folder and name its path"
            )
        if "\0" in value:
            raise UsageError(f"{where}: expected the path of an image, found {value!r:.60}")
        return value.replace("\\", "/")

    def _one(self, record: Record, found: Mapping[str, str], where: str, text_cells: bool) -> dict[str, Any]:
        """Return the question, answers and choices of a record that is not a conversation."""
        question = _cell(record, found, "question", where)
        if question is not None and not isinstance(question, str):
            raise UsageError(f"{where}, column {found['question']!r}: expected text, found {brief(question)}")
        column = found.get("answer", "")
        given = _cell(record, found, "answer", where)
        answers = self._answers(given, f"{where}, column {column!r}", text_cells=text_cells)
        choices, number_as = self._choices(record, found, where, text_cells), ""
        if any(choices):
            answers, choices, number_as = self._chosen(record, found, answers, choices, where)
        choices = [choice for choice in choices if choice]
        if "question" in found:
            form = "question"
        elif column in CAPTIONS:
            form = "caption"
        elif column:
            form = "label"
        elif self.images_alone:
            form = "image"
        else:
            raise UsageError(
                f"{where}: expected a question, a caption or a label, found the columns {', '.join(record)}. "
                f"Understood are {', '.join((*NAMES['question'], *NAMES['answer']))}; --columns "
                "question=NAME answer=NAME takes others"
            )
        return {
            "form": form,
            "question": plain(self._shown(question or "")),
            "answers": answers,
            "choices": choices,
            "number_as": number_as,
        }

    def _choices(self, record: Record, found: Mapping[str, str], where: str, text_cells: bool) -> list[str]:
        """Return the choices of a record; empty ones are kept as empty text, because numbers count them."""
        given, at = _cell(record, found, "choices", where), f"{where}, column {found.get('choices')!r}"
        choices = self._answers(given, at, text_cells=text_cells, empty=True)
        if text_cells and len(choices) == 1:
            return [one.strip() for one in choices[0].split("|")]
        return choices

    def _chosen(
        self, record: Record, found: Mapping[str, str], answers: list[str], choices: list[str], where: str
    ) -> tuple[list[str], list[str], str]:
        """Return the correct choice, all choices, and the meaning of a number that could have two."""
        column = found.get("answer", "")
        given = record.get(INDEX_COLUMN)
        if not is_empty(given):
            return [at_index(given, choices, f"{where}, column {INDEX_COLUMN!r}")], choices, ""
        if column == "answer" and "multiple_choices" in record and answers and answers[0] not in choices:
            return answers, sorted([*choices, answers[0]]), ""  # Visual7W lists the wrong ones
        number = self._number(record, found, choices, f"{where}, column {column!r}")
        if number is not None:
            self._numbers = self._numbers or meaning_of(self._all_numbers())
            answer, number_as = self._numbers.answer(number)
            return [answer], choices, number_as
        answers = [most_usual(answers)] if answers else []  # of several people
        check_chosen(answers, choices, f"{where}, column {column!r}")
        return answers, choices, ""

    def _number(
        self, record: Record, found: Mapping[str, str], choices: list[str], where: str
    ) -> Numbered | None:
        """Return the answer of a record with choices if it is a number."""
        number, given = whole(_cell(record, found, "answer", where)), record[found["choices"]]
        if number is None:
            return None
        of_numbers = isinstance(given, list) and all(whole(one) is not None for one in given)
        return Numbered(where, number, choices, of_numbers)

    def _all_numbers(self) -> Iterator[Numbered]:
        for where, record in self.records():
            found = self._find(record, where)
            choices = self._choices(record, found, where, text_cells=False)
            if not any(choices) or not is_empty(record.get(INDEX_COLUMN)):
                continue
            number = self._number(record, found, choices, f"{where}, column {found.get('answer')!r}")
            if number is not None:
                yield number

    def _answers(self, value: Any, where: str, *, text_cells: bool, empty: bool = False) -> list[str]:
        """Return the answers in a cell: text, number, boolean, object with an answer, or a list of these.

        With `empty`, empty items of a list are kept as empty text.
        """
        if value is None:
            return []
        if isinstance(value, str):
            text = one_line(self._shown(value))
            if text_cells and text.startswith("[") and text.endswith("]"):
                try:
                    return self._answers(parse_json(text), where, text_cells=False, empty=empty)
                except RepeatedKeyError as error:
                    raise UsageError(f"{where}: {error}") from None
                except ValueError:
                    if QUOTED.match(text):  # as Python and NumPy print lists
                        raise UsageError(
                            f'{where}: expected a list as JSON, such as ["red", "blue"], found {text:.60}'
                        ) from None
            return [text] if text else []
        if isinstance(value, bool):
            return ["yes" if value else "no"]
        if isinstance(value, int):
            return [str(value)]
        if isinstance(value, float):
            if value != value:  # NaN: an empty cell
                return []
            return [_number(value)]
        if isinstance(value, list):
            items = (self._answers(one, where, text_cells=False) for one in value)
            return [text for item in items for text in item or [""] * empty]
        if isinstance(value, dict):
            for name in PARTS:
                if name in value:
                    return self._answers(value[name], where, text_cells=False, empty=empty)
        raise UsageError(f"{where}: expected an answer or a list of answers, found {brief(value)}")

    def _shown(self, text: str) -> str:
        """Return the text, and record whether it contains characters that are removed."""
        self._cleaned = self._cleaned or DROPPED.search(text) is not None
        return text


def _cell(record: Record, found: Mapping[str, str], role: str, where: str) -> Any:
    """Return the value of a role in a record, None without one; raise UsageError for bytes."""
    value = record.get(found[role]) if role in found else None
    one = value[0] if isinstance(value, list) and value else value
    if isinstance(one, Embedded):
        raise UsageError(
            f"{where}, column {found[role]!r}: expected text, found bytes; store the column as text, or take "
            f"another one by --columns {role}=NAME"
        )
    return value


def identity(value: Any, where: str) -> str:
    """Return an id as text; a whole number is written without a fraction, however a table stores it."""
    if value is None or value != value:  # NaN: an empty cell
        return ""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, bool | list | dict):
        raise UsageError(f"{where}: expected text or a number, found {brief(value)}")
    return str(value)


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def confine(reference: str, root: Path, where: str) -> str:
    """Return the path of an image relative to its folder; raise UsageError if it is outside the folder."""
    if reference[:1] not in "/." and reference[-1] != "/" and not any(part in reference for part in ODD):
        return reference
    path = posixpath.normpath(reference)
    if posixpath.isabs(path):
        roots = [one for one in (root.absolute(), root.resolve()) if Path(path).is_relative_to(one)]
        path = Path(path).relative_to(roots[0]).as_posix() if roots else ".."
    if path == ".." or path.startswith(("../", EMBEDDED)) or ":" in path.split("/")[0][1:2]:
        raise UsageError(
            f"{where}: the image {reference!r:.100} is outside of {root}; --images FOLDER says where they are"
        )
    return path
