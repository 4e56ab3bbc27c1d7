"""The correct one of several choices, given by its text or by its number from 0."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.records import brief

INDEX_COLUMN = "correct_choice_idx"
"""Column that always holds the number of a choice (A-OKVQA)."""
LONGEST_INDEX = 20
"""Number of digits from which a text is no index; Python converts no more than 4,300."""
INDEX, TEXT = "index", "text"
NUMBERS_READ = {
    INDEX: "have a number as answer that is the index of one choice and the text of another; it is read as "
    "the index, from 0, as in ScienceQA (to give the text, write it in quotes)",
    TEXT: "have a number as answer that is the text of one choice and the index of another; it is read as "
    f"the text, since the choices are numbers too (to give the index, use a column {INDEX_COLUMN})",
}
"""Notes on numbers with two possible meanings, by the one that was taken."""


@dataclass(frozen=True)
class Numbered:
    """A number as the answer to a question with choices."""

    where: str  # location of the row, for error messages
    number: int  # the answer
    choices: list[str]  # the choices as text; empty ones have a number too
    of_numbers: bool  # whether the table holds the choices as numbers too, not as text

    @property
    def is_index(self) -> bool:
        """Whether it can be the number of a choice."""
        return self.number in _numbers(self.choices)

    @property
    def is_text(self) -> bool:
        """Whether it can be the text of a choice."""
        return str(self.number) in self.choices

    def differs(self) -> bool:
        """Return whether it can be both, of different choices."""
        return self.is_index and self.is_text and self.choices[self.number] != str(self.number)


@dataclass(frozen=True)
class Meaning:
    """What numbers as answers mean, the same for all rows: `INDEX` or `TEXT`, and whether both would fit."""

    kind: str
    unsure: bool

    def answer(self, given: Numbered) -> tuple[str, str]:
        """Return the text of the answer, and the remark of its row: the meaning, if another one would fit."""
        if self.kind == TEXT:
            return str(given.number), TEXT if self.unsure and given.differs() else ""
        return given.choices[given.number], INDEX if given.differs() else ""


def meaning_of(column: Iterable[Numbered]) -> Meaning:
    """Return what the numbers of a column mean. All rows are read, since one alone can fit both meanings.

    If both fit all rows, numbers beside choices that are numbers are texts, and numbers beside choices that
    are text are indices, as in ScienceQA. UsageError if neither fits all rows.
    """
    no_index: Numbered | None = None
    no_text: Numbered | None = None
    of_numbers, differs = True, False
    for one in column:
        no_index = no_index or (None if one.is_index else one)
        no_text = no_text or (None if one.is_text else one)
        of_numbers, differs = of_numbers and one.of_numbers, differs or one.differs()
    if no_index is not None and no_text is not None:
        other = "" if no_text is no_index else f" ({no_text.where}: {no_text.number} is the text of none)"
        raise UsageError(
            f"{no_index.where}: expected the number of a choice, {brief(_numbers(no_index.choices))}, found "
            f"{no_index.number}{other}; give the number of the choice in every row, or its text in every row"
        )
    if no_text is not None:
        return Meaning(INDEX, unsure=False)
    if no_index is not None:
        return Meaning(TEXT, unsure=False)
    return Meaning(TEXT if of_numbers else INDEX, unsure=differs)


def _numbers(choices: Sequence[str]) -> list[int]:
    """Return the numbers of the choices. Empty choices are counted, but cannot be chosen."""
    return [number for number, choice in enumerate(choices) if choice]


def whole(value: Any) -> int | None:
    """Return a whole number, which tables with gaps store as a float; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if isinstance(value, int) or value.is_integer() else None


def is_empty(value: Any) -> bool:
    """Return whether a cell is empty: None, empty text or NaN."""
    return value in (None, "") or value != value


def at_index(value: Any, choices: list[str], where: str) -> str:
    """Return the choice with a number, which may be written as text; UsageError if there is none."""
    text = value.strip() if isinstance(value, str) else ""
    number = int(text) if text.isdecimal() and len(text) < LONGEST_INDEX else whole(value)
    if number is None or number not in _numbers(choices):
        raise UsageError(
            f"{where}: expected the number of a choice, {brief(_numbers(choices))}, found {brief(value)}"
        )
    return choices[number]


def check_chosen(answers: list[str], choices: list[str], where: str) -> None:
    """Raise UsageError if an answer is none of the choices."""
    if answers and answers[0] not in choices:
        raise UsageError(
            f"{where}: the answer {answers[0]!r:.60} is not one of the choices {choices!r:.200}; copy the "
            f"text of a choice, or give its index from 0 in a column {INDEX_COLUMN}"
        )


def number_notes(remarks: Sequence[str]) -> list[str]:
    """Return the notes on numbers with two possible meanings; `remarks` are those of `Meaning.answer`."""
    counts = Counter(filter(None, remarks))
    return [f"{count:,} of {len(remarks):,} rows {NUMBERS_READ[kind]}" for kind, count in counts.items()]
