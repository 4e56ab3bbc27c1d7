"""The answers that VQAv2 learns, on real questions: all of them, or the published labels."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dept_vl._utils.errors import DamagedFileError, UsageError
from dept_vl.data.sampling import TrainingDraws
from dept_vl.tasks import TASKS
from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.prepare.commands import answer_list
from dept_vl.tasks.vqav2 import ANSWER_LIST, PUBLISHED_LIST, SCHEMA, VQAv2

FILE = Path(__file__).parents[1] / "fixtures" / "vqa" / "real_questions.jsonl.gz"
WEIGHTS = {1: 0.3, 2: 0.6, 3: 0.9}
"""Of an answer by the number of annotators who gave it; 1 for more."""
Questions = list[dict[str, Any]]


@pytest.fixture(scope="module")
def real() -> Questions:
    return [json.loads(line) for line in gzip.decompress(FILE.read_bytes()).decode().splitlines()]


def task_of(questions: Questions, answer_list: frozenset[str] | None = None) -> VQAv2:
    kept = {"image_id": 0, "subtype": "", "answer_type": "", "question_type": ""}
    records = [
        kept | {name: one[name] for name in ("question_id", "question", "answers")} for one in questions
    ]
    return VQAv2(Rows.of(records, SCHEMA), {"": Path()}, answer_list=answer_list)


def test_published_labels_are_those_of_their_definition(real: Questions, tmp_path: Path) -> None:
    task = task_of(real).with_published_labels(tmp_path)
    listed = set(json.loads(PUBLISHED_LIST.read_text(encoding="utf-8"))["answers"])
    assert len(listed) == 3129
    assert task.answer_list == listed
    unlabelled = 0
    for place, one in enumerate(real):
        answers = one["answers"]
        expected = {text: WEIGHTS.get(answers.count(text), 1.0) for text in answers if text in listed}
        if expected:
            assert dict(task[place].targets) == expected
        else:
            unlabelled += 1
            assert [score for _, score in task[place].targets] == [0.0]
    assert unlabelled == 32


def test_labels_of_all_answers_are_others(real: Questions, tmp_path: Path) -> None:
    published, everything = task_of(real).with_published_labels(tmp_path), task_of(real)
    assert published.answer_list is not None
    same, outside = 0, 0.0
    for place in range(len(real)):
        labels = dict(everything[place].targets)
        same += labels == dict(published[place].targets)
        unlisted = sum(score for text, score in labels.items() if text not in published.answer_list)
        outside += unlisted / sum(labels.values())
    # Of 60,000 questions 72.9% agree, and 10.4% of the draws are outside the list.
    assert same == 1445
    assert outside / len(real) == pytest.approx(0.1037, abs=1e-4)


def test_a_question_without_a_label_weighs_nothing(real: Questions) -> None:
    task = task_of(real[:20], frozenset({"2"}))
    draws = TrainingDraws([task], seed=0)
    for number in range(40):
        draw = draws[0, number]
        labelled = "2" in draw.example.answers
        assert (draw.weight > 0) == labelled
        assert (draw.target == "2") == labelled
    assert set(task.target_counts(20)) == {"2"}


def test_the_answer_list_is_rebuilt_by_its_rule(
    real: Questions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = Counter(one["multiple_choice_answer"] for one in real)
    for subtype, questions in {"train2014": real[::2], "val2014": real[1::2]}.items():
        path = tmp_path / f"v2_mscoco_{subtype}_annotations.json"
        path.write_text(json.dumps({"annotations": questions}))
    answer_list(tmp_path)
    rebuilt = json.loads((tmp_path / ANSWER_LIST).read_text())
    # These need no normalisation, and the published list has them all.
    assert rebuilt == sorted(text for text, count in usual.items() if count >= 9)
    assert len(rebuilt) == 20
    assert "20 of the 3,129 published ones, 0 others" in capsys.readouterr().out
    assert task_of(real).with_published_labels(tmp_path).answer_list == set(rebuilt)
    with pytest.raises(ValueError, match=r"the commonest is that of \d+"):
        answer_list(tmp_path, floor=2000)
    (tmp_path / ANSWER_LIST).write_text('{"answers": [1]}')
    with pytest.raises(DamagedFileError, match=ANSWER_LIST):
        task_of(real).with_published_labels(tmp_path)


@pytest.mark.parametrize("task", ["vqav2", "gqa", "nlvr2", "vqa"])
def test_questions_keep_their_case_where_that_is_asked_for(task: str) -> None:
    assert TASKS[task].source(" Is it NATO? ").endswith("is it nato?")
    assert TASKS[task].reading("keep").source(" Is it NATO? ").endswith("Is it NATO?")
    assert TASKS["coco"].reading("keep") == TASKS["coco"]


def test_other_tasks_have_no_published_labels() -> None:
    with pytest.raises(UsageError, match="gqa"):
        TASKS["gqa"].with_published_labels(Path())
