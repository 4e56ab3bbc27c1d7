"""Files for the servers: what is written passes, and what a server would turn away is named."""

import io
import json
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from dept_vl.cli import call
from dept_vl.tasks import TASKS, load_task
from dept_vl.tasks.base import Task
from dept_vl.tasks.score import CHECKS

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_submission.py"
QUESTIONS = {
    "vqav2": "v2_OpenEnded_mscoco_test2015_questions.json",
    "gqa": "submission_all_questions.json",
}
KEYS = {"vqav2": ("question_id", "answer"), "gqa": ("questionId", "prediction")}


@pytest.fixture(params=KEYS)
def task(request: pytest.FixtureRequest, scenes: Path) -> Task:
    """The split that a server wants, of VQAv2, then of GQA."""
    return load_task(request.param, scenes / request.param, TASKS[request.param].server_split)


def test_the_tasks_with_a_server() -> None:
    assert [name for name, blank in TASKS.items() if blank.server_split] == list(KEYS)


@pytest.fixture
def rows(task: Task) -> list[dict[str, Any]]:
    """A submission that a server takes, in another order than the questions."""
    id_key, answer_key = KEYS[task.name]
    return [{id_key: key, answer_key: f"answer {key}"} for key in reversed(task.example_ids())]


@pytest.fixture
def check(task: Task, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the script on a file with this content; returns its last line, or the one with which it ends."""

    def run(content: object, questions: Path | None = None) -> str:
        path = tmp_path / "submission.json"
        path.write_text(json.dumps(content))
        questions = questions or scenes / task.name / QUESTIONS[task.name]
        arguments = [task.name, "--questions", str(questions), "--predictions", str(path)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        said = io.StringIO()
        with pytest.raises(SystemExit) as end, redirect_stderr(said):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert end.value.code == 1
        (line,) = said.getvalue().splitlines()
        return line

    return run


def test_a_whole_split_is_written_and_passes(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "submission.json"
    predictions = {key: f"answer {key}" for key in reversed(task.example_ids())}
    submission = task.write_submission(predictions, path)
    assert (submission.path, submission.answered, submission.filled) == (path, len(task), 0)
    id_key, answer_key = KEYS[task.name]
    written = json.loads(path.read_text())
    assert [row[id_key] for row in written] == sorted(task.example_ids(), key=int)
    assert all(row == {id_key: row[id_key], answer_key: f"answer {row[id_key]}"} for row in written)
    assert task.prediction_format.read(path, task.example_ids()) == predictions


def test_what_a_phase_does_not_score_is_left_empty(scenes: Path, tmp_path: Path) -> None:
    dev, whole = (load_task("vqav2", scenes / "vqav2", split) for split in ("test-dev", "test"))
    asked = dev.example_ids()
    assert 0 < len(asked) < len(whole)
    path = tmp_path / "submission.json"
    submission = whole.write_submission(dict.fromkeys(asked, "2"), path)
    assert (submission.answered, submission.filled) == (len(asked), len(whole) - len(asked))
    written = {row["question_id"]: row["answer"] for row in json.loads(path.read_text())}
    assert written == {key: "2" if key in asked else "" for key in whole.example_ids()}


def test_a_prediction_of_no_question_is_refused_and_nothing_written(task: Task, tmp_path: Path) -> None:
    stranger = 424242 if task.name == "vqav2" else "424242"
    predictions = {**dict.fromkeys(task.example_ids(), "yes"), stranger: "no"}
    with pytest.raises(ValueError, match=rf"1 that belong to no example \(first: {stranger!r}\)") as error:
        task.write_submission(predictions, tmp_path / "submission.json")
    assert f"the submission of {task.name}" in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_the_script_counts_what_passes(
    task: Task,
    rows: list[dict[str, Any]],
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "submission.json"
    path.write_text(json.dumps(rows))
    questions = scenes / task.name / QUESTIONS[task.name]
    flags = ["--questions", str(questions), "--predictions", str(path)]
    count = call(CHECKS, "check", "", [task.name, *flags])
    assert count == len(task) == 24
    assert capsys.readouterr().out == "24 predictions, one for each question\n"


def test_missing_ids_are_named(check: Callable[..., str], rows: list[dict[str, Any]], task: Task) -> None:
    id_key, _ = KEYS[task.name]
    said = check(rows[2:])
    assert "each of the 24 examples, found 22: 2 missing (first: " in said
    assert all(repr(row[id_key]) in said for row in rows[:2])
    assert "submission.json" in said


def test_unknown_ids_are_named(check: Callable[..., str], rows: list[dict[str, Any]], task: Task) -> None:
    id_key, _ = KEYS[task.name]
    stranger = type(rows[0][id_key])(999)
    said = check([*rows, rows[0] | {id_key: stranger}])
    assert f"found 25: 1 that belong to no example (first: {stranger!r})" in said
    # Missing and unknown ids together: the file of another split, most likely.
    said = check([rows[0] | {id_key: stranger}, *rows[1:]])
    assert f"1 missing (first: {rows[0][id_key]!r}) and 1 that belong to no example" in said


def test_ids_that_stand_there_twice_are_named(
    check: Callable[..., str], rows: list[dict[str, Any]], task: Task
) -> None:
    id_key, answer_key = KEYS[task.name]
    said = check([*rows, rows[3] | {answer_key: "another"}])
    assert f"entry 24: {id_key} {rows[3][id_key]!r} is there twice" in said


def test_another_form_is_refused(check: Callable[..., str], rows: list[dict[str, Any]], task: Task) -> None:
    """Ids of another type, answers that are no text, other keys, no list."""
    id_key, answer_key = KEYS[task.name]
    other = {int: str, str: int}[type(rows[0][id_key])]
    assert f"entry 0: expected '{id_key}' to be" in check([rows[0] | {id_key: other(rows[0][id_key])}])
    assert f"expected '{answer_key}' to be text, found 2" in check([rows[0] | {answer_key: 2}])
    assert "entry 1: expected a list of" in check([rows[0], {"id": 3, "text": "yes"}])
    assert f'expected a list of {{"{id_key}"' in check({"predictions": rows})


def test_missing_files_are_named(
    check: Callable[..., str], rows: list[dict[str, Any]], task: Task, scenes: Path, tmp_path: Path
) -> None:
    assert f"expected questions.json in {tmp_path}" in check(rows, tmp_path / "questions.json")
    with pytest.raises(FileNotFoundError, match="expected a file of predictions at"):
        task.prediction_format.read(tmp_path / "nowhere.json", task.example_ids())
