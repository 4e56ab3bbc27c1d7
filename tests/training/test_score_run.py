"""A finished run scored again: on the split of the run, on others, and for the servers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from runs import files, forget_checksums, in_two_processes, reset_accelerate, with_

import dept_vl
from dept_vl._utils.errors import UsageError
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig, read_config
from dept_vl.data.splits import data_options, run_decoding
from dept_vl.tasks import TASKS, load_task
from dept_vl.tasks.base import limit
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training import score_run as score_run_module
from dept_vl.training.run import run
from dept_vl.training.score_run import Evaluated, score_run
from dept_vl.training.summary import RunResult

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@dataclass(frozen=True)
class Finished:
    """A run that was made once; nothing is written to its folder."""

    config: RunConfig
    result: RunResult
    folder: Path


@pytest.fixture(scope="module")
def finished(
    scenes: Path,
    make_run: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """On VQAv2, among its usual answers, with two beams."""
    data = DataOptions(
        data_dir=scenes / "vqav2", dev_split="val", dev_limit=4, candidate_floor=1, num_beams=2
    )
    config = make_run(data)
    config = replace(config, output_dir=tmp_path_factory.mktemp("runs") / "run")
    reset_accelerate()
    result = run(config)
    return Finished(config, result, result.output_dir)


@pytest.fixture
def evaluate(finished: Finished, tmp_path: Path) -> Callable[..., Evaluated]:
    """Scores the run with these options."""

    def call(**options: Any) -> Evaluated:
        options = {"output_dir": tmp_path / "evaluation"} | options
        return score_run(EvaluateConfig(run=finished.folder, **options))

    return call


def written(path: Path, id_key: str = "question_id", answer_key: str = "answer") -> dict[Any, str]:
    return {row[id_key]: row[answer_key] for row in json.loads(path.read_text())}


def test_the_split_of_the_run_is_scored_as_the_run_did(
    finished: Finished, evaluate: Callable[..., Evaluated], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(finished.folder)
    found = evaluate()
    assert found.evaluation.scores == finished.result.scores
    assert found.evaluation.predictions == written(finished.folder / "predictions.json")
    left = {"predictions.json", "scores.json", "answers.png", "report.html", ".checksums.json"}
    assert files(found.output_dir).keys() == left
    for name in ("predictions.json", "answers.png"):
        assert (found.output_dir / name).read_bytes() == before[name]
    assert json.loads((found.output_dir / "scores.json").read_text()) == finished.result.scores
    assert files(finished.folder) == before
    assert found.submission is None
    said = capsys.readouterr().out
    for part in ("vqav2 val: overall (0-100)", f"{found.evaluation.scores['overall']:.2f}", "24"):
        assert part in said


def test_the_script_reads_flags_and_names_a_folder_in_the_run(finished: Finished, tmp_path: Path) -> None:
    copy = shutil.copytree(finished.folder, tmp_path / "run")
    flags = ["--run", str(copy), "--split", "train", "--limit", "3", "--on_bad_image", "skip"]
    found = score_run(tyro.cli(EvaluateConfig, args=flags, use_underscores=True))
    assert found.output_dir == copy / "vqav2-train"
    assert len(written(copy / "vqav2-train" / "predictions.json")) == 3


def test_the_run_says_how_answers_are_decoded(finished: Finished) -> None:
    config = EvaluateConfig(run=finished.folder)
    options = data_options(config, finished.config)
    task = load_task("vqav2", options.data_dir, "val")
    decoding = run_decoding(config, options, task, task, 0)
    candidates = json.loads((finished.folder / "candidates.json").read_text())
    assert (decoding.num_beams, list(decoding.candidates)) == (2, candidates)
    more = replace(config, num_beams=3)
    assert run_decoding(more, data_options(more, finished.config), task, task, 0).num_beams == 3
    # Of another task than the run's: its own way.
    other = replace(config, task="coco", data_dir=options.data_dir.parent / "coco", split="val")
    options = data_options(other, finished.config)
    coco = load_task("coco", options.data_dir, "val")
    assert run_decoding(other, options, coco, coco, 0) == coco.decoding


def test_another_split(evaluate: Callable[..., Evaluated], scenes: Path) -> None:
    found = evaluate(split="train")
    task = load_task("vqav2", scenes / "vqav2", "train")
    assert found.evaluation.predictions.keys() == {*task.example_ids()}
    assert found.evaluation.scores == task.score(found.evaluation.predictions)


def test_own_data_are_the_same_rows_whichever_task_is_named(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("image,question,answer\na.png,what?,red\n")
    config = EvaluateConfig(run=finished.folder, own=OwnOptions(data=str(tmp_path / "own.csv")))
    options = data_options(config, finished.config)
    assert (options.task, options.test_split) == ("vqa", TASKS["vqa"].other_split)
    assert data_options(replace(config, task="vqav2"), finished.config) == options


def test_options_that_stay_as_in_the_run_are_told() -> None:
    run_options = OwnOptions(data="a", turns="all", metric="anls", split_seed=3)
    given = OwnOptions(data="b", metric="f1")
    assert given.kept_from(run_options) == "--turns all, --split_seed 3"
    assert given.over(run_options) == replace(run_options, data="b", metric="f1")
    assert OwnOptions().kept_from(OwnOptions()) == ""


def test_an_adapter_of_another_run_reads_questions_in_its_own_case(
    finished: Finished, evaluate: Callable[..., Evaluated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = dept_vl.Adapter.load(finished.folder / "best")
    replace(adapter, question_case="keep").save(tmp_path / "kept")
    loaded: list[str] = []
    real = score_run_module.load_split

    def load_split(options: DataOptions, split: str) -> Any:
        loaded.append(options.question_case)
        return real(options, split)

    monkeypatch.setattr(score_run_module, "load_split", load_split)
    evaluate(limit=2)
    evaluate(limit=2, adapter=tmp_path / "kept", output_dir=tmp_path / "other")
    assert loaded == ["lower", "keep"]


def test_a_runs_predictor_is_scored_on_the_examples_of_the_run(finished: Finished) -> None:
    of_run = dept_vl.evaluate(finished.folder, limit=5)
    assert dept_vl.evaluate(dept_vl.load(finished.folder), limit=5).predictions == of_run.predictions


@pytest.mark.parametrize("task", ["gqa", "nlvr2"])
def test_another_task(evaluate: Callable[..., Evaluated], scenes: Path, task: str) -> None:
    split = {"gqa": "testdev", "nlvr2": "dev"}[task]
    found = evaluate(task=task, data_dir=scenes / task, split=split)
    whole = load_task(task, scenes / task, split)
    assert found.evaluation.predictions.keys() == {*whole.example_ids()}
    assert found.evaluation.scores == whole.score(found.evaluation.predictions)
    assert found.submission is None
    path = found.output_dir / f"predictions{whole.prediction_format.suffix}"
    assert whole.prediction_format.read(path) == found.evaluation.predictions


def test_a_task_new_to_the_run_needs_folder_and_split(
    evaluate: Callable[..., Evaluated], scenes: Path
) -> None:
    for options in ({}, {"data_dir": scenes / "gqa"}, {"split": "val"}):
        with pytest.raises(ValueError, match="knows nothing of 'gqa'; say --data_dir and --split"):
            evaluate(task="gqa", **options)
    with pytest.raises(ValueError, match="unknown task 'okvqa'; there are: vqav2, gqa, nlvr2, coco"):
        evaluate(task="okvqa", data_dir=scenes, split="val")


def test_every_task_of_the_run_is_known(finished: Finished, scenes: Path) -> None:
    gqa = DataOptions(task="gqa", data_dir=scenes / "gqa", test_split="testdev", num_beams=4)
    trained = replace(finished.config, also=(gqa,))
    assert data_options(EvaluateConfig(run=finished.folder, task="gqa"), trained) == gqa
    assert data_options(EvaluateConfig(run=finished.folder), trained) == replace(
        trained.data, test_split="val"
    )


def test_a_limit_draws_as_the_run_would(
    finished: Finished, evaluate: Callable[..., Evaluated], scenes: Path
) -> None:
    found = evaluate(limit=5)
    task = limit(load_task("vqav2", scenes / "vqav2", "val"), 5, finished.config.train.seed)
    assert found.evaluation.predictions.keys() == {*task.example_ids()}
    assert len(found.evaluation.predictions) == 5


def test_candidates_of_a_file(evaluate: Callable[..., Evaluated], scenes: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    file.write_text('["red", "no"]')
    of_the_run = evaluate(limit=6)
    found = evaluate(limit=6, candidates=file, output_dir=tmp_path / "two")
    assert {*found.evaluation.predictions.values()} <= {"red", "no"}
    assert found.evaluation.predictions != of_the_run.evaluation.predictions
    # For any task: what is said is done.
    gqa = {"task": "gqa", "data_dir": scenes / "gqa", "split": "val", "limit": 6}
    found = evaluate(**gqa, candidates=file, output_dir=tmp_path / "gqa")
    assert {*found.evaluation.predictions.values()} <= {"red", "no"}


@pytest.mark.parametrize("content", ['{"red": 1}', "[]", '["red", 3]', "red\nno\n", r'["\ud800"]'])
def test_candidates_in_another_form_are_refused(
    evaluate: Callable[..., Evaluated], tmp_path: Path, content: str
) -> None:
    file = tmp_path / "answers.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="expected a JSON list of answers") as error:
        evaluate(candidates=file)
    assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="expected a JSON list of candidate answers at"):
        evaluate(candidates=file)


def test_nothing_is_overwritten(
    finished: Finished, evaluate: Callable[..., Evaluated], tmp_path: Path
) -> None:
    evaluate(limit=2)
    for folder in (tmp_path / "evaluation", finished.folder):
        before = files(folder)
        with pytest.raises(FileExistsError, match="already holds predictions; nothing was changed") as error:
            evaluate(limit=3, output_dir=folder)
        assert str(folder) in str(error.value)
        assert files(folder) == before


def test_an_evaluation_has_a_folder_of_its_own(
    finished: Finished, evaluate: Callable[..., Evaluated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(finished.folder)
    with pytest.raises(FileExistsError):
        evaluate(limit=3, output_dir=finished.folder / "best")
    with pytest.raises(UsageError):
        evaluate(limit=3, output_dir=Path(""))
    assert files(finished.folder) == before
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_finished_is_scored_with_a_note(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished.folder, tmp_path / "run")
    score_run(EvaluateConfig(run=copy, limit=2), write=False)
    assert "is not finished" not in capsys.readouterr().out
    forget_checksums(copy)
    (copy / "summary.json").unlink()
    score_run(EvaluateConfig(run=copy, limit=2), write=False)
    assert f"{copy} is not finished" in capsys.readouterr().out


def test_a_run_that_pauses_has_its_candidates(finished: Finished, tmp_path: Path) -> None:
    train = replace(finished.config.train, pause_at=1)
    reset_accelerate()
    folder = run(replace(finished.config, train=train, output_dir=tmp_path / "run")).output_dir
    assert (folder / "candidates.json").read_bytes() == (finished.folder / "candidates.json").read_bytes()


def test_what_is_no_run_is_refused(evaluate: Callable[..., Evaluated], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no configuration at"):
        score_run(EvaluateConfig(run=tmp_path))
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        evaluate(adapter=tmp_path)


def test_another_adapter(finished: Finished, evaluate: Callable[..., Evaluated], tmp_path: Path) -> None:
    """Of other sizes, read with the text length that it was trained with."""
    sizes = {"prompt_length": 5, "rank": 1, "max_source_length": 9}
    other = with_(finished.config, prompt=sizes, train={"max_steps": 1}, output_dir=tmp_path / "other")
    result = run(other)
    reset_accelerate()
    found = evaluate(adapter=tmp_path / "other" / "best")
    assert found.evaluation.scores == result.scores
    assert found.evaluation.predictions == written(tmp_path / "other" / "predictions.json")


def test_an_adapter_of_another_backbone_is_refused(
    finished: Finished,
    evaluate: Callable[..., Evaluated],
    tmp_path: Path,
) -> None:
    adapter = shutil.copytree(finished.folder / "best", tmp_path / "adapter")
    description = json.loads((adapter / "adapter.json").read_text())
    description["backbone"]["fingerprint"]["language"] = "0123456789abcdef"
    (adapter / "adapter.json").write_text(json.dumps(description))
    forget_checksums(adapter)
    with pytest.raises(ValueError, match="load the backbone it was trained on"):
        evaluate(adapter=adapter)


def test_missing_and_broken_images(
    evaluate: Callable[..., Evaluated], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = shutil.copytree(scenes / "vqav2", tmp_path / "vqav2")
    task = load_task("vqav2", data_dir, "val")
    (path,) = task.images(0)
    unseen = {task[index].example_id for index in range(len(task)) if task.images(index) == (path,)}
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="is not a readable image") as error:
        evaluate(data_dir=data_dir)
    assert path.name in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 6 images of vqav2 are missing"):
        evaluate(data_dir=data_dir)
    found = evaluate(data_dir=data_dir, on_bad_image="skip", batch_size=3)
    assert {*found.evaluation.skipped} == unseen
    assert found.evaluation.predictions.keys() == {*task.example_ids()}
    assert all(found.evaluation.predictions[key] == "" for key in unseen)
    assert "4 of 24 examples of vqav2 have no readable image" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["test", "test-std", "test-dev"])
def test_a_submission_to_vqav2_has_every_question_of_test(
    evaluate: Callable[..., Evaluated], scenes: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(split=split)
    asked, whole = (load_task("vqav2", scenes / "vqav2", name) for name in (split, "test"))
    assert found.submission is not None
    assert found.submission.path == found.output_dir / "submission.json"
    assert (found.submission.answered, found.submission.filled) == (len(asked), 24 - len(asked))
    assert len(whole.prediction_format.read(found.submission.path, whole.example_ids())) == 24
    submitted = written(found.submission.path)
    for key in whole.example_ids():
        assert submitted[key] == (found.evaluation.predictions[key] if key in asked.example_ids() else "")
    assert found.evaluation.scores == {}
    said = capsys.readouterr().out
    assert f"({len(asked)} answers" in said
    assert ("18 of other phases left empty" in said) == (split == "test-dev")


def test_a_submission_to_gqa(evaluate: Callable[..., Evaluated], scenes: Path) -> None:
    found = evaluate(task="gqa", data_dir=scenes / "gqa", split="submission_all")
    assert found.submission is not None
    assert (found.submission.answered, found.submission.filled) == (24, 0)
    submitted = written(found.submission.path, "questionId", "prediction")
    assert submitted == found.evaluation.predictions
    assert (
        submitted.keys() == json.loads((scenes / "gqa" / "submission_all_questions.json").read_text()).keys()
    )


def test_part_of_a_split_is_no_submission(evaluate: Callable[..., Evaluated]) -> None:
    found = evaluate(split="test-dev", limit=2)
    assert found.submission is None
    assert not (found.output_dir / "submission.json").exists()


def test_what_a_submission_lacks_is_noticed_before_anything_is_answered(
    evaluate: Callable[..., Evaluated], scenes: Path, tmp_path: Path
) -> None:
    data_dir = shutil.copytree(scenes / "vqav2", tmp_path / "vqav2")
    (data_dir / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    with pytest.raises(FileNotFoundError, match="test2015_questions"):
        evaluate(data_dir=data_dir, split="test-dev")
    assert not (tmp_path / "evaluation").exists()


def test_two_processes_answer_as_one_does(
    finished: Finished, evaluate: Callable[..., Evaluated], tmp_path: Path
) -> None:
    expected = evaluate(limit=7, batch_size=3)
    config = EvaluateConfig(finished.folder, limit=7, batch_size=3, output_dir=tmp_path / "two")
    in_two_processes(score_run, config)
    assert len(expected.evaluation.predictions) == 7
    assert files(tmp_path / "two") == files(expected.output_dir)


def test_the_run_is_found_as_it_was_written(finished: Finished) -> None:
    again = read_config(finished.folder / "config.json")
    assert replace(again, output_dir=finished.folder) == finished.config.settled()


def answer_otherwise(path: Path) -> None:
    content = json.loads(path.read_text())
    for answer in content["annotations"][0]["answers"]:
        answer["answer"] = "banana"
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("split", "part"),
    [("val", "test"), pytest.param("train", "train", marks=pytest.mark.slow), ("test-dev", "")],
)
def test_data_that_have_changed_since_the_run_are_told(
    finished: Finished,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    split: str,
    part: str,
) -> None:
    data_dir = shutil.copytree(scenes / "vqav2", tmp_path / "vqav2")
    began = json.loads((finished.folder / "identity.json").read_text())["content"]
    predictor = dept_vl.load(finished.folder)

    def changed() -> dict[str, str]:
        """What is told of a part, with what it was before."""
        folder = tmp_path / "evaluation"
        shutil.rmtree(folder, ignore_errors=True)
        options = {"split": split, "data_dir": data_dir, "limit": 2}
        found = dept_vl.evaluate(finished.folder, output_dir=folder, **options)
        assert dept_vl.evaluate(predictor, **options).changed == found.changed
        said = capsys.readouterr().out.count(f"note: vqav2 {split} of {data_dir} has changed since")
        assert said == (2 if found.changed else 0)
        assert ("has changed since" in (folder / "report.html").read_text()) == bool(found.changed)
        told = dict(line.split("=", 1) for line in found.changed.split("; ") if line)
        return {name: line.split(" -> ")[0] for name, line in told.items() if "dev" not in name}

    assert changed() == {}  # moved, and the same
    expected = {}
    for name, change in (
        ("", lambda: answer_otherwise(data_dir / f"v2_mscoco_{split}2014_annotations.json")),
        (".images", lambda: [path.write_bytes(path.read_bytes() + b" ") for path in data_dir.glob("*/*")]),
    ):
        if part:
            change()
            expected[f"vqav2.{part}{name}"] = began[f"vqav2.{part}{name}"]
        assert changed() == expected


def test_a_predictor_of_a_run_is_scored_on_the_data_of_the_run(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # there is no data/vqav2 here
    found = dept_vl.evaluate(dept_vl.load(finished.folder))
    assert found.scores == finished.result.scores
