"""Parquet copies written as official files: what the tasks then read, and what is said of bad copies."""

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dept_vl._utils.images import read_image
from dept_vl.tasks import load_task
from dept_vl.tasks.coco import COCOCaptions
from dept_vl.tasks.gqa import GQA
from dept_vl.tasks.nlvr2 import NLVR2
from dept_vl.tasks.prepare.copies import COPIES, fetch
from dept_vl.tasks.prepare.staging import staging_for
from dept_vl.tasks.vqav2 import VQAv2

Row = dict[str, Any]
ANSWERS = ["red"] * 6 + ["dark red"] * 4


def picture(colour: str, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 8), colour).save(file, kind)
    return file.getvalue()


def image(data: bytes) -> Row:
    return {"bytes": data, "path": "picture.jpg"}


def dataset(rows: list[Row], *images: str) -> datasets.Dataset:
    made = datasets.Dataset.from_list(rows)
    for name in images:
        made = made.cast_column(name, datasets.Image())
    return made


def write(path: Path, rows: list[Row], *images: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(rows, *images).to_parquet(str(path))
    return path


def vqa_rows(answered: bool = True) -> list[Row]:
    """Three questions about two images, the second a PNG, as in lmms-lab/VQAv2."""
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(ANSWERS, start=1)
    ]
    return [
        {
            "question_type": "what color is the" if answered else None,
            "multiple_choice_answer": "red" if answered else None,
            "answers": answers if answered else None,
            "image_id": image_id,
            "answer_type": "other" if answered else None,
            "question_id": image_id * 1000 + number,
            "question": f"What color is thing {number}?",
            "image": image(picture("red") if image_id == 42 else picture("blue", "PNG")),
        }
        for image_id, number in ((42, 0), (42, 1), (73, 0))
    ]


def vqa_copy(folder: Path, **splits: list[Row]) -> Path:
    for split, rows in (splits or {"validation": vqa_rows()}).items():
        write(folder / "data" / f"{split}-00000-of-00001.parquet", rows, "image")
    return folder


def gqa_questions(answered: bool = True) -> list[Row]:
    """Two questions in the schema of lmms-lab/GQA, whose `entailed` and `equivalent` are texts."""
    plain = [
        {"id": "0051", "imageId": "n161", "question": "Is it green?", "isBalanced": True},
        {"id": "0052", "imageId": "2405722", "question": "Which color?", "isBalanced": True},
    ]
    if not answered:
        return plain
    pointer = {"objectId": "1", "value": "2"}
    return [
        row
        | {
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "groups": {"global": None if answer == "yes" else "color", "local": "10-thing_color"},
            "entailed": entailed,
            "equivalent": "['0051']",
            "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
            "annotations": [{"question": pointer, "answer": None, "fullAnswer": pointer}],
            "semantic": [
                {"operation": "select", "argument": "thing (7)", "dependencies": []},
                {"operation": "verify color", "argument": "green", "dependencies": [0]},
            ],
            "semanticStr": "select: thing (7)->verify color: green [0]",
        }
        for row, answer, entailed in zip(plain, ("yes", "green"), ("['0052', '0053']", ""), strict=True)
    ]


GQA_IMAGES = {"n161": picture("green"), "2405722": picture("white")}


def gqa_copy(folder: Path, split: str = "val_balanced", answered: bool = True) -> Path:
    short = split.split("_")[0]
    write(folder / f"{split}_instructions" / f"{short}-00000-of-00001.parquet", gqa_questions(answered))
    rows = [{"id": image_id, "image": image(data)} for image_id, data in GQA_IMAGES.items()]
    write(folder / f"{split}_images" / short / "0000.parquet", rows, "image")
    return folder


def nlvr2_rows(*identifiers: str) -> list[Row]:
    return [
        {
            "identifier": identifier,
            "question": f"The left image of {identifier} is red.",
            "answer": "True" if number % 2 == 0 else "False",
            "left_image": image(picture("red", "PNG")),
            "right_image": image(picture("blue")),
            "left_url": f"https://example.org/{identifier}.jpg",
            "right_url": None,
            "writer": "103",
            "synset": "bottle",
            "query": "bottles2",
        }
        for number, identifier in enumerate(identifiers)
    ]


def nlvr2_copy(folder: Path) -> Path:
    for name, rows in (
        ("balanced_dev", nlvr2_rows("dev-189-0-0", "dev-189-0-1")),
        ("unbalanced_dev", nlvr2_rows("dev-342-3-0")),
    ):
        write(folder / "data" / f"{name}-00000-of-00001-54ed883c.parquet", rows, "left_image", "right_image")
    return folder


def coco_copy(folder: Path) -> Path:
    """An image of each split, in the schema of yerevann/coco-karpathy."""
    for number, split in enumerate(("train", "restval", "validation", "test")):
        subtype = "train2014" if split == "train" else "val2014"
        row = {
            "filepath": subtype,
            "sentids": [10 * number, 10 * number + 1],
            "filename": f"COCO_{subtype}_{number:012d}.jpg",
            "imgid": number,
            "split": split,
            "sentences": [f"A thing of {split}.", "Another  caption."],
            "cocoid": number,
            "url": "https://example.org/x.jpg",
        }
        write(folder / "data" / f"{split}-00000-of-00001.parquet", [row])
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_vqav2_val(tmp_path: Path) -> None:
    out = tmp_path / "vqav2"
    counts = fetch("vqav2", vqa_copy(tmp_path / "copy"), out, split="val")
    assert counts == {"questions": 3, "images": 2, "images_kept": 0, "images_reencoded": 1}
    task = VQAv2().load(out, "val")
    assert task.example_ids() == [42000, 42001, 73000]
    assert task[0].question == "What color is thing 0?"
    assert dict(task[0].targets) == {"red": 1.0, "dark red": 1.0}
    assert task.rows[0]["answers"] == ANSWERS
    assert task.images(2) == (out / "val2014" / "COCO_val2014_000000000073.jpg",)
    assert task.score({42000: "red", 42001: "dark red", 73000: "blue"})["overall"] == 66.67
    assert all(path.is_file() for path in task.image_files())
    # A JPEG's bytes stay; what is none becomes one, since its official name says so.
    assert task.images(0)[0].read_bytes() == picture("red")
    with Image.open(task.images(2)[0]) as written:
        assert written.format == "JPEG"
        red, green, blue = written.convert("RGB").getpixel((3, 3))  # type: ignore[misc]
    assert (red, green) < (5, 5)
    assert blue > 250


def test_vqav2_annotations_have_all_that_the_official_scorer_reads(tmp_path: Path) -> None:
    fetch("vqav2", vqa_copy(tmp_path / "copy"), tmp_path / "out", split="val")
    questions = json.loads((tmp_path / "out/v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    annotations = json.loads((tmp_path / "out/v2_mscoco_val2014_annotations.json").read_text())
    assert {"info", "license", "task_type", "data_type", "data_subtype"} < set(questions)
    assert (questions["data_type"], questions["data_subtype"]) == ("mscoco", "val2014")
    source = vqa_rows()
    for question, annotation, row in zip(
        questions["questions"], annotations["annotations"], source, strict=True
    ):
        assert question == {key: row[key] for key in ("question_id", "image_id", "question")}
        assert annotation == {key: row[key] for key in row if key not in ("question", "image")}


def test_vqav2_test_splits_share_their_images(tmp_path: Path) -> None:
    copy = vqa_copy(tmp_path / "copy", testdev=vqa_rows(False)[:2], test=vqa_rows(False))
    out = tmp_path / "out"
    assert fetch("vqav2", copy, out, split="test-dev")["images"] == 1
    before = tree(out)
    counts = fetch("vqav2", copy, out, split="test")
    assert counts == {"questions": 3, "images": 2, "images_kept": 1, "images_reencoded": 1}
    after = tree(out)
    assert before.items() < after.items()
    assert VQAv2().load(out, "test-dev").example_ids() == [42000, 42001]
    task = VQAv2().load(out, "test")
    assert task[2].targets == ()
    assert task.images(2) == (out / "test2015" / "COCO_test2015_000000000073.jpg",)
    assert all(path.is_file() for path in task.image_files())
    assert list(tmp_path.glob(".*")) == []


def test_gqa(tmp_path: Path) -> None:
    out = tmp_path / "gqa"
    counts = fetch("gqa", gqa_copy(tmp_path / "copy"), out, split="val")
    assert counts == {"questions": 2, "images": 2, "images_kept": 0, "images_reencoded": 0}
    task = GQA().load(out, "val")
    assert [task[i].answer for i in range(2)] == ["yes", "green"]
    assert task.rows[0] == {
        "question_id": "0051",
        "image_id": "n161",
        "question": "Is it green?",
        "answers": ["yes"],
        "is_balanced": True,
        "group": None,
        "entailed": ["0052", "0053"],
        "structural": "verify",
        "semantic": "attr",
        "detailed": "verifyAttr",
        "steps": 2,
    }
    assert task.rows[1]["group"] == "color"
    assert task.rows[1]["entailed"] == []
    assert {path.stem: path.read_bytes() for path in task.image_files()} == GQA_IMAGES
    assert task.score({"0051": "yes", "0052": "red"})["accuracy"] == 50.0
    record = json.loads((out / "val_balanced_questions.json").read_text())["0051"]
    assert (record["fullAnswer"], record["equivalent"]) == ("It is yes.", ["0051"])
    assert "no annotations of objects" in (out / "SOURCE-val_balanced.md").read_text().lower()


def test_gqa_splits_without_answers(tmp_path: Path) -> None:
    copy = gqa_copy(gqa_copy(tmp_path / "copy"), "test_balanced", answered=False)
    fetch("gqa", copy, tmp_path / "out", split="val_balanced")
    assert fetch("gqa", copy, tmp_path / "out", split="test")["images_kept"] == 2
    task = GQA().load(tmp_path / "out", "test")
    assert task[1].question == "Which color?"
    assert task[1].targets == ()


def test_gqa_reads_lists_of_ids_and_structs_of_lists(tmp_path: Path) -> None:
    """As copies made by other versions of `datasets` have them."""
    copy = gqa_copy(tmp_path / "copy")
    rows = gqa_questions()
    for row in rows:
        row["entailed"] = ["0052"]
        row["semantic"] = {key: [step[key] for step in row["semantic"]] for key in row["semantic"][0]}
    write(copy / "val_balanced_instructions/val-00000-of-00001.parquet", rows)
    fetch("gqa", copy, tmp_path / "out", split="val")
    row = GQA().load(tmp_path / "out", "val").rows[0]
    assert (row["entailed"], row["steps"]) == (["0052"], 2)


def test_nlvr2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nlvr2"
    counts = fetch("nlvr2", nlvr2_copy(tmp_path / "copy"), out, split="dev")
    assert counts == {"sentences": 3, "images": 4, "images_kept": 0, "images_reencoded": 0}
    assert "3 sentences of the 6,982 published" in capsys.readouterr().err
    task = NLVR2().load(out, "dev")
    assert task.example_ids() == ["dev-189-0-0", "dev-189-0-1", "dev-342-3-0"]
    assert [task[i].answer for i in range(3)] == ["true", "false", "true"]
    assert task[1].question == "The left image of dev-189-0-1 is red."
    left, right = task.images(2)
    assert (left.name, right.name) == ("dev-342-3-img0.png", "dev-342-3-img1.png")
    # The official names end in .png whatever the bytes are.
    assert (left.read_bytes(), right.read_bytes()) == (picture("red", "PNG"), picture("blue"))
    assert read_image(right).size == (16, 8)
    assert task.score({"dev-189-0-0": "true", "dev-189-0-1": "true", "dev-342-3-0": "true"}) == {
        "accuracy": pytest.approx(200 / 3),
        "consistency": pytest.approx(200 / 3),
    }
    first = json.loads((out / "dev.json").read_text().splitlines()[0])
    assert first["left_url"] == "https://example.org/dev-189-0-0.jpg"
    assert "right_url" not in first


def test_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "coco"
    counts = fetch("coco", coco_copy(tmp_path / "copy"), out, split="all")
    assert counts == {"captioned_images": 4}
    assert "cocodataset.org" in capsys.readouterr().err
    for name in ("train2014", "val2014"):
        (out / name).mkdir()
    ids = {split: COCOCaptions().load(out, split).example_ids() for split in ("train", "val", "test")}
    assert ids == {"train": [0, 1], "val": [2], "test": [3]}
    example = COCOCaptions().load(out, "val")[0]
    assert example.images == (out / "val2014" / "COCO_val2014_000000000002.jpg",)
    assert [caption for caption, _ in example.targets] == ["A thing of validation.", "Another caption."]
    content = json.loads((out / "dataset_coco.json").read_text())
    assert content["dataset"] == "coco"
    assert content["images"][3]["sentences"][1] == {"raw": "Another  caption.", "sentid": 31}


def test_saved_data_sets(tmp_path: Path) -> None:
    """A `save_to_disk` of all splits, of one, and of one that says which it is, read alike."""
    made = dataset(vqa_rows(), "image")
    datasets.DatasetDict({"validation": made}).save_to_disk(str(tmp_path / "all"))
    made.save_to_disk(str(tmp_path / "one" / "validation"))
    named = dataset(vqa_rows(), "image")
    named.info.splits = None
    named._split = datasets.NamedSplit("validation")
    named.save_to_disk(str(tmp_path / "named"))
    fetch("vqav2", vqa_copy(tmp_path / "parquet"), tmp_path / "out", split="val")
    expected = tree(tmp_path / "out")
    del expected["SOURCE-val.md"]
    for name in ("all", "one", "named"):
        fetch("vqav2", tmp_path / name, tmp_path / f"out-{name}", split="val")
        assert expected.items() < tree(tmp_path / f"out-{name}").items()
    with pytest.raises(FileNotFoundError, match="no split testdev"):
        fetch("vqav2", tmp_path / "named", tmp_path / "none", split="test-dev")


def test_parquet_without_the_library_s_metadata(tmp_path: Path) -> None:
    copy = vqa_copy(tmp_path / "copy")
    (file,) = copy.rglob("*.parquet")
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    assert fetch("vqav2", str(copy), tmp_path / "out", split="val")["images"] == 2


def test_reads_from_the_hub_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        calls.append((name, config, split, streaming))
        rows = gqa_questions()
        if config == "val_balanced_images":
            rows = [{"id": image_id, "image": image(data)} for image_id, data in GQA_IMAGES.items()]
        return dataset(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    fetch("gqa", "lmms-lab/GQA", tmp_path / "out", split="val")
    assert calls == [
        ("lmms-lab/GQA", "val_balanced_instructions", "val", True),
        ("lmms-lab/GQA", "val_balanced_images", "val", True),
    ]
    assert len(load_task("gqa", tmp_path / "out", "val")) == 2


def test_no_network(tmp_path: Path) -> None:
    """The tests run offline, so that this is the library's own error."""
    with pytest.raises(
        OSError, match=r"(?s)lmms-lab/NLVR2, balanced_dev.*hf download lmms-lab/NLVR2"
    ) as error:
        fetch("nlvr2", "lmms-lab/NLVR2", tmp_path / "out", split="dev")
    assert "FOLDER as the source" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_breaks_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield vqa_rows()[0]
        raise RuntimeError("server hung up")

    stream = datasets.IterableDataset.from_generator(rows, features=dataset(vqa_rows(), "image").features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(OSError, match=r"after 1 rows: server hung up.*hf download"):
        fetch("vqav2", "lmms-lab/VQAv2", tmp_path / "out", split="val")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = dataset(vqa_rows(), "image").features
    stream = datasets.IterableDataset.from_generator(lambda: iter(()), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(ValueError, match="lmms-lab/VQAv2, testdev: expected rows, found none"):
        fetch("vqav2", "lmms-lab/VQAv2", tmp_path / "out", split="test-dev")


def test_unknown_tasks_splits_and_sources(tmp_path: Path) -> None:
    copy = vqa_copy(tmp_path / "copy")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"unknown task 'vqa'.*vqav2, gqa, nlvr2, coco"):
        fetch("vqa", copy, out, split="val")
    with pytest.raises(
        ValueError, match=r"lmms-lab/VQAv2 has the splits val, test-dev, test; got 'train'.*vis"
    ):
        fetch("vqav2", copy, out, split="train")
    with pytest.raises(FileNotFoundError, match=r"no such folder.*lmms-lab/VQAv2"):
        fetch("vqav2", tmp_path / "nowhere", out, split="val")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        fetch("vqav2", "./a/b/c", out, split="val")
    with pytest.raises(
        FileNotFoundError, match=r"no split testdev.*found data/validation-00000-of-00001.parq"
    ):
        fetch("vqav2", copy, out, split="test-dev")
    with pytest.raises(FileNotFoundError, match=r"val_balanced_instructions.*hf download lmms-lab/GQA"):
        fetch("gqa", copy, out, split="val")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_incomplete_and_damaged_copies(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    file = write(copy / "data" / "validation-00000-of-00002.parquet", vqa_rows(), "image")
    with pytest.raises(
        ValueError, match=r"the table validation is incomplete .*found 1 file\(s\) of 2 .*hf download"
    ):
        fetch("vqav2", copy, tmp_path / "out", split="val")
    whole = file.rename(file.with_name("validation.parquet"))
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"cannot read.*validation.*hf download"):
        fetch("vqav2", copy, tmp_path / "out", split="val")
    dataset([row | {"image": 7} for row in vqa_rows()]).save_to_disk(str(tmp_path / "saved" / "validation"))
    with pytest.raises(OSError, match=r"validation: expected images in image, found"):
        fetch("vqav2", tmp_path / "saved", tmp_path / "out", split="val")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "split", "make", "file", "column"),
    [
        ("vqav2", "val", vqa_copy, "data/validation-00000-of-00001.parquet", "answers"),
        ("gqa", "val", gqa_copy, "val_balanced_instructions/val-00000-of-00001.parquet", "groups"),
        ("gqa", "val", gqa_copy, "val_balanced_images/val/0000.parquet", "image"),
        ("nlvr2", "dev", nlvr2_copy, "data/unbalanced_dev-00000-of-00001-54ed883c.parquet", "identifier"),
        ("coco", "all", coco_copy, "data/restval-00000-of-00001.parquet", "cocoid"),
    ],
)
def test_missing_columns(
    tmp_path: Path, task: str, split: str, make: Callable[[Path], Path], file: str, column: str
) -> None:
    copy = make(tmp_path / "copy")
    table = pq.read_table(copy / file)
    kept = [name for name in table.column_names if name != column]
    pq.write_table(table.select(kept).replace_schema_metadata(None), copy / file)
    with pytest.raises(ValueError, match=f"{column} missing, found {', '.join(kept)}") as error:
        fetch(task, copy, tmp_path / "out", split=split)
    assert COPIES[task].hub in str(error.value)
    assert str(copy) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_columns_that_nothing_needs_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{key: row[key] for key in row if key != "multiple_choice_answer"} for row in vqa_rows()]
    fetch("vqav2", vqa_copy(tmp_path / "copy", validation=rows), tmp_path / "out", split="val")
    assert "no columns multiple_choice_answer" in capsys.readouterr().err
    assert VQAv2().load(tmp_path / "out", "val")[0].answer == "red"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("question_id", "42000", "row 1: expected 'question_id' to be int, found '42000'"),
        ("image_id", 1.5, "row 1: expected 'image_id' to be int"),
        ("question", None, "row 1: expected 'question' to be str, found None"),
        ("answers", ["red"] * 10, "row 1, answers: expected a list of structs"),
        ("image", image(b""), r"row 1: expected the bytes of the image val2014/COCO_val2014_0+42\.jpg"),
        (
            "image",
            image(b"no picture"),
            r"row 1: the bytes of val2014/COCO_val2014_0+42\.jpg are not an image",
        ),
    ],
)
def test_bad_vqa_rows(tmp_path: Path, column: str, value: Any, message: str) -> None:
    copy = vqa_copy(tmp_path / "copy", validation=[vqa_rows()[0] | {column: value}])
    with pytest.raises(ValueError, match=message):
        fetch("vqav2", copy, tmp_path / "out", split="val")
    assert not (tmp_path / "out").exists()


def test_bad_gqa_rows(tmp_path: Path) -> None:
    copy = gqa_copy(tmp_path / "copy")
    images = copy / "val_balanced_images/val/0000.parquet"
    write(images, [{"id": "../../n161", "image": image(GQA_IMAGES["n161"])}], "image")
    with pytest.raises(ValueError, match=r"row 1: expected the name of an image inside its folder"):
        fetch("gqa", copy, tmp_path / "out", split="val")
    write(images, [{"id": "n161", "image": image(GQA_IMAGES["n161"])}], "image")
    with pytest.raises(
        ValueError, match=r"1 of 2 questions .*not in val_balanced_images \(first: \['2405722'\]"
    ):
        fetch("gqa", copy, tmp_path / "out", split="val")
    write(
        copy / "val_balanced_instructions/val-00000-of-00001.parquet", [gqa_questions()[0] | {"groups": ""}]
    )
    with pytest.raises(ValueError, match=r"row 1: expected 'groups' to be dict, found ''"):
        fetch("gqa", copy, tmp_path / "out", split="val")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identifier": "7"}, "expected an identifier dev-set-pair-sentence, found '7'"),
        ({"identifier": "test1-1-0-0"}, "expected an identifier dev-set-pair-sentence"),
        ({"identifier": "dev-../../1-0-0"}, "expected an identifier dev-set-pair-sentence"),
        ({"answer": "maybe"}, r"\(dev-1-0-0\): expected the answer 'True' or 'False', found 'maybe'"),
    ],
)
def test_bad_nlvr2_rows(tmp_path: Path, changes: Row, message: str) -> None:
    copy = nlvr2_copy(tmp_path / "copy")
    write(
        copy / "data/unbalanced_dev-00000-of-00001-54ed883c.parquet",
        [nlvr2_rows("dev-1-0-0")[0] | changes],
        "left_image",
        "right_image",
    )
    with pytest.raises(ValueError, match=message):
        fetch("nlvr2", copy, tmp_path / "out", split="dev")


def test_bad_coco_rows(tmp_path: Path) -> None:
    copy = coco_copy(tmp_path / "copy")
    file = copy / "data/test-00000-of-00001.parquet"
    (row,) = pq.read_table(file).to_pylist()
    for changes, message in (
        ({"sentences": []}, "row 1: expected captions under 'sentences'"),
        ({"filename": "../x.jpg"}, "row 1: expected the name of an image inside its folder"),
        ({"cocoid": "7"}, "row 1: expected 'cocoid' to be int"),
    ):
        write(file, [row | changes])
        with pytest.raises(ValueError, match=message):
            fetch("coco", copy, tmp_path / "out", split="all")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    copy = vqa_copy(tmp_path / "copy")
    out = tmp_path / "out"
    out.mkdir()
    taken = out / "v2_mscoco_val2014_annotations.json"
    taken.write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds v2_mscoco_val2014_annotations\.json already"):
        fetch("vqav2", copy, out, split="val")
    taken.unlink()
    mine = out / "val2014" / "COCO_val2014_000000000042.jpg"
    mine.parent.mkdir()
    mine.write_bytes(picture("white"))
    assert fetch("vqav2", copy, out, split="val")["images_kept"] == 1
    assert mine.read_bytes() == picture("white")
    before = tree(out)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        fetch("vqav2", copy, out, split="val")
    assert tree(out) == before
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="to be a folder, found a file"):
        fetch("vqav2", copy, tmp_path / "file", split="val")


def test_sigterm_leaves_no_hidden_folder(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, staging_for(tmp_path / "out") as staging:  # noqa: PT012
        (staging / "a.jpg").write_bytes(b"a")
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
