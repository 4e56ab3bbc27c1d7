"""Your own images and questions: every usual form of a table is read, scored and refused where it is damaged.

Images of `fixtures/own` are rendered; its tables are written by hand in the forms that people have.
"""

import base64
import csv
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from runs import forget_checksums, with_

import dept_vl
from dept_vl._utils import embedded
from dept_vl._utils.embedded import embedded_bytes
from dept_vl._utils.errors import UsageError
from dept_vl._utils.images import missing_files, read_image
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig
from dept_vl.data.content import rows_content
from dept_vl.data.splits import data_options, load_splits
from dept_vl.inference import bulk
from dept_vl.inference.options import PredictConfig
from dept_vl.inference.predict import predict
from dept_vl.tasks import TASKS, load_task
from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.metrics.own import anls, edit_distance, general_vqa_accuracy, normalise_own
from dept_vl.tasks.metrics.vqa import vqa_accuracy
from dept_vl.tasks.own.choices import INDEX_COLUMN
from dept_vl.tasks.own.convert import _new_id
from dept_vl.tasks.own.images import ImageFolder
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.tasks.own.split import image_groups, leaks
from dept_vl.training.extract import extract
from dept_vl.training.options import ExtractConfig
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

OWN = Path(__file__).parents[1] / "fixtures" / "own"
PHOTOS = OWN / "photos"
POOL = pa.proxy_memory_pool(pa.default_memory_pool())
"""Counts what is allocated; it outlives all of that."""
CAPTIONS = {"a green square": 1.0, "one square that is green": 1.0}
TWICE = '{"image": "img_0001", "question": "which?", "answer": "blue", "answer": "red"}\n'
"""A key twice, of which one value would be lost."""
DEEP = json.loads("[" * 201 + "1" + "]" * 201)
CHOSEN = {"image": "IMG_0001.JPG", "question": "which?", "choices": ["red", "blue", "green"], "answer": 2}
COUNTED = CHOSEN | {"choices": ["1", "2", "3", "4"]}
QUESTION = {"image": "IMG_0001.JPG", "question": "what color is it?", "answer": "blue"}


def own(file: Path | str, split: str = "all", **options: Any) -> Any:
    return load_task("vqa", split=split, **{"data": file, "images": PHOTOS, **options})


def written(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("file", "name", "primary", "size", "image", "targets"),
    [
        ("qa.jsonl", "vqa", "exact_match", 24, "IMG_0001.JPG", {"circle": 1.0}),
        ("qa.csv", "vqa", "exact_match", 24, "IMG_0001.JPG", {"circle": 1.0}),
        ("captions.jsonl", "captions", "CIDEr", 8, "holiday 2.jpeg", CAPTIONS),
        ("llava_like.json", "vqa", "exact_match", 8, "holiday 2.jpeg", {"green": 1.0}),
        ("messages.jsonl", "vqa", "exact_match", 8, "holiday 2.jpeg", {"square": 1.0}),
        ("aokvqa_like.json", "vqa", "accuracy", 8, "holiday 2.jpeg", {"green": 1.0}),
        ("textvqa_like.json", "vqa", "vqa_accuracy", 8, "holiday 2.jpeg", {"green": 1.0}),
        ("vizwiz_like.json", "vqa", "vqa_accuracy", 16, "IMG_0001.JPG", {"unanswerable": 0.3, "circle": 1.0}),
        ("test_without_answers.jsonl", "vqa", "exact_match", 8, "holiday 2.jpeg", {}),
    ],
)  # fmt: skip
def test_usual_forms_are_read(
    file: str, name: str, primary: str, size: int, image: str, targets: dict[str, float]
) -> None:
    task = own(OWN / file)
    assert (task.name, task.primary, len(task)) == (name, primary, size)
    assert task[1].images == (PHOTOS / image,)
    assert dict(task[1].targets) == targets
    assert not missing_files(task.image_files())
    assert not task.missing_images()
    ids = task.example_ids()
    assert len(set(ids)) == size
    answers = {key: task[place].answer for place, key in enumerate(ids)}
    if name == "vqa" and targets:
        perfect = task.score(answers)
        assert next(iter(perfect)) == primary
        assert perfect[primary] == 100
    elif not targets:
        assert task.score(answers) == {}


def test_choices_and_all_turns() -> None:
    assert own(OWN / "aokvqa_like.json")[0].choices == ("red", "blue", "green", "yellow")
    turns = own(OWN / "llava_like.json", turns="all")
    assert len(turns) == 16
    assert turns[1].question == "and which shape?"
    assert turns.example_ids()[:2] == ["a0-1", "a0-2"]


@pytest.mark.parametrize(
    ("answer", "text"),
    [(3, "3"), (3.0, "3"), (2.5, "2.5"), (True, "yes"), (False, "no"), ({"answer": "a dog"}, "a dog")],
)
def test_answers_of_any_type(tmp_path: Path, answer: Any, text: str) -> None:
    file = written(tmp_path, lines(QUESTION, QUESTION | {"answer": answer}))
    assert own(file)[1].answers == (text,)


def test_missing_images_are_those_that_no_name_finds(tmp_path: Path) -> None:
    names = ("IMG_0001.JPG", "img_0005", "4", "gone.png", "deep/gone", "IMG_0001.JPG")
    task = own(written(tmp_path, lines(*(QUESTION | {"image": name} for name in names))))
    assert (
        task.missing_images()
        == missing_files(task.image_files())
        == [PHOTOS / "gone.png", PHOTOS / "deep/gone"]
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("b.jpg", "b.jpg"),
        ("images/b.jpg", "images/b.jpg"),
        ("images/b", "images/b"),
        ("masks/b.jpg", "masks/b.png"),
        ("MASKS/b.jpg", "masks/b.png"),
        ("b", "masks/b.png"),
        ("c.png", "masks/c.png"),
        ("c.jpg", "c.gif"),
        ("d.jpg", "images/d.JPEG"),
        ("9", "images/COCO_val2014_000000000009.jpg"),
        ("000000000009", "images/COCO_val2014_000000000009.jpg"),
        ("9.jpg", "images/COCO_val2014_000000000009.jpg"),
        ("9.png", "9.png"),
        ("images/9.png", "images/COCO_val2014_000000000009.jpg"),
        ("masks/9", "masks/9"),
        ("masks/9.jpg", "masks/9.jpg"),
    ],
)
def test_an_image_of_another_folder_has_the_same_extension(tmp_path: Path, name: str, found: str) -> None:
    files = ("masks/b.png", "masks/d.png", "masks/c.png", "c.gif", "images/d.JPEG")
    for file in (*files, "images/COCO_val2014_000000000009.jpg"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    assert ImageFolder(tmp_path, tmp_path).find(name) == tmp_path / found
    missing = [] if (tmp_path / found).exists() else [tmp_path / found]
    assert ImageFolder(tmp_path, tmp_path).missing([name]) == missing


def test_columns_are_mapped_and_ids_made_new(tmp_path: Path) -> None:
    row = {"photo": "img_0001", "ask": "which?", "truth": "blue", "id": 7}
    task = own(written(tmp_path, lines(row, row)), columns=("image=photo", "question=ask", "answer=truth"))
    assert task.example_ids() == ["7", "7#2"]
    assert "1 of 2 rows have an id that came before" in task.notes[0]
    assert task[0].images == (PHOTOS / "IMG_0001.JPG",)  # of any case, and without its extension


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(QUESTION).encode(),
        lines(QUESTION).encode("utf-16"),
        lines(QUESTION).encode("utf-16-le"),
        lines(QUESTION).encode("utf-16-be"),
        lines(QUESTION).replace("\n", "\r\n").encode(),
        lines(QUESTION).replace("}\n", "},\n").encode(),
        json.dumps([QUESTION]).encode(),
        json.dumps(QUESTION, indent=1).encode(),
        ("\n \n" + lines(QUESTION) + "\n" + lines(QUESTION)).encode(),
        (" " + lines(QUESTION)).replace("\n", "\r").encode(),
        ("\n" + json.dumps({"data": [QUESTION]})).encode(),
        json.dumps({"a": QUESTION}).encode(),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("chunk", [3, 1 << 16])
def test_unambiguous_oddities_are_read(
    tmp_path: Path, content: bytes, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dept_vl.tasks.own.readers.CHUNK", chunk)
    if name == "data.jsonl" and content.strip().startswith((b"{\n ", b'{"data"', b'{"a"')):
        pytest.skip("is no JSON Lines")
    assert own(written(tmp_path, content, name))[0].answers == ("blue",)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_csv_of_a_spreadsheet(tmp_path: Path, encoding: str) -> None:
    long = "what is this? " * 714
    text = f'image,question,answer,\r\nIMG_0001.JPG,"a\r\nb é",3,\r\nIMG_0001.JPG,{long},say ""hi"",\r\n'
    task = own(written(tmp_path, text.encode(encoding), "data.csv"))
    assert [(task[n].question, task[n].answers) for n in (0, 1)] == [
        ("a\r\nb é", ("3",)),
        (long.strip(), ('say ""hi""',)),
    ]
    assert len(long) > 9_990


@pytest.mark.parametrize(
    "names", [("train", "validation", "test"), ("Train", "val", "testing"), ("test", "dev", "training")]
)
def test_lists_of_splits_in_one_file_are_all_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    rows = {name: [QUESTION | {"id": f"{name}{n}"} for n in range(2)] for name in names}
    path = written(tmp_path, json.dumps({"info": {"year": 2}, **rows}), "data.json")
    known = {"train": names[0], "validation": names[1], "test": names[2]}
    if names[0] == "test":
        known = {"train": names[2], "validation": names[1], "test": names[0]}
    for split, name in known.items():
        assert own(path, split).example_ids() == [f"{name}0", f"{name}1"]
    assert len(own(path)) == 6


def test_questions_and_annotations_in_one_file_are_joined(tmp_path: Path) -> None:
    asked = [{"question_id": n, "image_id": 3, "question": "which?"} for n in (5, 6)]
    answers = [{"question_id": n, "answers": [{"answer": colour}]} for n, colour in ((6, "red"), (5, "blue"))]
    content = {"annotations": answers, "licenses": [{"id": 1}], "questions": asked}
    task = own(written(tmp_path, json.dumps(content), "data.json"))
    assert [task[place].answer for place in (0, 1)] == ["blue", "red"]


def test_brackets_in_texts_are_not_nesting(tmp_path: Path) -> None:
    question = '[{"' * 60 + "\\" * 3
    rows = [QUESTION | {"question": question} for _ in range(400)]
    task = own(written(tmp_path, json.dumps({"data": rows}), "data.json"))
    assert (len(task), task[399].question) == (400, question)


@pytest.mark.parametrize("more", [{}, {"direct_answers": ["three"] * 10}, {"answer": "4"}])
@pytest.mark.parametrize("index", [2, 2.0, "2"])
def test_the_index_of_a_choice_is_never_its_text(tmp_path: Path, index: object, more: dict[str, Any]) -> None:
    row = {name: COUNTED[name] for name in ("image", "question", "choices")} | {"correct_choice_idx": index}
    task = own(written(tmp_path, json.dumps([row | more]), "data.json"))
    assert (task[0].answers, task[0].choices) == (("3",), ("1", "2", "3", "4"))
    assert task.notes == ()


@pytest.mark.parametrize("answer", [{"answer": 2}, {"answer": None, "correct_choice_idx": 2}])
@pytest.mark.parametrize("gap", [None, "", " "])
def test_the_index_of_a_choice_counts_empty_ones(
    tmp_path: Path, gap: str | None, answer: dict[str, Any]
) -> None:
    row = CHOSEN | {"choices": ["red", gap, "blue", "green"]} | answer
    example = own(written(tmp_path, lines(row), "a.jsonl"))[0]
    assert (example.answers, example.choices) == (("blue",), ("red", "blue", "green"))
    with pytest.raises(UsageError, match=r"a\.jsonl, line 1"):
        own(written(tmp_path, lines(row | {"choices": ["red", "blue", gap]}), "a.jsonl"))


def test_the_index_of_a_choice_in_a_table_of_text(tmp_path: Path) -> None:
    text = "image,question,choices,correct_choice_idx\nIMG_0001.JPG,q,1|2|3|4,2\nIMG_0001.JPG,q,1|2,\n"
    task = own(written(tmp_path, text, "data.csv"))
    assert [task[place].answers for place in (0, 1)] == [("3",), ()]


NUMBERS = COUNTED | {"choices": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("rows", "answers", "note"),
    [
        ([CHOSEN, COUNTED], ["green", "3"], "1 of 2 rows"),
        ([COUNTED, CHOSEN], ["3", "green"], "1 of 2 rows"),
        ([COUNTED, COUNTED | {"answer": 3}], ["3", "4"], "2 of 2 rows"),
        ([COUNTED, COUNTED | {"answer": 4}], ["2", "4"], ""),
        ([COUNTED, COUNTED | {"answer": 0}], ["3", "1"], "1 of 2 rows"),
        ([COUNTED, COUNTED | {"answer": "4"}], ["3", "4"], "1 of 2 rows"),
        ([COUNTED | {"answer": "2"}], ["2"], ""),
        ([NUMBERS, NUMBERS | {"answer": 3}], ["2", "3"], "2 of 2 rows"),
        ([NUMBERS, NUMBERS | {"answer": 0}], ["3", "1"], "1 of 2 rows"),
        ([CHOSEN, CHOSEN | {"answer": "red"}, CHOSEN | {"answer": 0.0}], ["green", "red", "red"], ""),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_number_as_answer_means_the_same_in_all_rows(
    tmp_path: Path, rows: list[dict[str, Any]], answers: list[str], note: str, name: str
) -> None:
    content = lines(*rows) if name == "data.jsonl" else json.dumps(rows)
    task = own(written(tmp_path, content, name))
    assert [task[place].answer for place in range(len(rows))] == answers
    assert [one[: len("1 of 2 rows")] for one in task.notes] == ([note] if note else [])


def test_a_number_as_answer_means_the_same_in_all_files(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([CHOSEN]), tmp_path / "train.parquet")
    written(tmp_path, lines(COUNTED), "test.jsonl")
    task = own(tmp_path)
    assert [task[place].answer for place in (0, 1)] == ["3", "green"]


def test_a_fault_of_quotes_in_a_table_with_tabs_names_the_tab(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2: a tab expected after '\"'; write"):
        own(written(tmp_path, 'image\tquestion\na.png\t"what"?\n', "data.tsv"))


def test_images_that_cannot_be_held_out_are_told_with_their_file(tmp_path: Path) -> None:
    path = written(tmp_path, lines(QUESTION))
    with pytest.raises(UsageError, match=rf"^{re.escape(str(path))}: cannot hold out .* from 1 in train"):
        own(path, "train")


def test_csv_with_quotes_and_other_delimiters(tmp_path: Path) -> None:
    text = 'image;question;answer\nIMG_0001.JPG;"red; or ""blue""?\nsay";blue\n'
    assert own(written(tmp_path, text, "data.csv"))[0].question == 'red; or "blue"?\nsay'
    listed = "image\tquestion\tchoices\tanswer\nIMG_0001.JPG\tq\tred|blue\tblue\n"
    assert own(written(tmp_path, listed, "data.tsv"))[0].choices == ("red", "blue")


def test_a_long_cell_is_read_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    usual = csv.field_size_limit()
    text = f"image,question,answer\nIMG_0001.JPG,{'w' * 2 * usual},blue\n"
    assert len(own(written(tmp_path, text, "data.csv"))[0].question) == 2 * usual
    assert csv.field_size_limit() == usual


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("data.jsonl", lines(QUESTION, {"question": "q", "answer": "a"}), "line 2"),
        ("data.jsonl", lines(QUESTION, QUESTION | {"image": "../secret.png"}), "line 2"),
        ("data.jsonl", lines(QUESTION, QUESTION | {"image": "/etc/passwd"}), "line 2"),
        ("data.jsonl", lines(QUESTION, QUESTION | {"question": 5}), "line 2, column 'question'"),
        ("data.jsonl", lines(QUESTION, {"image": "x.png", "blob": 1}), "line 2"),
        ("data.jsonl", lines(QUESTION) + '{"image": "a.png",}\n', "line 2, column 19"),
        ("data.jsonl", lines(QUESTION) + "[1]\n", "line 2"),
        ("data.json", '[{"image": "a.png", "question": "q",}]', "line 1, column 37"),
        ("data.csv", "image,question\na.png,one,two\n", "line 2"),
        ("data.csv", b"image,question\na.png,caf\xe9\n", "line 2"),
        ("data.csv", "image,image\na,b\n", "line 1"),
        ("data.parquet", "no parquet", "data.parquet"),
        ("data.jsonl", lines(QUESTION | {"choices": ["red", "green"]}), "line 1, column 'answer'"),
        ("data.jsonl", lines(CHOSEN, CHOSEN | {"answer": 4}), "line 2, column 'answer'"),
        ("data.jsonl", lines(CHOSEN | {"correct_choice_idx": 3}), "line 1, column 'correct_choice_idx'"),
        ("data.jsonl", lines(CHOSEN, COUNTED | {"answer": 4}), "line 2, column 'answer'"),
        ("data.jsonl", "", "data.jsonl"),
        ("data.jsonl", lines(QUESTION) + TWICE, "line 2: the key 'answer'"),
        ("data.jsonl", lines(QUESTION, QUESTION) + f"[{TWICE.strip()}]\n", "line 3: the key 'answer'"),
        ("data.json", f"[{json.dumps(QUESTION)}, {TWICE}]", "row 2: the key 'answer'"),
        ("data.json", f'{{"a": {json.dumps(QUESTION)}, "b": {TWICE}}}', "row 2: the key 'answer'"),
        ("data.json", f'{{"data": [{json.dumps(QUESTION)}, {TWICE}]}}', "row 2: the key 'answer'"),
        ("data.json", f"{{{TWICE[1:]}", "the key 'answer'"),
        ("data.csv", 'image,answer\na.png,"[{""text"": ""x"", ""text"": 2}]"\n', "line 2, column 'answer'"),
        ("data.jsonl", lines(QUESTION, QUESTION | {"image": {"a": 1}}), "line 2, column 'image'"),
        ("data.jsonl", lines(QUESTION, QUESTION | {"answer": {"a": 1}}), "line 2, column 'answer'"),
        ("data.jsonl", lines(QUESTION | {"image": "https://x/y.jpg"}), "line 1, column 'image'"),
        ("data.jsonl", lines(QUESTION | {"image": "data:image/png;base64,@"}), "line 1, column 'image'"),
        ("data.jsonl", lines(QUESTION, QUESTION | {"images": ["a", "b"]}), "row 2"),
        ("data.jsonl", lines(QUESTION).encode() + b'{"question": "caf\xe9"}\n', "line 2"),
        ("data.json", b'[{"question":\n "caf\xe9"}]', "line 2"),
        ("data.json", f"[{json.dumps(QUESTION)},\n]", "line 2, column 1"),
        ("data.json", json.dumps([QUESTION])[:-9], "line 1, column"),
        ("data.csv", "image,question\n,what?\n", "line 2, column 'image'"),
        ("data.csv", "image,question\n/etc/passwd,what?\n", "line 2, column 'image'"),
        ("data.csv", 'image,question\na.png,"what?\nb.png,which?\n', "line 2"),
        ("data.csv", 'image,question\na.png,"what"?\n', "line 2"),
        ("data.csv", "foo,bar\n1,2\n", "columns are foo, bar. Understood are images, image"),
        ("data.csv", "image,bar\na.png,2\n", "--columns question=NAME answer=NAME"),
        ("data.xlsx", "PK", "data.xlsx"),
        ("data.json", "[" * 100_000, "nested too deeply"),
        ("data.json", '{"a":' * 100_000, "nested too deeply"),
        ("data.json", '{"data": [{"image":' + "[" * 100_000, "nested too deeply"),
        ("data.json", json.dumps([QUESTION | {"more": DEEP}]), "nested too deeply"),
        ("data.jsonl", "[" * 100_000, "nested too deeply"),
        ("data.jsonl", lines(QUESTION) + '{"a":' * 100_000, "line 2: expected one JSON object a line"),
        ("data.jsonl", lines(QUESTION | {"answer": DEEP}), "line 1: expected one JSON object a line"),
        ("metadata.jsonl", "[" * 100_000, "nested too deeply"),
        ("data.json", json.dumps({"data": [QUESTION], "rest": [QUESTION]}), "found 'data', 'rest'"),
        ("data.json", json.dumps({"train": [QUESTION], "rest": [QUESTION]}), "found 'train', 'rest'"),
        ("data.json", json.dumps({"images": [QUESTION], "questions": [QUESTION]}), "'images', 'questions'"),
        ("data.json", '{"test": [{}], "test": [{}]}', "the key 'test'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_clear_error(
    tmp_path: Path, name: str, content: str | bytes, where: str
) -> None:
    with pytest.raises(UsageError) as caught:
        own(written(tmp_path, content, name))
    assert where in str(caught.value)
    assert "download" not in str(caught.value)


def test_a_question_answered_twice_in_its_file_is_told(tmp_path: Path) -> None:
    questions = [{"question_id": 1, "image_id": 3, "question": "which?"}]
    given = [{"question_id": 1, "answers": [{"answer": colour}]} for colour in ("red", "blue")]
    (tmp_path / "mine_questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "mine_annotations.json").write_text(json.dumps({"annotations": given}))
    with pytest.raises(UsageError, match="row 2: the question_id 1 is there twice"):
        own(tmp_path / "mine_questions.json")


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"filename": "a.jpg", "sentences": ["x"]}, {"filename": "b.jpg", "sentences": {"x": 1}}]},
        {"images": [{"filename": "a.jpg", "qa_pairs": [1]}]},
        {"images": [{"filename": "a.jpg", "qa_pairs": {"question": "which?"}}]},
        {"images": [{"id": 1}], "annotations": [{"image_id": [1], "caption": "a"}]},
        {"images": [{"id": {}}], "annotations": [{"image_id": 1, "caption": "a"}]},
        {"questions": [{"question_id": 1}], "annotations": [{"question_id": [1], "answers": ["a"]}]},
        {"questions": [{"question_id": [1]}], "annotations": [{"question_id": 1, "answers": ["a"]}]},
        {"questions": [{"question_id": 1}], "annotations": [{"question_id": None, "answers": ["a"]}]},
    ],
)
def test_a_damaged_file_of_another_data_set_is_told(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"x\.json, row \d"):
        own(written(tmp_path, json.dumps(content), "x.json"))


def test_ids_join_as_numbers_and_as_text(tmp_path: Path) -> None:
    content = {
        "questions": [{"question_id": "1", "image": "IMG_0001.JPG", "question": "which?"}],
        "annotations": [{"question_id": 1, "answers": ["red"]}],
    }
    assert own(written(tmp_path, json.dumps(content), "x.json"))[0].answer == "red"


def test_an_id_given_to_many_rows_is_looked_up_once_a_row() -> None:
    class Counted(dict[str, int]):
        looked = 0

        def __contains__(self, key: object) -> bool:
            self.looked += 1
            return super().__contains__(key)

    seen = Counted()
    chosen = [_new_id("7", number, seen, "here")[0] for number in range(500)]
    assert chosen[-1] == "7#500"
    assert seen.looked < 3 * len(chosen)


def test_numbers_too_long_for_python_are_names_of_nothing(tmp_path: Path) -> None:
    digits = "1" * 5000
    assert ImageFolder(PHOTOS, PHOTOS).missing([digits]) == [PHOTOS / digits]
    rows = lines({name: value for name, value in CHOSEN.items() if name != "answer"} | {INDEX_COLUMN: digits})
    with pytest.raises(UsageError, match="expected the number of a choice"):
        own(written(tmp_path, rows))


NFC, NFD = "gy\u0151ri caf\u00e9", "gyo\u030bri cafe\u0301"


@pytest.mark.parametrize(
    ("written_as", "read_as"),
    [
        (NFD, NFC),
        ("re\0d", "red"),
        ("re\ud800d", "red"),
        ("\ufeffred\u200b", "red"),
        ("red\u00a0car", "red car"),
        ("red\u3000 \tcar\n", "red car"),
        ("\u200ered\u200e\u200d ", "red"),
        ("co\u00adop", "coop"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),
        ("Red", "Red"),
        ("\u2460", "\u2460"),
    ],
)
def test_answers_are_read_as_they_look(tmp_path: Path, written_as: str, read_as: str) -> None:
    rows = [QUESTION | {"answer": one, "question": f"is it {one}"} for one in (written_as, read_as)]
    task = own(written(tmp_path, lines(*rows)))
    assert [task[place].answer for place in (0, 1)] == [read_as] * 2
    assert "".join(task[0].question.split()) == "".join(task[1].question.split())
    assert task.score({"0": written_as, "1": written_as})["exact_match"] == 100.0
    assert task.mark(task[0], written_as) == 1.0
    assert task.written(written_as) == read_as
    choices = [read_as, "other"]
    chosen = own(written(tmp_path, lines(*(row | {"choices": choices} for row in rows)), "choices.jsonl"))
    assert chosen.score({"0": read_as, "1": written_as})["accuracy"] == 100.0
    several = [QUESTION | {"answers": [written_as, read_as, "x", "y"]} for _ in range(2)]
    targets = own(written(tmp_path, lines(*several), "several.jsonl"))[0].targets
    assert [text for text, _ in targets].count(read_as) == 1


def test_labels_that_look_alike_are_one(tmp_path: Path) -> None:
    spelled = [NFC, NFD, f"{NFC} ", NFC.replace(" ", "\u00a0"), f"\u200b{NFC}", "Yes", "yes"]
    rows = [{"image": "IMG_0001.JPG", "label": label} for label in spelled]
    task = own(written(tmp_path, lines(*rows)))
    assert task.labels == ("Yes", NFC, "yes")
    assert task.decoding.candidates == task.labels
    scores = task.score({str(place): label for place, label in enumerate(spelled)})
    assert scores == {"accuracy": 100.0, "macro_f1": 100.0}
    notes = " ".join(task.notes)
    assert "1 of 7 rows have control characters" in notes
    assert "'Yes' and 'yes'" in notes


def test_splits_and_image_names_are_read_as_they_look(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    stored, named = [NFC, f"2 {NFD}", "3"], [NFD, f"2 {NFC}", "3"]
    for name in stored:
        shutil.copy(PHOTOS / "IMG_0001.JPG", photos / f"{name}.jpg")
    splits = ["Train\u00a0", " test", "val\n"]
    rows = [QUESTION | {"image": f"{n}.jpg", "split": split} for n, split in zip(named, splits, strict=True)]
    file = written(tmp_path, lines(*rows))
    task = own(file, images=photos)
    assert task.missing_images() == []
    assert [path.name for path in task.image_files()] == [f"{name}.jpg" for name in stored]
    assert [len(own(file, name, images=photos)) for name in ("train", "test", "validation")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.csv", "Image,que\u200bstion ,ANSWER\nIMG_0001.JPG,which?,blue\n"),
        ("data.jsonl", '{"image\u00a0": "IMG_0001.JPG", "question ": "which?", "Answer": "blue"}\n'),
        (
            "data.jsonl",
            '{"image": "IMG_0001.JPG", "question": "which?", "answer": "blue", "Answer": "red"}\n',
        ),
    ],
)
def test_columns_are_found_as_they_look(tmp_path: Path, name: str, content: str) -> None:
    task = own(written(tmp_path, content, name))
    assert (task.name, task[0].question, task[0].answer) == ("vqa", "which?", "blue")


def test_splits_of_numbers_and_empty_questions_are_told(tmp_path: Path) -> None:
    rows = [QUESTION | {"split": split} for split in (0, 1)]
    with pytest.raises(UsageError, match="no rows to train on: found the splits 0, 1"):
        own(written(tmp_path, lines(*rows)), "train")
    task = own(written(tmp_path, lines(QUESTION, QUESTION | {"question": " \u200b"}), "empty.jsonl"))
    assert "1 of 2 rows of all have an empty question" in task.notes


def test_rows_from_before_have_the_same_content(tmp_path: Path) -> None:
    rows = own(written(tmp_path, lines(QUESTION))).rows
    assert "cleaned" in rows.table.column_names
    before = Rows(rows.table.drop_columns(["cleaned"]))
    assert rows_content(before) == rows_content(rows)


def test_embedded_images_are_read_where_they_are(tmp_path: Path) -> None:
    content = [(PHOTOS / name).read_bytes() for name in ("IMG_0001.JPG", "scan-3.png")]
    images = pa.array([{"bytes": one, "path": None} for one in content])
    features = {"label": {"names": ["blue", "red"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": images, "label": pa.array([0, 1])}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    lists = pa.table(
        {"images": pa.array([[{"bytes": one, "path": "x"}] * 2 for one in content]), "question": ["a", "b"]}
    )
    pq.write_table(lists, tmp_path / "c.parquet")
    for name, count in (("a.parquet", 1), ("b.arrow", 1), ("c.parquet", 2)):
        task = load_task("vqa", data=tmp_path / name, split="all")
        assert task.image_count == count
        assert not missing_files(task.image_files())
        for place, one in enumerate(content):
            pixels = [read_image(path).tobytes() for path in task[place].images]
            assert pixels == [read_image(one).tobytes()] * count
    labels = load_task("vqa", data=tmp_path / "a.parquet", split="all")
    assert (labels.name, labels.labels, labels[1].answer) == ("labels", ("blue", "red"), "red")


def with_urls(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    """A table of these rows, in one of the forms that may hold data URLs."""
    if form.startswith("csv"):
        cells = [["image", "question", "answer"], *([row[k] for k in QUESTION] for row in rows)]
        text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in cells)
        return written(folder, text.encode(form.removeprefix("csv ") or "utf-8"), "a.csv")
    if form == "list":
        return written(folder, json.dumps(rows, indent=1), "a.json")
    if form == "escaped":
        return written(folder, lines(*rows).replace("/", "\\/"), "a.jsonl")
    if form == "messages.parquet":
        parts = [{"type": "image", "image": None, "text": None}, {"type": "text", "image": None}]
        rows = [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [parts[0] | {"image": row["image"]}, parts[1] | {"text": "what?"}],
                    },
                    {"role": "assistant", "content": [parts[1] | {"text": row["answer"]}]},
                ]
            }
            for row in rows
        ]
    if form.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
        return folder / "a.parquet"
    if form == "arrow":
        table = pa.Table.from_pylist([row | {"image": [row["image"]]} for row in rows])
        with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return folder / "a.arrow"
    return written(folder, lines(*rows), "a.jsonl")


URL_FORMS = ("lines", "escaped", "list", "csv utf-8", "csv utf-16", "csv utf-16-le", "parquet")


@pytest.mark.parametrize("form", [*URL_FORMS, "messages.parquet", "arrow"])
def test_data_urls_are_read_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("DEPT_VL_CACHE", str(tmp_path / "cache"))
    content = []
    for seed in (0, 1):
        file = BytesIO()
        noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(file, "PNG")
        content.append(file.getvalue())
    urls = [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in content]
    (tmp_path / "data").mkdir()
    rows = [QUESTION | {"image": urls[one]} for one in (0, 1, 1, 0, 1)]
    task = own(with_urls(tmp_path / "data", form, rows))
    written_out = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*"))
    assert written_out < min(map(len, content)) / 2
    assert len(task.image_files()) == 2  # each once, however many ask about it
    assert not task.missing_images()
    assert image_groups(task.rows, range(5), task.folder).tolist() == [0, 1, 1, 0, 1]
    for index, one in enumerate((0, 1, 1, 0, 1)):
        assert embedded_bytes(task[index].images[0]) == content[one]


@pytest.mark.parametrize("url", ['data:image/svg+xml,<svg a="1">', "data:image/svg+xml,é"])
def test_a_data_url_that_is_not_written_plainly_is_an_error(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        own(written(tmp_path, lines(QUESTION, QUESTION | {"image": url}), "a.jsonl"))
    assert "a.jsonl, line 2, column 'image'" in str(caught.value)


def test_a_name_like_a_reference_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    url = f"data:image/png;base64,{base64.b64encode((PHOTOS / 'scan-3.png').read_bytes()).decode()}"
    hidden = written(tmp_path, url, "hidden.json")
    for name in (f"embedded:{hidden}/bytes/0/{len(url)}", f"{hidden}/bytes/0/{len(url)}"):
        with pytest.raises(UsageError) as caught:
            own(written(tmp_path / "data", lines(QUESTION | {"image": name}), "a.jsonl"))
        assert "a.jsonl, line 1" in str(caught.value)


def test_a_data_url_that_changed_is_no_image(tmp_path: Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode((PHOTOS / 'scan-3.png').read_bytes()).decode()}"
    table = written(tmp_path, lines(QUESTION | {"image": url}), "a.jsonl")
    image = own(table)[0].images[0]
    table.write_text("\n" * 5 + table.read_text())
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        read_image(image)


def test_one_image_in_several_rows_of_a_table_is_one_image(tmp_path: Path) -> None:
    first, second = ({"bytes": (PHOTOS / name).read_bytes()} for name in ("IMG_0001.JPG", "scan-3.png"))
    table = {
        "image": [first, first, second, first],
        "question": ["what?"] * 4,
        "answer": ["a"] * 4,
        "split": ["train", "train", "train", "test"],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    task = own(tmp_path / "a.parquet")
    assert image_groups(task.rows, range(4), task.folder).tolist() == [0, 0, 1, 0]
    assert [re.findall(r"\d+", line) for line in leaks(task.rows, task.folder)] == [["1", "1"]]


def test_one_file_under_several_names_is_one_image(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(PHOTOS / "scan-3.png", tmp_path / "below" / name)
    names = ("below/a.png", "a.png", "BELOW/A.PNG", "a", "below/b.png")
    rows = [QUESTION | {"image": name} for name in names]
    task = own(written(tmp_path, lines(*rows)), images=None)
    assert image_groups(task.rows, range(5), task.folder).tolist() == [0, 0, 0, 0, 1]
    assert len(task.image_files()) == 2
    split = [row | {"split": "test" if place == 1 else "train"} for place, row in enumerate(rows)]
    notes = own(written(tmp_path, lines(*split)), images=None).notes
    assert [re.findall(r"\d+", line) for line in notes] == [["1", "1"]]


def test_images_in_tables_are_decoded_a_few_at_a_time(tmp_path: Path) -> None:
    one, count = 20_000, 1000
    images = [{"bytes": bytes([n % 251]) * one, "path": f"{n}.png"} for n in range(count)]
    for name, column in (("image", images), ("images", [[image, image] for image in images])):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({name: column, "question": ["a"] * count}), path, write_batch_size=4)
    usual = pa.default_memory_pool()
    pa.set_memory_pool(POOL)
    try:
        alone = [
            load_task("vqa", data=tmp_path / f"{name}.parquet", split="all") for name in ("image", "images")
        ]
        for row in (0, 999, 7):
            (path,) = alone[0][row].images
            assert embedded_bytes(path) == images[row]["bytes"]
        assert embedded_bytes(alone[1][9].images[1]) == images[9]["bytes"]
        with ThreadPoolExecutor(8) as threads:  # as sizes of images are looked up
            paths = [alone[0][row].images[0] for row in range(count)]
            assert list(threads.map(embedded_bytes, paths)) == [image["bytes"] for image in images]
    finally:
        embedded._group.cache_clear()
        pa.set_memory_pool(usual)
    assert POOL.max_memory() < one * count / 3


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((PHOTOS / "scan-3.png").read_bytes())
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    task = load_task("vqa", data=written(folder, lines(QUESTION | {"image": "a.png"})), split="all")
    with pytest.raises(UsageError, match="outside"):
        task.image_files()
    with pytest.raises(UsageError, match="outside"):
        task.missing_images()


def test_splits_of_files_columns_and_held_out_images(tmp_path: Path) -> None:
    shutil.copytree(PHOTOS, tmp_path / "photos")
    for split, image in (("train", "scan-3"), ("val", "scan-7"), ("test", "scan-3")):
        written(tmp_path, lines(QUESTION | {"image": f"photos/{image}.png"}), f"{split}.jsonl")
    task = load_task("vqa", data=tmp_path, split="validation")
    assert [path.name for path in task.image_files()] == ["scan-7.png"]
    assert task.notes == ("1 of the 1 images of train are in test too",)
    sides = {split: own(OWN / "qa.jsonl", split) for split in ("train", "validation", "test")}
    images = {split: set(side.image_files()) for split, side in sides.items()}
    assert {split: len(some) for split, some in images.items()} == {"train": 6, "validation": 1, "test": 1}
    assert len(set().union(*images.values())) == 8
    other = own(OWN / "qa.jsonl", "test", split_seed=1).image_files()
    assert other != sides["test"].image_files()


@pytest.mark.parametrize(
    ("prediction", "answers", "accuracy"),
    [
        ("Blue.", ["blue"], 1.0),
        ("red", ["blue"], 0.0),
        ("blue", ["blue", "red"], 0.5),
        ("blue", ["blue", "red", "green"], 2 / 3),
        ("blue", ["blue"] * 2 + ["red"] * 2, 1.0),
        ("blue", ["blue"] + ["red"] * 4, 0.6),
        ("blue", ["blue"] * 9, 1.0),
    ],
)
def test_vqa_accuracy_of_fewer_than_ten_answers(prediction: str, answers: list[str], accuracy: float) -> None:
    assert general_vqa_accuracy(prediction, answers) == pytest.approx(accuracy)


def test_vqa_accuracy_of_ten_answers_is_the_official_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dept_vl.tasks.metrics.own.OFFICIAL_ANSWERS", 11)  # by the general form
    for matches in range(11):
        answers = ["blue"] * matches + [f"other {number}" for number in range(10 - matches)]
        assert general_vqa_accuracy("blue", answers) == pytest.approx(vqa_accuracy("blue", answers))


def test_anls() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert anls("Hello  world", ["hello world"]) == 1
    assert anls("helo", ["hello", "x"]) == pytest.approx(0.8)
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abc", ["axy"]) == 0  # a third


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("file", ["qa.csv", "aokvqa_like.json", "labels.jsonl"])
def test_own_data_are_trained_scored_and_asked(
    file: str, tmp_path: Path, make_run: Callable[..., RunConfig]
) -> None:
    rows = [json.loads(line) for line in (OWN / "qa.jsonl").read_text().splitlines()][::3]
    labels = [{"file_name": row["image"], "label": row["answer"]} for row in rows]
    data = written(tmp_path, lines(*labels), file) if file == "labels.jsonl" else OWN / file
    options = DataOptions(own=OwnOptions(data=str(data), images=PHOTOS), max_lost_answers=1.0)
    assert options.task == "vqa"
    config = with_(make_run(options), output_dir=tmp_path / "run")
    scores = run(config).scores
    found = score_run(EvaluateConfig(run=tmp_path / "run", output_dir=tmp_path / "again"))
    assert found.scores == scores
    other = score_run(EvaluateConfig(run=tmp_path / "run", own=options.own, output_dir=tmp_path / "other"))
    assert len(other.predictions) == len(own(data))
    task = own(data)
    if file != "qa.csv":
        allowed = task.labels or task[0].choices
        assert set(other.predictions.values()) <= set(allowed)
    predictor = dept_vl.load(tmp_path / "run")
    question = "" if file == "labels.jsonl" else "what color is the shape?"
    answer = predictor.answer(PHOTOS / "scan-3.png", question)
    assert isinstance(answer, str)
    assert not task.labels or answer in task.labels


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("task", "prefix"), [("gqa", "gqa: "), ("nlvr2", "nlvr: "), ("coco", "caption:")])
def test_an_adapter_of_another_task_is_asked_in_its_own_way(
    task: str,
    prefix: str,
    tmp_path: Path,
    scenes: Path,
    make_run: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images: dict[str, Any] = {"images": ["scan-3.png"] * 2 if task == "nlvr2" else ["scan-3.png"]}
    rows = [images | {"question": text, "answer": "yes"} for text in ("A?", "Is it red?")]
    options = OwnOptions(data=str(written(tmp_path, lines(*rows))), images=PHOTOS)
    learnt = DataOptions(task=task, data_dir=scenes / task, meteor=False, test_limit=2)
    config = with_(make_run(learnt, max_steps=1), output_dir=tmp_path / "run")
    run(config)
    asked: list[str] = []
    decode = bulk.decode

    def spy(model: Any, batch: Any, *rest: Any) -> list[str]:
        asked.extend(model.backbone.tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True))
        return decode(model, batch, *rest)

    predictor = dept_vl.load(config.output_dir, device="cpu")
    wanted = [predictor.task.source(text if task != "coco" else "") for text in ("A?", "Is it red?")]
    tokenizer = predictor.model.backbone.tokenizer
    wanted = [tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) for text in wanted]
    assert wanted[0].startswith(tokenizer.decode(tokenizer(prefix).input_ids, skip_special_tokens=True))
    for place in ("evaluate", "bulk"):
        monkeypatch.setattr(f"dept_vl.inference.{place}.decode", spy)
    scored = score_run(EvaluateConfig(run=config.output_dir, own=options, output_dir=tmp_path / "scored"))
    assert dept_vl.evaluate(predictor, **vars(options)).predictions == scored.predictions
    output = tmp_path / "answers.jsonl"
    predict(PredictConfig((), str(config.output_dir), own=options, output=output, device="cpu"))
    assert asked == wanted * 3


def test_an_adapter_is_asked_only_what_it_answers() -> None:
    whole, captions = own(OWN / "qa.csv"), own(OWN / "captions.jsonl")
    assert captions.asked_by(TASKS["coco"])[0].source_text == "caption:"
    for data, task, reason in ((whole, "nlvr2", "2"), (whole, "rte", "no images"), (captions, "gqa", "none")):
        with pytest.raises(UsageError, match=reason):
            data.asked_by(TASKS[task])


def test_answers_that_an_adapter_cannot_give_are_told(tmp_path: Path) -> None:
    rows = [{"image": "4", "label": label} for label in ("warm", "Warm", "hot", "Warm", "")]
    data = own(written(tmp_path, lines(*rows)))
    adapter = TASKS["labels"].with_facts(
        {"form": "label", "scoring": "one", "labels": ["cold", "warm"], "image_count": 1}
    )
    told = "3 of 4 answers are none of the adapter's 2 labels: 'Warm', 'hot'"
    assert data.asked_by(adapter).notes == (*data.notes, told)
    assert data.asked_by(TASKS["labels"]).notes == data.notes
    known = adapter.with_facts(adapter.facts() | {"labels": ["Warm", "hot", "warm"]})
    assert data.asked_by(known).notes == data.notes


def test_a_caption_among_questions_is_told(tmp_path: Path) -> None:
    task = own(written(tmp_path, lines(QUESTION, {"image": "4", "caption": "a square"}, QUESTION)))
    assert task.name == "vqa"
    assert "1 of 3 rows of all have an empty question" in task.notes


def test_a_run_on_own_captions_is_evaluated_with_its_own_options() -> None:
    columns = ("image=photo", "answer=truth")
    of_run = OwnOptions(data="a.csv", images=Path("photos"), columns=columns, metric="f1")
    trained = RunConfig(data=DataOptions(task="captions", own=of_run))
    asked = EvaluateConfig(run=Path("run"))
    assert data_options(asked, trained).own == of_run
    assert data_options(asked, trained).task == "captions"
    by_anls = data_options(replace(asked, own=OwnOptions(metric="anls")), trained).own
    assert by_anls == replace(of_run, metric="anls")
    other = data_options(replace(asked, own=OwnOptions(data="b.csv")), trained).own
    assert other == replace(of_run, data="b.csv", images=None)


@pytest.mark.usefixtures("fresh_accelerate")
def test_features_of_embedded_images_are_kept(
    tmp_path: Path, make_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("IMG_0001.JPG", "scan-3.png", "scan-7.png", "000000000004.jpg")
    images = pa.array([{"bytes": (PHOTOS / name).read_bytes(), "path": None} for name in names])
    pq.write_table(pa.table({"image": images, "label": ["a", "b", "a", "b"]}), tmp_path / "a.parquet")
    config = make_run(DataOptions(own=OwnOptions(data=str(tmp_path / "a.parquet"))))
    (folder,) = extract(ExtractConfig(data=config.data, backbone=config.backbone))
    assert folder == tmp_path / "features"
    cached = with_(config, data={"features": "cached"}, output_dir=tmp_path / "run")
    assert set(run(cached).scores) == {"accuracy", "macro_f1"}
    assert extract(ExtractConfig(data=config.data, backbone=config.backbone)) == [folder]
    assert "0 images encoded, 4 were there" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("file", ["labels.jsonl", "qa.csv"])
def test_an_adapter_alone_knows_its_labels_and_longest_answer(
    file: str, tmp_path: Path, make_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a big blue circle that nobody has ever seen before in this place"
    rows = [json.loads(line) for line in (OWN / "qa.jsonl").read_text().splitlines()][::3]
    labels = [{"file_name": row["image"], "label": row["answer"]} for row in rows]
    answers = [row | {"answer": long} for row in rows]
    data = written(tmp_path, lines(*(labels if file == "labels.jsonl" else answers)), "rows.jsonl")
    options = DataOptions(own=OwnOptions(data=str(data), images=PHOTOS), max_lost_answers=1.0)
    trained = dept_vl.train(with_(make_run(options), output_dir=tmp_path / "run"))
    backbone = dept_vl.load(trained.folder).model.backbone
    with_run = dept_vl.load(trained.folder, backbone=backbone)
    assert not (trained.folder / "task.json").exists()
    shutil.copytree(trained.folder / "best", tmp_path / "alone")
    alone = dept_vl.load(tmp_path / "alone", backbone=backbone)
    assert (alone.task, alone.decoding) == (with_run.task, with_run.decoding)
    if file == "labels.jsonl":
        assert alone.decoding.candidates == ("blue", "green", "red", "yellow")
        learnt = {row["answer"] for row in rows}
        assert set(alone.answer([PHOTOS / "scan-3.png", PHOTOS / "scan-7.png"])) <= learnt
        other = written(tmp_path, lines(*(row | {"label": row["label"].upper()} for row in labels[:2])))
        asked = OwnOptions(data=str(other), images=PHOTOS)
        score_run(EvaluateConfig(run=trained.folder, own=asked, output_dir=tmp_path / "other"))
        told = "note: 2 of 2 answers are none of the adapter's 4 labels: "
        assert told in capsys.readouterr().out
        config = PredictConfig((), str(trained.folder), own=asked, output=tmp_path / "answers.jsonl")
        predict(replace(config, device="cpu"))
        assert told in capsys.readouterr().out
    else:
        assert alone.decoding.max_new_tokens == len(backbone.tokenizer(long).input_ids) > 10
    for source in (trained, alone):
        evaluated = dept_vl.evaluate(source, data=data, images=PHOTOS, split="all")
        assert len(evaluated.predictions) == len(rows)
    # As a run of before says it: beside the adapter.
    description = json.loads((trained.folder / "best" / "adapter.json").read_text())
    (trained.folder / "task.json").write_text(json.dumps(description.pop("answering")))
    (trained.folder / "best" / "adapter.json").write_text(json.dumps(description))
    forget_checksums(trained.folder)
    older = dept_vl.load(trained.folder, backbone=backbone)
    assert (older.task, older.decoding) == (with_run.task, with_run.decoding)


def test_facts_of_strangers_are_checked() -> None:
    with pytest.raises(ValueError, match="form"):
        TASKS["vqa"].with_facts({"form": "x", "scoring": "one", "labels": [], "image_count": 1})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1.5", "15", False),
        ("-5", "5", False),
        (".5", "5", False),
        ("+", "-", False),
        ("A", "", False),
        ("?", "", False),
        ("1/2", "12", False),
        ("10:30", "1030", False),
        ("1,000", "1000", True),
        ("The cat.", "cat", True),
        ("15.", "15", True),
        ("well-known", "wellknown", True),
        ("Blue ", "blue!", True),
    ],
)
def test_exact_match_keeps_numbers_and_signs_apart(one: str, other: str, same: bool) -> None:
    assert (normalise_own(one) == normalise_own(other)) is same


def test_an_answer_of_a_sign_is_right_alone(tmp_path: Path) -> None:
    rows = [QUESTION | {"answer": answer} for answer in ("+", "-", "1.5", "15")]
    task = own(written(tmp_path, lines(*rows)))
    right = dict(zip(task.example_ids(), ("+", "-", "1.5", "15"), strict=True))
    assert task.score(right)["exact_match"] == 100
    for wrong in (("-", "+", "15", "1.5"), ("", "", "", "")):
        assert task.score(dict(zip(right, wrong, strict=True)))["exact_match"] == 0


def test_ids_that_are_floats_are_the_same_ids(tmp_path: Path) -> None:
    table = pa.table({"id": [2.0, 0.0, 1.0], "image": ["IMG_0001.JPG"] * 3, "question": ["what?"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    assert own(tmp_path / "a.parquet").example_ids() == ["2", "0", "1"]


def test_the_number_of_a_row_takes_no_id_of_another(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        own(written(tmp_path, lines(QUESTION, QUESTION | {"id": "0"})))
    assert "line 2" in str(caught.value)
    assert own(written(tmp_path, lines(QUESTION | {"id": "1"}, QUESTION))).example_ids() == ["1", "1#2"]


@pytest.mark.parametrize("cell", ["['red', 'redish']", "['red' 'crimson']"])
def test_a_list_as_python_prints_it_is_refused(tmp_path: Path, cell: str) -> None:
    table = f'image,question,answer\nIMG_0001.JPG,what?,"{cell}"\n'
    with pytest.raises(UsageError) as caught:
        own(written(tmp_path, table, "a.csv"))
    assert "a.csv, line 2, column 'answer'" in str(caught.value)


@pytest.mark.parametrize("role", ["image", "question", "answer", "choices", "id", "split", "type"])
def test_a_named_column_that_is_nowhere_is_an_error(tmp_path: Path, role: str) -> None:
    table = written(tmp_path, lines(QUESTION | {"split": "train"}, QUESTION | {"split": "train"}))
    with pytest.raises(UsageError, match=f"{role}=gld"):
        own(table, columns=(f"{role}=gld",))


def test_a_named_column_replaces_the_usual_one_in_every_row(tmp_path: Path) -> None:
    task = own(written(tmp_path, lines(QUESTION | {"gold": "red"}, QUESTION)), columns=("answer=gold",))
    assert [task[place].answers for place in range(2)] == [("red",), ()]


def test_a_column_without_a_name_has_no_role(tmp_path: Path) -> None:
    table = written(
        tmp_path, ",image,question,answer\n0,IMG_0001.JPG,what?,blue\n1,IMG_0001.JPG,who?,red\n", "x.csv"
    )
    task = own(table)
    assert [task[place].answers for place in range(2)] == [("blue",), ("red",)]
    assert task.rows.column("split").to_pylist() == ["", ""]
    unanswered = own(written(tmp_path, ",image,question\n0,IMG_0001.JPG,what?\n", "y.csv"))
    assert unanswered[0].answers == ()


@pytest.mark.parametrize("column", ["question", "answer", "id", "split"])
def test_bytes_are_no_text(tmp_path: Path, column: str) -> None:
    values = {name: [value] * 2 for name, value in (QUESTION | {"id": "7", "split": "train"}).items()}
    values[column] = [b"what?"] * 2
    pq.write_table(pa.table(values), tmp_path / "data.parquet")
    with pytest.raises(UsageError, match=rf"data\.parquet, row 1, column '{column}'"):
        own(tmp_path / "data.parquet")


def test_short_floats_are_read_as_written(tmp_path: Path) -> None:
    table = pa.table(
        {name: [value] * 2 for name, value in QUESTION.items()}
        | {"answer": pa.array([0.1, 3.0], pa.float32())}
    )
    pq.write_table(table, tmp_path / "data.parquet")
    task = own(tmp_path / "data.parquet")
    assert [task[place].answer for place in range(2)] == ["0.1", "3"]
    several = table.set_column(2, "answers", pa.array([[0.1, 0.2], [3.0]], pa.list_(pa.float32())))
    pq.write_table(several, tmp_path / "data.parquet")
    task = own(tmp_path / "data.parquet")
    assert [task[place].answers for place in range(2)] == [("0.1", "0.2"), ("3",)]


@pytest.mark.parametrize("identity", [{"$oid": "65a"}, ["7"], True])
def test_an_id_is_text_or_a_number(tmp_path: Path, identity: object) -> None:
    with pytest.raises(UsageError, match="'id'"):
        own(written(tmp_path, lines(QUESTION | {"id": identity})))


def test_ids_of_decimals_and_dates_are_kept(tmp_path: Path) -> None:
    table = {name: [value] for name, value in QUESTION.items()}
    for identity in (Decimal("12.50"), date(2024, 2, 29)):
        pq.write_table(pa.table(table | {"id": [identity]}), tmp_path / "data.parquet")
        assert own(tmp_path / "data.parquet").example_ids() == [str(identity)]


def test_rows_that_no_split_uses_and_further_labels_are_told(tmp_path: Path) -> None:
    splits = ("train", "val", "test", "extra", "extra", "")
    task = own(written(tmp_path, lines(*(QUESTION | {"split": split} for split in splits))))
    notes = " ".join(task.notes)
    assert "2 of 6 rows are of the splits 'extra'" in notes
    assert "1 of 6 rows have an empty split" in notes
    labelled = {"image": "IMG_0001.JPG", "label": ["a", "b"]}
    task = own(written(tmp_path, lines(labelled, labelled | {"label": "a"}), "labels.jsonl"))
    assert any(note.startswith("1 of 2 rows of all have several labels") for note in task.notes)


def test_rows_that_are_trained_and_scored_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (QUESTION | {"split": split} for split in ("train", "train", "val", "test"))
    options = DataOptions(
        own=OwnOptions(data=str(written(tmp_path, lines(*rows))), images=PHOTOS), train_split="all"
    )
    load_splits(options, 0)
    assert "1 of 1 rows of the test split" in capsys.readouterr().out
    load_splits(replace(options, train_split="", test_split="test"), 0)
    assert "trained on, too" not in capsys.readouterr().out
