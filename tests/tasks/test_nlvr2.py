"""NLVR2 in its official files: what is read, how it is scored, and what is said of bad files."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_metrics_nlvr2 import EXAMPLES, EXPECTED, PREDICTIONS

from dept_vl.tasks import load_task
from dept_vl.tasks import nlvr2 as nlvr2_module
from dept_vl.tasks.metrics.nlvr2 import score_nlvr2
from dept_vl.tasks.nlvr2 import NLVR2, SPLITS

PLAIN = {"sentence": "Both images show a dog.", "label": "True", "identifier": "dev-1-0-0"}


@pytest.fixture
def folder(scenes: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(scenes / "nlvr2", tmp_path / "nlvr2")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(root: Path, name: str, records: Sequence[Mapping[str, Any]]) -> Path:
    """A file of sentences, and a folder for images beside it."""
    (root / name).mkdir(parents=True, exist_ok=True)
    path = root / f"{name}.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def gold(task: NLVR2) -> dict[int | str, str]:
    return {task[index].example_id: task[index].answer for index in range(len(task))}


@pytest.mark.parametrize(("split", "name"), SPLITS.items())
def test_what_is_read_is_what_the_file_holds(
    scenes: Path, folder: Path, tmp_path: Path, split: str, name: str
) -> None:
    root = scenes / "nlvr2"
    if name == "test2":  # never published; whoever has it may read it
        (folder / "test1").rename(folder / "test2")
        (folder / "test1.json").rename(folder / "test2.json")
        root = folder
    records = read(root / f"{name}.json")
    task = NLVR2().load(root, split)
    assert len(task) == len(records) in (12, 24)
    assert task.example_ids() == [record["identifier"] for record in records]
    for index, record in enumerate(records):
        example = task[index]
        answer = {"True": "true", "False": "false"}[record["label"]]
        pair = record["identifier"].rpartition("-")[0]
        place = root / name / str(record.get("directory", ""))
        assert example.example_id == record["identifier"]
        assert example.source_text == f"nlvr: {record['sentence']}"
        assert example.question == record["sentence"]
        assert (example.targets, example.answer) == (((answer, 1.0),), answer)
        assert example.images == task.images(index)
        if name != "test2":
            assert example.images == (place / f"{pair}-img0.png", place / f"{pair}-img1.png")
            assert all(path.is_file() for path in example.images)
    used = {path for index in range(len(task)) for path in task.images(index)}
    assert set(task.image_files()) == used
    assert len(task.image_files()) == len(used) == len(records)  # two sentences a pair
    assert set(task.decoding.candidates) == {"true", "false"}


def test_training_images_lie_in_numbered_folders(scenes: Path) -> None:
    task = NLVR2().load(scenes / "nlvr2", "train")
    assert {path.parent.name for path in task.image_files()} == {"0", "1", "2"}
    assert {path.parent.parent for path in task.image_files()} == {scenes / "nlvr2" / "train"}


def test_training_images_may_lie_in_one_folder(folder: Path) -> None:
    numbered = [path.name for path in load_task("nlvr2", folder, "train").image_files()]
    for image in list((folder / "train").glob("*/*.png")):
        image.rename(folder / "train" / image.name)
    task = load_task("nlvr2", folder, "train")
    assert [path.name for path in task.image_files()] == numbered
    assert all(path.is_file() for path in (*task.image_files(), *task.images(0), *task[0].images))
    task.images(0)[0].unlink()  # a single one that is missing says nothing of the others
    assert load_task("nlvr2", folder, "train").missing_images() == [task.images(0)[0]]


@pytest.mark.parametrize("directory", [7, "7"])
def test_the_folder_is_a_number_or_its_name(tmp_path: Path, directory: object) -> None:
    write(tmp_path, "train", [PLAIN | {"directory": directory, "identifier": "train-10171-2-1"}])
    (paths,) = {NLVR2().load(tmp_path, "train").images(0)}
    assert paths == tuple(tmp_path / "train" / "7" / f"train-10171-2-img{side}.png" for side in (0, 1))


def test_the_source_is_lower_case_without_blanks_around(tmp_path: Path) -> None:
    write(tmp_path, "dev", [PLAIN | {"sentence": " Both Images. \n"}])
    example = load_task("nlvr2", tmp_path, "dev")[0]
    assert (example.source_text, example.question) == ("nlvr: both images.", " Both Images. \n")


def test_other_places_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "dev", [PLAIN, PLAIN | {"identifier": "dev-1-0-1"}])
    (tmp_path / "data").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "data" / "dev.json").write_text("\ufeff" + path.read_text().replace("\n", "\n\n"))
    path.unlink()
    (tmp_path / "dev").rename(tmp_path / "images" / "dev")
    task = NLVR2().load(tmp_path, "dev")
    assert len(task) == 2
    assert task.images(1)[0] == tmp_path / "images" / "dev" / "dev-1-0-img0.png"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> NLVR2:
    """Real identifiers and labels, with sentences of our own."""
    root = tmp_path_factory.mktemp("official")
    records = [PLAIN | {"identifier": identifier, "label": label} for identifier, label in EXAMPLES]
    write(root, "dev", records)
    return NLVR2().load(root, "dev")


def test_real_identifiers_name_their_images(official: NLVR2) -> None:
    assert len(official) == len(EXAMPLES) == 1396
    for index, (identifier, _) in enumerate(EXAMPLES):
        split, image_set, pair, _ = identifier.split("-")
        names = [path.name for path in official.images(index)]
        assert names == [f"{split}-{image_set}-{pair}-img{side}.png" for side in (0, 1)]


def test_the_official_figures_in_percent(official: NLVR2) -> None:
    scores = official.score(PREDICTIONS)
    assert official.primary == next(iter(scores)) == "accuracy"
    assert scores == {name: 100 * EXPECTED[name] for name in ("accuracy", "consistency")}
    assert 50 < scores["accuracy"] < 100
    some = range(0, 1396, 7)
    few = {EXAMPLES[index][0]: PREDICTIONS[EXAMPLES[index][0]] for index in some}
    expected = score_nlvr2([EXAMPLES[index] for index in some], few)
    assert official.subset(some).score(few) == {
        "accuracy": 100 * expected["accuracy"],
        "consistency": 100 * expected["consistency"],
    }
    assert official.subset([]).score({}) == {}


def test_missing_and_extra_predictions_are_named(scenes: Path) -> None:
    task = NLVR2().load(scenes / "nlvr2", "dev")
    answers = gold(task)
    assert task.score(answers) == {"accuracy": 100.0, "consistency": 100.0}
    answers["dev-9-9-9"] = answers.pop("dev-0-0-1")
    with pytest.raises(ValueError, match=r"1 missing \(first: 'dev-0-0-1'\) and 1 that .*: 'dev-9-9-9'\)"):
        task.score(answers)


def test_words_are_written_as_the_official_script_reads_them(scenes: Path) -> None:
    task = NLVR2().load(scenes / "nlvr2", "dev")
    assert task.written(" True\n") == "true"
    padded = {key: f" {answer.title()} " for key, answer in gold(task).items()}
    assert task.score(padded)["accuracy"] == 0.0
    assert task.score({key: task.written(answer) for key, answer in padded.items()})["accuracy"] == 100.0


@pytest.mark.parametrize("absent", [{}, {"label": None}])
def test_hidden_labels(tmp_path: Path, absent: dict[str, None]) -> None:
    bare = {key: value for key, value in PLAIN.items() if key != "label"} | absent
    write(tmp_path, "test2", [bare, bare | {"identifier": "test2-1-0-1"}])
    task = NLVR2().load(tmp_path, "test2")
    assert [(task[index].targets, task[index].answer) for index in (0, 1)] == [((), "")] * 2
    assert task.score(dict.fromkeys(task.example_ids(), "true")) == {}
    with pytest.raises(ValueError, match="1 missing"):
        task.score({"test2-1-0-1": "true"})


@pytest.mark.parametrize(("first", "found"), [("True", "no label here"), (None, "one here")])
def test_labels_in_some_records_only(tmp_path: Path, first: str | None, found: str) -> None:
    other = None if first else "False"
    records = [PLAIN | {"label": first}, PLAIN | {"label": other, "identifier": "dev-1-0-1"}]
    path = write(tmp_path, "dev", records)
    expected = rf"record 2 \(dev-1-0-1\): expected a label in every record or in none, found {found}"
    with pytest.raises(ValueError, match=expected) as error:
        NLVR2().load(tmp_path, "dev")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("label", ["true", "Yes", "", True, 1, ["True"], {"label": "True"}])
def test_wrong_label(tmp_path: Path, label: object) -> None:
    path = write(tmp_path, "dev", [PLAIN, PLAIN | {"label": label, "identifier": "dev-1-0-1"}])
    expected = f"record 2 (dev-1-0-1): expected the label 'True' or 'False', found {label!r}"
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        NLVR2().load(tmp_path, "dev")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("identifier", ["dev-1-0", "dev-1-0-1-img0", "a/dev-1-0-0", "dev"])
def test_wrong_identifier(tmp_path: Path, identifier: str) -> None:
    path = write(tmp_path, "dev", [PLAIN | {"identifier": identifier}])
    expected = f"record 1: expected an identifier split-set-pair-sentence, found {identifier!r}"
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        NLVR2().load(tmp_path, "dev")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("identifier", "../dev-1-0-0"),
        ("identifier", "/dev-1-0-0"),
        ("identifier", "..\\dev-1-0-0"),
        ("identifier", ""),
        ("directory", ".."),
        ("directory", "/etc"),
        ("directory", "3/../.."),
        ("directory", ""),
    ],
)
def test_images_stay_in_their_folder(tmp_path: Path, field: str, value: str) -> None:
    path = write(tmp_path, "train", [PLAIN, PLAIN | {"identifier": "train-1-0-1", field: value}])
    where = "record 2" if field == "identifier" else "record 2 (train-1-0-1)"
    expected = f"{where}, {field}: expected the name of an image inside its folder, found {value!r}"
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        NLVR2().load(tmp_path, "train")
    assert str(path) in str(error.value)


def test_unknown_split(scenes: Path) -> None:
    with pytest.raises(ValueError, match="splits train, dev, test, test1, test2; got 'val'"):
        NLVR2().load(scenes / "nlvr2", "val")


def test_missing_file_is_named(folder: Path) -> None:
    (folder / "test1.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected test1.json \(or data/test1.json\) in ") as error:
        NLVR2().load(folder, "test")
    assert str(folder) in str(error.value)
    assert "https://github.com/lil-lab/nlvr" in str(error.value)


def test_missing_image_folder(folder: Path) -> None:
    (folder / "dev").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no image folder for dev") as error:
        NLVR2().load(folder, "dev")
    assert f"{folder / 'dev'} with dev-*-img0.png" in str(error.value)
    assert len(NLVR2().load(folder, "train")) == 24


def test_truncated_file(folder: Path) -> None:
    path = folder / "dev.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"dev.json, line 12, column \d+: .*in the form of https") as e:
        NLVR2().load(folder, "dev")
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty: expected one JSON object a line"),
        (b"\n\n", "is empty: expected one JSON object a line"),
        (b"[1, 2]\n", "line 1: expected a JSON object, found"),
        (b'{"a": "\xff"}\n', "line 1: expected a JSON object"),
        (b'{"identifier": 7}\n', "record 1: expected 'identifier' to be str, found 7"),
        (b'{"identifier": "dev-1-0-0", "label": "True"}\n', "expected 'sentence' to be str, found no such"),
        (2 * json.dumps(PLAIN).encode().join([b"", b"\n"]), "identifier 'dev-1-0-0' is there more than"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, expected: str) -> None:
    path = write(tmp_path, "dev", [])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        NLVR2().load(tmp_path, "dev")
    assert str(path) in str(error.value)


def test_a_file_is_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = NLVR2().load(folder, "dev")

    def fail(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(nlvr2_module, "read_lines", fail)
    again = NLVR2().load(folder, "dev")
    assert [again[index] for index in range(12)] == [before[index] for index in range(12)]
    (folder / "dev.json").write_text("".join((folder / "dev.json").read_text()) + "\n")
    with pytest.raises(AssertionError, match="parsed again"):
        NLVR2().load(folder, "dev")
