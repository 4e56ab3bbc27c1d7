"""Generated data sets in the official form: whole, repeatable, and true of their images."""

import json
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_scenes import asked_in, fitting

from dept_vl._utils.images import missing_files, read_image
from dept_vl.tasks import load_task
from dept_vl.tasks.metrics.vqa import normalise_answer
from pretraining.questions import CAPTION_PHRASINGS
from study_data import official as official_module
from study_data.official import SPLITS, write_tasks
from study_data.questions import KEPT_OUT, NOUNS, NUMBERS, ask_kept_out, listings, pair_statement
from study_data.render import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Scene, render, sample_scene

COUNTS = {"train": 12, "val": 6, "test": 6}
LOADED = {
    "vqav2": {"train": 48, "val": 24, "trainval": 72, "test": 24, "test-std": 24, "test-dev": 6},
    "gqa": {"train": 48, "val": 24, "testdev": 24, "submission_all": 24},
    "nlvr2": {"train": 24, "dev": 12, "test": 12},
    "coco": {"train": 12, "val": 6, "test": 6},
}
COLOUR, SHAPE = "|".join(COLOURS), "|".join(SHAPES)
PHRASE = rf"((?:{'|'.join(SIZES)}) )?((?:{COLOUR}) )?(?:{SHAPE}|{'|'.join(NOUNS)})"


@pytest.fixture(scope="module")
def drawn() -> dict[int, Scene]:
    """The scenes of the shared folder by the number of their image: drawn first, from the seed."""
    rng = Random(0)
    return {number: sample_scene(rng) for number in range(1, 1 + sum(COUNTS.values()))}


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    rng = Random(1)
    return [sample_scene(rng) for _ in range(300)]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def holds(sentence: str, left: Scene, right: Scene) -> bool:
    """Whether a statement about two images is true, by the words of it alone."""
    forms = {
        r"both images show a (.+)": lambda a, b: a > 0 and b > 0,
        r"a (.+) is in each image": lambda a, b: a > 0 and b > 0,
        r"neither image shows a (.+)": lambda a, b: a == b == 0,
        r"exactly one image contains a (.+)": lambda a, b: (a > 0) is not (b > 0),
        r"the left image contains a (.+)": lambda a, b: a > 0,
        r"the right image contains a (.+)": lambda a, b: b > 0,
        r"at least one image contains a (.+)": lambda a, b: a + b > 0,
        r"there are (.+)s in the left image only": lambda a, b: a > 0 and b == 0,
        r"the left image has more (.+)s": lambda a, b: a > b,
    }
    for form, truth in forms.items():
        if found := re.fullmatch(form, sentence):
            return bool(truth(*(len(fitting(scene, found[1])) for scene in (left, right))))
    found = re.fullmatch(r"there are (\w+) (.+)s in all", sentence)
    assert found is not None, sentence
    count = sum(len(fitting(scene, found[2])) for scene in (left, right))
    return NUMBERS.index(found[1]) == count


def phrase_of(sentence: str) -> str:
    found = re.search(PHRASE, sentence)
    assert found is not None, sentence
    return found[0]


@pytest.mark.parametrize("task", LOADED)
def test_every_split_loads_with_all_its_images(scenes: Path, task: str) -> None:
    assert sorted(path.name for path in scenes.iterdir()) == sorted(LOADED)
    for split, count in LOADED[task].items():
        loaded = load_task(task, scenes / task, split)
        assert len(loaded) == len(set(loaded.example_ids())) == count
        assert missing_files(loaded.image_files()) == []
        assert read_image(loaded.image_files()[0]).size == (IMAGE_SIZE, IMAGE_SIZE)


def test_no_image_is_in_two_splits(scenes: Path) -> None:
    for task, splits in (
        ("vqav2", ("train", "val", "test")),
        ("gqa", ("train", "val", "testdev")),
        ("nlvr2", ("train", "dev", "test")),
        ("coco", ("train", "val", "test")),
    ):
        pictures = [
            {read_image(path).tobytes() for path in load_task(task, scenes / task, split).image_files()}
            for split in splits
        ]
        assert sum(map(len, pictures)) == len(set.union(*pictures))
        if task != "nlvr2":
            assert list(map(len, pictures)) == list(COUNTS.values())


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write_tasks(tmp_path / "deep" / name, train=2, val=1, test=1, seed=seed)

    def contents(name: str) -> dict[Path, bytes]:
        root = tmp_path / "deep" / name
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    one, other = contents("one"), contents("other")
    assert one == contents("two")
    pictures = [{file for path, file in of.items() if path.suffix != ".json"} for of in (one, other)]
    assert not pictures[0] & pictures[1]
    assert len(pictures[0]) > 4
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["one", "other", "two"]


def test_images_are_the_scenes(scenes: Path, drawn: dict[int, Scene]) -> None:
    for number, scene in drawn.items():
        pixels = np.asarray(render(scene), dtype=float)
        with Image.open(scenes / "gqa" / "images" / f"{number}.jpg") as image:
            saved = np.asarray(image, dtype=float)
        # JPEG, but colours do not bleed out of shapes this small.
        assert np.abs(saved - pixels).mean() < 3
        assert np.abs(saved - pixels).max() < 80
    pictures = {render(scene).tobytes() for scene in drawn.values()}
    assert all(read_image(path).tobytes() in pictures for path in (scenes / "nlvr2").rglob("*.png"))


def test_vqav2_questions_are_kept_out_and_ten_people_agree(scenes: Path) -> None:
    root = scenes / "vqav2"
    pattern = asked_in([wording for _, group in KEPT_OUT.values() for wording in group])
    for subtype in ("train2014", "val2014"):
        questions = read(root / f"v2_OpenEnded_mscoco_{subtype}_questions.json")["questions"]
        annotations = read(root / f"v2_mscoco_{subtype}_annotations.json")["annotations"]
        assert [row["question_id"] for row in questions] == [row["question_id"] for row in annotations]
        assert [row["image_id"] for row in questions] == [row["image_id"] for row in annotations]
        for row, annotation in zip(questions, annotations, strict=True):
            assert pattern.fullmatch(row["question"])
            answers = {answer["answer"] for answer in annotation["answers"]}
            assert answers == {annotation["multiple_choice_answer"]}
            (answer,) = answers
            assert answer == normalise_answer(answer) != ""
            kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
            assert annotation["answer_type"] == kind
            assert row["question"].startswith(annotation["question_type"])
    whole, part = (
        read(root / f"v2_OpenEnded_mscoco_{subtype}_questions.json")["questions"]
        for subtype in ("test2015", "test-dev2015")
    )
    assert [row for row in whole if row in part] == part
    assert len(part) < len(whole)


def test_gold_answers_score_100(scenes: Path) -> None:
    for task, split in (("vqav2", "train"), ("gqa", "train"), ("nlvr2", "train")):
        loaded = load_task(task, scenes / task, split)
        gold = {loaded[i].example_id: loaded.written(loaded[i].answer) for i in range(len(loaded))}
        assert loaded.score(gold)[loaded.primary] == 100.0


def test_gqa_records_are_of_the_scorers_form(scenes: Path) -> None:
    root = scenes / "gqa"
    for name in ("train", "val", "testdev"):
        questions = read(root / f"{name}_balanced_questions.json")
        choices = read(root / "eval" / f"{name}_choices.json")
        assert questions.keys() == choices.keys()
        for question_id, record in questions.items():
            assert record["answer"] in choices[question_id]["valid"]
            assert 2 <= len(choices[question_id]["valid"]) == len(set(choices[question_id]["plausible"]))
    bare = read(root / "submission_all_questions.json")
    assert bare == {
        key: {field: record[field] for field in ("question", "imageId", "isBalanced")}
        for key, record in read(root / "testdev_balanced_questions.json").items()
    }


def test_nlvr2_labels_are_true_of_the_images(scenes: Path, drawn: dict[int, Scene]) -> None:
    by_pixels = {render(scene).tobytes(): scene for scene in drawn.values()}
    labels: Counter[str] = Counter()
    for split in ("train", "dev", "test"):
        task = load_task("nlvr2", scenes / "nlvr2", split)
        for index in range(len(task)):
            left, right = (by_pixels[read_image(path).tobytes()] for path in task[index].images)
            assert task[index].answer == str(holds(task[index].question, left, right)).lower()
            labels[task[index].answer] += 1
    assert labels.keys() == {"true", "false"}


def test_coco_captions_list_the_objects(scenes: Path, drawn: dict[int, Scene]) -> None:
    images = read(scenes / "coco" / "dataset_coco.json")["images"]
    assert [image["cocoid"] for image in images] == list(drawn)
    for image in images:
        captions = [sentence["raw"] for sentence in image["sentences"]]
        assert captions == listings(drawn[image["cocoid"]])
        assert image["filename"] == f"COCO_{image['filepath']}_{image['cocoid']:012d}.jpg"
    assert Counter(image["split"] for image in images) == {"restval": 3, "train": 9, "val": 6, "test": 6}


def test_statements_about_pairs_are_right(many: list[Scene]) -> None:
    rng, seen = Random(2), Counter[tuple[str, bool]]()
    for left, right in pairwise(many):
        for _ in range(4):
            sentence, truth = pair_statement(left, right, rng)
            assert holds(sentence, left, right) is truth, (sentence, left, right)
            seen[sentence.replace(phrase_of(sentence), "{}"), truth] += 1
    # Every kind is sometimes true and sometimes false, and neither answer is the one to guess.
    kinds = {
        "both images show a {}", "a {} is in each image", "neither image shows a {}",
        "exactly one image contains a {}", "the left image contains a {}", "the right image contains a {}",
        "at least one image contains a {}", "there are {}s in the left image only",
        "the left image has more {}s", "there are zero {}s in all", "there are two {}s in all",
    }  # fmt: skip
    assert kinds <= {kind for kind, _ in seen}
    assert all(seen[kind, truth] > 0 for kind in kinds for truth in (True, False))
    assert 0.3 < sum(count for (_, truth), count in seen.items() if truth) / seen.total() < 0.7


def test_every_question_kept_out_is_asked(many: list[Scene]) -> None:
    rng = Random(3)
    asked = [ask_kept_out(scene, rng) for scene in many for _ in range(5)]
    for _, wordings in KEPT_OUT.values():
        pattern = asked_in(wordings)
        found = [qa for qa in asked if pattern.fullmatch(qa.source_text)]
        assert len({qa.target_text for qa in found}) > 1
    known = asked_in([wording for _, wordings in KEPT_OUT.values() for wording in wordings])
    assert all(known.fullmatch(qa.source_text) for qa in asked)


def test_only_the_families_named_are_asked(many: list[Scene]) -> None:
    rng = Random(4)
    asked = [ask_kept_out(scene, rng, ["many or few", "is there"]) for scene in many]
    pattern = asked_in([*KEPT_OUT["many or few"][1], *KEPT_OUT["is there"][1]])
    assert all(pattern.fullmatch(qa.source_text) for qa in asked)
    assert {qa.target_text for qa in asked} == {"many", "few", "yes", "no"}
    assert ask_kept_out(many[0], Random(5)) == ask_kept_out(many[0], Random(5))


def test_listings_name_every_object_and_neither_size_nor_place(many: list[Scene]) -> None:
    for scene in many:
        captions = listings(scene)
        assert len(captions) == 5
        things = [(item.colour, item.shape) for item in scene.objects]
        for caption in captions:
            assert re.findall(rf"\b({COLOUR}) ({SHAPE})\b", caption) == things
            words = set(re.findall(r"\w+", caption))
            assert not words & {*SIZES, "left", "right", "top", "bottom", "center"}
            assert not caption.startswith(CAPTION_PHRASINGS)
        assert captions[-1].split()[0] == ("zero", "one", "two", "three", "four")[len(things)]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    with pytest.raises(FileExistsError, match="is there already; choose another folder") as error:
        write_tasks(tmp_path / "data", train=1, val=1, test=1)
    assert str(tmp_path / "data") in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine"]


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(official_module, "_coco", full)
    with pytest.raises(OSError, match="No space left"):
        write_tasks(tmp_path / "data", train=1, val=1, test=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [0, -3])
def test_no_split_is_empty(tmp_path: Path, split: str, count: int) -> None:
    counts = {"train": 1, "val": 1, "test": 1} | {split: count}
    with pytest.raises(ValueError, match=f"at least one image in each split, found {split}={count}"):
        write_tasks(tmp_path / "data", **counts)
    assert list(tmp_path.iterdir()) == []


def test_one_image_a_split_is_enough(tmp_path: Path) -> None:
    write_tasks(tmp_path / "data", train=1, val=1, test=1)
    for task, splits in LOADED.items():
        for split in splits:
            assert len(load_task(task, tmp_path / "data" / task, split)) > 0
    shutil.rmtree(tmp_path / "data")
