"""Rows of every task without images, as they are published."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
SPLITS = ("train", "validation", "test")
PUBLISHED_SPLITS = (*SPLITS, "validation_matched", "validation_mismatched")
COUNT = 40
"""Rows of each published split."""


@dataclass(frozen=True)
class Sample:
    """Rows as published, and what becomes of the first."""

    rows: Rows
    text: str
    answers: list[str]
    group: str = ""


def labelled(rows: Rows, labels: Sequence[Any] = (0, 1)) -> Rows:
    """GLUE's and SuperGLUE's two columns, the label by turns."""
    return [{**row, "label": labels[n % len(labels)], "idx": n} for n, row in enumerate(rows)]


def mrqa(subset: str) -> Sample:
    """MRQA's columns; the rows of other subsets lie among its own."""
    context = "The tower [SEP] was built in 1889\n by Eiffel's company."
    row: dict[str, Any] = {
        "context": context,
        "context_tokens": {"tokens": ["The", "tower"], "offsets": [0, 4]},
        "qid": "0f1e",
        "question": "When was it built?",
        "question_tokens": {"tokens": ["When"], "offsets": [0]},
        "detected_answers": {
            "text": ["1889"],
            "char_spans": [{"start": [29], "end": [32]}],
            "token_spans": [{"start": [6], "end": [6]}],
        },
        "answers": ["1889", "in 1889"],
    }
    who = {"question": "Who built it?", "answers": ["Eiffel's company"]}
    return Sample(
        [{"subset": subset, **row}, {"subset": "SQuAD", **row}, {"subset": subset, **row, **who}],
        "question: When was it built? context: The tower [SEP] was built in 1889 by Eiffel's company.",
        ["1889", "in 1889"],
    )


PAIR = [
    {"sentence1": "Rain fell all day.", "sentence2": "It was wet."},
    {"sentence1": "She sold the car.", "sentence2": "She owns {it}."},
]
SAMPLES = {
    "mnli": Sample(
        labelled([{"premise": "Rain fell.", "hypothesis": "It was wet."}] * 3, (0, 1, 2)),
        "mnli hypothesis: It was wet. premise: Rain fell.",
        ["entailment"],
    ),
    "qqp": Sample(
        labelled([{"question1": "How old is it?", "question2": "What is its age?"}] * 2, (1, 0)),
        "qqp question1: How old is it? question2: What is its age?",
        ["duplicate"],
    ),
    "qnli": Sample(
        labelled([{"question": "Who rang?", "sentence": "Ann rang twice."}] * 2),
        "qnli question: Who rang? sentence: Ann rang twice.",
        ["entailment"],
    ),
    "sst2": Sample(
        labelled([{"sentence": "a joy throughout "}, {"sentence": "dull"}], (1, 0)),
        "sst2 sentence: a joy throughout",
        ["positive"],
    ),
    "stsb": Sample(
        labelled(PAIR, (3.25, 1.0)),
        "stsb sentence1: Rain fell all day. sentence2: It was wet.",
        ["3.2"],
    ),
    "mrpc": Sample(
        labelled(PAIR, (1, 0)),
        "mrpc sentence1: Rain fell all day. sentence2: It was wet.",
        ["equivalent"],
    ),
    "rte": Sample(
        labelled(PAIR),
        "rte sentence1: Rain fell all day. sentence2: It was wet.",
        ["entailment"],
    ),
    "cola": Sample(
        labelled([{"sentence": "They left."}, {"sentence": "They leaved did."}], (1, 0)),
        "cola sentence: They left.",
        ["acceptable"],
    ),
    "multirc": Sample(
        [
            {
                "paragraph": "<b>Sent 1: </b>Ann rang.<br><b>Sent 2: </b>Bob slept.<br>",
                "question": "Who rang?",
                "answer": answer,
                "idx": {"paragraph": 7, "question": 3, "answer": number},
                "label": label,
            }
            for number, (answer, label) in enumerate([("Ann", 1), ("Bob", 0)])
        ],
        "multirc question: Who rang? answer: Ann paragraph: Sent 1: Ann rang. Sent 2: Bob slept.",
        ["True"],
        "7-3",
    ),
    "boolq": Sample(
        labelled([{"question": "is it old", "passage": "Tower -- It was built long ago."}] * 2, (1, 0)),
        "boolq question: is it old passage: Tower -- It was built long ago.",
        ["True"],
    ),
    "wic": Sample(
        labelled(
            [
                {
                    "word": "place",
                    "sentence1": "Do you want to come over to my place?",
                    "sentence2": "A political system with no place for it.",
                    "start1": 31,
                    "start2": 27,
                    "end1": 36,
                    "end2": 32,
                }
            ]
            * 2
        ),
        "wic sentence1: Do you want to come over to my place? sentence2: A political system with no place "
        "for it. word: place",
        ["False"],
    ),
    "wsc": Sample(
        labelled(
            [
                {
                    "text": "Mark told Pete many lies about himself.",
                    "span1_index": 0,
                    "span2_index": 6,
                    "span1_text": "Mark",
                    "span2_text": "himself",
                }
            ]
            * 2
        ),
        "wsc text: * Mark * told Pete many lies about # himself #.",
        ["False"],
    ),
    "cb": Sample(
        labelled([{"premise": "Rain fell.", "hypothesis": "It was dry."}] * 3, (1, 0, 2)),
        "cb hypothesis: It was dry. premise: Rain fell.",
        ["contradiction"],
    ),
    "naturalquestions": mrqa("NaturalQuestionsShort"),
    "hotpotqa": mrqa("HotpotQA"),
    "searchqa": mrqa("SearchQA"),
    "newsqa": mrqa("NewsQA"),
    "winogrande": Sample(
        [
            {
                "sentence": "Ann asked Bea to help since _ was tired.",
                "option1": "Ann",
                "option2": "Bea",
                "answer": answer,
            }
            for answer in ("2", "1")
        ],
        "winogrande sentence: Ann asked Bea to help since _ was tired. option1: Ann option2: Bea",
        ["2"],
    ),
    "yelp2": Sample(
        [{"text": "Never again.", "label": 0}, {"text": "Friendly!", "label": 1}],
        "yelp2 sentence: Never again.",
        ["negative"],
    ),
    "scitail": Sample(
        [
            {
                "sentence1_binary_parse": "( Salt dissolves )",
                "sentence1_parse": "(S Salt dissolves)",
                "sentence1": "Salt dissolves in water.",
                "sentence2_parse": "(S It mixes)",
                "sentence2": "Water dissolves salt.",
                "annotator_labels": [label],
                "gold_label": label,
            }
            for label in ("entailment", "neutral")
        ],
        "scitail hypothesis: Water dissolves salt. premise: Salt dissolves in water.",
        ["entailment"],
    ),
    "paws": Sample(
        [{"id": 1 + label, **PAIR[label], "label": label} for label in (0, 1)],
        "paws sentence1: Rain fell all day. sentence2: It was wet.",
        ["not_equivalent"],
    ),
    "snippets": Sample(
        [{"sentence": "dull", "label": 0, "rating": -2.0}, {"sentence": "fun", "label": 1, "rating": 1.5}],
        "snippets sentence: dull",
        ["negative"],
    ),
}


def rows_of(name: str, count: int = COUNT) -> Rows:
    rows = SAMPLES[name].rows
    return [rows[n % len(rows)] for n in range(count)]


def write_lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_splits(folder: Path, name: str) -> Path:
    """A folder with a file for each split that any data set publishes."""
    for split in PUBLISHED_SPLITS:
        write_lines(folder / f"{split}.jsonl", rows_of(name))
    return folder
