"""The data checker: what it says of whole, incomplete and damaged folders."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dept_vl.tasks import TASKS
from dept_vl.tasks.coco import KARPATHY_FILE
from dept_vl.tasks.prepare import check as check_module
from dept_vl.tasks.prepare.check import Finding, check
from dept_vl.tasks.vqav2 import MINIVAL_FILE

QUESTIONS = {"train": 48, "val": 24, "test": 24, "test-dev": 6}

# Of the generated scenes: examples, images, answers of each split.
COUNTS: dict[str, dict[str, tuple[int, int | None, int | None]]] = {
    "vqav2": {
        "train": (48, 12, 480),
        "val": (24, 6, 240),
        "minival": (5, None, 50),
        "nominival": (19, None, 190),
        "karpathy-train": (48 + 8, None, 560),
        "karpathy-val": (8, None, 80),
        "karpathy-test": (8, None, 80),
        "test-dev": (6, None, None),
        "test": (24, 6, None),
    },
    "gqa": {
        "train_balanced": (48, 12, 48),
        "val_balanced": (24, 6, 24),
        "testdev_balanced": (24, None, 24),
    },
    "nlvr2": {"train": (24, 24, 24), "dev": (12, 12, 12), "test1": (12, None, 12)},
    "coco": {"train": (12, 12, 60), "val": (6, 6, 30), "test": (6, 6, 30)},
}


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four tasks, VQAv2 with the lists of its other splits."""
    root = shutil.copytree(scenes, tmp_path_factory.mktemp("whole") / "data")
    questions = json.loads((root / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    minival = [{"question_id": row["question_id"]} for row in questions["questions"][::5]]
    (root / "vqav2" / MINIVAL_FILE).write_text(json.dumps(minival))
    # As in Karpathy's own: val and test are images of val2014.
    splits = {13: "restval", 14: "restval", 15: "val", 16: "val", 17: "test", 18: "test"}
    content = json.loads((root / "coco" / KARPATHY_FILE).read_text())
    listed = [row | {"split": splits.get(row["cocoid"], "train")} for row in content["images"]]
    (root / "vqav2" / KARPATHY_FILE).write_text(json.dumps({"images": listed}))
    return root


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of the scenes in place of the published ones."""
    assert [name for name, blank in TASKS.items() if blank.published] == list(COUNTS)
    for task in COUNTS:
        splits = TASKS[task].published
        assert COUNTS[task].keys() == splits.keys()
        counts = {
            split: replace(facts, examples=examples, images=images, answers=answers)
            for split, facts in splits.items()
            for examples, images, answers in [COUNTS[task][split]]
        }
        monkeypatch.setattr(type(TASKS[task]), "published", counts)


def copied(whole: Path, task: str, tmp_path: Path) -> Path:
    return shutil.copytree(whole / task, tmp_path / task)


def by_status(findings: list[Finding]) -> dict[str, list[str]]:
    statuses: dict[str, list[str]] = {}
    for finding in findings:
        statuses.setdefault(finding.status, []).append(finding.what)
    return statuses


def counted(task: str) -> list[str]:
    """What is said of whole splits."""
    lines = []
    for split, counts in COUNTS[task].items():
        names = ("examples", "images", "answers")
        lines += [
            f"{task} {split}: {name}: {count}, as published"
            for name, count in zip(names, counts, strict=True)
            if count is not None
        ]
    return lines


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("task", "files"), [("vqav2", 8 + 3), ("gqa", 3 + 1), ("nlvr2", 3 + 3), ("coco", 3)])
def test_everything_is_there(whole: Path, task: str, files: int) -> None:
    findings = list(check(task, whole / task, sample=1))
    assert all(finding.good for finding in findings)
    statuses = by_status(findings)
    assert statuses.keys() == {"found", "ok"}
    # Each once, though several splits read it.
    assert len(statuses["found"]) == len(set(statuses["found"])) == files
    assert all(Path(line).exists() and Path(line).parent == whole / task for line in statuses["found"])
    opened = [line for line in statuses["ok"] if "opened" in line]
    assert len(opened) == len(COUNTS[task])
    assert [line for line in statuses["ok"] if "opened" not in line] == counted(task)


@pytest.mark.parametrize("task", COUNTS)
def test_the_published_counts_are_those_of_the_real_data(whole: Path, task: str) -> None:
    findings = list(check(task, whole / task, sample=1))
    differing = by_status(findings)["differs"]
    assert not any(finding.good for finding in findings if finding.status == "differs")
    for split, (examples, _, answers) in COUNTS[task].items():
        facts = TASKS[task].published[split]
        line = f"{task} {split}: examples: found {examples}, published are {facts.examples:,}"
        assert line in differing
        line = f"{task} {split}: answers: found {answers}, published are {facts.answers or 0:,}"
        assert (line in differing) == (facts.answers is not None)
    assert "as published" not in "".join(finding.what for finding in findings)


@pytest.mark.usefixtures("published")
def test_missing_files_are_named_with_their_source(scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes, "vqav2", tmp_path)
    (folder / "v2_mscoco_val2014_annotations.json").unlink()
    (folder / "test2015").rename(folder / "elsewhere")
    statuses = by_status(list(check("vqav2", folder, sample=1)))
    site = "published at https://visualqa.org/download.html"
    assert statuses["missing"] == [
        f"v2_mscoco_val2014_annotations.json (or mscoco_val2014_annotations.json), {site}",
        "minival.json, published at https://nlp.cs.unc.edu/data/lxmert_data/vqa/minival.json",
        "dataset_coco.json, published at "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        f"test2015 (or images/test2015, Images/mscoco/test2015), {site}",
    ]
    assert statuses["skipped"] == [
        f"vqav2 {split}: files are missing" for split in COUNTS["vqav2"] if split != "train"
    ]
    assert "vqav2 train: examples: 48, as published" in statuses["ok"]
    assert not Finding("skipped", "").good


@pytest.mark.usefixtures("published")
def test_images_of_coco_are_published_elsewhere_than_its_splits(scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes, "coco", tmp_path)
    shutil.rmtree(folder / "train2014")
    statuses = by_status(list(check("coco", folder)))
    (line,) = statuses["missing"]
    assert line.startswith("train2014 (or images/train2014, ")
    assert line.endswith("published at https://cocodataset.org/#download")
    assert statuses["skipped"] == ["coco train: files are missing"]


@pytest.mark.usefixtures("published")
def test_files_under_their_other_names_are_found(scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes, "nlvr2", tmp_path)
    (folder / "data").mkdir()
    (folder / "images").mkdir()
    (folder / "dev.json").rename(folder / "data" / "dev.json")
    (folder / "dev").rename(folder / "images" / "dev")
    findings = list(check("nlvr2", folder, sample=1))
    assert all(finding.good for finding in findings)
    assert {str(folder / "data" / "dev.json"), str(folder / "images" / "dev")} <= set(
        by_status(findings)["found"]
    )


@pytest.mark.usefixtures("published")
def test_missing_and_broken_images_are_named(scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes, "coco", tmp_path)
    names = sorted(path.name for path in (folder / "train2014").iterdir())
    gone, cut, empty, text = (folder / "train2014" / name for name in names[:4])
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:400])
    empty.write_bytes(b"")
    text.write_text("<html>404</html>")
    findings = list(check("coco", folder, sample=0))
    statuses = by_status(findings)
    assert statuses["missing"] == ["coco train: 1 of 12 image files", str(gone)]
    *broken, summary = statuses["broken"]
    assert sorted(line.split(" ")[0] for line in broken) == sorted(map(str, (cut, empty, text)))
    assert all("is not a readable image" in line for line in broken)
    assert summary == "coco train: 8 of 11 images opened of 11"
    assert "coco val: 6 of 6 images opened of 6" in statuses["ok"]
    assert [finding.status for finding in findings if not finding.good] == ["missing"] * 2 + ["broken"] * 4
    # Counts are of the files, whatever the images.
    assert "coco train: images: 12, as published" in statuses["ok"]


@pytest.mark.usefixtures("published")
def test_no_image_is_there(scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes, "gqa", tmp_path)
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    statuses = by_status(list(check("gqa", folder)))
    assert len(statuses["missing"]) == 3 + 12 + 6 + 6
    assert not any("opened" in line for line in statuses["ok"])


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("task", "file", "split"),
    [
        ("vqav2", "v2_mscoco_train2014_annotations.json", "train"),
        ("gqa", "val_balanced_questions.json", "val_balanced"),
        ("nlvr2", "dev.json", "dev"),
        ("coco", "dataset_coco.json", "train"),
    ],
)
def test_a_broken_file_is_one_line_and_the_rest_goes_on(
    scenes: Path, tmp_path: Path, task: str, file: str, split: str
) -> None:
    folder = copied(scenes, task, tmp_path)
    path = folder / file
    path.write_text(path.read_text()[:-20])
    statuses = by_status(list(check(task, folder, sample=1)))
    assert all(str(path) in line and "line " in line and "again" not in line for line in statuses["broken"])
    assert str(path) in statuses["found"]
    assert not any(line.startswith(f"{task} {split}:") for line in statuses.get("ok", []))
    whole = {"vqav2": "val", "gqa": "train_balanced", "nlvr2": "train"}
    if task in whole:
        assert len(statuses["broken"]) == 1
        assert (
            f"{task} {whole[task]}: examples: {COUNTS[task][whole[task]][0]}, as published" in statuses["ok"]
        )
    else:
        assert len(statuses["broken"]) == 3


@pytest.mark.usefixtures("published")
def test_a_list_of_another_data_set_is_broken(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, "vqav2", tmp_path)
    (folder / MINIVAL_FILE).write_text('[{"question_id": 7}]')
    statuses = by_status(list(check("vqav2", folder, sample=1)))
    (line,) = statuses["broken"]
    assert line.startswith(f"{folder / MINIVAL_FILE}: expected it to leave questions of val2014")
    assert statuses["differs"] == [
        "vqav2 nominival: examples: found 24, published are 19",
        "vqav2 nominival: answers: found 240, published are 190",
    ]


@pytest.mark.usefixtures("published")
def test_the_same_images_are_sampled_each_time(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(check_module, "read_image", opened.append)

    def sampled(**options: Any) -> list[str]:
        opened.clear()
        findings = list(check("coco", scenes / "coco", **options))
        assert all(finding.good for finding in findings)
        return [path.name for path in opened]

    few = sampled(sample=4)
    assert len(few) == 4 * 3 == len(set(few))
    assert sampled(sample=4) == few
    assert len(sampled(sample=0)) == len(sampled(sample=12)) == len(sampled()) == 24
    assert "4 of 4 images opened of 12" in " ".join(
        finding.what for finding in check("coco", scenes / "coco", sample=4)
    )


def test_good_is_found_or_ok() -> None:
    statuses: Mapping[str, bool] = {
        "found": True,
        "ok": True,
        "missing": False,
        "differs": False,
        "broken": False,
        "skipped": False,
    }
    assert {status: Finding(status, "it").good for status in statuses} == statuses


def test_unknown_task_and_missing_folder(scenes: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'vqa'; there are: vqav2, gqa, nlvr2, coco"):
        next(check("vqa", scenes))
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere; make it and put the files of gqa there"
    ):
        next(check("gqa", scenes / "nowhere"))
