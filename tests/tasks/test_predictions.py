"""Prediction files: written, read back, and refused with one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat, check_ids

VQA = PredictionFormat("question_id", "answer", "int")
GQA = PredictionFormat("questionId", "prediction", "str")
NLVR2 = PredictionFormat("identifier", "prediction", "str", "lines")
NUMBERED = PredictionFormat("id", "answer", "int", "lines")

# Lines end with any line break, have no blanks around them, and are split at commas.
cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\n,"), max_size=12).map(str.strip)
answers = st.dictionaries(st.integers(-(10**17), 10**17), cells, max_size=6)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "predictions"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(form: PredictionFormat, path: Path) -> str:
    """The message: one line, which begins with the file."""
    with pytest.raises(ValueError) as caught:
        form.read(path)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_written_as_the_servers_want(tmp_path: Path) -> None:
    path = tmp_path / f"results{VQA.suffix}"
    VQA.write({10: "two dogs", 9: "é"}, path)
    assert path.name == "results.json"
    assert path.read_bytes() == (
        b'[{"question_id": 9, "answer": "\\u00e9"}, {"question_id": 10, "answer": "two dogs"}]\n'
    )
    GQA.write({"07": "yes"}, path)
    assert json.loads(path.read_text()) == [{"questionId": "07", "prediction": "yes"}]
    path = tmp_path / f"results{NLVR2.suffix}"
    NLVR2.write({"dev-10-0-0": "true", "dev-9-0-1": "false", "dev-9-0-0": "true"}, path)
    assert path.name == "results.csv"
    assert path.read_bytes() == b"dev-9-0-0,true\ndev-9-0-1,false\ndev-10-0-0,true\n"


@pytest.mark.parametrize("form", [VQA, GQA, NLVR2, NUMBERED])
def test_order_is_that_of_the_ids(tmp_path: Path, form: PredictionFormat) -> None:
    """Whatever order they come in, so that the files of two runs can be compared."""
    numbers = [100, 9, 10, 2, 33]
    ids: list[ExampleId] = list(numbers) if form.id_type == "int" else [f"q{number}" for number in numbers]
    texts = [f"answer {number}" for number in numbers]
    written = []
    for order in (ids, ids[::-1]):
        answer_of = dict(zip(ids, texts, strict=True))
        form.write({key: answer_of[key] for key in order}, tmp_path / "x")
        written.append((tmp_path / "x").read_bytes())
    assert written[0] == written[1]
    assert [str(key).lstrip("q") for key in form.read(tmp_path / "x")] == ["2", "9", "10", "33", "100"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(predictions=answers)
@pytest.mark.parametrize("form", [VQA, GQA, NLVR2, NUMBERED])
def test_round_trip(tmp_path: Path, form: PredictionFormat, predictions: dict[int, str]) -> None:
    given_ids: dict[ExampleId, str] = {
        key if form.id_type == "int" else f'{key} "q" é': answer for key, answer in predictions.items()
    }
    path = tmp_path / "predictions"
    form.write(given_ids, path)
    assert form.read(path) == given_ids


def test_json_round_trip_of_any_text(tmp_path: Path) -> None:
    odd: dict[ExampleId, str] = {" 1\r\n": " \r\n\t\0\ud83d\u2028", "": ""}
    GQA.write(odd, tmp_path / "x")
    assert GQA.read(tmp_path / "x") == odd


def test_lines_are_read_as_by_a_script_that_splits_at_commas(tmp_path: Path) -> None:
    text = 'dev-1-0-0,true\r\n\n  dev-2-0-0, True \ndev-3-0-0,"True"\ndev-4-0-0,False,sure\rdev-5-0-0,\n'
    assert NLVR2.read(write(tmp_path, text)) == {
        "dev-1-0-0": "true",
        "dev-2-0-0": " True",
        "dev-3-0-0": '"True"',
        "dev-4-0-0": "False",
        "dev-5-0-0": "",
    }
    assert "line 2: expected lines of identifier,prediction" in refused(NLVR2, write(tmp_path, "a,true\nb\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dev-1\n", "line 1: expected lines of identifier,prediction, found 'dev-1'"),
        ("a,true\rb,false\rc", "line 3"),
        ("a,true\nb,true\na,false\n", "line 3: identifier 'a' is there twice"),
        (b"a,\xff\n", "utf-8"),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in refused(NLVR2, write(tmp_path, content))


@pytest.mark.parametrize("key", ["x", "1.0", "", "1 2", "0x1", "1_0", "٣", "9" * 5000])
def test_ids_of_lines_that_are_no_numbers_are_refused(tmp_path: Path, key: str) -> None:
    assert "line 2: expected 'id' to be int, found '" in refused(NUMBERED, write(tmp_path, f"1,a\n{key},b\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found something else (Expecting value"),
        ("  \n", "found something else"),
        ("[", "found something else"),
        ('[{"question_id": 1, "answer": "a"}] x', "found something else (Extra data"),
        (b'[{"question_id": 1, "answer": "\xff"}]', "found something else ('utf-8'"),
        ("[" * 100_000, "found something else (it is nested too deeply"),
        ('[{"question_id": ' + "9" * 5000 + ', "answer": "a"}]', "found something else (Exceeds the limit"),
        ('{"1": "a"}', 'a list of {"question_id": int, "answer": str}, found dict'),
        ('"text"', "found str"),
        ("null", "found NoneType"),
        ("[1]", "entry 0: expected a list of"),
        ('[{"question_id": 1, "answer": "a"}, {"question_id": 2}]', "entry 1: expected a list of"),
        ('[{"answer": "a"}]', "entry 0: expected a list of"),
        ('[{"questionId": "1", "prediction": "a"}]', "found {'questionId': '1', 'prediction': 'a'}"),
        ('[{"question_id": true, "answer": "a"}]', "entry 0: expected 'question_id' to be int, found True"),
        ('[{"question_id": 1.0, "answer": "a"}]', "expected 'question_id' to be int, found 1.0"),
        ('[{"question_id": "1", "answer": "a"}]', "expected 'question_id' to be int, found '1'"),
        ('[{"question_id": null, "answer": "a"}]', "expected 'question_id' to be int, found None"),
        ('[{"question_id": [1], "answer": "a"}]', "expected 'question_id' to be int, found [1]"),
        ('[{"question_id": 1, "answer": null}]', "entry 0: expected 'answer' to be text, found None"),
        ('[{"question_id": 1, "answer": 2}]', "expected 'answer' to be text, found 2"),
        ('[{"question_id": 1, "answer": ["a"]}]', "expected 'answer' to be text, found ['a']"),
        (
            '[{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "a"}]',
            "entry 1: question_id 1 is there twice; keep one prediction for each",
        ),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in refused(VQA, write(tmp_path, content))


@pytest.mark.parametrize("key", [1, 1.5, True, None, ["1"]])
def test_json_ids_that_are_no_text_are_refused(tmp_path: Path, key: Any) -> None:
    path = write(tmp_path, json.dumps([{"questionId": key, "prediction": "a"}]))
    assert f"expected 'questionId' to be str, found {key!r}" in refused(GQA, path)


def test_long_content_is_not_shown_whole(tmp_path: Path) -> None:
    long = 10_000 * "a\n"
    for row in ({"other": long}, {"question_id": long, "answer": ""}, {"question_id": 1, "answer": [long]}):
        assert len(refused(VQA, write(tmp_path, json.dumps([row])))) < 400
    assert len(refused(NLVR2, write(tmp_path, '"' + long[:50_000] + '"'))) < 400


def test_further_fields_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff[{"question_id": 1, "confidence": 0.5, "answer": "a"}]\r\n')
    assert VQA.read(path) == {1: "a"}


def test_no_predictions(tmp_path: Path) -> None:
    """No error here: that they are missing `check_ids` says."""
    for form, content in ((VQA, "[]"), (NLVR2, ""), (NLVR2, "\n\n")):
        assert form.read(write(tmp_path, content)) == {}
        form.write({}, tmp_path / "x")
        assert form.read(tmp_path / "x") == {}


@pytest.mark.parametrize("form", [VQA, NLVR2])
def test_missing_file_is_told(tmp_path: Path, form: PredictionFormat) -> None:
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a file of predictions at ") as caught:
            form.read(path)
        assert str(path) in str(caught.value)


def test_ids_of_all_examples_pass() -> None:
    check_ids([1, 2, 3], {3: "a", 1: "b", 2: "c"}, "vqav2")
    check_ids(iter(["a", "b"]), iter(["b", "a"]), "gqa")
    check_ids([], [], "empty")


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        ([1, 2, 3], [2], "3 examples, found 1: 2 missing (first: 1, 3)"),
        ([1], [1, 5, 4], "1 examples, found 3: 2 that belong to no example (first: 5, 4)"),
        (
            ["a", "b"],
            ["b", "c"],
            "2 examples, found 2: 1 missing (first: 'a') and 1 that belong to no example (first: 'c')",
        ),
        # The same number as text is another id, which the message shows.
        (
            [7],
            ["7"],
            "1 examples, found 1: 1 missing (first: 7) and 1 that belong to no example (first: '7')",
        ),
        (range(5000), [], "5,000 examples, found 0: 5,000 missing (first: 0, 1, 2)"),
        ([], range(2), "0 examples, found 2: 2 that belong to no example (first: 0, 1)"),
    ],
)
def test_other_ids_are_told(expected: Any, found: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_ids(expected, found, "vqav2")
    assert str(caught.value) == f"vqav2: expected one prediction for each of the {message}"
