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
from typing import Any, Literal

from dept_vl.tasks.metrics.text import accuracy, f1, macro_f1, matthews, multirc, pearson, squad

Row = Mapping[str, Any]
"""A row of a data set as published."""

Answers = Sequence[Sequence[str]]
"""All right answers, of each example."""

Score = Callable[[Sequence[str], Answers, Sequence[str]], dict[str, float]]
"""Figures of predictions, from the right answers and the groups; the primary one first."""


@dataclass(frozen=True)
class Part:
    """What of a published split makes up one of ours.

    Attributes:
        split: The published one.
        side: `drawn` at random, the `rest`, or all.
        size: Examples drawn: a tenth of the split at most; 0 draws half.
    """

    split: str
    side: Literal["all", "drawn", "rest"] = "all"
    size: int = 0


HALVED = {
    "train": Part("train"),
    "validation": Part("validation", "drawn"),
    "test": Part("validation", "rest"),
}
HELD_OUT = {
    "train": Part("train", "rest", 1000),
    "validation": Part("train", "drawn", 1000),
    "test": Part("validation"),
}
PUBLISHED = {"train": Part("train"), "validation": Part("validation"), "test": Part("test")}
MNLI = PUBLISHED | {"validation": Part("validation_mismatched"), "test": Part("validation_matched")}
YELP = HELD_OUT | {"test": Part("test")}


def numbered(*words: str) -> dict[str, str]:
    """Words of the classes 0, 1, ..."""
    return {str(number): word for number, word in enumerate(words)}


def first(answers: Answers) -> list[str]:
    """The one right answer of each example."""
    return [given[0] for given in answers]


def accuracy_alone(predictions: Sequence[str], answers: Answers, groups: Sequence[str]) -> dict[str, float]:
    """Accuracy; what is no class is wrong."""
    return {"accuracy": accuracy(predictions, first(answers))}


def accuracy_and_f1(negative: str, positive: str) -> Score:
    """Accuracy, and F1 of the positive class; as T5 has it, what is no class counts as the wrong one."""

    def score(predictions: Sequence[str], answers: Answers, groups: Sequence[str]) -> dict[str, float]:
        labels = first(answers)
        chosen = wrong_where_no_class(predictions, labels, (negative, positive))
        return {"accuracy": accuracy(chosen, labels), "f1": f1(chosen, labels, positive=positive)}

    return score


def by_question(predictions: Sequence[str], answers: Answers, groups: Sequence[str]) -> dict[str, float]:
    """MultiRC's F1 over all answers and share of questions without a mistake, among those of the split.

    A question's answers lie on both sides of the halved split, as in the literature.
    """
    labels = first(answers)
    chosen = wrong_where_no_class(predictions, labels, ("False", "True"))
    return multirc(chosen, labels, groups, positive="True")


def accuracy_and_macro_f1(*words: str) -> Score:
    """Accuracy, and the mean over these classes of their F1."""

    def score(predictions: Sequence[str], answers: Answers, groups: Sequence[str]) -> dict[str, float]:
        labels = first(answers)
        return {
            "accuracy": accuracy(predictions, labels),
            "macro_f1": macro_f1(predictions, labels, classes=words),
        }

    return score


def matthews_alone(predictions: Sequence[str], answers: Answers, groups: Sequence[str]) -> dict[str, float]:
    """Matthews correlation; what is no class is a class of its own, as T5 has it."""
    return {"matthews": matthews(predictions, first(answers))}


def pearson_alone(predictions: Sequence[str], answers: Answers, groups: Sequence[str]) -> dict[str, float]:
    """Pearson correlation with the rounded scores; what is no number is -1, as T5 has it."""
    return {"pearson": pearson([number(text) for text in predictions], list(map(float, first(answers))))}


def words_of_answers(predictions: Sequence[str], answers: Answers, groups: Sequence[str]) -> dict[str, float]:
    """Word F1 and exact match: MRQA's, the best over all human answers; and with the first of them alone.

    The latter (`f1_first`, `em_first`) is how DePT's code scores.
    """
    figures, alone = squad(predictions, answers), squad(predictions, [given[:1] for given in answers])
    return {"f1": figures["f1"], "em": figures["em"], "f1_first": alone["f1"], "em_first": alone["em"]}


def wrong_where_no_class(
    predictions: Sequence[str], labels: Sequence[str], classes: tuple[str, str]
) -> list[str]:
    """Predictions; one that names neither class becomes the one that is not the label."""
    opposite = {classes[0]: classes[1], classes[1]: classes[0]}
    return [
        prediction if prediction in opposite else opposite[label]
        for prediction, label in zip(predictions, labels, strict=True)
    ]


def number(text: str) -> float:
    """The number that a text is, -1 if it is none."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if abs(value) < float("inf") else -1.0  # neither of infinity and nan


def fifths(score: Any) -> str:
    """A similarity from 0 to 5 as T5 learns it: rounded to the next 0.2.

    Raises:
        ValueError: If it is no such number.
    """
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
    """WSC's text with ` * ` around the noun (span 1) and ` # ` around the pronoun (span 2).

    Spans are told by the number of their first word. What is marked there is the span, however its
    letters are written, or, where something else stands there, as many whole words.

    Raises:
        ValueError: If the text has no such word.
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


def as_published(row: Row) -> Row:
    """The row."""
    return row


@dataclass(frozen=True)
class TextSpec:
    """What there is to know of a text task.

    Attributes:
        dataset: Its name on the Hub; empty where it is on none.
        config: Its configuration there.
        text: The source text, with the columns that go into it.
        words: Label -> the word that stands for it; none where answers are free.
        label: Column of the label, the number or the answers.
        splits: What ours are made from.
        score: Its figures.
        primary: The first of them, that papers report.
        answer: Free answers only: how a label is written; None for a column that lists the answers.
        group: What examples that are scored together have in common.
        only: Column and value of the rows that are of this task; a copy without the column has no others.
        prepare: Changes a row before its text is written.
        columns: What `prepare` needs besides.
        max_new_tokens: Longest answer, in tokens.
    """

    dataset: str
    config: str | None
    text: str
    words: Mapping[str, str] = field(default_factory=dict)
    label: str = "label"
    splits: Mapping[str, Part] = field(default_factory=lambda: HALVED)
    score: Score = accuracy_alone
    primary: str = "accuracy"
    answer: Callable[[Any], str] | None = None
    group: str = ""
    only: tuple[str, str] | None = None
    prepare: Callable[[Row], Row] = as_published
    columns: tuple[str, ...] = ()
    max_new_tokens: int = 16


GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


def mrqa(subset: str) -> TextSpec:
    """A task of MRQA, told by its name in the column `subset`."""
    return TextSpec(
        "mrqa-workshop/mrqa",
        None,
        "question: {question} context: {context}",
        label="answers",
        splits=HELD_OUT,
        score=words_of_answers,
        primary="f1",
        only=("subset", subset),
        max_new_tokens=32,
    )


TEXT_TASKS: dict[str, TextSpec] = {
    "mnli": TextSpec(
        GLUE,
        "mnli",
        "mnli hypothesis: {hypothesis} premise: {premise}",
        numbered("entailment", "neutral", "contradiction"),
        splits=MNLI,
    ),
    "qqp": TextSpec(
        GLUE,
        "qqp",
        "qqp question1: {question1} question2: {question2}",
        numbered("not_duplicate", "duplicate"),
        splits=HELD_OUT,
        score=accuracy_and_f1("not_duplicate", "duplicate"),
    ),
    "qnli": TextSpec(
        GLUE,
        "qnli",
        "qnli question: {question} sentence: {sentence}",
        numbered("entailment", "not_entailment"),
        splits=HELD_OUT,
    ),
    "sst2": TextSpec(
        GLUE,
        "sst2",
        "sst2 sentence: {sentence}",
        numbered("negative", "positive"),
        splits=HELD_OUT,
    ),
    "stsb": TextSpec(
        GLUE,
        "stsb",
        "stsb sentence1: {sentence1} sentence2: {sentence2}",
        answer=fifths,
        score=pearson_alone,
        primary="pearson",
    ),
    "mrpc": TextSpec(
        GLUE,
        "mrpc",
        "mrpc sentence1: {sentence1} sentence2: {sentence2}",
        numbered("not_equivalent", "equivalent"),
        score=accuracy_and_f1("not_equivalent", "equivalent"),
    ),
    "rte": TextSpec(
        GLUE,
        "rte",
        "rte sentence1: {sentence1} sentence2: {sentence2}",
        numbered("entailment", "not_entailment"),
    ),
    "cola": TextSpec(
        GLUE,
        "cola",
        "cola sentence: {sentence}",
        numbered("unacceptable", "acceptable"),
        score=matthews_alone,
        primary="matthews",
    ),
    "multirc": TextSpec(
        SUPER_GLUE,
        "multirc",
        "multirc question: {question} answer: {answer} paragraph: {paragraph}",
        numbered("False", "True"),
        score=by_question,
        primary="f1a",
        group="{idx[paragraph]}-{idx[question]}",
        prepare=without_markup,
    ),
    "boolq": TextSpec(
        SUPER_GLUE,
        "boolq",
        "boolq question: {question} passage: {passage}",
        numbered("False", "True"),
    ),
    "wic": TextSpec(
        SUPER_GLUE,
        "wic",
        "wic sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        numbered("False", "True"),
    ),
    "wsc": TextSpec(
        SUPER_GLUE,
        "wsc.fixed",
        "wsc text: {text}",
        numbered("False", "True"),
        prepare=with_marks,
        columns=("span1_text", "span1_index", "span2_text", "span2_index"),
    ),
    "cb": TextSpec(
        SUPER_GLUE,
        "cb",
        "cb hypothesis: {hypothesis} premise: {premise}",
        numbered("entailment", "contradiction", "neutral"),
        score=accuracy_and_macro_f1("entailment", "contradiction", "neutral"),
    ),
    "naturalquestions": mrqa("NaturalQuestionsShort"),
    "hotpotqa": mrqa("HotpotQA"),
    "searchqa": mrqa("SearchQA"),
    "newsqa": mrqa("NewsQA"),
    "winogrande": TextSpec(
        "allenai/winogrande",
        "winogrande_xl",
        "winogrande sentence: {sentence} option1: {option1} option2: {option2}",
        {"1": "1", "2": "2"},
        label="answer",
        splits=HELD_OUT,
    ),
    "yelp2": TextSpec(
        "fancyzhx/yelp_polarity",
        None,
        "yelp2 sentence: {text}",
        numbered("negative", "positive"),
        splits=YELP,
    ),
    "scitail": TextSpec(
        "allenai/scitail",
        "snli_format",
        "scitail hypothesis: {sentence2} premise: {sentence1}",
        {"entailment": "entailment", "neutral": "neutral"},
        label="gold_label",
    ),
    "paws": TextSpec(
        "google-research-datasets/paws",
        "labeled_final",
        "paws sentence1: {sentence1} sentence2: {sentence2}",
        numbered("not_equivalent", "equivalent"),
        splits=PUBLISHED,
    ),
    "snippets": TextSpec(
        "",
        None,
        "snippets sentence: {sentence}",
        numbered("negative", "positive"),
        splits=PUBLISHED,
    ),
}
"""By the names that the published hyper-parameters go by (`presets.PAPER`)."""
