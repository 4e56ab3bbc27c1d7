"""GQA in its official files: what is read, how it is scored, and what is said of bad files."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_metrics_gqa import CHOICES, EXPECTED, PREDICTIONS, ROWS, official_record

from dept_vl.config import DataOptions
from dept_vl.tasks import gqa as gqa_module
from dept_vl.tasks import load_task
from dept_vl.tasks.gqa import GQA, JOINED, SHORT, SPLITS, read_choices, score_rows

OFFICIAL = {key: figure for key, figure in EXPECTED.items() if isinstance(figure, float)}
PLAIN = official_record(ROWS[0]) | {"imageId": "1"}


@pytest.fixture
def folder(scenes: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(scenes / "gqa", tmp_path / "gqa")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases scored by the official scorer, in the form of its files."""
    root = tmp_path_factory.mktemp("official")
    write(root, "val_all", {row["question_id"]: official_record(row) | {"imageId": "1"} for row in ROWS})
    (root / "eval").mkdir()
    (root / "eval" / "val_choices.json").write_text(json.dumps(CHOICES))
    return root


def write(root: Path, split: str, questions: Mapping[str, Mapping[str, Any]], folder: str = "") -> Path:
    """A questions file, and a folder for images beside it."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    path = root / folder / f"{split}_questions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(questions))
    return path


def gold(task: GQA) -> dict[int | str, str]:
    return {task[index].example_id: task[index].answer for index in range(len(task))}


@pytest.mark.parametrize("split", ["train", "val", "testdev", "train_balanced", "testdev_balanced"])
def test_what_is_read_is_what_the_file_holds(scenes: Path, split: str) -> None:
    root = scenes / "gqa"
    records = json.loads((root / f"{SHORT.get(split, split)}_questions.json").read_text())
    task = GQA().load(root, split)
    assert len(task) == len(records) in (24, 48)
    assert task.example_ids() == list(records)
    for index, (question_id, record) in enumerate(records.items()):
        example = task[index]
        assert example.example_id == question_id
        assert example.question == record["question"]
        assert example.source_text == f"gqa: {record['question']}"
        assert example.targets == ((record["answer"], 1.0),)
        assert example.answer == record["answer"]
        assert example.images == (root / "images" / f"{record['imageId']}.jpg",) == task.images(index)
        assert not example.in_turn
    used = dict.fromkeys(record["imageId"] for record in records.values())
    assert task.image_files() == [root / "images" / f"{image_id}.jpg" for image_id in used]
    assert all(path.is_file() for path in task.image_files())


def test_the_source_is_lower_case_without_blanks_around(tmp_path: Path) -> None:
    write(tmp_path, "val_all", {"7": PLAIN | {"question": " Is the Boy\tGreen? \n"}})
    example = load_task("gqa", tmp_path, "val_all")[0]
    assert example.source_text == "gqa: is the boy\tgreen?"
    assert example.question == " Is the Boy\tGreen? \n"


@pytest.mark.parametrize("folder", ["", "questions"])
def test_every_split_is_read_from_its_own_file(tmp_path: Path, folder: str) -> None:
    for split in SPLITS:
        write(tmp_path, split, {f"of {split}": PLAIN}, folder)
    assert len(SPLITS) == 11
    assert {split: GQA().load(tmp_path, split).example_ids() for split in SPLITS} == {
        split: [f"of {split}"] for split in SPLITS
    }
    assert {split: GQA().load(tmp_path, split).example_ids() for split in SHORT} == {
        split: [f"of {split}_balanced"] for split in ("train", "val", "testdev", "test")
    }


def test_training_and_validation_are_one_split(tmp_path: Path) -> None:
    for split in SPLITS:
        write(tmp_path, split, {f"of {split}": PLAIN}, "")
    ids = {split: GQA().load(tmp_path, split).example_ids() for split in JOINED}
    assert ids["trainval"] == ids["trainval_balanced"] == ["of train_balanced", "of val_balanced"]
    assert ids["trainval_all"] == ["of train_all", "of val_all"]
    options = DataOptions(task="gqa", train_split="trainval", dev_split="testdev")
    assert options.splits() == ("trainval", "testdev", "testdev")


def test_unknown_split(scenes: Path) -> None:
    with pytest.raises(
        ValueError, match=r"GQA has the splits train, val, .*, submission_all; got 'test-dev'"
    ):
        GQA().load(scenes / "gqa", "test-dev")


@pytest.mark.parametrize("folder", ["train_all_questions", "questions/train_all_questions"])
def test_train_all_comes_in_ten_parts(tmp_path: Path, folder: str) -> None:
    # Written last to first: the numbers give the order.
    for part in reversed(range(10)):
        path = write(tmp_path, "train_all", {f"{part}a": PLAIN, f"{part}b": PLAIN})
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / folder / f"train_all_questions_{part}.json")
    task = GQA().load(tmp_path, "train_all")
    assert task.example_ids() == [f"{part}{letter}" for part in range(10) for letter in "ab"]
    assert task[-1].example_id == "9b"
    for part in (3, 9):
        (tmp_path / folder / f"train_all_questions_{part}.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"the 10 parts of GQA's train_all in .*, found 8") as error:
        GQA().load(tmp_path, "train_all")
    assert "train_all_questions_3.json, train_all_questions_9.json; they are published at https" in str(
        error.value
    )
    assert str(tmp_path / folder) in str(error.value)


def test_train_all_in_one_file(tmp_path: Path) -> None:
    write(tmp_path, "train_all", {"7": PLAIN})
    assert GQA().load(tmp_path, "train_all").example_ids() == ["7"]


def test_a_split_without_answers_is_answered_and_not_scored(scenes: Path) -> None:
    root = scenes / "gqa"
    task = GQA().load(root, "submission_all")
    bare = json.loads((root / "submission_all_questions.json").read_text())
    assert all("answer" not in record for record in bare.values())
    assert task.example_ids() == list(bare) == GQA().load(root, "testdev").example_ids()
    assert task[3].question == bare[list(bare)[3]]["question"]
    assert {(task[index].targets, task[index].answer) for index in range(len(task))} == {((), "")}
    assert task.score(dict.fromkeys(bare, "yes")) == {}
    with pytest.raises(ValueError, match="24 examples, found 0: 24 missing"):
        task.score({})


@pytest.mark.parametrize(("first", "found"), [(True, "no answer here"), (False, "one here")])
def test_answers_in_some_questions_only(tmp_path: Path, first: bool, found: str) -> None:
    bare = {"question": "Is it?", "imageId": "1", "isBalanced": True}
    path = write(tmp_path, "val_all", {"7": PLAIN if first else bare, "8": bare if first else PLAIN})
    with pytest.raises(
        ValueError, match=f"question '8': expected an answer .* or in none, found {found}"
    ) as e:
        GQA().load(tmp_path, "val_all")
    assert str(path) in str(e.value)


def test_the_official_figures_of_the_official_files(official: Path) -> None:
    task = GQA().load(official, "val_all")
    scores = task.score(PREDICTIONS)
    assert scores == OFFICIAL
    assert task.primary == next(iter(scores)) == "accuracy"
    assert score_rows(task.rows, PREDICTIONS, CHOICES) == EXPECTED


def test_consistency_only_where_the_official_scorer_computes_it(official: Path) -> None:
    task = GQA().load(official, "val_all")
    without = {key: figure for key, figure in OFFICIAL.items() if key != "consistency"}
    balanced = [index for index, row in enumerate(ROWS) if row["is_balanced"] == "yes"]
    alone = {ROWS[index]["question_id"]: PREDICTIONS[ROWS[index]["question_id"]] for index in balanced}
    # Questions that are entailed are not there, or nobody answered them.
    assert task.subset(balanced).score(alone) == without
    assert score_rows(task.rows, alone, CHOICES).get("consistency") is None


def test_no_consistency_where_questions_entail_themselves_alone(tmp_path: Path) -> None:
    write(tmp_path, "val_balanced", {"7": PLAIN | {"entailed": ["7"]}, "8": PLAIN | {"entailed": []}})
    task = GQA().load(tmp_path, "val")
    assert "consistency" not in task.score(gold(task))
    write(tmp_path, "val_balanced", {"7": PLAIN | {"entailed": ["8"]}, "8": PLAIN | {"entailed": []}})
    task = GQA().load(tmp_path, "val")
    assert task.score(gold(task))["consistency"] == 100.0
    assert task.score({"7": PLAIN["answer"], "8": "no idea"})["consistency"] == 0.0


@pytest.mark.parametrize("place", ["eval", "."])
def test_choices_give_validity_and_plausibility(folder: Path, place: str) -> None:
    (folder / "eval" / "val_choices.json").rename(folder / "choices.json")
    task = GQA().load(folder, "val")
    assert task.choices_file is None
    assert task.score(gold(task)).keys() == {"accuracy", "binary", "open", "distribution"}
    (folder / "choices.json").rename(folder / place / "val_choices.json")
    task = GQA().load(folder, "val")
    scores = task.score(gold(task))
    assert scores.keys() == {"accuracy", "binary", "open", "validity", "plausibility", "distribution"}
    assert scores["accuracy"] == scores["validity"] == scores["plausibility"] == 100.0
    assert scores["distribution"] == 0.0
    nonsense = task.score(dict.fromkeys(task.example_ids(), "nonsense"))
    assert nonsense["accuracy"] == nonsense["validity"] == nonsense["plausibility"] == 0.0
    file = folder / place / "val_choices.json"  # read again, since it changed
    file.write_text(json.dumps({key: {"valid": [], "plausible": []} for key in json.loads(file.read_text())}))
    assert task.score(gold(task))["validity"] == 0.0


def test_binary_and_open_are_told_apart(scenes: Path) -> None:
    task = GQA().load(scenes / "gqa", "train")
    records = json.loads((scenes / "gqa" / "train_balanced_questions.json").read_text())
    queries = {key for key, record in records.items() if record["types"]["structural"] == "query"}
    assert 0 < len(queries) < len(records)
    scores = task.score({key: "?" if key in queries else answer for key, answer in gold(task).items()})
    assert (scores["open"], scores["binary"]) == (0.0, 100.0)
    assert scores["accuracy"] == pytest.approx(100 * (1 - len(queries) / len(records)))


def test_choices_of_another_split(folder: Path) -> None:
    shutil.copy(folder / "eval" / "train_choices.json", folder / "eval" / "val_choices.json")
    task = GQA().load(folder, "val")
    with pytest.raises(ValueError, match="pass the choices file of the same split or none"):
        task.score(gold(task))


def test_damaged_choices(tmp_path: Path) -> None:
    path = tmp_path / "val_choices.json"
    path.write_text('{"7": {"valid": ["yes"]}}')
    with pytest.raises(
        ValueError, match=r"question '7': expected 'plausible' to be list, found no such"
    ) as e:
        read_choices(path)
    assert str(path) in str(e.value)
    with pytest.raises(FileNotFoundError, match=r"expected none.json in .*published at https://cs.stanford"):
        read_choices(tmp_path / "none.json")


def test_a_subset_is_scored_alone(scenes: Path) -> None:
    task = GQA().load(scenes / "gqa", "val")
    few = task.subset([5, 1])
    assert few.example_ids() == [task[5].example_id, task[1].example_id]
    assert few[0] == task[5]
    assert len(few.image_files()) == 2
    assert few.score({task[5].example_id: task[5].answer, task[1].example_id: "?"})["accuracy"] == 50.0
    with pytest.raises(ValueError, match="belong to no example"):
        few.score(gold(task))
    assert task.subset([]).score({}) == {}


def test_answers_are_written_as_the_gold_ones_are(scenes: Path) -> None:
    task = GQA().load(scenes / "gqa", "val")
    assert task.written(" Light Blue\n") == "light blue"
    # What somebody else wrote is compared as it stands.
    shouted = {key: answer.upper() for key, answer in gold(task).items()}
    assert task.score(shouted)["accuracy"] == 0.0
    assert task.score({key: task.written(answer) for key, answer in shouted.items()})["accuracy"] == 100.0


@pytest.mark.parametrize("image_id", ["../1", "/etc/passwd", "a/../../1", "a\\1", "", ".", "C:1"])
def test_images_stay_in_their_folder(tmp_path: Path, image_id: str) -> None:
    path = write(tmp_path, "val_balanced", {"6": PLAIN, "7": PLAIN | {"imageId": image_id}})
    expected = f"question '7', imageId: expected the name of an image inside its folder, found {image_id!r}"
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        GQA().load(tmp_path, "val")
    assert str(path) in str(error.value)


def test_missing_file_is_named(folder: Path) -> None:
    (folder / "val_balanced_questions.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        GQA().load(folder, "val")
    for part in ("val_balanced_questions.json (or questions/val", str(folder), "https://cs.stanford.edu"):
        assert part in str(error.value)


def test_missing_image_folder(folder: Path) -> None:
    (folder / "images").rename(folder / "pictures")
    with pytest.raises(FileNotFoundError, match="no image folder for images") as error:
        GQA().load(folder, "val")
    assert f"{folder / 'images'} with <imageId>.jpg" in str(error.value)
    # As the archive of all images unpacks.
    (folder / "allImages").mkdir()
    (folder / "pictures").rename(folder / "allImages" / "images")
    assert all(path.is_file() for path in GQA().load(folder, "val").image_files())


def test_truncated_file(folder: Path) -> None:
    path = folder / "val_balanced_questions.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"line 1, column .*cut short or damaged.* at https") as error:
        GQA().load(folder, "val")
    assert str(path) in str(error.value)
    # Nothing half-converted was kept.
    with pytest.raises(ValueError, match="cut short"):
        GQA().load(folder, "val")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "expected an object of objects"),
        ("{}", "an object of objects, found none"),
        ('{"questions": []}', "entry 'questions': expected an object"),
        ('{"7": {"imageId": 1, "question": "?"}}', "question '7': expected 'imageId' to be str, found 1"),
        ('{"7": {"imageId": "1"}}', "question '7': expected 'question' to be str, found no such field"),
        (
            '{"7": {"imageId": "1", "question": "?", "answer": "yes"}}',
            "question '7': expected the key 'isBalanced'",
        ),
        (
            json.dumps({"7": PLAIN})[:-1] + ", " + json.dumps({"7": PLAIN})[1:],
            "question_id '7' is there more than once",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, content: str, expected: str) -> None:
    path = write(tmp_path, "val_balanced", {})
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        GQA().load(tmp_path, "val")
    assert str(path) in str(error.value)


def test_a_file_is_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = GQA().load(folder, "val")

    def fail(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(gqa_module, "read_mapping", fail)
    again = GQA().load(folder, "val")
    assert [again[index] for index in range(24)] == [before[index] for index in range(24)]
    path = folder / "val_balanced_questions.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(AssertionError, match="parsed again"):
        GQA().load(folder, "val")
