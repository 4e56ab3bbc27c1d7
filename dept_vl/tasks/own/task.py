"""Task on your own images and questions. Captions and labels are recognised by the columns."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow.compute as pc
from pydantic import Field

from dept_vl._utils.errors import UsageError
from dept_vl._utils.options import LARGEST_COUNT, check
from dept_vl._utils.printable import one_line, plain
from dept_vl.tasks.base import Decoding, Example, QuestionCase, Task, most_usual
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat
from dept_vl.tasks.io.rows import NO_ROWS, Rows
from dept_vl.tasks.metrics.caption import check_scorers, reported, score_captions
from dept_vl.tasks.metrics.own import OFFICIAL_ANSWERS, anls, general_vqa_accuracy, normalise_own
from dept_vl.tasks.metrics.text import macro_f1, squad
from dept_vl.tasks.metrics.vqa import soft_scores
from dept_vl.tasks.own import split as splits
from dept_vl.tasks.own.choices import number_notes
from dept_vl.tasks.own.convert import rows_of
from dept_vl.tasks.own.find import find_tables
from dept_vl.tasks.own.images import ImageFolder
from dept_vl.tasks.own.options import OwnOptions

NO_OPTIONS = OwnOptions()
NO_FOLDER = ImageFolder(Path(), Path())
FORMS = {"question": "vqa", "caption": "captions", "label": "labels"}
"""Task name by form of the examples."""
PREFIXES = {"question": "vqa: ", "caption": "caption:", "label": "label:"}
MOST_LABELS = 1000
"""Maximum number of different labels to choose among; if there are more, labels are generated freely."""


@dataclass(frozen=True)
class Facts:
    """Facts about the training data that a blank task does not know."""

    form: Literal["question", "caption", "label"]
    scoring: Literal["one", "several", "choices"]
    labels: list[str]
    image_count: Annotated[int, Field(ge=1, le=LARGEST_COUNT)]


@dataclass(frozen=True)
class OwnTask(Task):
    """One split of your own data."""

    rows: Rows = NO_ROWS  # rows with the columns of `convert.SCHEMA`
    form: str = "question"  # form of the examples, a key of `FORMS`
    options: OwnOptions = NO_OPTIONS  # options for the data
    folder: ImageFolder = NO_FOLDER  # folder of the images
    scoring: str = "one"  # scoring of questions: `one` answer each, `several` answers, or `choices`
    labels: tuple[str, ...] = ()  # the only valid ones, for the form `label`; empty if over `MOST_LABELS`
    image_count: int = 1  # number of images per example
    meteor: bool = True  # whether to score captions by METEOR too
    notes: tuple[str, ...] = ()  # remarks about the data, to print, with the leaks
    leaks: tuple[str, ...] = ()  # remarks about images that splits share
    question_case: QuestionCase = "lower"  # case in which the encoder reads questions
    asker: Task | None = None  # task of the adapter under evaluation, which asks the questions

    scales: ClassVar = {"CIDEr": "x100"}
    id_column = "id"
    prediction_format = PredictionFormat("id", "answer", "str")
    dev_split = "validation"
    test_split = "test"
    other_split = splits.AUTO
    example_call = '"photo.jpg", "..."'
    pipeline = "visual-question-answering"
    fits_answers = True

    @property
    def name(self) -> str:  # type: ignore[override]  # never assigned
        """Name of the task, by the form of the examples."""
        return FORMS[self.form]

    @property
    def loaded_as(self) -> str:
        """Name under which options select this task, for all forms."""
        return VQA.name

    @property
    def prefix(self) -> str:  # type: ignore[override]  # never assigned
        """Text before every question, for the encoder."""
        return PREFIXES[self.form]

    @property
    def asks(self) -> bool:  # type: ignore[override]  # never assigned
        """Whether examples have a question."""
        return self.form == "question"

    @property
    def primary(self) -> str:  # type: ignore[override]  # never assigned
        """Metric for comparing adapters; higher is better."""
        if self.options.metric != "auto" and self.form == "question":
            return self.options.metric
        of_questions = {"one": "exact_match", "several": "vqa_accuracy", "choices": "accuracy"}
        return {"caption": "CIDEr", "label": "accuracy"}.get(self.form) or of_questions[self.scoring]

    @property
    def marked_by(self) -> str:  # type: ignore[override]  # never assigned
        """Name of the measure that `mark` returns."""
        if self.form == "caption":
            return "word F1 with the closest human caption"
        return "VQA accuracy" if (self.form, self.scoring) == ("question", "several") else "right or wrong"

    @property
    def decoding(self) -> Decoding:  # type: ignore[override]  # never assigned
        """Beam search for captions, choice among `labels` for labels, greedy decoding for questions."""
        if self.form == "caption":
            return Decoding(max_new_tokens=40, num_beams=5)
        return Decoding(max_new_tokens=10, candidates=self.labels)

    def with_options(self, options: OwnOptions) -> "OwnTask":
        """Return the task that reads the data of these options."""
        return replace(self, options=options)

    def facts(self) -> dict[str, Any]:
        """Return the facts about the training data, to save with a run."""
        return {one.name: getattr(self, one.name) for one in fields(Facts)} | {"labels": list(self.labels)}

    def with_facts(self, facts: Mapping[str, Any]) -> "OwnTask":
        """Return the task with the facts of a run; raise ValueError if they are another task's facts."""
        if not facts:
            return self
        known: Facts = check(dict(facts), Facts)
        return replace(self, **vars(known) | {"labels": tuple(known.labels)})

    def read(self, root: Path, split: str) -> "OwnTask":
        """Read a split: train, validation, test, all, or auto (test if the data have it, else all)."""
        data = self.options.data or str(root)
        base, tables, unread = find_tables(data)
        place = self.options.images or base
        if not place.is_dir():
            raise FileNotFoundError(f"no folder of images: {place}")
        folder = ImageFolder(place, base)
        rows = rows_of(tables, place, base, self.options, images_alone=not self.asks)
        chosen = rows.subset(splits.choose(rows, split, self.options, folder))
        if not len(chosen):
            raise UsageError(f"{data} has no rows of the split {split!r}")
        forms = rows.column("form").unique().to_pylist()
        if {"caption", "label"} <= {*forms}:
            raise UsageError(f"{data} has rows with a caption and rows with a label; put them into two files")
        form = self.form if self.form != "question" else next(f for f in FORMS if f in forms)
        counts = rows.lengths("images")
        other = np.flatnonzero(counts != counts[0])
        if len(other):
            raise UsageError(
                f"{data}: expected as many images in every row, found {counts[0]} in the first and "
                f"{counts[other[0]]} in row {other[0] + 1} (id {rows.value('id', int(other[0]))})"
            )
        named = pc.list_flatten(rows.column("answers")).unique().to_pylist() if form == "label" else []
        labels = sorted(named) if len(named) <= MOST_LABELS else []
        leaks = tuple(splits.leaks(rows, folder))
        return replace(
            self,
            rows=chosen,
            form=form,
            folder=folder,
            scoring=_scoring(rows),
            labels=tuple(labels),
            image_count=int(counts[0]),
            notes=(
                *_notes(rows, chosen, split, labels),
                *unread,
                *leaks,
                *_unused_metric(self.options, form),
            ),
            leaks=leaks,
        )

    def answered(self) -> "OwnTask":
        """Return the task with only the examples that have an answer."""
        known = self.rows.lengths("answers") > 0
        return self if known.all() else replace(self, rows=self.rows.subset(np.flatnonzero(known)))

    def draws_per_epoch(self) -> int:
        """Return the number of examples, or of different captions."""
        if self.form != "caption":
            return len(self)
        return sum(len(set(captions)) for captions in self.rows.column("answers").to_pylist())

    def asked_by(self, asker: Task) -> "OwnTask":
        """Return the examples in the form of an adapter's task; UsageError if they do not fit it."""
        data = self.options.data
        if asker.image_count != self.image_count:
            raise UsageError(
                f"{asker.name} is about {asker.image_count or 'no'} images, and rows of {data} have "
                f"{self.image_count}"
            )
        if asker.asks and not self.asks:
            raise UsageError(
                f"{asker.name} answers questions, and {data} has none; --columns question=NAME says where "
                "they are"
            )
        labels = () if self.scoring == "choices" else asker.decoding.candidates
        return replace(self, asker=asker, notes=(*self.notes, *splits.unknown_labels(self.rows, labels)))

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        answers = tuple(row["answers"])
        kinds = (("class", answers[0]),) if answers and self.form == "label" else ()
        return Example(
            example_id=row["id"],
            source_text=self.source(row["question"] if self.form == "question" else ""),
            images=self._paths(row["images"]),
            targets=_targets(answers, self.form, self.scoring),
            in_turn=self.form == "caption",
            question=row["question"] or (answers[0] if answers and self.form == "caption" else ""),
            answer=_reference(answers, self.form),
            answers=answers,
            kinds=(("answer type", row["type"]),) if answers and row["type"] else kinds,
            choices=tuple(row["choices"]),
        )

    def source(self, question: str) -> str:
        """Return the text for the encoder; raise ValueError for a question to a captions or labels task."""
        if self.asker is not None:
            return self.asker.source(question if self.asker.asks else "")
        if self.form == "question":
            return super().source(plain(question))
        if question.strip():
            raise ValueError(f"{self.name} answer no question, and {question!r:.60} is one; leave it out")
        return self.prefix

    def images(self, index: int) -> tuple[Path, ...]:
        """Return the images of an example."""
        return self._paths(self.rows.value("images", index))

    def image_keys(self) -> list[tuple[Path, ...]]:
        """See `Task.image_keys`; copies of an image in a table, and rows joined by images, have one key."""
        keys: dict[int, tuple[Path, ...]] = {}
        groups = splits.image_groups(self.rows, range(len(self)), self.folder).tolist()
        for index, group in enumerate(groups):
            images = self.images(index)
            keys[group] = min(images, keys.get(group, images))
        return [keys[group] for group in groups]

    def image_files(self) -> list[Path]:
        """Return the images of all examples, each once."""
        names = self.rows.column("images").combine_chunks().flatten().unique().to_pylist()
        return list(dict.fromkeys(self._paths(names)))

    def missing_images(self) -> list[Path]:
        """Return the image files that do not exist. Images inside tables are not checked."""
        names = self.rows.column("images").combine_chunks().flatten().unique().to_pylist()
        return self.folder.missing(names)

    def _paths(self, references: list[str]) -> tuple[Path, ...]:
        return tuple(map(self.folder.find, references))

    def written(self, answer: str) -> str:
        """Return a decoded prediction on one line, normalised like the answers in the data."""
        return one_line(answer)

    def mark(self, example: Example, prediction: str) -> float:
        """Return a score from 0 to 1 for one prediction. `marked_by` names the measure."""
        prediction = one_line(prediction)
        if self.form == "caption":
            return squad([prediction], [example.answers])["f1"] / 100
        if self.form == "question" and self.scoring == "several":
            return general_vqa_accuracy(prediction, example.answers)
        if self.form == "label" or example.choices:
            return float(prediction == example.answer)
        return float(normalise_own(prediction) in map(normalise_own, example.answers))

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute all metrics that apply to the form and scoring of the data."""
        answers = self.rows.column("answers").to_pylist()
        said = [one_line(predictions[key]) for key in self.example_ids()]
        if self.form == "caption":
            pairs = dict(enumerate(answers)), dict(enumerate(said))
            return reported(score_captions(*pairs, meteor=self.meteor))
        if self.form == "label":
            right = [one[0] for one in answers]
            return {"accuracy": _percent([a == b for a, b in zip(said, right, strict=True)])} | {
                "macro_f1": macro_f1(said, right, classes=sorted(set(right)))
            }
        scores = self._question_scores(said, answers)
        return {self.primary: scores.pop(self.primary), **scores}

    def _question_scores(self, said: list[str], answers: list[list[str]]) -> dict[str, float]:
        words = squad(said, answers, normalise_own)
        scores = {"exact_match": words["em"], "f1": words["f1"]}
        if self.scoring == "choices" or self.options.metric == "accuracy":
            scores["accuracy"] = _percent([one == right[0] for one, right in zip(said, answers, strict=True)])
        if self.scoring == "several" or self.options.metric == "vqa_accuracy":
            marks = [general_vqa_accuracy(*pair) for pair in zip(said, answers, strict=True)]
            scores["vqa_accuracy"] = round(_percent(marks), 2)
        if self.options.metric == "anls":
            scores["anls"] = _percent([anls(*pair) for pair in zip(said, answers, strict=True)])
        return scores

    def target_counts(self, examples: int) -> Counter[str]:
        """Count the training targets of all examples."""
        counts: Counter[str] = Counter()
        for answers in self.rows.column("answers").to_pylist():
            for text, share in _targets(tuple(answers), self.form, self.scoring):
                counts[text] += share > 0
        return counts

    def without_slow_metrics(self) -> "OwnTask":
        """Return the task without METEOR."""
        return replace(self, meteor=False)

    def check_requirements(self) -> None:
        """Check that the caption scorers are installed and, if METEOR is used, that it runs."""
        if self.form == "caption":
            check_scorers(meteor=self.meteor)


def _percent(marks: list[Any]) -> float:
    return 100 * float(sum(marks)) / len(marks)


def _reference(answers: tuple[str, ...], form: str) -> str:
    """Return the answer that predictions are marked against; captions have none."""
    if form == "label":
        return answers[0] if answers else ""
    return "" if form == "caption" else most_usual(answers)


@lru_cache(maxsize=100_000)
def _targets(answers: tuple[str, ...], form: str, scoring: str) -> tuple[tuple[str, float], ...]:
    if not answers:
        return ()
    if form == "caption":
        return tuple((caption, 1.0) for caption in dict.fromkeys(answers))
    if scoring == "several" and form == "question" and len(answers) > 1:
        if len(answers) >= OFFICIAL_ANSWERS:
            return tuple((soft_scores(answers) or {most_usual(answers): 1.0}).items())
        marks = {answer: general_vqa_accuracy(answer, answers) for answer in dict.fromkeys(answers)}
        return tuple((answer, mark) for answer, mark in marks.items() if mark)
    return ((answers[0], 1.0),)


def _scoring(rows: Rows) -> str:
    if rows.lengths("choices").min() > 1:
        return "choices"
    return "several" if rows.lengths("answers").max() > 1 else "one"


def _differ_in_case(labels: Sequence[str]) -> list[str]:
    """Return pairs of labels that differ only in case."""
    first: dict[str, str] = {}
    pairs = ((first.setdefault(label.casefold(), label), label) for label in labels)
    return [f"{one!r} and {other!r}" for one, other in pairs if one != other]


def _notes(rows: Rows, chosen: Rows, split: str, labels: Sequence[str]) -> Iterator[str]:
    renamed = pc.sum(rows.column("renamed")).as_py() or 0
    if renamed:
        yield f"{renamed:,} of {len(rows):,} rows have an id that came before, and got a new one (id#2, ...)"
    cleaned = pc.sum(rows.column("cleaned")).as_py() or 0
    if cleaned:
        yield (
            f"{cleaned:,} of {len(rows):,} rows have control characters in their text, or others that do not "
            "show; these are left out"
        )
    yield from number_notes(rows.column("number_as").to_pylist())
    forms = rows.column("form").unique().to_pylist()
    silent = pc.sum(pc.equal(chosen.column("question"), "")).as_py() if "question" in forms else 0
    if silent:
        yield f"{silent:,} of {len(chosen):,} rows of {split} have an empty question"
    if alike := _differ_in_case(labels):
        yield f"labels that differ in case alone are apart: {', '.join(alike[:3])}"
    answers = chosen.lengths("answers")
    unanswered = int((answers == 0).sum())
    if 0 < unanswered < len(chosen):
        yield f"{unanswered:,} of {len(chosen):,} rows of {split} have no answer and are not learnt or scored"
    yield from splits.unused(rows)
    if several := int((answers > 1).sum()) if "label" in forms else 0:
        yield f"{several:,} of {len(chosen):,} rows of {split} have several labels; the first of each counts"
    few = (answers > 0) & (answers < OFFICIAL_ANSWERS)
    if "question" in forms and _scoring(rows) == "several" and few.any():
        yield (
            f"VQA accuracy is the official one of {OFFICIAL_ANSWERS} human answers; of fewer it is its "
            "general form, in which a third of the others have to agree and a lone answer counts 1"
        )


def _unused_metric(options: OwnOptions, form: str) -> Iterator[str]:
    decides = OwnTask(form=form).primary
    if form != "question" and options.metric not in ("auto", decides):
        yield f"--metric {options.metric} is for questions; of {FORMS[form]}, {decides} decides"


VQA = OwnTask()
CAPTIONS = OwnTask(form="caption")
LABELS = OwnTask(form="label")
