"""Your own data are looked at before anything is trained: each fault that they have is found and counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dept_vl.cli import data as command
from dept_vl.cli import exit_status
from dept_vl.data.check_own import check_own
from dept_vl.models.checks import load_tokenizer
from dept_vl.tasks.own.options import OwnOptions

OWN = Path(__file__).parents[1] / "fixtures" / "own"
PHOTOS = OWN / "photos"


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A folder with named splits in which everything is wrong once."""
    shutil.copytree(PHOTOS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "broken.png").write_bytes(b"no image")
    asked: dict[str, Any] = {"image": "scan-3.png", "question": "what is it?", "answer": "red"}
    rows = {
        "train": [
            asked | {"id": "a"},
            asked | {"id": "a", "image": "gone.png"},
            asked | {"id": "b", "question": "  "},
            asked | {"id": "c", "image": "broken.png", "answer": "győri"},
        ],
        "test": [asked | {"id": "d", "answer": None}],
    }
    for split, records in rows.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{split}.jsonl").write_text(text)
    return tmp_path


def found(data: Path, **options: Any) -> dict[str, list[str]]:
    """What was found, by its status."""
    lines: dict[str, list[str]] = {}
    usual = {"sample": 0, "tokenizer": None, "sheet": None}
    for finding in check_own(OwnOptions(data=str(data)), **(usual | options)):
        lines.setdefault(finding.status, []).append(finding.what)
    return lines


def test_copies_of_images_in_another_split_are_a_leak(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.bmp")  # all of one size
    shutil.copyfile(tmp_path / "a.bmp", tmp_path / "again.bmp")
    rows = [("a", "train"), ("b", "train"), ("again", "test"), ("c", "test")]
    asked = {"question": "what colour?", "answer": "red"}
    text = "".join(
        json.dumps({"image": f"{name}.bmp", "split": split} | asked) + "\n" for name, split in rows
    )
    (tmp_path / "data.jsonl").write_text(text)
    assert found(tmp_path / "data.jsonl")["leak"] == [
        "1 of the 2 images of test are copies of images of train"
    ]


def test_every_fault_is_found(faulty: Path, language_folders: dict[str, Path]) -> None:
    sheet = faulty / "sheet.png"
    lines = found(faulty, tokenizer=load_tokenizer(language_folders["t5"]), sheet=sheet)
    assert lines["missing"] == ["vqa: 1 of 3 image files", str(faulty / "gone.png")]
    assert [str(faulty / "broken.png") in line for line in lines["broken"]] == [True, False]
    assert lines["leak"] == ["1 of the 3 images of train are in test too"]
    (empty,) = lines["empty"]
    assert "1 of 5" in empty
    assert "ids b" in empty
    assert any("1 of 5 rows have an id that came before" in line for line in lines["note"])
    (lost,) = lines["lost"]
    assert "1 of 4" in lost
    assert "győri" in lost
    assert any(line.startswith("answers: 4, 0 to 1 a row, 2 different; 'red' 75.0%") for line in lines["ok"])
    assert [line for line in lines["ok"] if line.startswith(("train: 4", "test: 1"))]
    assert any(
        line.startswith("1 examples are drawn") for line in lines["ok"]
    )  # of the others no image reads
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"


def test_lengths_are_those_of_the_tokenizer(language_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(language_folders["t5"])
    rows = [json.loads(line) for line in (OWN / "qa.jsonl").read_text().splitlines()]
    texts = max(len(tokenizer("vqa: " + row["question"]).input_ids) for row in rows)
    answers = max(len(tokenizer(row["answer"]).input_ids) for row in rows)
    whole = OwnOptions(data=str(OWN / "qa.jsonl"), images=PHOTOS)
    lines = [one.what for one in check_own(whole, sample=1, tokenizer=tokenizer, sheet=None)]
    assert any(line.startswith(f"longest text: {texts} tokens") for line in lines)
    assert any(line.startswith(f"longest answer: {answers} tokens") for line in lines)


def test_the_contact_sheet_has_sixteen_examples(tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        Image.new("RGB", (9, 9), (12 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": "red"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    lines = found(tmp_path / "rows.json", sheet=tmp_path / "sheet.png")
    assert "16 examples are drawn in" in lines["ok"][-1]
    with Image.open(tmp_path / "sheet.png") as picture:
        reds = {color for _, color in picture.getcolors(1 << 20) or [] if color[1:] == (0, 0)}  # type: ignore[index]
    assert len(reds & {(12 * number, 0, 0) for number in range(20)}) == 16


def test_the_command_says_whether_anything_is_wrong(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["check", "--data", str(OWN / "captions.jsonl"), "--images", str(PHOTOS)]
    assert exit_status(command, good) == 0
    assert "captions: 8 rows, 8 images" in capsys.readouterr().out
    report = tmp_path / "report.txt"
    assert exit_status(command, ["check", "--data", str(faulty), "--report", str(report)]) == 1
    assert report.read_text().splitlines() == capsys.readouterr().out.splitlines()[:-1]
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"image": \n')
    assert exit_status(command, ["check", "--data", str(damaged)]) == 1
    assert "line 1" in capsys.readouterr().out
    assert exit_status(command, ["check"]) == 2
