"""COCO captions in Karpathy's splits: what is read, what is learned and scored, and bad files."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dept_vl.config import DataOptions
from dept_vl.data.splits import load_splits
from dept_vl.tasks import coco as coco_module
from dept_vl.tasks import load_task
from dept_vl.tasks.coco import KARPATHY_FILE, SPLITS, COCOCaptions, karpathy_split, read_references
from dept_vl.tasks.metrics import caption as caption_module
from dept_vl.tasks.metrics.caption import Figures

SENTENCES = [{"raw": "A dog runs."}, {"raw": "a brown dog"}]
PLAIN = {
    "filepath": "val2014",
    "filename": "COCO_val2014_000000000042.jpg",
    "cocoid": 42,
    "split": "val",
    "sentences": SENTENCES,
}
SCORE: Figures = {
    **{"Bleu_1": 61.0, "Bleu_2": 62.0, "Bleu_3": 63.0, "Bleu_4": 64.0, "METEOR": 30.5, "ROUGE_L": 50.5},
    **{"CIDEr": 112.5, "scale": 100, "n": 2},
}
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime on the PATH")


@pytest.fixture
def folder(scenes: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(scenes / "coco", tmp_path / "coco")


def write(root: Path, images: Sequence[Mapping[str, Any]], folder: str = "val2014") -> Path:
    """The file of the splits, and a folder for images beside it."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / KARPATHY_FILE
    path.write_text(json.dumps({"images": list(images), "dataset": "coco"}))
    return path


def read(root: Path, split: str) -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = json.loads((root / KARPATHY_FILE).read_text())["images"]
    return [image for image in images if image["split"] in SPLITS[split]]


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 6), ("test", 6)])
def test_what_is_read_is_what_the_file_holds(scenes: Path, split: str, count: int) -> None:
    root = scenes / "coco"
    images = read(root, split)
    task = COCOCaptions().load(root, split)
    assert len(task) == len(images) == count
    assert task.example_ids() == [image["cocoid"] for image in images]
    for index, image in enumerate(images):
        captions = [sentence["raw"] for sentence in image["sentences"]]
        example = task[index]
        assert example.example_id == image["cocoid"]
        assert example.source_text == "caption:"
        assert example.images == (root / image["filepath"] / image["filename"],) == task.images(index)
        # In order, but once each: "a red star" and "a red star" are one thing to learn.
        assert example.targets == tuple((caption, 1.0) for caption in dict.fromkeys(captions))
        assert example.in_turn
        assert example.question == captions[0]
    assert task.image_files() == [root / image["filepath"] / image["filename"] for image in images]
    assert all(path.is_file() for path in task.image_files())
    assert read_references(root / KARPATHY_FILE, split) == {
        image["cocoid"]: [sentence["raw"] for sentence in image["sentences"]] for image in images
    }
    assert karpathy_split(root / KARPATHY_FILE, split) == task.example_ids()


def test_restval_joins_train(scenes: Path) -> None:
    splits = [image["split"] for image in read(scenes / "coco", "train")]
    assert set(splits) == {"train", "restval"}
    assert len(COCOCaptions().load(scenes / "coco", "train")) == len(splits)


def test_captions_that_stand_there_twice_are_learned_once_and_scored_twice(tmp_path: Path) -> None:
    raws = ["A dog.", " A  dog.\n", "a dog.", "", " \n", "A cat"]
    path = write(tmp_path, [PLAIN | {"sentences": [{"raw": raw} for raw in raws]}])
    example = load_task("coco", tmp_path, "val")[0]
    # On one line; without text no caption.
    assert example.targets == (("A dog.", 1.0), ("a dog.", 1.0), ("A cat", 1.0))
    assert read_references(path, "val") == {42: ["A dog.", "A dog.", "a dog.", "A cat"]}


def test_decoding_is_by_beams(scenes: Path) -> None:
    decoding = COCOCaptions().load(scenes / "coco", "val").decoding
    assert (decoding.max_new_tokens, decoding.num_beams, decoding.candidates) == (40, 5, ())


@pytest.mark.parametrize("layout", [".", "images", "Images/mscoco"])
def test_images_may_lie_in_three_places(tmp_path: Path, layout: str) -> None:
    write(tmp_path, [PLAIN], f"{layout}/val2014")
    (path,) = COCOCaptions().load(tmp_path, "val").images(0)
    assert path == tmp_path / layout / "val2014" / "COCO_val2014_000000000042.jpg"


def test_only_the_folders_of_a_split_are_needed(folder: Path) -> None:
    shutil.rmtree(folder / "train2014")
    assert len(COCOCaptions().load(folder, "test")) == 6
    with pytest.raises(FileNotFoundError, match="no image folder for train2014") as error:
        COCOCaptions().load(folder, "train")
    assert str(folder / "train2014") in str(error.value)
    assert "https://cocodataset.org" in str(error.value)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[int, list[str]], dict[int, str]]]:
    """What is given to the scorer, which takes no time."""
    calls: list[tuple[dict[int, list[str]], dict[int, str]]] = []

    def score(references: dict[int, list[str]], predictions: dict[int, str], *, meteor: bool) -> Figures:
        calls.append((references, predictions))
        return {name: value for name, value in SCORE.items() if meteor or name != "METEOR"}

    monkeypatch.setattr(coco_module, "score_captions", score)
    return calls


def test_every_caption_is_a_reference(
    scenes: Path, scored: list[tuple[dict[int, list[str]], dict[int, str]]]
) -> None:
    task = COCOCaptions().load(scenes / "coco", "test")
    predictions: dict[int | str, str] = {key: f"caption of {key}" for key in task.example_ids()}
    scores = task.score(predictions)
    assert scored == [(read_references(scenes / "coco" / KARPATHY_FILE, "test"), predictions)]
    assert scores == {
        "CIDEr": 112.5,
        "Bleu_4": 64.0,
        "METEOR": 30.5,
        "ROUGE_L": 50.5,
        "Bleu_1": 61.0,
        "Bleu_2": 62.0,
        "Bleu_3": 63.0,
    }
    assert next(iter(scores)) == task.primary == "CIDEr"
    # Without METEOR, whose program takes seconds, the others are the same.
    del scores["METEOR"]
    assert replace(task, meteor=False).score(predictions) == scores


@needs_java
def test_a_run_may_leave_meteor_out(scenes: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    options = DataOptions(task="coco", data_dir=scenes / "coco", dev_split="val", test_split="test")
    for meteor in (True, False):
        splits = load_splits(replace(options, meteor=meteor), 0)
        assert [part.meteor for part in (splits.train, splits.dev, splits.test)] == [meteor] * 3


def test_a_subset_is_scored_against_its_own_references(
    scenes: Path, scored: list[tuple[dict[int, list[str]], dict[int, str]]]
) -> None:
    task = COCOCaptions().load(scenes / "coco", "test")
    few = task.subset([4, 0])
    assert few[0] == task[4]
    few.score(dict.fromkeys(few.example_ids(), "a dog"))
    ((references, predictions),) = scored
    assert list(references) == [task[4].example_id, task[0].example_id] == list(predictions)
    with pytest.raises(ValueError, match=r"2 examples, found 1: 1 missing"):
        few.score({task[4].example_id: "a dog"})
    with pytest.raises(ValueError, match="belong to no example"):
        few.score(dict.fromkeys(task.example_ids(), "a dog"))
    assert len(scored) == 1


@needs_java
def test_the_real_scorer(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    # It alone takes ten seconds to start; `test_metrics_caption.py` has it.
    monkeypatch.setattr(caption_module, "_meteor", lambda *_: 0.25)
    task = COCOCaptions().load(scenes / "coco", "val")
    scores = task.score({key: task[i].targets[0][0] for i, key in enumerate(task.example_ids())})
    assert scores.pop("METEOR") == 25.0
    assert scores.pop("CIDEr") > 100
    assert scores == pytest.approx(
        {"Bleu_1": 100.0, "Bleu_2": 100.0, "Bleu_3": 100.0, "Bleu_4": 100.0, "ROUGE_L": 100.0}, rel=1e-6
    )


def test_captions_are_written_on_one_line(scenes: Path) -> None:
    assert COCOCaptions().load(scenes / "coco", "val").written(" A dog\nruns.\t") == "A dog runs."


def test_references_of_cocos_own_annotations(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2014.json"
    rows = [(7, "A dog."), (3, "a cat"), (7, "a  dog\n"), (7, "A dog.")]
    annotations = [
        {"id": number, "image_id": image_id, "caption": caption}
        for number, (image_id, caption) in enumerate(rows)
    ]
    path.write_text(json.dumps({"info": {}, "images": [{"id": 7}], "annotations": annotations}))
    # As they stand: the scorer puts them on one line.
    assert read_references(path) == {7: ["A dog.", "a  dog\n", "A dog."], 3: ["a cat"]}
    path.write_text(json.dumps({"annotations": [*annotations, {"image_id": 7}]}))
    with pytest.raises(
        ValueError, match=r"annotations\[4\]: expected 'caption' to be str, found no"
    ) as error:
        read_references(path)
    assert str(path) in str(error.value)


def test_references_of_several_splits_are_not_mixed(scenes: Path) -> None:
    path = scenes / "coco" / KARPATHY_FILE
    with pytest.raises(ValueError, match="holds the splits train, val, test; say which with --split"):
        read_references(path)
    with pytest.raises(ValueError, match="splits train, val, test; got 'restval'"):
        read_references(path, "restval")


def test_unknown_split(scenes: Path) -> None:
    with pytest.raises(ValueError, match="splits train, val, test; got 'restval'"):
        COCOCaptions().load(scenes / "coco", "restval")


def test_a_split_of_which_there_is_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, [PLAIN])
    with pytest.raises(ValueError, match="expected images of the split 'test', found none") as error:
        COCOCaptions().load(tmp_path, "test")
    assert str(path) in str(error.value)


def test_missing_file_is_named(folder: Path) -> None:
    path = folder / KARPATHY_FILE
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected dataset_coco.json in ") as error:
        COCOCaptions().load(folder, "val")
    assert str(folder) in str(error.value)
    assert "https://cs.stanford.edu/people/karpathy" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"file not found: .*; it is published at https"):
        read_references(path, "val")
    with pytest.raises(FileNotFoundError, match=r"captions_val2014.json .*published at https://cocodataset"):
        read_references(folder / "captions_val2014.json")


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("filepath", "../val2014"),
        ("filepath", "/val2014"),
        ("filepath", ""),
        ("filename", "../../42.jpg"),
        ("filename", "/42.jpg"),
        ("filename", "..\\42.jpg"),
    ],
)
def test_images_stay_in_their_folder(tmp_path: Path, field: str, name: str) -> None:
    path = write(tmp_path, [PLAIN | {"cocoid": 41}, PLAIN | {field: name}])
    expected = (
        f"images[1] (cocoid 42), {field}: expected the name of an image inside its folder, found {name!r}"
    )
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        COCOCaptions().load(tmp_path, "val")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sentences": []}, "expected captions under 'sentences', found none"),
        ({"sentences": [{"raw": " "}]}, "expected captions under 'sentences', found none"),
        ({"sentences": "A dog."}, "expected 'sentences' to be list, found 'A dog.'"),
        ({"sentences": ["A dog."]}, "expected each sentence to be an object, found 'A dog.'"),
        ({"sentences": [{"tokens": ["dog"]}]}, "expected 'raw' to be str, found no such field"),
        ({"split": None}, "expected 'split' to be str, found None"),
    ],
)
def test_damaged_records(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = write(tmp_path, [PLAIN | {"cocoid": 41}, PLAIN | change])
    with pytest.raises(ValueError, match=re.escape(f"images[1] (cocoid 42): {expected}")) as error:
        COCOCaptions().load(tmp_path, "val")
    assert str(path) in str(error.value)


def test_an_image_without_a_number_or_there_twice(tmp_path: Path) -> None:
    write(tmp_path, [PLAIN | {"cocoid": "42"}])
    with pytest.raises(ValueError, match=r"images\[0\] \(cocoid '42'\): expected 'cocoid' to be int"):
        COCOCaptions().load(tmp_path, "val")
    write(tmp_path, [PLAIN, PLAIN])
    with pytest.raises(ValueError, match="image_id 42 is there more than once"):
        COCOCaptions().load(tmp_path, "val")


def test_truncated_file(folder: Path) -> None:
    path = folder / KARPATHY_FILE
    path.write_text(path.read_text()[:300])
    with pytest.raises(ValueError, match=r"line .*, column .*cut short or damaged.* at https") as error:
        COCOCaptions().load(folder, "val")
    assert str(path) in str(error.value)
    path.write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="under 'images', found none"):
        COCOCaptions().load(folder, "val")


def test_a_file_is_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = COCOCaptions().load(folder, "val")

    def fail(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(coco_module, "read_list", fail)
    again = COCOCaptions().load(folder, "val")
    assert [again[index] for index in range(6)] == [before[index] for index in range(6)]
    # Another split of the same file needs no parsing either.
    assert len(COCOCaptions().load(folder, "train")) == 12
    (folder / KARPATHY_FILE).write_text((folder / KARPATHY_FILE).read_text() + "\n")
    with pytest.raises(AssertionError, match="parsed again"):
        COCOCaptions().load(folder, "val")
