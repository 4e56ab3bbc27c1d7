"""Base class of all tasks. A task provides the examples of a split and the metrics of predictions."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat, Submission, check_ids

if TYPE_CHECKING:  # Listing the tasks imports neither pyarrow nor what reads images.
    from dept_vl.tasks.io.files import Published
    from dept_vl.tasks.io.rows import Rows
    from dept_vl.tasks.own.options import OwnOptions


USUAL_SCALE = "0-100"

QuestionCase = Literal["lower", "keep"]
"""Case in which questions are read. `keep`, as written, is published for the tasks with images."""
AnswerLabels = Literal["all", "published"]
"""Training targets: all human answers, normalised, or only those in the published list, as written."""


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        example_id: Id of the example in the task's official files.
        source_text: Text for the encoder, including the task prefix.
        images: Image files; none, one or two.
        targets: Training targets, each with its score in [0, 1]; empty if answers are not published.
        in_turn: Whether all targets are used in turn (captions), instead of drawn in proportion to their
            scores.
        question: Question without prefix, for display.
        answer: Most frequent human answer, for display; empty if answers are not published.
        answers: All human answers, with repetitions, for display.
        choices: The only valid answers to this question; empty if any answer is valid.
        kinds: Groups of the example, such as `("answer type", "yes/no")`. Accuracy is also shown for each.
    """

    example_id: ExampleId
    source_text: str
    images: tuple[Path, ...]
    targets: tuple[tuple[str, float], ...]
    in_turn: bool = False
    question: str = ""
    answer: str = ""
    answers: tuple[str, ...] = ()
    kinds: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """Generation settings for predictions."""

    max_new_tokens: int  # maximum length of a prediction, in tokens
    num_beams: int = 1  # number of beams; 1 is greedy decoding
    candidates: tuple[str, ...] = ()  # the only predictions allowed; empty for free generation


class Task(ABC):
    """A task: constants as class attributes and, once loaded, the examples of one split.

    Tasks are registered *blank*, without rows, which is enough to answer your own questions; `load` returns
    the task with a split. Subclasses are frozen dataclasses with `rows` as first field.
    `dept_vl.tasks.register_task` explains how to add one.
    """

    rows: "Rows"
    """Examples of the split."""
    question_case: QuestionCase = "lower"
    """Case in which the encoder reads questions. Tasks that support both cases define it as a field."""
    name = ""
    """Name of the task in the registry."""
    prefix = ""
    """Text before every question, for the encoder."""
    image_count = 1
    """Number of images per example; 0 for a text task."""
    asks = True
    """Whether examples have a question; captions have none."""
    primary = "accuracy"
    """Metric for comparing adapters; higher is better."""
    marked_by = "right or wrong"
    """Name of the measure that `mark` returns, for display."""
    scales: ClassVar[Mapping[str, str]] = {}
    """Scale by metric, for metrics that are not on the scale 0-100."""
    max_source_length = 20
    """Default maximum length of a text, in tokens; longer texts are truncated."""
    decoding = Decoding(max_new_tokens=10)
    """Default generation settings."""
    has_usual_answers = False
    """Whether predictions can be restricted to the usual answers of the training split."""
    prediction_format = PredictionFormat("question_id", "answer", "int")
    """Format of the prediction files that the task's evaluation server accepts."""
    id_column = "question_id"
    """Column of the rows with the example ids."""
    source_column = ""
    """Column of the rows with the texts for the encoder, if there is one."""
    image_columns: ClassVar[Sequence[Sequence[str]]] = ()
    """For each image of an example, the columns of the rows that `image_path` takes. Without them, `images`
    builds the whole example."""
    image_path: ClassVar[Callable[..., Path]]
    """Method that returns the path of an image; tasks that set `image_columns` define it."""
    train_split = "train"
    """Default training split."""
    dev_split = ""
    """Default split for choosing the best adapter; if empty, images are held out of the training split."""
    test_split = "val"
    """Default split for the final score."""
    server_split = ""
    """Split whose examples must all be in a submission, even if few are scored; empty without a server."""
    published: ClassVar[Mapping[str, "Published"]] = {}
    """Published facts about the official files, by split."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Download location by file or folder, for those not published with the rest."""
    example_call = '"image.jpg", "..."'
    """Arguments of `Predictor.answer` in the model card's example."""
    pipeline = "image-text-to-text"
    """Pipeline tag of the task on the Hugging Face Hub."""
    other_split = ""
    """Split to score when a run is evaluated on other data; empty for `test_split`."""
    fits_answers = False
    """Whether the maximum prediction length is that of the training answers, not `max_new_tokens`."""
    notes: tuple[str, ...] = ()
    """Remarks about the data, found while reading; printed once."""

    @property
    def loaded_as(self) -> str:
        """Name under which options select the task."""
        return self.name

    def with_options(self, options: "OwnOptions") -> "Task":
        """Return the task that reads your own data; raise UsageError if it has official files."""
        raise UsageError(
            f"{self.name} reads its official files, and not your own data ({', '.join(options.given())}): "
            "for these give --data and leave out --task"
        )

    def facts(self) -> dict[str, Any]:
        """Return the facts about the training data that inference needs, in JSON types."""
        return {}

    def with_facts(self, facts: Mapping[str, Any]) -> "Task":
        """Return the blank task with the facts of a run, as returned by `facts`."""
        return self

    def reading(self, question_case: QuestionCase) -> "Task":
        """Return the task with questions in this case; raise UsageError if it does not support the case."""
        if "question_case" in {one.name for one in fields(self)}:  # type: ignore[arg-type]  # subclasses are
            return replace(self, question_case=question_case)  # type: ignore[type-var]
        if question_case != self.question_case and self.asks and self.image_count:
            raise UsageError(
                f"{self.name} reads questions in {self.question_case} case: leave question_case out, or give "
                "the task a field of that name"
            )
        return self

    def with_published_labels(self, root: Path) -> "Task":
        """Return the task with the published answer list as targets; raise UsageError if it has none."""
        raise UsageError(
            f"answer_labels=published is of VQAv2's answers; {self.name} has one kind of labels: leave it out"
        )

    def draws_per_epoch(self) -> int:
        """Return the number of draws after which every target of the `in_turn` examples was used once."""
        return len(self)

    def answered(self) -> "Task":
        """Return the task with only the examples that have an answer; with all if none has one."""
        if "answers" not in self.rows.table.column_names:  # a task with a `score` of its own
            return self
        known = self.rows.lengths("answers") > 0
        return self if known.all() or not known.any() else self.subset(known.nonzero()[0].tolist())

    def asked_by(self, asker: "Task") -> "Task":
        """Return the examples in the form of an adapter's task; raise UsageError if they do not fit it."""
        return self

    def target_counts(self, examples: int) -> Counter[str]:
        """Count the training targets of about `examples` examples."""
        step = max(1, len(self) // examples)
        counts: Counter[str] = Counter()
        for index in range(0, len(self), step):
            counts.update(text for text, score in self[index].targets if score)
        return counts

    def load(self, root: Path | None = None, split: str = "") -> "Task":
        """Read a split.

        Args:
            root: Folder with the task's files; None for `data/NAME`.
            split: Name of the split; empty for the training split.

        Raises:
            FileNotFoundError: If a file or an image folder is missing.
            ValueError: If the split is unknown or a file is damaged.
        """
        return self.read(data_folder(self.name, root), split or self.train_split)

    @abstractmethod
    def read(self, root: Path, split: str) -> "Task":
        """Read a split from a folder. Raises the errors of `load`."""

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def source(self, question: str) -> str:
        """Return the text for the encoder: the prefix, then the question."""
        return self.prefix + (question.lower() if self.question_case == "lower" else question).strip()

    def example_ids(self) -> list[ExampleId]:
        """Return the ids of all examples."""
        ids: list[ExampleId] = self.rows.column(self.id_column).to_pylist()
        return ids

    def images(self, index: int) -> tuple[Path, ...]:
        """Return the image files of an example."""
        if not self.image_columns:
            return self[index].images if self.image_count else ()
        named = ((self.rows.value(name, index) for name in names) for names in self.image_columns)
        return tuple(self.image_path(*values) for values in named)

    def image_keys(self) -> list[tuple[Path, ...]]:
        """Return a key for each example. Two examples share an image if their keys share a file."""
        return [self.images(index) for index in range(len(self))]

    def image_files(self) -> list[Path]:
        """Return the image files of all examples, each once."""
        if not self.image_columns:
            return list(dict.fromkeys(path for index in range(len(self)) for path in self.images(index)))
        named = (values for names in self.image_columns for values in self.rows.distinct(*names))
        return [self.image_path(*values) for values in dict.fromkeys(named)]

    def missing_images(self) -> list[Path]:
        """Return the image files that do not exist. Override it if that is possible without all paths."""
        from dept_vl._utils.images import missing_files

        return missing_files(self.image_files())

    def subset(self, indices: Sequence[int]) -> "Task":
        """Return the split with only these examples; scores cover only these."""
        return replace(self, rows=self.rows.subset(indices))  # type: ignore[type-var]  # subclasses are

    def written(self, answer: str) -> str:
        """Return a decoded prediction in the form used in submissions."""
        return answer.strip()

    def write_submission(self, predictions: Mapping[ExampleId, str], path: Path) -> Submission:
        """Write a submission for this whole split; questions without prediction are left empty.

        Raises:
            ValueError: If a prediction does not belong to the split.
        """
        ids = self.example_ids()
        check_ids(predictions.keys() & set(ids), predictions, f"the submission of {self.name}")
        self.prediction_format.write({key: predictions.get(key, "") for key in ids}, path)
        return Submission(path, len(predictions), len(ids) - len(predictions))

    def mark(self, example: Example, prediction: str) -> float:
        """Return a score from 0 to 1 for one prediction, for display. `marked_by` names the measure."""
        return float(prediction == example.answer)

    def score(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute the metrics from one prediction per example, over the examples that have an answer.

        Returns:
            The metrics, with the primary metric first; empty if answers are not published.

        Raises:
            ValueError: If predictions are missing or have unknown ids.
        """
        check_ids(self.example_ids(), predictions, self.name)
        known = self.answered()
        return known.metrics(predictions) if len(known) and known.rows.value("answers", 0) else {}

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute the metrics of predictions checked by `score`. By default, average `mark` over examples."""
        examples = (self[index] for index in range(len(self)))
        return {self.primary: 100 * fmean(self.mark(one, predictions[one.example_id]) for one in examples)}

    def scale_of(self, metric: str) -> str:
        """Return the scale of a metric."""
        return self.scales.get(metric.rsplit("/", 1)[-1], USUAL_SCALE)

    def usual_answers(self, floor: int) -> tuple[str, ...]:
        """Return answers that are most frequent in at least `floor` questions; ValueError if none is."""
        counts: Counter[str] = Counter()
        for answers in self.rows.column("answers").to_pylist():
            if answers:
                counts[self.written(most_usual(answers))] += 1
        chosen = tuple(answer for answer, count in counts.most_common() if count >= floor and answer)
        if not chosen:
            raise ValueError(
                f"no answer is the usual one of {floor} questions or more, so there is none to choose among; "
                f"the commonest stands {max(counts.values(), default=0)} times: lower candidate_floor"
            )
        return chosen

    def without_slow_metrics(self) -> "Task":
        """Return the task without the metrics that add seconds to every evaluation."""
        return self

    def check_requirements(self) -> None:  # noqa: B027  # most tasks need nothing
        """Raise ImportError or FileNotFoundError if a package or program for the metrics is missing."""


def data_folder(name: str, root: Path | None) -> Path:
    """Return the folder with a task's files: `root`, or `data/NAME` by default."""
    return Path("data") / name if root is None else root


def most_usual(answers: Sequence[str]) -> str:
    """Return the most frequent answer; empty if there are no answers."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def hold_out_images(task: Task, count: int, seed: int) -> tuple[Task, Task]:
    """Split a task by image into the rest and `count` held-out images; ValueError if a part is empty."""
    images = task.image_keys()
    distinct = sorted(set(images))
    if not 0 < count < len(distinct):
        raise ValueError(
            f"cannot hold out {count} of the {len(distinct)} images of {task.name}; "
            f"choose holdout_images between 1 and {len(distinct) - 1}, or name a dev_split"
        )
    held_out = set(Random(seed).sample(distinct, count))
    sides: tuple[list[int], list[int]] = ([], [])
    for index, key in enumerate(images):
        sides[key in held_out].append(index)
    return task.subset(sides[0]), task.subset(sides[1])


def limit(task: Task, count: int, seed: int) -> Task:
    """Return at most `count` randomly drawn examples, in their original order; 0 keeps all."""
    if count == 0 or count >= len(task):
        return task
    return task.subset(sorted(Random(seed).sample(range(len(task)), count)))


def shown_metrics(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics for a summary: all except the many scores by VQA question type."""
    return {name: value for name, value in scores.items() if "question_type/" not in name}


def scale_of(metric: str, tasks: Sequence[Task]) -> str:
    """Return the scale of a metric of these tasks; its name may start with the task's name and a slash."""
    named = [task for task in tasks if metric.startswith(f"{task.name}/")]
    return next(
        (scale for task in named or tasks if (scale := task.scale_of(metric)) != USUAL_SCALE), USUAL_SCALE
    )


def score_rows(scores: Mapping[str, float], splits: str, tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Return a table row, with the scale, for each metric in a summary."""
    return [
        (f"{splits}: {name.replace('answer_type/', '')} ({scale_of(name, tasks)})", f"{value:.2f}")
        for name, value in shown_metrics(scores).items()
    ]
