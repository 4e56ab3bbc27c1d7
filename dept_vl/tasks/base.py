"""The base class of all tasks: examples to read, and metrics of the answers."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat, check_ids

if TYPE_CHECKING:  # Listing the tasks imports neither pyarrow nor what reads images.
    from dept_vl.tasks.io.official_files import Published
    from dept_vl.tasks.io.rows import Rows
    from dept_vl.tasks.own.options import OwnOptions


USUAL_SCALE = "0-100"

QuestionCase = Literal["lower", "keep"]
"""Questions are read in lower case, or as they are written: published for the tasks with images."""
AnswerLabels = Literal["all", "published"]
"""Answers to learn: all human ones, normalised; or as they are written, within the published list."""


@dataclass(frozen=True)
class Example:
    """One thing to answer.

    Attributes:
        example_id: As in the task's official files.
        source_text: What the encoder reads, task prefix included.
        images: None, one or two files.
        targets: Answers to learn, each with its score in [0, 1]; empty where none is published.
        in_turn: Learn every target once before any comes again (captions), rather than one drawn in
            proportion to its score.
        question: The bare question, to show.
        answer: The most usual human answer, to show; empty where none is published.
        answers: All human answers, each as often as it was given, to show.
        choices: The only answers to this question; empty where any may be given.
        kinds: What it is one of, by kind of kind: `("answer type", "yes/no")`. Accuracies are shown for each.
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
    """How an answer is decoded.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        num_beams: Beams of the search; 1 is greedy.
        candidates: The only answers there are; empty generates freely.
    """

    max_new_tokens: int
    num_beams: int = 1
    candidates: tuple[str, ...] = ()


class Task(ABC):
    """A task: its constants as class attributes, and, once loaded, one split of it.

    A task is registered *blank*, without rows: that is enough to ask questions of your own, and `load`
    returns the same task with the rows of a split. Subclasses are frozen dataclasses whose first field is
    `rows`; see `dept_vl.tasks.register_task` for how to add one.
    """

    rows: "Rows"
    """The examples of the split."""
    question_case: QuestionCase = "lower"
    """How questions are read; a field of the tasks that can do either."""
    name = ""
    """Name in the registry."""
    prefix = ""
    """What the encoder reads before a question."""
    image_count = 1
    """Images of an example; 0 for a text task."""
    asks = True
    """Whether there is a question; captions have none."""
    primary = "accuracy"
    """Metric by which adapters are compared; higher is better."""
    marked_by = "right or wrong"
    """What `mark` measures, in words."""
    scales: ClassVar[Mapping[str, str]] = {}
    """Metric -> its scale, where that is not 0-100."""
    max_source_length = 20
    """Tokens of the longest text by default; longer ones are cut."""
    decoding = Decoding(max_new_tokens=10)
    """How answers are decoded by default."""
    has_usual_answers = False
    """Whether answers may be chosen among the usual ones of the training split."""
    prediction_format = PredictionFormat("question_id", "answer", "int")
    """Format of the prediction files of the task's server."""
    id_column = "question_id"
    """Column of the rows with the ids of the examples."""
    source_column = ""
    """Column with the texts that the encoder reads, where there is one."""
    train_split = "train"
    """Split to train on by default."""
    dev_split = ""
    """Split to choose the best adapter on; empty holds images out of the training split."""
    test_split = "val"
    """Split to score on at the end."""
    server_split = ""
    """Split all of whose examples the evaluation server wants, whatever it scores; empty without one."""
    published: ClassVar[Mapping[str, "Published"]] = {}
    """Split -> what its authors say of its files."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """File or folder -> where it is published, if not where the rest is."""
    example_call = '"image.jpg", "..."'
    """Arguments of `Predictor.answer`, for the model card."""
    pipeline = "image-text-to-text"
    """The Hub's name for what a model of the task does."""
    other_split = ""
    """Split to score on of other data than a run's; empty for `test_split`."""
    fits_answers = False
    """Whether the longest answer that may be learnt is as long as the data have it, not `max_new_tokens`."""
    notes: tuple[str, ...] = ()
    """What was noticed while reading, to be printed once."""

    @property
    def loaded_as(self) -> str:
        """Name by which options ask for the task."""
        return self.name

    def with_options(self, options: "OwnOptions") -> "Task":
        """Return the task that reads your own data; raise UsageError if it has files of its own."""
        raise UsageError(
            f"{self.name} reads its official files; --data is read by task vqa: leave out --task"
        )

    def facts(self) -> dict[str, Any]:
        """Return what the blank task does not know and answering needs, in JSON types."""
        return {}

    def with_facts(self, facts: Mapping[str, Any]) -> "Task":
        """Return the blank task with the facts of a run."""
        return self

    def reading(self, question_case: QuestionCase) -> "Task":
        """Return the task that reads questions in this case; raise UsageError if it has another."""
        if "question_case" in {one.name for one in fields(self)}:  # type: ignore[arg-type]  # subclasses are
            return replace(self, question_case=question_case)  # type: ignore[type-var]
        if question_case != self.question_case and self.asks and self.image_count:
            raise UsageError(
                f"{self.name} reads questions in {self.question_case} case: leave question_case out, or give "
                "the task a field of that name"
            )
        return self

    def with_published_labels(self, root: Path) -> "Task":
        """Return the task that learns published labels of its folder or ours; UsageError without any."""
        raise UsageError(
            f"answer_labels=published is of VQAv2's answers; {self.name} has one kind of labels: leave it out"
        )

    def draws_per_epoch(self) -> int:
        """Return how often an example is drawn until every target that is learnt in turn came once."""
        return len(self)

    def answered(self) -> "Task":
        """Return the examples that can be learnt and scored."""
        return self

    def asked_by(self, asker: "Task") -> "Task":
        """Return the examples as an adapter's task asks; raise UsageError if they do not fit it."""
        return self

    def target_counts(self, examples: int) -> tuple[Counter[str], int]:
        """Count the answers to learn of about so many examples; return how many these are, too."""
        step = max(1, len(self) // examples)
        counts: Counter[str] = Counter()
        for index in range(0, len(self), step):
            counts.update(text for text, score in self[index].targets if score)
        return counts, len(range(0, len(self), step))

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
        """Read a split from a folder; the errors are those of `load`."""

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def source(self, question: str) -> str:
        """Return what the encoder reads of a question: the prefix, then the question."""
        return self.prefix + (question.lower() if self.question_case == "lower" else question).strip()

    def example_ids(self) -> list[ExampleId]:
        """Return the ids of all examples."""
        ids: list[ExampleId] = self.rows.column(self.id_column).to_pylist()
        return ids

    def images(self, index: int) -> tuple[Path, ...]:
        """Return the image files of one example; override it where that is possible without the example."""
        return self[index].images

    def image_files(self) -> list[Path]:
        """Return the different image files of all examples."""
        return list(dict.fromkeys(path for index in range(len(self)) for path in self.images(index)))

    def missing_images(self) -> list[Path]:
        """Return the image files that are not there; override it where that is possible without all paths."""
        from dept_vl._utils.images import missing_files

        return missing_files(self.image_files())

    def subset(self, indices: Sequence[int]) -> "Task":
        """Return the same split with these examples alone, scored alone."""
        return replace(self, rows=self.rows.subset(indices))  # type: ignore[type-var]  # subclasses are

    def written(self, answer: str) -> str:
        """Return a decoded answer as it goes into a submission."""
        return answer.strip()

    def mark(self, example: Example, prediction: str) -> float:
        """Rate one answer from 0 to 1, to show it; `marked_by` names the measure."""
        return float(prediction == example.answer)

    def score(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute the metrics from one prediction for each example.

        Returns:
            The metrics, the primary one first; none where answers are not published.

        Raises:
            ValueError: If predictions are missing or belong to no example.
        """
        check_ids(self.example_ids(), predictions, self.name)
        if not len(self) or not self.rows.value("answers", 0):
            return {}
        return self.metrics(predictions)

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute the metrics of checked predictions with published answers: the mean of `mark`."""
        examples = (self[index] for index in range(len(self)))
        return {self.primary: 100 * fmean(self.mark(one, predictions[one.example_id]) for one in examples)}

    def scale_of(self, metric: str) -> str:
        """Return the scale of a metric."""
        return self.scales.get(metric.rsplit("/", 1)[-1], USUAL_SCALE)

    def usual_answers(self, floor: int) -> tuple[str, ...]:
        """Return usual answers of `floor` or more questions, commonest first; ValueError without any."""
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
        """Return the task without the metrics that take seconds for every evaluation."""
        return self

    def check_requirements(self) -> None:  # noqa: B027  # most tasks need nothing
        """Raise ImportError or FileNotFoundError if a package or program of the metrics is missing."""


def data_folder(name: str, root: Path | None) -> Path:
    """Return the folder with a task's files: `data/NAME` unless given."""
    return Path("data") / name if root is None else root


def most_usual(answers: Sequence[str]) -> str:
    """Return the answer that is given most often; empty for no answers."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def hold_out_images(task: Task, count: int, seed: int) -> tuple[Task, Task]:
    """Split a task by image: (the rest, held out); raise ValueError if nothing is left to train on."""
    images = [task.images(index) for index in range(len(task))]
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
    """Return at most `count` examples, drawn at random and kept in order; 0 keeps all."""
    if count == 0 or count >= len(task):
        return task
    return task.subset(sorted(Random(seed).sample(range(len(task)), count)))


def shown_metrics(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a summary shows: without the dozens of VQA's question types."""
    return {name: value for name, value in scores.items() if "question_type/" not in name}


def scale_of(metric: str, tasks: Sequence[Task]) -> str:
    """Return the scale of a metric of one of these tasks; of several, its name may begin with the task's."""
    named = [task for task in tasks if metric.startswith(f"{task.name}/")]
    return next(
        (scale for task in named or tasks if (scale := task.scale_of(metric)) != USUAL_SCALE), USUAL_SCALE
    )


def score_rows(scores: Mapping[str, float], splits: str, tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Return a row for each metric that a summary shows, with its scale."""
    return [
        (f"{splits}: {name.replace('answer_type/', '')} ({scale_of(name, tasks)})", f"{value:.2f}")
        for name, value in shown_metrics(scores).items()
    ]
