"""Files of predictions scored from the command line: the official figures, and errors in one line."""

import io
import json
import os
import runpy
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import test_metrics_gqa as gqa
import test_metrics_nlvr2 as nlvr2
import test_metrics_vqa as vqa

from dept_vl._utils.errors import UsageError
from dept_vl.cli import call
from dept_vl.tasks import score
from dept_vl.tasks.metrics.caption import Figures, score_captions

SCRIPT = Path(__file__).parents[2] / "scripts" / "score.py"
Arguments = list[str]


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def rows(predictions: Mapping[Any, str], id_key: str, answer_key: str) -> list[dict[str, Any]]:
    return [{id_key: key, answer_key: answer} for key, answer in predictions.items()]


@pytest.fixture
def vqav2_files(tmp_path: Path) -> Arguments:
    """The fixture as the official files."""
    questions = [
        {"question_id": case["question_id"], "image_id": 1, "question": "what is it?"} for case in vqa.CASES
    ]
    annotations = [
        {key: case[key] for key in ("question_id", "question_type", "answer_type", "answers")}
        for case in vqa.CASES
    ]
    predictions = {case["question_id"]: case["prediction"] for case in vqa.CASES}
    return [
        *["vqav2", "--questions", write(tmp_path / "questions.json", {"questions": questions})],
        *["--annotations", write(tmp_path / "annotations.json", {"annotations": annotations})],
        *["--predictions", write(tmp_path / "predictions.json", rows(predictions, "question_id", "answer"))],
    ]


@pytest.fixture
def gqa_files(tmp_path: Path) -> Arguments:
    questions = {row["question_id"]: {"imageId": "1", **gqa.official_record(row)} for row in gqa.ROWS}
    predictions = rows(gqa.PREDICTIONS, "questionId", "prediction")
    return [
        *["gqa", "--questions", write(tmp_path / "questions.json", questions)],
        *["--predictions", write(tmp_path / "predictions.json", predictions)],
        *["--choices", write(tmp_path / "choices.json", gqa.CHOICES)],
    ]


@pytest.fixture
def nlvr2_files(tmp_path: Path) -> Arguments:
    examples, predictions = tmp_path / "dev.json", tmp_path / "predictions.csv"
    examples.write_text(
        "".join(
            json.dumps({"identifier": identifier, "label": label, "sentence": "It is so."}) + "\n"
            for identifier, label in nlvr2.EXAMPLES
        )
    )
    predictions.write_text("".join(f"{key},{answer}\n" for key, answer in nlvr2.PREDICTIONS.items()))
    return ["nlvr2", "--examples", str(examples), "--predictions", str(predictions)]


@pytest.fixture
def coco_files(tmp_path: Path) -> Arguments:
    captions = {7: ["A red dog.", "a dog that is red"], 3: ["Two cats sit.", "cats"]}
    annotations = [
        {"id": 10 * image_id + number, "image_id": image_id, "caption": caption}
        for image_id, given in captions.items()
        for number, caption in enumerate(given)
    ]
    predictions = rows({3: "two cats", 7: "a red dog runs"}, "image_id", "caption")
    return [
        *["coco", "--references", write(tmp_path / "captions.json", {"annotations": annotations})],
        *["--predictions", write(tmp_path / "predictions.json", predictions)],
    ]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the slow scorer of captions is asked, instead of asking it."""
    calls: list[dict[str, Any]] = []

    def scorer(references: Any, predictions: Any, *, spice: bool) -> Figures:
        calls.append({"references": references, "predictions": predictions, "spice": spice})
        names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L")
        figures = {name: float(n) for n, name in enumerate(names, start=1)} | {"CIDEr": 112.5}
        return figures | ({"SPICE": 8.0} if spice else {}) | {"scale": 100, "n": len(references)}

    monkeypatch.setattr(score, "score_captions", scorer)
    return calls


def figures_of(arguments: Sequence[str]) -> dict[str, Any]:
    figures = call(score.COMMANDS, "score", "", list(arguments))
    assert isinstance(figures, dict)
    return figures


def scored(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """The figures, which --json writes as they are."""
    figures = figures_of([*arguments, "--json", str(folder / "figures.json")])
    written: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    assert list(written.items()) == list(figures.items())
    return written


def refused(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line with which the program ends."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    said = io.StringIO()
    with pytest.raises(SystemExit) as end, redirect_stderr(said):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code in (1, 2)
    (line,) = said.getvalue().splitlines()
    return line.removeprefix("dept-vl: error: ")


def value_of(arguments: Arguments, flag: str) -> Path:
    return Path(arguments[arguments.index(flag) + 1])


def without_last(arguments: Arguments) -> str:
    """Take the last prediction out of the file; returns its id."""
    path = value_of(arguments, "--predictions")
    if path.suffix == ".csv":
        *kept, last = path.read_text().splitlines(keepends=True)
        path.write_text("".join(kept))
        return last.split(",")[0]
    *others, gone = json.loads(path.read_text())
    write(path, others)
    return str(next(iter(gone.values())))


def test_vqav2_as_official(
    vqav2_files: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scored(vqav2_files, tmp_path) == vqa.FIXTURE_TOTALS
    table = capsys.readouterr().out
    for part in ("VQA accuracy, official (0-100)", "54.03", "perAnswerType: yes/no", "58.96", "320"):
        assert part in table


def test_vqav2_may_be_normalised_throughout(vqav2_files: Arguments) -> None:
    official = figures_of(vqav2_files)
    always = figures_of([*vqav2_files, "--normalisation", "always"])
    assert always["overall"] > official["overall"]


def test_gqa_as_official(gqa_files: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = scored(gqa_files, tmp_path)
    assert figures == gqa.EXPECTED
    assert list(figures) == list(gqa.EXPECTED)
    said = capsys.readouterr().out
    assert "left out" not in said
    for part in ("58.98", "0.1073", "accuracyPerStructuralType: choose: score", "lower is better"):
        assert part in said


def test_gqa_says_what_it_leaves_out(
    gqa_files: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = {key: answer for key, answer in gqa.PREDICTIONS.items() if key in gqa.CHOICES}
    assert len(predictions) < len(gqa.PREDICTIONS)
    write(value_of(gqa_files, "--predictions"), rows(predictions, "questionId", "prediction"))
    assert scored(gqa_files[:-2], tmp_path) == gqa.without(
        gqa.EXPECTED, "validity", "plausibility", "consistency"
    )
    assert "left out: validity, plausibility, consistency" in capsys.readouterr().out


def test_gqa_questions_without_answers_are_refused(
    gqa_files: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = value_of(gqa_files, "--questions")
    bare = {
        key: {name: record[name] for name in ("imageId", "question", "isBalanced")}
        for key, record in json.loads(path.read_text()).items()
    }
    write(path, bare)
    said = refused(gqa_files, monkeypatch)
    assert "questions.json: expected an answer to each question" in said


def test_nlvr2_as_official(
    nlvr2_files: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = scored(nlvr2_files, tmp_path)
    assert figures == nlvr2.EXPECTED
    assert list(figures) == list(nlvr2.EXPECTED)
    table = capsys.readouterr().out
    for part in ("NLVR2 (0-1)", "0.7973", "0.4525", "1,396"):
        assert part in table


def test_nlvr2_words_with_a_space_before_are_wrong_as_officially(
    nlvr2_files: Arguments, tmp_path: Path
) -> None:
    path = value_of(nlvr2_files, "--predictions")
    path.write_text(path.read_text().replace(",", ", "))
    assert scored(nlvr2_files, tmp_path)["accuracy"] == 0.0


def test_nlvr2_needs_labels(nlvr2_files: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    path = value_of(nlvr2_files, "--examples")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "label"}) + "\n" for r in records))
    assert "expected a label for each example, found 0 of 1396" in refused(nlvr2_files, monkeypatch)


def test_coco_asks_the_official_scorer(
    coco_files: Arguments, called: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = scored(coco_files, tmp_path)
    assert called == [
        {
            "references": {7: ["A red dog.", "a dog that is red"], 3: ["Two cats sit.", "cats"]},
            "predictions": {3: "two cats", 7: "a red dog runs"},
            "spice": False,
        }
    ]
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "scale", "n"]
    assert list(figures) == names
    assert (figures["CIDEr"], figures["scale"], figures["n"]) == (112.5, 100, 2)
    assert "112.50" in capsys.readouterr().out
    assert list(scored([*coco_files, "--spice"], tmp_path)) == [*names[:7], "SPICE", *names[7:]]


def test_coco_reads_karpathys_file(
    scenes: Path, called: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = scenes / "coco" / "dataset_coco.json"
    captions = {
        image["cocoid"]: [sentence["raw"] for sentence in image["sentences"]]
        for image in json.loads(file.read_text())["images"]
        if image["split"] == "test"
    }
    predictions = write(
        tmp_path / "predictions.json", rows(dict.fromkeys(captions, "a"), "image_id", "caption")
    )
    arguments = ["coco", "--references", str(file), "--predictions", predictions]
    assert figures_of([*arguments, "--split", "test"])["n"] == len(captions) == 6
    assert called[0]["references"] == captions
    assert "say which with --split" in refused(arguments, monkeypatch)
    assert "train, val, test; got 'tset'" in refused([*arguments, "--split", "tset"], monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime on the PATH")
def test_coco_figures_are_those_of_the_scorer(coco_files: Arguments, tmp_path: Path) -> None:
    expected = score_captions(
        {7: ["A red dog.", "a dog that is red"], 3: ["Two cats sit.", "cats"]},
        {3: "two cats", 7: "a red dog runs"},
    )
    assert scored(coco_files, tmp_path) == expected


@pytest.mark.parametrize(
    ("task", "first"),
    [("vqav2", "320 examples, found 319"), ("nlvr2", "1,396 examples, found 1,395"), ("coco", "1 missing")],
)
def test_a_missing_prediction_is_named(
    task: str, first: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = request.getfixturevalue(f"{task}_files")
    predictions = value_of(arguments, "--predictions")
    gone = without_last(arguments)
    said = refused(arguments, monkeypatch)
    assert first in said
    assert gone in said
    assert str(predictions) in said


def test_a_missing_balanced_answer_is_named(gqa_files: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = dict(gqa.PREDICTIONS)
    gone = next(iter(gqa.CHOICES))
    del predictions[gone]
    write(value_of(gqa_files, "--predictions"), rows(predictions, "questionId", "prediction"))
    assert gone in refused(gqa_files, monkeypatch)


def test_another_form_is_refused(
    vqav2_files: Arguments, nlvr2_files: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions of another task, a file cut short, and none at all."""
    path = value_of(vqav2_files, "--predictions")
    write(path, rows(gqa.PREDICTIONS, "questionId", "prediction"))
    assert '"question_id": int, "answer": str' in refused(vqav2_files, monkeypatch)
    path.write_text('[{"question_id": 2, "answ')
    assert str(path) in refused(vqav2_files, monkeypatch)
    path.unlink()
    assert f"expected a file of predictions at {path}" in refused(vqav2_files, monkeypatch)
    predictions = value_of(nlvr2_files, "--predictions")
    predictions.write_text("dev-305-3-1;False\n")
    assert "line 1: expected lines of identifier,prediction" in refused(nlvr2_files, monkeypatch)


def test_missing_data_and_an_output_that_cannot_be_written_end_in_a_line(
    nlvr2_files: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = str(tmp_path / "nowhere" / "figures.json")
    assert nowhere in refused([*nlvr2_files, "--json", nowhere], monkeypatch)
    value_of(nlvr2_files, "--examples").unlink()
    assert "NLVR2 file not found" in refused(nlvr2_files, monkeypatch)


@pytest.mark.parametrize("option", ["--questions", "--predictions"])
def test_no_file_that_is_read_is_overwritten(gqa_files: Arguments, option: str) -> None:
    file = Path(gqa_files[gqa_files.index(option) + 1])
    before = file.read_bytes()
    with pytest.raises(UsageError, match="would overwrite"):
        call(score.COMMANDS, "score", "", [*gqa_files, "--json", str(file)])
    assert file.read_bytes() == before


def test_captions_without_java_or_scorer_end_in_a_line(
    coco_files: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "java" in refused(coco_files, monkeypatch).lower()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert "no `java` is on the PATH" in refused(coco_files, monkeypatch)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.spice", None)
    assert "dept-vl[caption]" in refused(coco_files, monkeypatch)
