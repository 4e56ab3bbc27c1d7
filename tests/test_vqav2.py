"""VQAv2 in its official files: what is read, how it is scored, and what is said of bad files."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import annotations_path, questions_path, read_rows, task_of, vqa_row, write_rows, write_vqa

from dept_vl.metrics.vqa import normalise_answer, vqa_accuracy
from dept_vl.splits import check_images
from dept_vl.tasks import load_task
from dept_vl.tasks.example import hold_out_images, limit
from dept_vl.tasks.rows import Rows
from dept_vl.tasks.vqav2 import SCHEMA, VQAv2

FIXTURE = Path(__file__).parent / "fixtures" / "vqa" / "cases.jsonl"
CASES: list[dict[str, Any]] = [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
LAYOUTS = ("", "images", "Images/mscoco")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_vqa(tmp_path / "vqa")


def usual_answers(task: VQAv2) -> dict[int | str, str]:
    return {task[index].example_id: task[index].answer for index in range(len(task))}


@pytest.mark.parametrize("version", ["v2_", ""])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_both_versions_in_every_layout(tmp_path: Path, version: str, layout: str) -> None:
    root = write_vqa(tmp_path, version=version, layout=layout)
    task = VQAv2.load(root, "train")
    assert len(task) == 12
    example = task[0]
    assert example.example_id == 0
    assert example.images == (root / layout / "train2014" / "COCO_train2014_000000000000.jpg",)
    assert example.images == task.images(0)
    assert example.source_text == "vqa: what colour is the shape?"
    assert (example.question, example.answer) == ("What colour is the shape?", "red")


def test_version_2_is_read_where_both_lie_together(tmp_path: Path) -> None:
    write_vqa(tmp_path, version="", images=2)
    write_vqa(tmp_path, version="v2_", images=3)
    assert len(VQAv2.load(tmp_path, "val")) == 9


def test_splits_are_apart(tmp_path: Path) -> None:
    write_vqa(tmp_path, subtypes=("train2014", "val2014", "test2015", "test-dev2015"))
    ids = {
        split: [example.example_id for example in map(VQAv2.load(tmp_path, split).__getitem__, range(12))]
        for split in ("train", "val", "test", "test-dev")
    }
    assert ids["train"][0] == 0
    assert ids["val"][0] == 10_000
    assert ids["test"] == ids["test-dev"]
    assert ids["test"][0] == 20_000


@pytest.mark.parametrize("split", ["test", "test-dev"])
def test_test_splits_have_no_answers_and_the_images_of_test(tmp_path: Path, split: str) -> None:
    write_vqa(tmp_path, subtypes=("test2015", "test-dev2015"))
    example = VQAv2.load(tmp_path, split)[1]
    assert (example.targets, example.answer) == ((), "")
    assert example.images[0].parent == tmp_path / "test2015"


def test_a_split_without_answers_is_answered_and_not_scored(tmp_path: Path) -> None:
    task = VQAv2.load(write_vqa(tmp_path, subtypes=("test2015",)), "test")
    predictions = {task[index].example_id: "no" for index in range(len(task))}
    assert task.score(predictions) == {}
    with pytest.raises(ValueError, match="1 missing"):
        task.score({key: answer for key, answer in predictions.items() if key != 20_000})


def test_targets_are_soft_scores(folder: Path) -> None:
    task = VQAv2.load(folder, "train")
    assert dict(task[0].targets) == {"red": 1.0, "2": 0.6, "blue": 0.3}
    # One colour is blue, so eight of ten said so.
    assert dict(task[6].targets) == {"blue": 1.0, "2": 0.6}
    assert dict(task_of(["x", "x", "x", *"abcdefg"])[0].targets)["x"] == 0.9


def test_answers_of_which_nothing_is_left_are_still_learned() -> None:
    # "what letter is it?": an article to the scorer.
    assert task_of(["a"] * 10)[0].targets == (("a", 1.0),)


def test_the_usual_answers_score_100_in_every_type(folder: Path) -> None:
    task = VQAv2.load(folder, "val")
    assert task.score(usual_answers(task)) == {
        "overall": 100.0,
        "answer_type/number": 100.0,
        "answer_type/other": 100.0,
        "answer_type/yes/no": 100.0,
        "question_type/how many": 100.0,
        "question_type/is there a": 100.0,
        "question_type/what colour": 100.0,
    }
    assert task.primary == next(iter(task.score(usual_answers(task))))


def test_types_are_scored_apart(folder: Path) -> None:
    task = VQAv2.load(folder, "val")
    predictions = usual_answers(task)
    for number in range(4):
        predictions[10_001 + 10 * number] = "maybe"
    # "two" was said twice, and counts as "2".
    predictions[10_000] = "Two."
    scores = task.score(predictions)
    assert scores["answer_type/yes/no"] == scores["question_type/is there a"] == 0.0
    assert scores["answer_type/number"] == 100.0
    assert scores["answer_type/other"] == 90.0
    assert scores["overall"] == round((400 + 0 + 360) / 12, 2)


def test_answers_are_written_as_the_scorer_wants_them() -> None:
    task = task_of(["circle"] * 10)
    assert task.written("The circle.") == "circle"
    # What somebody else wrote is compared as it stands: raw, since the ten agree.
    assert task.score({0: "The circle."})["overall"] == 0.0
    assert task.score({0: task.written("The circle.")})["overall"] == 100.0


def test_missing_and_extra_predictions_are_named(folder: Path) -> None:
    task = VQAv2.load(folder, "train")
    predictions = usual_answers(task)
    del predictions[1], predictions[12]
    predictions[777] = "yes"
    with pytest.raises(
        ValueError, match=r"the 12 examples, found 11: 2 missing \(first: 1, 12\) and 1 that belong to no"
    ) as e:
        task.score(predictions)
    assert "777" in str(e.value)
    with pytest.raises(ValueError, match=r"found 13: 1 that belong to no example \(first: 777\)"):
        task.score({**usual_answers(task), 777: "yes"})


def _fixture_task() -> tuple[VQAv2, dict[int | str, str]]:
    rows = [
        vqa_row(
            case["question_id"],
            [record["answer"] for record in case["answers"]],
            answer_type=case["answer_type"],
            question_type=case["question_type"],
        )
        for case in CASES
    ]
    return VQAv2(Rows.of(rows, SCHEMA), {}), {case["question_id"]: case["prediction"] for case in CASES}


def _means(accuracy: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for case in CASES:
        for name in (
            "overall",
            f"answer_type/{case['answer_type']}",
            f"question_type/{case['question_type']}",
        ):
            groups[name].append(accuracy(case))
    return {name: round(sum(group) / len(group), 2) for name, group in groups.items()}


def test_official_cases_give_the_official_totals() -> None:
    task, predictions = _fixture_task()
    assert task.score(predictions) == _means(lambda case: case["official_accuracy"])
    for index, case in enumerate(CASES):
        alone = task.subset([index]).score({case["question_id"]: case["prediction"]})
        assert alone["overall"] == case["official_accuracy"]


def test_what_we_write_is_normalised() -> None:
    task, predictions = _fixture_task()
    written = {key: task.written(answer) for key, answer in predictions.items()}
    assert task.score(written) == _means(
        lambda case: (
            100
            * vqa_accuracy(
                normalise_answer(case["prediction"]), [record["answer"] for record in case["answers"]]
            )
        )
    )


def test_unknown_split(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"splits train, val, .*, test; got 'test2015'"):
        VQAv2.load(folder, "test2015")


def test_unknown_task(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'vqa'; there are: vqav2, gqa, nlvr2, coco"):
        load_task("vqa", folder, "train")


@pytest.mark.parametrize("find", [questions_path, annotations_path])
def test_missing_file_is_named(folder: Path, find: Callable[..., Path]) -> None:
    find(folder).unlink()
    with pytest.raises(FileNotFoundError) as error:
        VQAv2.load(folder, "train")
    for part in (find(folder).name, find(folder, version="").name, str(folder), "https://visualqa.org"):
        assert part in str(error.value)


def test_questions_without_annotations_are_named(folder: Path) -> None:
    rows = read_rows(annotations_path(folder), "annotations")
    write_rows(annotations_path(folder), "annotations", rows[2:])
    with pytest.raises(
        ValueError, match=r"2 questions without an annotation \(first: \[0, 1\]\), 0 annot"
    ) as e:
        VQAv2.load(folder, "train")
    for path in (questions_path(folder), annotations_path(folder)):
        assert path.name in str(e.value)


def test_annotations_without_questions_are_named(folder: Path) -> None:
    rows = read_rows(questions_path(folder), "questions")
    write_rows(questions_path(folder), "questions", rows[:-1])
    with pytest.raises(ValueError, match=r"0 questions without .* 1 annotations without a question .*\[32\]"):
        VQAv2.load(folder, "train")


@pytest.mark.parametrize("subtype", ["train2014", "test2015"])
def test_question_id_twice(tmp_path: Path, subtype: str) -> None:
    write_vqa(tmp_path, subtypes=(subtype,))
    path = questions_path(tmp_path, subtype)
    rows = read_rows(path, "questions")
    write_rows(path, "questions", [*rows, rows[4]])
    with pytest.raises(ValueError, match=f"question_id {rows[4]['question_id']} stands there more than once"):
        VQAv2.load(tmp_path, "train" if subtype == "train2014" else "test")


@pytest.mark.parametrize("find", [questions_path, annotations_path])
def test_truncated_json(folder: Path, find: Callable[..., Path]) -> None:
    path = find(folder)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="the file is cut short or damaged") as error:
        VQAv2.load(folder, "train")
    assert str(path) in str(error.value)
    assert "download it again" in str(error.value)


@pytest.mark.parametrize("content", ["[]", '{"questions": []}', '{"annotations": [1]}', "3"])
def test_another_file_renamed(folder: Path, content: str) -> None:
    questions_path(folder).write_text(content)
    with pytest.raises(ValueError, match=r"'questions'|empty list"):
        VQAv2.load(folder, "train")


def test_missing_image_folder(folder: Path) -> None:
    (folder / "train2014").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no image folder for train2014") as error:
        VQAv2.load(folder, "train")
    assert str(folder / "train2014") in str(error.value)


def test_missing_images_are_counted_and_named(folder: Path) -> None:
    for image_id in (1, 3):
        (folder / "train2014" / f"COCO_train2014_{image_id:012d}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="2 of 4 images of vqav2 are missing") as error:
        check_images(VQAv2.load(folder, "train"), "raise")
    for part in (str(folder / "train2014"), "COCO_train2014_000000000001.jpg", "000000000003.jpg"):
        assert part in str(error.value)


def test_held_out_images_are_on_one_side_only(folder: Path) -> None:
    task = VQAv2.load(folder, "train")
    rest, held_out = hold_out_images(task, 1, seed=0)
    assert (len(rest), len(held_out)) == (9, 3)
    sides = [{side.images(index) for index in range(len(side))} for side in (rest, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 1
    ids = [side[index].example_id for side in (rest, held_out) for index in range(len(side))]
    assert sorted(ids, key=int) == [task[index].example_id for index in range(len(task))]


def test_held_out_images_follow_from_the_seed(folder: Path) -> None:
    task = VQAv2.load(folder, "train")
    first, again = hold_out_images(task, 2, seed=3), hold_out_images(task, 2, seed=3)
    assert [list(side.example_ids()) for side in first] == [list(side.example_ids()) for side in again]
    assert len({tuple(hold_out_images(task, 2, seed)[1].example_ids()) for seed in range(8)}) > 1
    # The order of the questions does not decide.
    reordered = task.subset(range(len(task) - 1, -1, -1))
    assert set(hold_out_images(reordered, 2, seed=3)[1].example_ids()) == set(first[1].example_ids())


@pytest.mark.parametrize("count", [-1, 0, 4, 5])
def test_held_out_images_leave_something_on_both_sides(folder: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot hold out {count} of the 4 images of vqav2") as error:
        hold_out_images(VQAv2.load(folder, "train"), count, seed=0)
    assert "between 1 and 3" in str(error.value)


def test_limit_draws_in_order_and_from_the_seed(folder: Path) -> None:
    task = VQAv2.load(folder, "train")
    assert limit(task, 0, seed=0) is task
    assert limit(task, 12, seed=0) is task
    assert limit(task, 100, seed=0) is task
    few = limit(task, 5, seed=0)
    ids = [few[index].example_id for index in range(len(few))]
    assert len(set(ids)) == 5
    assert ids == sorted(ids, key=int)
    assert limit(task, 5, seed=0).example_ids() == few.example_ids()
    assert len({tuple(limit(task, 5, seed).example_ids()) for seed in range(8)}) > 1


def test_a_subset_is_scored_alone(folder: Path) -> None:
    task = VQAv2.load(folder, "train")
    few = task.subset([0, 4])
    assert few.score({0: "red", 11: "perhaps"})["overall"] == 50.0
    with pytest.raises(ValueError, match="belong to no example"):
        few.score(usual_answers(task))
