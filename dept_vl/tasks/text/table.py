"""Definitions of the text tasks: data set, text template, classes, splits and metrics.

GLUE (Wang et al. 2019) and SuperGLUE (Wang et al. 2019), MRQA (Fisch et al. 2019), WinoGrande (Sakaguchi et
al. 2020), Yelp-2 (Zhang et al. 2015), SciTail (Khot et al. 2018), PAWS-Wiki (Zhang et al. 2019): the 21 text
tasks of DePT, and the movie-review snippets of `snippets`. Texts, class names and splits are those of T5
(Raffel et al. 2020) and ATTEMPT (Asai et al. 2022); `tasks/README.md` has the differences and their reasons.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from dept_vl.tasks.metrics.text import accuracy, f1, macro_f1, matthews, multirc, pearson, squad

Row = Mapping[str, Any]
"""A row of a published data set."""


@dataclass(frozen=True)
class Part:
    """Part of a published split: all of it, `size` drawn examples (at most a tenth; 0: half), or the rest."""

    split: str
    side: Literal["all", "drawn", "rest"] = "all"
    size: int = 0


PUBLISHED = {"train": Part("train"), "validation": Part("validation"), "test": Part("test")}
HALVED = PUBLISHED | {"validation": Part("validation", "drawn"), "test": Part("validation", "rest")}
HELD_OUT = {
    "train": Part("train", "rest", 1000),
    "validation": Part("train", "drawn", 1000),
    "test": Part("validation"),
}
MNLI = PUBLISHED | {"validation": Part("validation_mismatched"), "test": Part("validation_matched")}
YELP = HELD_OUT | {"test": Part("test")}


@dataclass(frozen=True)
class Answered:
    """Predictions, correct answers and groups of examples, and the class names if there are classes."""

    predictions: Sequence[str]
    answers: Sequence[Sequence[str]]
    groups: Sequence[str]
    classes: Sequence[str]

    @property
    def labels(self) -> list[str]:
        """Correct answer of each example."""
        return [given[0] for given in self.answers]

    @property
    def chosen(self) -> list[str]:
        """Predictions for two classes, where one that names neither class is replaced by the wrong class."""
        negative, positive = self.classes
        opposite = {negative: positive, positive: negative}
        pairs = zip(self.predictions, self.labels, strict=True)
        return [prediction if prediction in opposite else opposite[label] for prediction, label in pairs]


Score = Callable[[Answered], dict[str, float]]
"""Function that computes the metrics of a split, with the primary metric first."""


def accuracy_alone(split: Answered) -> dict[str, float]:
    """Return the accuracy; predictions outside the classes are wrong."""
    return {"accuracy": accuracy(split.predictions, split.labels)}


def accuracy_and_f1(split: Answered) -> dict[str, float]:
    """Return accuracy and F1 of the second class; predictions outside the classes are wrong, as in T5."""
    chosen, labels = split.chosen, split.labels
    return {"accuracy": accuracy(chosen, labels), "f1": f1(chosen, labels, positive=split.classes[1])}


def by_question(split: Answered) -> dict[str, float]:
    """Return MultiRC's F1 over all answers and share of questions without a mistake, within the split.

    As in the literature, halving the split can separate the answers to a question.
    """
    return multirc(split.chosen, split.labels, split.groups, positive=split.classes[1])


def accuracy_and_macro_f1(split: Answered) -> dict[str, float]:
    """Return the accuracy and the mean F1 of the classes."""
    macro = macro_f1(split.predictions, split.labels, classes=split.classes)
    return accuracy_alone(split) | {"macro_f1": macro}


def matthews_alone(split: Answered) -> dict[str, float]:
    """Return the Matthews correlation; a prediction outside the classes is a class of its own, as in T5."""
    return {"matthews": matthews(split.predictions, split.labels)}


def pearson_alone(split: Answered) -> dict[str, float]:
    """Return the Pearson correlation with the rounded scores; predictions that are not numbers are -1."""
    return {"pearson": pearson([number(text) for text in split.predictions], list(map(float, split.labels)))}


def words_of_answers(split: Answered) -> dict[str, float]:
    """Return word F1 and exact match, as in MRQA and (`f1_first`, `em_first`) as in DePT's code.

    MRQA takes the best score over all human answers, DePT's code only scores against the first.
    """
    best = squad(split.predictions, split.answers)
    alone = squad(split.predictions, [given[:1] for given in split.answers])
    return {"f1": best["f1"], "em": best["em"], "f1_first": alone["f1"], "em_first": alone["em"]}


def number(text: str) -> float:
    """Return the number in a text, or -1 if it is not a finite number."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if abs(value) < float("inf") else -1.0  # not infinity or nan


def fifths(score: Any) -> str:
    """Round a similarity from 0 to 5 to the nearest 0.2, as in T5; raise ValueError if it is out of range."""
    value = float(score)
    if not 0 <= value <= 5:
        raise ValueError(f"expected a number from 0 to 5, found {score!r}")
    return f"{round(value * 5) / 5:.1f}"


def without_markup(row: Row) -> Row:
    """Return a row of MultiRC without HTML in its text columns."""
    plain = {}
    for name in ("question", "answer", "paragraph"):
        text = str(row[name]).replace("<br>", " ")
        plain[name] = text.replace("<b>", "").replace("</b>", "")
    return {**row, **plain}


def with_marks(row: Row) -> Row:
    """Return a row of WSC with ` * ` around the noun (span 1) and ` # ` around the pronoun (span 2).

    A span starts at a word index. The mark ends where the span's text ends, ignoring case, or after as many
    whole words if the text differs. Raises ValueError if there is no such word.
    """
    words = row["text"].split()
    for name, mark in (("span2", "#"), ("span1", "*")):
        span, start = row[f"{name}_text"].split(), int(row[f"{name}_index"])
        end = start + len(span) - 1
        if not span or not 0 <= start <= end < len(words):
            raise ValueError(
                f"expected {name} {row[f'{name}_text']!r} at word {start} of {len(words)}, found no such word"
            )
        last = words[end]
        inside = len(span[-1]) if last.lower().startswith(span[-1].lower()) else len(last)
        words[end] = f"{last[:inside]} {mark}{last[inside:]}"
        words[start] = f"{mark} {words[start]}"
    return {**row, "text": " ".join(words)}


@dataclass(frozen=True)
class TextSpec:
    """Definition of a text task."""

    name: str  # name in the registry, and at the start of the text
    dataset: str  # name of the data set on the Hub; empty if it is not there
    reads: str  # columns in the text, in order; `premise=sentence1` reads column sentence1 as premise
    classes: str = ""  # names of the classes 0, 1, ...; empty for free answers
    config: str | None = None  # configuration of the data set
    keys: str = ""  # labels of the classes in the data, if they are not 0, 1, ...
    task_name: bool = True  # whether the text starts with the name of the task
    label: str = "label"  # column of the label, the number or the answers
    splits: Mapping[str, Part] = field(default_factory=lambda: HALVED)  # what makes up each split
    score: Score = accuracy_alone  # function that computes the metrics
    primary: str = "accuracy"  # primary metric, reported in papers
    answer: Callable[[Any], str] | None = None  # formats a free answer; None: the column lists the answers
    group: str = ""  # template for the group of examples that are scored together
    only: tuple[str, str] | None = None  # column and value of the rows to take; a copy may lack the column
    prepare: Callable[[Row], Row] = dict  # function that changes a row before its text is written
    columns: tuple[str, ...] = ()  # additional columns for `prepare`
    max_new_tokens: int = 16  # maximum length of a prediction, in tokens

    @cached_property
    def text(self) -> str:
        """Template of the text for the encoder."""
        pairs = (read.partition("=") for read in self.reads.split())
        parts = [f"{shown}: {{{column or shown}}}" for shown, _, column in pairs]
        return " ".join([self.name, *parts] if self.task_name else parts)

    @cached_property
    def words(self) -> dict[str, str]:
        """Class name by label."""
        names = self.classes.split()
        return dict(zip(self.keys.split() or map(str, range(len(names))), names, strict=True))


TWO_SENTENCES = "sentence1 sentence2"


def _glue(name: str, reads: str, classes: str = "", **others: Any) -> TextSpec:
    return TextSpec(name, "nyu-mll/glue", reads, classes, **{"config": name, **others})


def _super_glue(name: str, reads: str, classes: str, **others: Any) -> TextSpec:
    return TextSpec(name, "aps/super_glue", reads, classes, **{"config": name, **others})


def _mrqa(name: str, subset: str) -> TextSpec:
    """Return a task of MRQA, selected by its name in the column `subset`."""
    return TextSpec(
        name,
        "mrqa-workshop/mrqa",
        "question context",
        task_name=False,
        label="answers",
        splits=HELD_OUT,
        score=words_of_answers,
        primary="f1",
        only=("subset", subset),
        max_new_tokens=32,
    )


_TABLE = (
    _glue("mnli", "hypothesis premise", "entailment neutral contradiction", splits=MNLI),
    _glue("qqp", "question1 question2", "not_duplicate duplicate", splits=HELD_OUT, score=accuracy_and_f1),
    _glue("qnli", "question sentence", "entailment not_entailment", splits=HELD_OUT),
    _glue("sst2", "sentence", "negative positive", splits=HELD_OUT),
    _glue("stsb", TWO_SENTENCES, answer=fifths, score=pearson_alone, primary="pearson"),
    _glue("mrpc", TWO_SENTENCES, "not_equivalent equivalent", score=accuracy_and_f1),
    _glue("rte", TWO_SENTENCES, "entailment not_entailment"),
    _glue("cola", "sentence", "unacceptable acceptable", score=matthews_alone, primary="matthews"),
    _super_glue(
        "multirc",
        "question answer paragraph",
        "False True",
        score=by_question,
        primary="f1a",
        group="{idx[paragraph]}-{idx[question]}",
        prepare=without_markup,
    ),
    _super_glue("boolq", "question passage", "False True"),
    _super_glue("wic", "sentence1 sentence2 word", "False True"),
    _super_glue(
        "wsc",
        "text",
        "False True",
        config="wsc.fixed",
        prepare=with_marks,
        columns=("span1_text", "span1_index", "span2_text", "span2_index"),
    ),
    _super_glue("cb", "hypothesis premise", "entailment contradiction neutral", score=accuracy_and_macro_f1),
    _mrqa("naturalquestions", "NaturalQuestionsShort"),
    _mrqa("hotpotqa", "HotpotQA"),
    _mrqa("searchqa", "SearchQA"),
    _mrqa("newsqa", "NewsQA"),
    TextSpec(
        "winogrande",
        "allenai/winogrande",
        "sentence option1 option2",
        "1 2",
        config="winogrande_xl",
        keys="1 2",
        label="answer",
        splits=HELD_OUT,
    ),
    TextSpec("yelp2", "fancyzhx/yelp_polarity", "sentence=text", "negative positive", splits=YELP),
    TextSpec(
        "scitail",
        "allenai/scitail",
        "hypothesis=sentence2 premise=sentence1",
        "entailment neutral",
        config="snli_format",
        keys="entailment neutral",
        label="gold_label",
    ),
    TextSpec(
        "paws",
        "google-research-datasets/paws",
        TWO_SENTENCES,
        "not_equivalent equivalent",
        config="labeled_final",
        splits=PUBLISHED,
    ),
    TextSpec("snippets", "", "sentence", "negative positive", splits=PUBLISHED),
)
TEXT_TASKS = {spec.name: spec for spec in _TABLE}
"""Text tasks by name. The published hyper-parameters use these names (`presets.PAPER`)."""
