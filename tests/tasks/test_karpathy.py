"""Karpathy's splits of VQAv2 as files: the same records, readable as the official files are."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dept_vl.tasks.coco import KARPATHY_FILE
from dept_vl.tasks.prepare import karpathy as karpathy_module
from dept_vl.tasks.prepare.karpathy import SPLITS, write_splits
from dept_vl.tasks.prepare.staging import json_list
from dept_vl.tasks.vqav2 import ANSWERED, VQAv2, annotation_names, question_names, read_rows

# Image -> split: as in Karpathy's own, val and test are images of val2014; 12 is in none.
LISTED = {
    **dict.fromkeys(range(1, 12), "train"),
    **dict.fromkeys((13, 14), "restval"),
    **dict.fromkeys((15, 16, 17), "val"),
    18: "test",
}
COUNTS = {"train": 4 * 13, "val": 4 * 3, "test": 4}
NAMES = {"questions": question_names, "annotations": annotation_names}


@pytest.fixture
def root(scenes: Path, tmp_path: Path) -> Path:
    """VQAv2 with Karpathy's list; its records are copied, its images are not."""
    folder = tmp_path / "vqav2"
    shutil.copytree(scenes / "vqav2", folder, ignore=shutil.ignore_patterns("*.jpg"))
    images = [
        {
            "filepath": "anywhere",
            "filename": f"{image_id}.jpg",
            "cocoid": image_id,
            "split": split,
            "sentences": [{"raw": "a scene"}],
        }
        for image_id, split in LISTED.items()
    ]
    (folder / KARPATHY_FILE).write_text(json.dumps({"images": images, "dataset": "coco"}))
    # Fields that nobody here reads, and letters that JSON may write in two ways.
    path = folder / question_names("val2014")[0]
    content = json.loads(path.read_text())
    content["questions"][8] |= {"question": "Où est le café? \U0001f600", "extra": {"1": [None, 2.5, True]}}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def records(folder: Path, key: str, *parts: str) -> list[dict[str, Any]]:
    """The records of official files, one after the other."""
    files = (folder / NAMES[key](part)[0] for part in parts)
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))[key]]


def test_every_record_is_kept_as_it_is(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "karpathy"
    assert write_splits(root, output) == COUNTS
    assert sorted(path.name for path in output.iterdir()) == sorted(
        f"v2_{kind}_karpathy-{split}_{key}.json"
        for kind, key in (("OpenEnded_mscoco", "questions"), ("mscoco", "annotations"))
        for split in SPLITS
    )
    for key in NAMES:
        for split in SPLITS:
            wanted = ("train", "restval") if split == "train" else (split,)
            expected = [row for row in records(root, key, *ANSWERED) if LISTED.get(row["image_id"]) in wanted]
            assert records(output, key, f"karpathy-{split}") == expected
            assert len(expected) == COUNTS[split]
    odd = records(output, "questions", "karpathy-val")[0]
    assert (odd["question"], odd["extra"]) == ("Où est le café? \U0001f600", {"1": [None, 2.5, True]})


def test_the_files_hold_what_our_own_splits_hold(root: Path, tmp_path: Path) -> None:
    write_splits(root, tmp_path / "out")
    for split in SPLITS:
        part = f"karpathy-{split}"
        rows = read_rows(*(tmp_path / "out" / names(part)[0] for names in (question_names, annotation_names)))
        ours = VQAv2().load(root, part).rows
        assert len(rows) == len(ours) == COUNTS[split]
        for name in ("question_id", "image_id", "question", "answers", "answer_type", "question_type"):
            assert rows.column(name).to_pylist() == ours.column(name).to_pylist()


def test_files_of_version_1_are_read_too(root: Path, tmp_path: Path) -> None:
    expected = write_splits(root, tmp_path / "2")
    for names in NAMES.values():
        for subtype in ANSWERED:
            new, old = names(subtype)
            (root / new).rename(root / old)
    assert write_splits(root, tmp_path / "1") == expected


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_nothing_is_overwritten(root: Path, tmp_path: Path, key: str, split: str) -> None:
    there = tmp_path / NAMES[key](f"karpathy-{split}")[0]
    there.write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="is there already; choose another --output_dir") as error:
        write_splits(root, tmp_path)
    assert str(there) in str(error.value)
    assert there.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == before


def test_files_may_be_written_beside_the_official_ones(root: Path) -> None:
    before = {path: path.read_bytes() for path in root.glob("*.json")}
    write_splits(root, root)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(root.glob("*.json"))) == len(before) + 6


@pytest.mark.parametrize("key", NAMES)
def test_a_damaged_file_leaves_nothing_behind(root: Path, tmp_path: Path, key: str) -> None:
    path = root / NAMES[key]("val2014")[0]
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="cut short or damaged") as error:
        write_splits(root, tmp_path / "out")
    assert str(path) in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(path: Path, header: dict[str, Any], key: str) -> Iterator[Callable[[dict[str, Any]], None]]:
        with json_list(path, header, key) as add:

            def write(record: dict[str, Any]) -> None:
                if record["image_id"] == 16:
                    raise OSError(28, "No space left on device")
                add(record)

            yield write

    monkeypatch.setattr(karpathy_module, "json_list", full)
    with pytest.raises(OSError, match="No space left"):
        write_splits(root, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("key", NAMES)
def test_a_record_without_its_image(root: Path, tmp_path: Path, key: str) -> None:
    path = root / NAMES[key]("train2014")[0]
    content = json.loads(path.read_text())
    del content[key][5]["image_id"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{key}\[5\]: expected 'image_id' to be int, found no") as error:
        write_splits(root, tmp_path / "out")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (KARPATHY_FILE, "Karpathy's splits of COCO file not found: expected dataset_coco.json in "),
        (question_names("val2014")[0], r"expected v2_OpenEnded.*val2014_questions.json \(or Open"),
        (annotation_names("train2014")[0], r"expected v2_mscoco_train2014_annotations.json \(or mscoco"),
    ],
)
def test_missing_files_are_named(root: Path, tmp_path: Path, name: str, expected: str) -> None:
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=expected) as error:
        write_splits(root, tmp_path / "out")
    assert str(root) in str(error.value)
    assert not (tmp_path / "out").exists()
