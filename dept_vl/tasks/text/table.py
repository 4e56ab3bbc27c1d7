"""The text tasks, a few lines each: where they are published, how they read, what is figured.

GLUE (Wang et al. 2019) and SuperGLUE (Wang et al. 2019), MRQA (Fisch et al. 2019), WinoGrande
(Sakaguchi et al. 2020), Yelp-2 (Zhang et al. 2015), SciTail (Khot et al. 2018), PAWS-Wiki (Zhang et al.
2019): the 21 text tasks of DePT, and the movie-review snippets of `snippets`.

Texts and words are those that T5 (Raffel et al. 2020) was trained on: the task's name, then every column
with its name before it, to be answered with the name of the class. Differences, each with its reason:

    boolq       the question before the passage, as ATTEMPT (Asai et al. 2022) has it and DePT took over,
                or a long passage would push the question out of the text
    wsc         T5's classification form, ` * ` around the noun and ` # ` around the pronoun, answered
                with True or False, which is what published figures are of; not T5's later form, in which
                the noun itself is generated
    MRQA        no spaces put around punctuation, since an answer so written is wrong to the scorer; the
                first of several answers is learnt, as in the literature
    paws        with the words that T5 knows from mrpc
    winogrande, yelp2, scitail    not T5's: as ATTEMPT's, in T5's manner

ATTEMPT and DePT answer with the number of the class instead of its name.

What DePT's released runs do otherwise, and changes a published number:

    no task name in front      here it is, as T5 was trained to read it; their text is ours without it
    the number of the class    see above; T5 was trained on the names
    one answer of MRQA's       learnt here too; scored both ways: `f1` and `em` over all human answers, as
                               MRQA has it, `f1_first` and `em_first` against the first alone, as theirs
    answers of 20 tokens       MRQA's, here 32; `--preset paper` cuts at 20 (`--max_answer_tokens`)
    chosen by                  MRQA by exact match, CB by macro F1; here by F1 and accuracy, which are
                               reported; `--preset paper` chooses as they do (`--choose_by`)
    yelp2                      their first 100,000 rows; here all 560,000, since no reason is given
    eps 1e-6, no decay         `--preset paper`; without it torch's 1e-8 and a decay of 1e-5
    P from a sentence          `--preset paper`; without it from common words, as Lester et al. (2021)
    few-shot                   `dept-vl transfer --preset paper`, see `data.shots`

Splits are those of this literature (ATTEMPT's code, taken over by MPT and DePT), since most test labels
are not published:

    HALVED      a small set's validation split is halved, into validation and test
    HELD_OUT    of a large set (over 10,000 to train on) 1,000 training examples are validation, and the
                validation split is test (yelp2 has no validation split and a test split with labels)
    mnli        the mismatched validation split is validation, the matched one test
    PUBLISHED   as they are (paws, snippets)

Which examples are drawn is the literature's too: the first of torch's permutation with seed 42.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from dept_vl.tasks.metrics.text import accuracy, f1, macro_f1, matthews, multirc, pearson, squad

Row = Mapping[str, Any]
"""A row of a data set as published."""


@dataclass(frozen=True)
class Part:
    """A part of a published split: all, `size` examples drawn (a tenth at most; 0: half), or the rest."""

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
    """Predictions, right answers and groups of examples; and the words of the classes, if there are any."""

    predictions: Sequence[str]
    answers: Sequence[Sequence[str]]
    groups: Sequence[str]
    classes: Sequence[str]

    @property
    def labels(self) -> list[str]:
        """The one right answer of each example."""
        return [given[0] for given in self.answers]

    @property
    def chosen(self) -> list[str]:
        """The predictions; of two classes, one that names neither becomes the one that is not the label."""
        negative, positive = self.classes
        opposite = {negative: positive, positive: negative}
        pairs = zip(self.predictions, self.labels, strict=True)
        return [prediction if prediction in opposite else opposite[label] for prediction, label in pairs]


Score = Callable[[Answered], dict[str, float]]
"""Metrics of a split, the primary one first."""


def accuracy_alone(split: Answered) -> dict[str, float]:
    """Accuracy; what is no class is wrong."""
    return {"accuracy": accuracy(split.predictions, split.labels)}


def accuracy_and_f1(split: Answered) -> dict[str, float]:
    """Accuracy, and F1 of the second class; as T5 has it, what is no class counts as the wrong one."""
    chosen, labels = split.chosen, split.labels
    return {"accuracy": accuracy(chosen, labels), "f1": f1(chosen, labels, positive=split.classes[1])}


def by_question(split: Answered) -> dict[str, float]:
    """MultiRC's F1 over all answers and share of questions without a mistake, among those of the split.

    A question's answers lie on both sides of the halved split, as in the literature.
    """
    return multirc(split.chosen, split.labels, split.groups, positive=split.classes[1])


def accuracy_and_macro_f1(split: Answered) -> dict[str, float]:
    """Accuracy, and the mean over the classes of their F1."""
    macro = macro_f1(split.predictions, split.labels, classes=split.classes)
    return {**accuracy_alone(split), "macro_f1": macro}


def matthews_alone(split: Answered) -> dict[str, float]:
    """Matthews correlation; what is no class is a class of its own, as T5 has it."""
    return {"matthews": matthews(split.predictions, split.labels)}


def pearson_alone(split: Answered) -> dict[str, float]:
    """Pearson correlation with the rounded scores; what is no number is -1, as T5 has it."""
    return {"pearson": pearson([number(text) for text in split.predictions], list(map(float, split.labels)))}


def words_of_answers(split: Answered) -> dict[str, float]:
    """Word F1 and exact match: MRQA's, the best over all human answers; and with the first of them alone.

    The latter (`f1_first`, `em_first`) is how DePT's code scores.
    """
    best = squad(split.predictions, split.answers)
    alone = squad(split.predictions, [given[:1] for given in split.answers])
    return {"f1": best["f1"], "em": best["em"], "f1_first": alone["f1"], "em_first": alone["em"]}


def number(text: str) -> float:
    """Return the number that a text is, -1 if it is none."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if abs(value) < float("inf") else -1.0  # neither of infinity and nan


def fifths(score: Any) -> str:
    """Round a similarity from 0 to 5 to the next 0.2, as T5 learns it; raise ValueError for another."""
    value = float(score)
    if not 0 <= value <= 5:
        raise ValueError(f"expected a number from 0 to 5, found {score!r}")
    return f"{round(value * 5) / 5:.1f}"


def without_markup(row: Row) -> Row:
    """MultiRC's columns without their HTML."""
    plain = {}
    for name in ("question", "answer", "paragraph"):
        text = str(row[name]).replace("<br>", " ")
        plain[name] = text.replace("<b>", "").replace("</b>", "")
    return {**row, **plain}


def with_marks(row: Row) -> Row:
    """Put ` * ` around the noun (span 1) and ` # ` around the pronoun (span 2) of WSC's text.

    Spans begin at a numbered word. What is marked there is the span, however its letters are written, or,
    where something else stands there, as many whole words. Raise ValueError if the text has no such word.
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
    """What there is to know of a text task.

    Attributes:
        name: In the registry, and in front of the text.
        dataset: Its name on the Hub; empty where it is on none.
        reads: The columns that go into the text, in order; `premise=sentence1` names one otherwise.
        classes: Names of the classes 0, 1, ...; none where answers are free.
        config: Its configuration there.
        keys: What the classes are called in the data, where not 0, 1, ...
        task_name: Whether the text begins with the name of the task.
        label: Column of the label, the number or the answers.
        splits: What ours are made from.
        score: Its metrics.
        primary: The first of them, that papers report.
        answer: Free answers only: how a label is written; None for a column that lists the answers.
        group: What examples that are scored together have in common.
        only: Column and value of the rows that are of this task; a copy without the column has no others.
        prepare: Changes a row before its text is written.
        columns: What `prepare` needs besides.
        max_new_tokens: Longest answer, in tokens.
    """

    name: str
    dataset: str
    reads: str
    classes: str = ""
    config: str | None = None
    keys: str = ""
    task_name: bool = True
    label: str = "label"
    splits: Mapping[str, Part] = field(default_factory=lambda: HALVED)
    score: Score = accuracy_alone
    primary: str = "accuracy"
    answer: Callable[[Any], str] | None = None
    group: str = ""
    only: tuple[str, str] | None = None
    prepare: Callable[[Row], Row] = dict
    columns: tuple[str, ...] = ()
    max_new_tokens: int = 16

    @cached_property
    def text(self) -> str:
        """The template of the text that the encoder reads."""
        pairs = (read.partition("=") for read in self.reads.split())
        parts = [f"{shown}: {{{column or shown}}}" for shown, _, column in pairs]
        return " ".join([self.name, *parts] if self.task_name else parts)

    @cached_property
    def words(self) -> dict[str, str]:
        """Label -> the word that stands for it."""
        names = self.classes.split()
        return dict(zip(self.keys.split() or map(str, range(len(names))), names, strict=True))


TWO_SENTENCES = "sentence1 sentence2"


def _glue(name: str, reads: str, classes: str = "", **others: Any) -> TextSpec:
    return TextSpec(name, "nyu-mll/glue", reads, classes, **{"config": name, **others})


def _super_glue(name: str, reads: str, classes: str, **others: Any) -> TextSpec:
    return TextSpec(name, "aps/super_glue", reads, classes, **{"config": name, **others})


def _mrqa(name: str, subset: str) -> TextSpec:
    """Return a task of MRQA, told by its name in the column `subset`."""
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
"""By the names that the published hyper-parameters go by (`presets.PAPER`)."""
