"""VQAv2 in its official files: what is read, how it is scored, and what is said of bad files."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import annotations_path, questions_path, read_rows, task_of, vqa_row, write_rows, write_vqa

from dept_vl.data.splits import check_images
from dept_vl.tasks import load_task
from dept_vl.tasks import vqav2 as vqav2_module
from dept_vl.tasks.base import hold_out_images, limit
from dept_vl.tasks.coco import KARPATHY_FILE
from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.metrics.vqa import normalise_answer, vqa_accuracy
from dept_vl.tasks.vqav2 import MINIVAL_FILE, SCHEMA, SUBTYPES, VQAv2

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vqa" / "cases.jsonl"
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
    task = VQAv2().load(root, "train")
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
    assert len(VQAv2().load(tmp_path, "val")) == 9


def test_splits_are_apart(tmp_path: Path) -> None:
    write_vqa(tmp_path, subtypes=("train2014", "val2014", "test2015", "test-dev2015"))
    ids = {
        split: [example.example_id for example in map(VQAv2().load(tmp_path, split).__getitem__, range(12))]
        for split in ("train", "val", "test", "test-dev")
    }
    assert ids["train"][0] == 0
    assert ids["val"][0] == 10_000
    assert ids["test"] == ids["test-dev"]
    assert ids["test"][0] == 20_000


@pytest.mark.parametrize("split", ["test", "test-dev"])
def test_test_splits_have_no_answers_and_the_images_of_test(tmp_path: Path, split: str) -> None:
    write_vqa(tmp_path, subtypes=("test2015", "test-dev2015"))
    example = VQAv2().load(tmp_path, split)[1]
    assert (example.targets, example.answer) == ((), "")
    assert example.images[0].parent == tmp_path / "test2015"


def test_a_split_without_answers_is_answered_and_not_scored(tmp_path: Path) -> None:
    task = VQAv2().load(write_vqa(tmp_path, subtypes=("test2015",)), "test")
    predictions = {task[index].example_id: "no" for index in range(len(task))}
    assert task.score(predictions) == {}
    with pytest.raises(ValueError, match="1 missing"):
        task.score({key: answer for key, answer in predictions.items() if key != 20_000})


def test_targets_are_soft_scores(folder: Path) -> None:
    task = VQAv2().load(folder, "train")
    assert dict(task[0].targets) == {"red": 1.0, "2": 0.6, "blue": 0.3}
    # One colour is blue, so eight of ten said so.
    assert dict(task[6].targets) == {"blue": 1.0, "2": 0.6}
    assert dict(task_of(["x", "x", "x", *"abcdefg"])[0].targets)["x"] == 0.9


def test_answers_of_which_nothing_is_left_are_still_learned() -> None:
    # "what letter is it?": an article to the scorer.
    assert task_of(["a"] * 10)[0].targets == (("a", 1.0),)


def test_the_usual_answers_score_100_in_every_type(folder: Path) -> None:
    task = VQAv2().load(folder, "val")
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
    task = VQAv2().load(folder, "val")
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
    task = VQAv2().load(folder, "train")
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
        VQAv2().load(folder, "test2015")


def test_unknown_task(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'vqa3'; there are: vqav2, gqa, nlvr2, coco"):
        load_task("vqa3", folder, "train")


@pytest.mark.parametrize("find", [questions_path, annotations_path])
def test_missing_file_is_named(folder: Path, find: Callable[..., Path]) -> None:
    find(folder).unlink()
    with pytest.raises(FileNotFoundError) as error:
        VQAv2().load(folder, "train")
    for part in (find(folder).name, find(folder, version="").name, str(folder), "https://visualqa.org"):
        assert part in str(error.value)


def test_questions_without_annotations_are_named(folder: Path) -> None:
    rows = read_rows(annotations_path(folder), "annotations")
    write_rows(annotations_path(folder), "annotations", rows[2:])
    with pytest.raises(
        ValueError, match=r"2 questions without an annotation \(first: \[0, 1\]\), 0 annot"
    ) as e:
        VQAv2().load(folder, "train")
    for path in (questions_path(folder), annotations_path(folder)):
        assert path.name in str(e.value)


def test_annotations_without_questions_are_named(folder: Path) -> None:
    rows = read_rows(questions_path(folder), "questions")
    write_rows(questions_path(folder), "questions", rows[:-1])
    with pytest.raises(ValueError, match=r"0 questions without .* 1 annotations without a question .*\[32\]"):
        VQAv2().load(folder, "train")


@pytest.mark.parametrize("subtype", ["train2014", "test2015"])
def test_question_id_twice(tmp_path: Path, subtype: str) -> None:
    write_vqa(tmp_path, subtypes=(subtype,))
    path = questions_path(tmp_path, subtype)
    rows = read_rows(path, "questions")
    write_rows(path, "questions", [*rows, rows[4]])
    with pytest.raises(ValueError, match=f"question_id {rows[4]['question_id']} is there more than once"):
        VQAv2().load(tmp_path, "train" if subtype == "train2014" else "test")


@pytest.mark.parametrize("find", [questions_path, annotations_path])
def test_truncated_json(folder: Path, find: Callable[..., Path]) -> None:
    path = find(folder)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="is cut short or damaged") as error:
        VQAv2().load(folder, "train")
    assert str(path) in str(error.value)
    assert "line 1, column " in str(error.value)
    assert "again" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", '{"questions": []}', '{"annotations": [1]}', "3"])
def test_another_file_renamed(folder: Path, content: str) -> None:
    questions_path(folder).write_text(content)
    with pytest.raises(ValueError, match=r"'questions'|empty list"):
        VQAv2().load(folder, "train")


def test_missing_image_folder(folder: Path) -> None:
    (folder / "train2014").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no image folder for train2014") as error:
        VQAv2().load(folder, "train")
    assert str(folder / "train2014") in str(error.value)


def test_missing_images_are_counted_and_named(folder: Path) -> None:
    for image_id in (1, 3):
        (folder / "train2014" / f"COCO_train2014_{image_id:012d}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="2 of 4 images of vqav2 are missing") as error:
        check_images(VQAv2().load(folder, "train"), "raise")
    for part in (str(folder / "train2014"), "COCO_train2014_000000000001.jpg", "000000000003.jpg"):
        assert part in str(error.value)


def test_held_out_images_are_on_one_side_only(folder: Path) -> None:
    task = VQAv2().load(folder, "train")
    rest, held_out = hold_out_images(task, 1, seed=0)
    assert (len(rest), len(held_out)) == (9, 3)
    sides = [{side.images(index) for index in range(len(side))} for side in (rest, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 1
    ids = [side[index].example_id for side in (rest, held_out) for index in range(len(side))]
    assert sorted(ids, key=int) == [task[index].example_id for index in range(len(task))]


def test_held_out_images_follow_from_the_seed(folder: Path) -> None:
    task = VQAv2().load(folder, "train")
    first, again = hold_out_images(task, 2, seed=3), hold_out_images(task, 2, seed=3)
    assert [list(side.example_ids()) for side in first] == [list(side.example_ids()) for side in again]
    assert len({tuple(hold_out_images(task, 2, seed)[1].example_ids()) for seed in range(8)}) > 1
    # The order of the questions does not decide.
    reordered = task.subset(range(len(task) - 1, -1, -1))
    assert set(hold_out_images(reordered, 2, seed=3)[1].example_ids()) == set(first[1].example_ids())


@pytest.mark.parametrize("count", [-1, 0, 4, 5])
def test_held_out_images_leave_something_on_both_sides(folder: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot hold out {count} of the 4 images of vqav2") as error:
        hold_out_images(VQAv2().load(folder, "train"), count, seed=0)
    assert "between 1 and 3" in str(error.value)


def test_limit_draws_in_order_and_from_the_seed(folder: Path) -> None:
    task = VQAv2().load(folder, "train")
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
    task = VQAv2().load(folder, "train")
    few = task.subset([0, 4])
    assert few.score({0: "red", 11: "perhaps"})["overall"] == 50.0
    with pytest.raises(ValueError, match="belong to no example"):
        few.score(usual_answers(task))


KARPATHY = {0: "train", 1: "train", 2: "test", 1000: "restval", 1001: "val", 1002: "test", 5: "val"}
"""Image -> split. Image 5 has no questions, image 3 is in no split."""


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All official files, and the lists of the other splits."""
    root = write_vqa(
        tmp_path_factory.mktemp("lists"), subtypes=("train2014", "val2014", "test2015", "test-dev2015")
    )
    write_karpathy(root, KARPATHY)
    write_minival(root, [10_020, 10_001, 10_002])
    return root


def write_karpathy(root: Path, splits: dict[int, str]) -> None:
    images = [
        {
            "filepath": "val2014",
            "filename": f"{image_id}.jpg",
            "cocoid": image_id,
            "split": split,
            "sentences": [{"raw": "a shape"}],
        }
        for image_id, split in splits.items()
    ]
    (root / KARPATHY_FILE).write_text(json.dumps({"images": images}))


def write_minival(root: Path, ids: list[int]) -> None:
    """As LXMERT's: whole records, of which the id is read."""
    rows = [{"question_id": question_id, "label": {"yes": 1}, "sent": "?"} for question_id in ids]
    (root / MINIVAL_FILE).write_text(json.dumps(rows))


def asked(*images: int) -> list[int]:
    return [10 * image_id + place for image_id in images for place in range(3)]


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("train", asked(0, 1, 2, 3)),
        ("val", asked(1000, 1001, 1002, 1003)),
        ("trainval", asked(0, 1, 2, 3, 1000, 1001, 1002, 1003)),
        ("minival", [10_001, 10_002, 10_020]),
        ("nominival", [i for i in asked(1000, 1001, 1002, 1003) if i not in (10_001, 10_002, 10_020)]),
        ("karpathy-train", asked(0, 1, 1000)),
        ("karpathy-val", asked(1001)),
        ("karpathy-test", asked(2, 1002)),
        ("test-dev", asked(2000, 2001, 2002, 2003)),
        ("test-std", asked(2000, 2001, 2002, 2003)),
        ("test", asked(2000, 2001, 2002, 2003)),
    ],
)
def test_every_split_holds_its_questions(lists: Path, split: str, ids: list[int]) -> None:
    task = VQAv2().load(lists, split)
    assert task.example_ids() == ids
    subtype = {0: "train2014", 1: "val2014", 2: "test2015"}
    paths = {i: lists / subtype[i // 10_000] / f"COCO_{subtype[i // 10_000]}_{i // 10:012d}.jpg" for i in ids}
    assert [task[index].images for index in range(len(ids))] == [(paths[i],) for i in ids]
    assert task.image_files() == list(dict.fromkeys(paths.values()))
    assert all(path.is_file() for path in task.image_files())
    assert all(bool(task[index].targets) == (not split.startswith("test")) for index in range(len(ids)))
    assert bool(task.score(dict.fromkeys(ids, "red"))) == (not split.startswith("test"))


def test_there_are_no_other_splits() -> None:
    assert len(SUBTYPES) == 11


def test_rows_are_what_the_files_hold(scenes: Path) -> None:
    root = scenes / "vqav2"
    task = VQAv2().load(root, "trainval")
    place = 0
    for subtype in ("train2014", "val2014"):
        annotations = {
            row["question_id"]: row for row in read_rows(annotations_path(root, subtype), "annotations")
        }
        for row in read_rows(questions_path(root, subtype), "questions"):
            annotation = annotations[row["question_id"]]
            answers = [answer["answer"] for answer in annotation["answers"]]
            assert task.rows[place] == {
                "question_id": row["question_id"],
                "image_id": row["image_id"],
                "subtype": subtype,
                "question": row["question"],
                "answers": answers,
                "answer_type": annotation["answer_type"],
                "question_type": annotation["question_type"],
            }
            assert task[place].answer == annotation["multiple_choice_answer"]
            place += 1
    assert len(task) == place == 72


@pytest.mark.parametrize(
    ("split", "name", "source"),
    [
        ("minival", MINIVAL_FILE, "https://nlp.cs.unc.edu/data/lxmert_data/vqa/minival.json"),
        ("nominival", MINIVAL_FILE, "https://nlp.cs.unc.edu/data/lxmert_data/vqa/minival.json"),
        ("karpathy-test", KARPATHY_FILE, "https://cs.stanford.edu/people/karpathy/deepimagesent"),
    ],
)
def test_missing_list_is_named(folder: Path, split: str, name: str, source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"expected {name} in ") as error:
        VQAv2().load(folder, split)
    assert str(folder) in str(error.value)
    assert source in str(error.value)


def test_a_list_of_other_questions(folder: Path) -> None:
    write_minival(folder, [7])
    write_karpathy(folder, {77: "val", 0: "train"})
    for split, name in (("minival", MINIVAL_FILE), ("karpathy-val", KARPATHY_FILE)):
        with pytest.raises(
            ValueError, match=rf"questions of .*val2014 for the split '{split}', found none of "
        ):
            VQAv2().load(folder, split)
        with pytest.raises(ValueError, match=str(folder / name)):
            VQAv2().load(folder, split)
    # Nothing is left of val2014 without all of it.
    write_minival(folder, asked(1000, 1001, 1002, 1003))
    with pytest.raises(ValueError, match="for the split 'nominival', found none of 12"):
        VQAv2().load(folder, "nominival")


def test_damaged_minival(folder: Path) -> None:
    path = folder / MINIVAL_FILE
    path.write_text('[{"question_id": 10000}, {"question_id": "10001"}]')
    with pytest.raises(ValueError, match="entry 1: expected 'question_id' to be int, found '10001'") as error:
        VQAv2().load(folder, "minival")
    assert str(path) in str(error.value)
    path.write_text('[{"question_id": 10000}, {"quest')
    with pytest.raises(ValueError, match="cut short or damaged"):
        VQAv2().load(folder, "minival")


def test_the_usual_answers_of_enough_questions() -> None:
    answers = ("No.", "two", "red", "no", "red", "blue", "no", "the", "red")
    # Nine say so, one says something else: the commonest counts, as the scorer writes it.
    task = task_of(*([answer] * 9 + ["odd"] for answer in answers), ["odd"] * 10)
    assert task.usual_answers(2) == ("no", "red")
    assert task.usual_answers(3) == ("no", "red")
    # Of an article nothing is left; of equally usual ones the first comes first.
    assert task.usual_answers(1) == ("no", "red", "2", "blue", "odd")
    assert task.subset([4, 8, 3]).usual_answers(2) == ("red",)
    with pytest.raises(ValueError, match=r"usual one of 4 .*commonest stands 3 times: lower candidate_floor"):
        task.usual_answers(4)


def test_a_test_split_has_no_usual_answers(lists: Path) -> None:
    with pytest.raises(ValueError, match="the commonest stands 0 times"):
        VQAv2().load(lists, "test").usual_answers(1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"answers": [{"answer": "red"}] * 9}, "question 10: expected 10 human answers, found 9"),
        ({"answers": ["red"] * 10}, "question 10: expected each answer to be an object, found 'red'"),
        ({"answers": [{"answer": 2}] * 10}, "question 10: expected 'answer' to be str, found 2"),
        ({"answer_type": None}, "question 10: expected 'answer_type' to be str, found None"),
        ({"question_id": True}, "question True: expected 'question_id' to be int, found True"),
        ({"question_id": 11}, "question_id 11 is there more than once"),
    ],
)
def test_damaged_annotations(folder: Path, change: dict[str, Any], expected: str) -> None:
    path = annotations_path(folder)
    rows = read_rows(path, "annotations")
    rows[3] |= change
    write_rows(path, "annotations", rows)
    with pytest.raises(ValueError, match=expected) as error:
        VQAv2().load(folder, "train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["image_id", "question", "question_id"])
def test_damaged_questions(folder: Path, name: str) -> None:
    path = questions_path(folder)
    rows = read_rows(path, "questions")
    del rows[3][name]
    write_rows(path, "questions", rows)
    where = "None" if name == "question_id" else "10"
    with pytest.raises(
        ValueError, match=f"question {where}: expected '{name}' to be .*, found no such"
    ) as error:
        VQAv2().load(folder, "train")
    assert str(path) in str(error.value)


def test_files_are_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_karpathy(folder, KARPATHY)
    before = VQAv2().load(folder, "trainval")
    VQAv2().load(folder, "karpathy-val")

    def fail(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(vqav2_module, "read_list", fail)
    again = VQAv2().load(folder, "trainval")
    assert [again[index] for index in range(24)] == [before[index] for index in range(24)]
    # Other splits of the same files need no parsing either.
    assert len(VQAv2().load(folder, "val")) == 12
    assert len(VQAv2().load(folder, "karpathy-test")) == 6
    annotations_path(folder).write_text(annotations_path(folder).read_text() + "\n")
    with pytest.raises(AssertionError, match="parsed again"):
        VQAv2().load(folder, "train")
