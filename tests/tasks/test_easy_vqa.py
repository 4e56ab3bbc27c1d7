"""easy-VQA written as VQAv2: on a stand-in for the package, and on the package itself."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import easy_vqa
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageStat, JpegImagePlugin

from study_data import commands
from study_data.easy_vqa import MARKER, QUESTION_TYPES, convert, question_type

COLOURS = ["red", "teal", "blue"]
"""Of the shape in train images 0 and 1 and in test image 0."""

TRAIN = (
    [
        "what shape is present?",
        "is there a red shape?",
        "what color is the circle?",
        "is no red shape present?",
    ],
    ["circle", "yes", "teal", "yes"],
    [0, 0, 1, 1],
)
TEST = (["what is the blue shape?", "does the image contain a circle?"], ["triangle", "no"], [0, 0])
COUNTS = {
    "train2014_images": 2,
    "train2014_questions": 4,
    "train2014_annotations": 4,
    "val2014_images": 1,
    "val2014_questions": 2,
    "val2014_annotations": 2,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package, with three images; ids start at 0 in both splits."""
    paths = []
    for index, colour in enumerate(COLOURS):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).rectangle((20, 24, 31, 47), fill=colour)
        path = tmp_path / "package" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        paths.append(str(path))
    stand_in = ModuleType("easy_vqa")
    vars(stand_in).update(
        get_train_questions=lambda: TRAIN,
        get_test_questions=lambda: TEST,
        get_train_image_paths=lambda: {1: paths[1], 0: paths[0]},
        get_test_image_paths=lambda: {0: paths[2]},
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", stand_in)
    return stand_in


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_split(folder: Path, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Questions file and annotations file of a split."""
    return (
        read(folder / f"v2_OpenEnded_mscoco_{split}_questions.json"),
        read(folder / f"v2_mscoco_{split}_annotations.json"),
    )


def files(folder: Path) -> dict[str, int]:
    """Every file below the folder, with its time of change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def colour_error(first: Image.Image, second: Image.Image) -> float:
    """Largest root mean square difference of a colour channel, 0 to 255."""
    return max(ImageStat.Stat(ImageChops.difference(first, second)).rms)


def test_files_are_the_official_ones(package: ModuleType, tmp_path: Path) -> None:
    """Names and keys of VQAv2, and nothing beside them but source and marker."""
    output_dir = tmp_path / "missing" / "easy-vqa"
    assert convert(output_dir) == COUNTS
    assert sorted(files(output_dir)) == [
        "SOURCE.md",
        MARKER,
        "train2014/COCO_train2014_000000000000.jpg",
        "train2014/COCO_train2014_000000000001.jpg",
        "v2_OpenEnded_mscoco_train2014_questions.json",
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_train2014_annotations.json",
        "v2_mscoco_val2014_annotations.json",
        "val2014/COCO_val2014_000000000002.jpg",
    ]
    shared = {"info", "license", "data_type", "data_subtype"}
    for split in ("train2014", "val2014"):
        questions, annotations = read_split(output_dir, split)
        assert set(questions) == shared | {"task_type", "questions"}
        assert set(annotations) == shared | {"annotations"}
        assert questions["task_type"] == "Open-Ended"
        assert questions["data_type"] == annotations["data_type"] == "mscoco"
        assert questions["data_subtype"] == annotations["data_subtype"] == split
        assert [row["question_id"] for row in questions["questions"]] == [
            row["question_id"] for row in annotations["annotations"]
        ]
    source = (output_dir / "SOURCE.md").read_text(encoding="utf-8")
    assert "https://github.com/vzhou842/easy-VQA" in source
    assert "Copyright (c) 2019 Victor Zhou" in source


def test_rows(package: ModuleType, tmp_path: Path) -> None:
    """Question and annotation of a row in full; ids and types of all of them."""
    convert(tmp_path / "out")
    questions, annotations = read_split(tmp_path / "out", "train2014")
    assert questions["questions"][1] == {
        "image_id": 0,
        "question": "is there a red shape?",
        "question_id": 1,
    }
    assert annotations["annotations"][1] == {
        "question_type": "is there a",
        "multiple_choice_answer": "yes",
        "answers": [
            {"answer": "yes", "answer_confidence": "yes", "answer_id": number}
            for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
        ],
        "image_id": 0,
        "answer_type": "yes/no",
        "question_id": 1,
    }
    assert [row["question_id"] for row in questions["questions"]] == [0, 1, 1000, 1001]
    assert [row["answer_type"] for row in annotations["annotations"]] == [
        "other",
        "yes/no",
        "other",
        "yes/no",
    ]


def test_ids_are_unique_over_both_splits(package: ModuleType, tmp_path: Path) -> None:
    """Test image 0 comes after the two train images."""
    convert(tmp_path / "out")
    train, _ = read_split(tmp_path / "out", "train2014")
    val, _ = read_split(tmp_path / "out", "val2014")
    assert {row["image_id"] for row in train["questions"]} == {0, 1}
    assert {row["image_id"] for row in val["questions"]} == {2}
    assert [row["question_id"] for row in val["questions"]] == [2000, 2001]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("what is the color of the circle?", "what is the color of the"),
        ("What color is the shape?", "what color is the"),
        ("what is the red shape?", "what is the"),
        ("what shape is in the image?", "what"),
        ("is there a circle?", "is there a"),
        ("is there not a circle?", "is there"),
        ("is there another circle?", "is there"),
        ("is no circle present?", "is"),
        ("does the image not contain a circle?", "does the"),
        ("whatever shape?", "none of the above"),
    ],
)
def test_question_type(question: str, expected: str) -> None:
    """The longest type wins, and only whole words count."""
    assert question_type(question) == expected


def test_colours_survive(package: ModuleType, tmp_path: Path) -> None:
    """Within a few steps of 256 after JPEG, edges included, for colours at full resolution."""
    convert(tmp_path / "out")
    names = ["train2014_000000000000", "train2014_000000000001", "val2014_000000000002"]
    for index, name in enumerate(names):
        with (
            Image.open(tmp_path / "package" / f"{index}.png") as png,
            Image.open(tmp_path / "out" / name.split("_")[0] / f"COCO_{name}.jpg") as jpeg,
        ):
            assert (jpeg.format, jpeg.mode, jpeg.size) == ("JPEG", "RGB", (64, 64))
            assert JpegImagePlugin.get_sampling(jpeg) == 0
            assert colour_error(png, jpeg) < 4


def test_second_call_changes_nothing(
    package: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A finished folder is left alone, said so, and needs no package."""
    convert(tmp_path / "out")
    before = files(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    assert convert(tmp_path / "out") == COUNTS
    assert files(tmp_path / "out") == before
    assert f"{tmp_path / 'out'} holds easy-VQA already" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["image", "questions", "truncated", "marker"])
def test_damaged_folder_is_refused(package: ModuleType, tmp_path: Path, damage: str) -> None:
    """A conversion that lost something no longer counts as finished."""
    convert(tmp_path / "out")
    questions = tmp_path / "out" / "v2_OpenEnded_mscoco_val2014_questions.json"
    if damage == "image":
        next((tmp_path / "out" / "train2014").iterdir()).unlink()
    elif damage == "questions":
        questions.unlink()
    elif damage == "truncated":
        questions.write_bytes(questions.read_bytes()[:-10])
    else:
        (tmp_path / "out" / MARKER).unlink()
    before = files(tmp_path / "out")
    with pytest.raises(FileExistsError, match="choose another output folder"):
        convert(tmp_path / "out")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_something_else_is_refused(package: ModuleType, tmp_path: Path, kind: str) -> None:
    """Whatever else stands there is named and kept."""
    output_dir = tmp_path / "out"
    if kind == "file":
        output_dir.write_text("mine")
    else:
        output_dir.mkdir()
    if kind == "folder":
        (output_dir / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError) as caught:
        convert(output_dir)
    message = str(caught.value)
    assert message.startswith(f"expected {output_dir} not to exist")
    assert "found something else" in message
    assert "choose another" in message
    assert output_dir.is_file() or len(files(output_dir)) == (kind == "folder")


def test_failure_leaves_nothing(package: ModuleType, tmp_path: Path) -> None:
    """An image that cannot be read, last of all: no half-written folder, under no name."""
    package.get_test_image_paths = lambda: {0: str(tmp_path / "package" / "gone.png")}
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        convert(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what to install, and writes nothing."""
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match="pip install easy-vqa"):
        convert(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command(package: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes the folder and prints what is in it."""
    output_dir = tmp_path / "out"
    commands.easy_vqa(output_dir)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{output_dir} holds:"
    assert {kind: int(count) for kind, count in map(str.split, lines[1:])} == COUNTS
    assert read(output_dir / MARKER) == COUNTS


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package itself, a declared dependency of the tests, converted once; 47 MB."""
    output_dir = tmp_path_factory.mktemp("easy_vqa") / "out"
    assert convert(output_dir) == {
        "train2014_images": 4_000,
        "train2014_questions": 38_575,
        "train2014_annotations": 38_575,
        "val2014_images": 1_000,
        "val2014_questions": 9_673,
        "val2014_annotations": 9_673,
    }
    return output_dir


@pytest.mark.slow
def test_package_questions(converted: Path) -> None:
    """Ids, answers, and yes/no questions as its README counts them."""
    image_ids: list[int] = []
    question_ids: list[int] = []
    answers: set[str] = set()
    kinds: set[str] = set()
    answer_types: list[Counter[str]] = []
    for split in ("train2014", "val2014"):
        questions, annotations = read_split(converted, split)
        image_ids += {row["image_id"] for row in questions["questions"]}
        question_ids += [row["question_id"] for row in questions["questions"]]
        answers |= {row["multiple_choice_answer"] for row in annotations["annotations"]}
        kinds |= {row["question_type"] for row in annotations["annotations"]}
        answer_types.append(Counter(row["answer_type"] for row in annotations["annotations"]))
    assert sorted(image_ids) == list(range(5_000))
    assert len(set(question_ids)) == len(question_ids) == 38_575 + 9_673
    assert len(answers) == 13
    assert kinds == set(QUESTION_TYPES)
    assert answer_types == [
        {"yes/no": 28_407, "other": 38_575 - 28_407},
        {"yes/no": 7_136, "other": 9_673 - 7_136},
    ]


@pytest.mark.slow
def test_package_images(converted: Path) -> None:
    """Every hundredth image is the one that the package means by its id."""
    for split, paths, offset in (
        ("train2014", easy_vqa.get_train_image_paths(), 0),
        ("val2014", easy_vqa.get_test_image_paths(), 4_000),
    ):
        for source_id in range(0, len(paths), 100):
            name = f"COCO_{split}_{source_id + offset:012d}.jpg"
            with (
                Image.open(paths[source_id]) as png,
                Image.open(converted / split / name) as jpeg,
            ):
                assert colour_error(png, jpeg) < 4, name
