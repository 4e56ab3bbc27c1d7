"""Your own images and questions: every usual form of a table is read, scored and refused where it is damaged.

Images of `fixtures/own` are rendered; its tables are written by hand in the forms that people have.
"""

import csv
import json
import re
import shutil
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_files import OWN, PHOTOS, QUESTION, lines, own, written

from dept_vl._utils.errors import UsageError
from dept_vl._utils.images import missing_files
from dept_vl.config import DataOptions
from dept_vl.data.content import rows_content
from dept_vl.data.splits import load_splits
from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.own.choices import INDEX_COLUMN
from dept_vl.tasks.own.convert import _new_id
from dept_vl.tasks.own.images import ImageFolder
from dept_vl.tasks.own.options import OwnOptions

CAPTIONS = {"a green square": 1.0, "one square that is green": 1.0}
TWICE = '{"image": "img_0001", "question": "which?", "answer": "blue", "answer": "red"}\n'
"""A key twice, of which one value would be lost."""
DEEP = json.loads("[" * 201 + "1" + "]" * 201)
CHOSEN = {"image": "IMG_0001.JPG", "question": "which?", "choices": ["red", "blue", "green"], "answer": 2}
COUNTED = CHOSEN | {"choices": ["1", "2", "3", "4"]}


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


def turn(role: str, text: str, *images: str | None) -> dict[str, Any]:
    parts = [{"type": "image"} | ({"image": one} if one else {}) for one in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


@pytest.mark.parametrize("column", [False, True])
def test_a_question_has_the_images_of_the_turns_up_to_it(tmp_path: Path, column: bool) -> None:
    names = ["IMG_0001.JPG", "scan-3.png"]
    first, second = (None, None) if column else names
    turns = [turn("user", "one?", first), turn("assistant", "a"), turn("user", "two?", second)]
    row = {"messages": turns} | ({"images": names} if column else {})
    file = written(tmp_path, lines(row))
    paths = tuple(PHOTOS / name for name in names)
    assert own(file)[0].images == paths[:1]
    with pytest.raises(UsageError, match="images"):  # one each, or two
        own(file, turns="all")
    spoken = row | {"messages": [turn("user", "which?", first, second), turn("assistant", "a")]}
    assert own(written(tmp_path, lines(spoken)))[0].images == paths


@pytest.mark.parametrize("turns", ["first", "all"])
def test_a_question_before_all_images_has_them_all(tmp_path: Path, turns: str) -> None:
    late = [turn("user", "hello?"), turn("assistant", "a"), turn("user", "what?", "IMG_0001.JPG")]
    task = own(written(tmp_path, lines({"messages": late})), turns=turns)
    assert [task[n].images for n in range(len(task))] == [(PHOTOS / "IMG_0001.JPG",)] * len(task)


def test_images_in_turns_are_not_read_beside_a_column(tmp_path: Path) -> None:
    row = {"images": ["IMG_0001.JPG"], "messages": [turn("user", "what?", "https://example.org/a.png")]}
    assert own(written(tmp_path, lines(row)))[0].images == (PHOTOS / "IMG_0001.JPG",)


def test_an_empty_turn_is_no_answer(tmp_path: Path) -> None:
    turns = [turn("user", "what?", "IMG_0001.JPG"), {"role": "assistant", "content": " "}]
    task = own(written(tmp_path, lines({"messages": turns})))
    assert (task[0].answers, task[0].targets) == ((), ())


def test_a_prompt_may_be_a_conversation_or_text(tmp_path: Path) -> None:
    spoken = {
        "image": "IMG_0001.JPG",
        "prompt": [turn("user", "one?")],
        "completion": [turn("assistant", "a")],
    }
    written_out = {"image": "IMG_0001.JPG", "prompt": "two?", "completion": "b"}
    for rows in ((spoken, written_out), (written_out, spoken)):
        task = own(written(tmp_path, lines(*rows)))
        assert {task[n].question: task[n].answers for n in (0, 1)} == {"one?": ("a",), "two?": ("b",)}


def test_deep_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    written(tmp_path, lines(QUESTION))
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "a/b/c/more.jsonl")
    task = own(tmp_path)
    assert (len(task), "a/b/c/more.jsonl" in " ".join(task.notes)) == (1, True)
    for number in range(100):
        (tmp_path / f"a/b/c/of_one_image_{number}.json").touch()
    assert max(map(len, own(tmp_path).notes)) < 300


def test_a_quote_that_takes_in_the_next_line_is_an_error(tmp_path: Path) -> None:
    rows = (("image", "question", "answer"), *[("IMG_0001.JPG", "q", a) for a in ('"red', 'blue"', "green")])
    text = "\n".join(map("\t".join, rows))
    with pytest.raises(UsageError, match=r"data\.tsv, line 2"):
        own(written(tmp_path, text, "data.tsv"))
    cell = 'image\tquestion\tanswer\nIMG_0001.JPG\t"is this\n\ta\tlist?"\tyes\n'
    assert own(written(tmp_path, cell, "data.tsv"))[0].question == "is this\n\ta\tlist?"


def test_the_usual_answer_of_several_is_the_choice(tmp_path: Path) -> None:
    asked = {**QUESTION, "choices": ["a", "b"], "answers": ["b", "a", "a"]}
    del asked["answer"]
    task = own(written(tmp_path, lines(asked)))
    example = task[0]
    assert (example.answers, example.targets, example.answer) == (("a",), (("a", 1.0),), "a")
    assert task.score({example.example_id: "a"})["accuracy"] == 100 * task.mark(example, "a") == 100
    with pytest.raises(UsageError, match="not one of the choices"):
        own(written(tmp_path, lines(asked | {"answers": ["c", "a", "c"]})))


def test_annotations_that_belong_to_nothing_are_named(tmp_path: Path) -> None:
    questions = [{"question_id": n, "image_id": n, "question": "what?"} for n in range(2)]
    written(tmp_path, json.dumps({"questions": questions}), "questions.json")
    answers = [{"question_id": n, "image_id": n, "answers": [{"answer": "a"}]} for n in range(3)]
    written(tmp_path, json.dumps({"annotations": answers}), "annotations.json")
    with pytest.raises(UsageError, match=r"annotations.json: 1 annotations .*questions.json .*first: '2'"):
        own(tmp_path / "questions.json")
    captions = [{"image_id": n, "id": n, "caption": "a"} for n in range(3)]
    images = [{"id": n, "file_name": "IMG_0001.JPG"} for n in range(2)]
    content = json.dumps({"images": images, "annotations": captions})
    with pytest.raises(UsageError, match=r"1 annotations have the image_id .*first: '2'"):
        own(written(tmp_path, content, "captions.json"))


def test_the_first_of_several_labels_counts_everywhere(tmp_path: Path) -> None:
    task = own(written(tmp_path, lines({"image": "IMG_0001.JPG", "label": ["b", "a", "a"]})))
    example = task[0]
    assert (example.answer, example.targets) == ("b", (("b", 1.0),))
    assert task.score({example.example_id: "b"})["accuracy"] == 100 * task.mark(example, "b") == 100


def test_captions_and_labels_are_not_mixed(tmp_path: Path) -> None:
    rows = ({"image": "IMG_0001.JPG", kind: "a"} for kind in ("caption", "label"))
    with pytest.raises(UsageError, match="two files"):
        own(written(tmp_path, lines(*rows)))


def test_a_metric_of_questions_has_no_effect_on_captions(tmp_path: Path) -> None:
    file = written(tmp_path, lines({"image": "IMG_0001.JPG", "caption": "a"}))
    assert own(file, metric="f1").notes == ("--metric f1 is for questions; of captions, CIDEr decides",)
    assert own(file).notes == ()


def test_an_epoch_of_captions_has_every_caption(tmp_path: Path) -> None:
    rows = [
        {"image": "IMG_0001.JPG", "captions": ["a", "b", "a"]},
        {"image": "scan-3.png", "captions": ["a"]},
    ]
    assert own(written(tmp_path, lines(*rows))).draws_per_epoch() == 3
    assert own(written(tmp_path, lines(QUESTION, QUESTION), "more.jsonl")).draws_per_epoch() == 2


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


def test_numbers_beside_an_empty_index_are_read_as_others(tmp_path: Path) -> None:
    row = CHOSEN | {"correct_choice_idx": None}
    assert own(written(tmp_path, lines(row), "a.jsonl"))[0].answers == ("green",)
    with pytest.raises(UsageError, match=r"line 1.*number of a choice.*found 7"):
        own(written(tmp_path, lines(row | {"answer": 7}), "a.jsonl"))


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
