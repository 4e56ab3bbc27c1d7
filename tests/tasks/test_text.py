"""Text tasks: from rows as published to texts, splits and figures, and whole runs on tiny models."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from text_samples import COUNT, SAMPLES, SPLITS, rows_of, write_lines, write_splits

from dept_vl._utils.errors import UsageError
from dept_vl.config import (
    DataOptions,
)
from dept_vl.data.sampling import TrainingDraws
from dept_vl.data.splits import load_splits
from dept_vl.presets import PAPER
from dept_vl.tasks import TASKS, load_task
from dept_vl.tasks.base import Task
from dept_vl.tasks.text.table import HALVED, HELD_OUT, TEXT_TASKS, fifths, with_marks
from dept_vl.tasks.text.task import TextTask, choose, read_rows

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_every_task_of_the_papers_is_there() -> None:
    assert set(SAMPLES) == set(TEXT_TASKS)
    assert len(set(SAMPLES) - {"snippets"}) == 21
    assert set(PAPER) - {"vqav2", "coco"} < set(TEXT_TASKS) < set(TASKS)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_task_from_its_rows_to_its_score(name: str, tmp_path: Path) -> None:
    sample, spec = SAMPLES[name], TEXT_TASKS[name]
    folder = write_splits(tmp_path / name, name)
    for split in SPLITS:
        task = load_task(name, folder, split)
        assert isinstance(task, TextTask)
        assert isinstance(task, Task)
        first = next(n for n in range(len(task)) if task.rows[n]["id"] % len(sample.rows) == 0)
        example = task[first]
        assert example.source_text == sample.text
        assert example.targets == ((sample.answers[0], 1.0),)
        assert (task.rows[first]["answers"], task.rows[first]["group"]) == (sample.answers, sample.group)
        assert (task.images(0), task.image_files(), example.images) == ((), [], ())
        assert task.rows.column(task.source_column).to_pylist()[first] == example.source_text
        ids = task.example_ids()
        right = {ids[n]: task[n].answer for n in range(len(task))}
        figures = task.score(right)
        assert next(iter(figures)) == task.primary
        assert all(value == pytest.approx(100.0) for value in figures.values())
        nonsense = task.score(dict.fromkeys(ids, "no class of any task"))
        assert nonsense.keys() == figures.keys()
        assert nonsense[task.primary] == 0.0
        assert set(task.decoding.candidates) == set(spec.words.values())
        if task.decoding.candidates:
            assert set(right.values()) <= set(task.decoding.candidates)
        half = task.subset(range(len(task) // 2))
        assert half.example_ids() == ids[: len(task) // 2]
        with pytest.raises(ValueError, match=f"{name}: expected one prediction"):
            half.score(right)


@pytest.mark.parametrize("name", SAMPLES)
def test_splits_are_apart_and_lose_nothing(name: str, tmp_path: Path) -> None:
    folder = write_splits(tmp_path / name, name)
    spec = TEXT_TASKS[name]
    seen: dict[str, list[Any]] = {}
    for split in SPLITS:
        seen.setdefault(spec.splits[split].split, []).extend(load_task(name, folder, split).example_ids())
    for ids in seen.values():
        assert len(set(ids)) == len(ids)
    kept = [n for n, row in enumerate(rows_of(name)) if row.get("subset") != "SQuAD"]
    assert all(sorted(ids) == kept for ids in seen.values())


def test_the_draw_is_that_of_the_literature() -> None:
    order = torch.randperm(277, generator=torch.Generator().manual_seed(42)).tolist()
    assert choose(277, HALVED["validation"]).tolist() == sorted(order[:138])
    assert choose(277, HALVED["test"]).tolist() == sorted(order[138:])
    order = torch.randperm(67_349, generator=torch.Generator().manual_seed(42)).tolist()
    assert choose(67_349, HELD_OUT["validation"]).tolist() == sorted(order[:1000])
    assert len(choose(67_349, HELD_OUT["train"])) == 66_349
    # A sample is no large set: a tenth of it at most.
    assert len(choose(40, HELD_OUT["validation"])) == 4


def test_splits_have_short_names_and_others_are_refused(tmp_path: Path) -> None:
    folder = write_splits(tmp_path, "rte")
    assert load_task("rte", folder, "dev").example_ids() == load_task("rte", folder, "val").example_ids()
    with pytest.raises(ValueError, match="rte has the splits train, validation, test; got 'minival'"):
        load_task("rte", folder, "minival")


def test_left_out_splits_are_the_task_s_own(tmp_path: Path) -> None:
    splits = load_splits(DataOptions(task="rte", data_dir=write_splits(tmp_path, "rte")), seed=0)
    assert (splits.options.dev_split, splits.options.test_split) == ("validation", "test")
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (COUNT, COUNT // 2, COUNT // 2)


def test_a_folder_under_data_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_splits(tmp_path / "data" / "cola", "cola")
    assert len(load_task("cola", None, "train")) == COUNT


# What is scored.


def score(name: str, predictions: Sequence[str], folder: Path) -> dict[str, float]:
    """Figures of predictions on the training rows."""
    write_lines(folder / "train.jsonl", rows_of(name, len(predictions)))
    task = TextTask(name, load_rows(name, folder))
    return task.score(dict(zip(task.example_ids(), predictions, strict=True)))


def load_rows(name: str, folder: Path) -> Any:
    return read_rows(name, folder, "train")


def test_what_is_no_class_counts_as_t5_has_it(tmp_path: Path) -> None:
    # Labels by turns duplicate, not_duplicate; nonsense is taken for the other class by F1.
    mixed = ["duplicate", "what", "what", "not_duplicate"]
    assert score("qqp", mixed, tmp_path) == {"accuracy": 50.0, "f1": 50.0}
    # A class of its own for the correlation: (3 * 4 - 2 * 2 - 1 * 2) / sqrt((16 - 6) (16 - 8)).
    figures = score("cola", ["acceptable", "what", "acceptable", "unacceptable"], tmp_path)
    assert figures["matthews"] == pytest.approx(100 * 6 / 80**0.5)
    # Of three classes contradiction is right once in two, entailment always, neutral never.
    assert score("cb", ["contradiction", "entailment", "what", "what"], tmp_path) == {
        "accuracy": 50.0,
        "macro_f1": pytest.approx(100 * (2 / 3 + 1 + 0) / 3),
    }
    figures = score("multirc", ["True", "False", "what", "False"], tmp_path)
    assert figures == {"f1a": pytest.approx(200 / 3), "em": 0.0}


def test_numbers_are_read_from_text(tmp_path: Path) -> None:
    assert score("stsb", ["3.2", "1.0", "3.2", "1.0"], tmp_path)["pearson"] == pytest.approx(100.0)
    # What is no number is -1: below every score, and so on the right side here.
    for text in ("very", "nan", "inf", "1e999", ""):
        assert score("stsb", ["3.2", text], tmp_path)["pearson"] == pytest.approx(100.0)


def test_an_answer_may_be_any_that_is_listed(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", rows_of("newsqa", 3))
    task = TextTask("newsqa", load_rows("newsqa", tmp_path))
    assert task.example_ids() == [0, 2]
    assert task.score({0: "In 1889!", 2: "the Company"}) == {
        "f1": pytest.approx(100 * (1 + 2 / 3) / 2),
        "em": 50.0,
        "f1_first": pytest.approx(100 * 2 / 3),
        "em_first": 0.0,
    }


@pytest.mark.parametrize(
    ("score", "text"),
    [(0, "0.0"), (5, "5.0"), (3.25, "3.2"), (2.7, "2.8"), (4.59, "4.6"), (0.1, "0.0"), ("1.75", "1.8")],
)
def test_similarities_are_rounded_to_a_fifth(score: Any, text: str) -> None:
    assert fifths(score) == text


@pytest.mark.parametrize(
    ("text", "noun", "pronoun", "marked"),
    [
        ("Ann met Bea's aunt when she came.", (2, "Bea"), (5, "she"),
         "Ann met * Bea *'s aunt when # she # came."),
        ("It broke because the old cup fell.", (3, "the old cup"), (0, "it"),
         "# It # broke because * the old cup * fell."),
        # Span 2 within span 1, and a span that is written otherwise in the text.
        ("Bob drove his father home", (2, "his father"), (2, "his"), "Bob drove * # his # father * home"),
        ("Bob met Mr. Lee there", (2, "mister"), (4, "there"), "Bob met * Mr. * Lee # there #"),
    ],
)  # fmt: skip
def test_spans_are_marked(text: str, noun: tuple[int, str], pronoun: tuple[int, str], marked: str) -> None:
    row = {
        "text": text,
        "span1_index": noun[0],
        "span1_text": noun[1],
        "span2_index": pronoun[0],
        "span2_text": pronoun[1],
    }
    assert with_marks(row)["text"] == marked


# Where rows come from.


def write_as(kind: str, folder: Path, name: str) -> Path:
    """The splits of a task as one kind of local copy; returns the folder to name."""
    rows = rows_of(name)
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        if kind == "save_to_disk":
            continue
        if kind == "shards":
            for part in range(2):
                path = folder / "data" / f"{split}-{part:05}-of-00002.parquet"
                path.parent.mkdir(exist_ok=True)
                pq.write_table(pa.Table.from_pylist(rows[part * 20 : part * 20 + 20]), path)
        elif kind == "hub repository":
            path = folder / str(TEXT_TASKS[name].config) / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif kind in ("csv", "tsv"):
            with (folder / f"{split}.{kind}").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        elif kind == "json":
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))
        else:
            write_lines(folder / f"{split}.json", rows)
    if kind == "save_to_disk":
        saved = {split: datasets.Dataset.from_list(rows) for split in ("train", "validation")}
        datasets.DatasetDict(saved).save_to_disk(str(folder))
    return folder


KINDS = ("save_to_disk", "shards", "hub repository", "csv", "tsv", "json", "json lines")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rte", "wsc", "stsb"])
def test_every_kind_of_copy_reads_the_same(kind: str, name: str, tmp_path: Path) -> None:
    expected = load_task(name, write_splits(tmp_path / "lines", name), "test")
    found = load_task(name, write_as(kind, tmp_path / kind, name), "test")
    assert [found[n] for n in range(len(found))] == [expected[n] for n in range(len(expected))]


@pytest.mark.parametrize(
    ("names", "labels"), [(["1", "2"], [0, 1]), (["positive", "negative"], [1, 0]), (["good", "bad"], [0, 1])]
)
def test_names_of_classes_count_if_the_task_has_them(
    tmp_path: Path, names: list[str], labels: list[int]
) -> None:
    """Yelp's are 1 and 2, which stand for 0 and 1."""
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": ["bad", "good"], "label": labels})
    for split in ("train", "test"):
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{split}.parquet")
    task = load_task("yelp2", tmp_path, "test")
    assert [task[n].answers for n in (0, 1)] == [("negative",), ("positive",)]


def test_a_split_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    folder = write_as("csv", tmp_path / "rte", "rte")
    write_lines(folder / "validation.json", rows_of("rte"))
    assert len(load_task("rte", folder, "train")) == 40
    with pytest.raises(UsageError, match=r"validation\.json and .*validation\.csv"):
        load_task("rte", folder, "validation")


@pytest.mark.parametrize("kind", ["save_to_disk", "shards", "json"])
@pytest.mark.parametrize("name", ["multirc", "searchqa"])
def test_nested_columns_are_read(kind: str, name: str, tmp_path: Path) -> None:
    expected = load_task(name, write_splits(tmp_path / "lines", name), "test")
    found = load_task(name, write_as(kind, tmp_path / kind, name), "test")
    assert found.rows.table.slice(0, 9).to_pylist() == expected.rows.table.slice(0, 9).to_pylist()  # type: ignore[attr-defined]
    assert found.example_ids() == expected.example_ids()


def test_one_split_of_save_to_disk_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows_of("sst2")).save_to_disk(str(tmp_path / "train"))
    assert len(load_task("sst2", tmp_path / "train", "train")) == COUNT - COUNT // 10


def test_labels_may_be_names_numbers_or_booleans(tmp_path: Path) -> None:
    rows = rows_of("boolq", 8)
    for row, label in zip(rows[:4], ("True", True, "1", 1), strict=True):
        write_lines(tmp_path / "train.jsonl", [{**row, "label": label}])
        assert load_rows("boolq", tmp_path).value("answers", 0) == ["True"]


def test_a_copy_of_one_subset_needs_no_column_for_it(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "subset"} for row in rows_of("newsqa")]
    for split in ("train", "validation"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    assert len(load_task("newsqa", tmp_path, "test")) == COUNT


def test_tasks_that_share_a_file_keep_apart(tmp_path: Path) -> None:
    rows = rows_of("newsqa", 20) + rows_of("searchqa", 10)
    write_lines(tmp_path / "validation.jsonl", rows)
    sizes = [len(load_task(name, tmp_path, "test")) for name in ("newsqa", "searchqa", "newsqa")]
    assert sizes == [13, 7, 13]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hub of two data sets; what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str) -> Any:
        asked.append((path, config, split))
        name = {"wsc.fixed": "wsc", None: "hotpotqa"}[config]
        folder = tmp_path / f"{name}-{split}"
        if not folder.exists():
            datasets.Dataset.from_list(rows_of(name)).save_to_disk(str(folder))
        return datasets.load_from_disk(str(folder))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


def test_without_a_folder_the_hub_is_read(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    found = load_task("wsc", None, "validation")
    assert hub == [("aps/super_glue", "wsc.fixed", "validation")]
    expected = load_task("wsc", write_splits(tmp_path / "lines", "wsc"), "validation")
    assert [found[n] for n in range(len(found))] == [expected[n] for n in range(len(expected))]
    assert len(load_task("hotpotqa", None, "test")) == 27
    assert hub[1:] == [("mrqa-workshop/mrqa", None, "validation")]


@pytest.mark.parametrize(
    ("name", "config"), [("rte", "'nyu-mll/glue', 'rte'"), ("yelp2", "'fancyzhx/yelp_polarity'")]
)
def test_no_network_and_no_copy_is_one_message(
    name: str, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cannot read .* from the Hub") as error:
        load_task(name, None, "train")
    for part in (f"load_dataset({config}).save_to_disk", "--data_dir FOLDER", "train.parquet"):
        assert part in str(error.value)


def test_missing_places_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere with rte"):
        load_task("rte", tmp_path / "nowhere", "train")
    write_lines(tmp_path / "rte" / "train.jsonl", rows_of("rte"))
    with pytest.raises(FileNotFoundError, match="holds no split 'validation' of rte: expected validation"):
        load_task("rte", tmp_path / "rte", "test")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no copy of snippets; .*prepare_data.py snippets "):
        load_task("snippets", None, "train")


# What is wrong with rows.


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rte", {"label": 2}, r"row 3: expected label to be 0 \(entailment\), 1 \(not_entailment\), found 2"),
        ("rte", {"label": True}, "row 3: expected label to be .*, found True"),
        ("cola", {"sentence": " \n"}, "row 3: expected text in sentence, found nothing"),
        ("mrpc", {"sentence1": "", "sentence2": None}, "row 3: expected text in .*, found nothing"),
        ("mrpc", {"sentence1": 7}, "row 3: expected text in sentence1, sentence2, found 7"),
        ("stsb", {"label": 5.2}, "row 3: expected a number from 0 to 5, found 5.2"),
        ("stsb", {"label": "high"}, "row 3: could not convert"),
        ("wsc", {"span2_index": 40}, "row 3: expected span2 'himself' at word 40 of 7, found no such word"),
        ("wsc", {"span2_text": None}, "row 3: "),
        ("multirc", {"idx": 5}, "row 3: "),
        ("newsqa", {"answers": "1889"}, "row 3: expected answers to be a list of answers, found '1889'"),
        ("newsqa", {"answers": [3]}, r"row 3: expected answers to be a list of texts, found \[3\]"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = rows_of(name)
    rows[3] = {**rows[3], **change}
    write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        load_task(name, tmp_path, "train")
    assert "train.jsonl" in str(error.value)


def test_rows_without_a_label_are_neither_learnt_nor_scored(tmp_path: Path) -> None:
    labels = [0, -1, 1, 0, None, 1]
    rows = [{"sentence1": f"a {n}", "sentence2": "b", "label": label} for n, label in enumerate(labels)]
    for split in ("train", "validation"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    splits = load_splits(DataOptions(task="rte", data_dir=tmp_path), seed=0)
    assert splits.train.example_ids() == [0, 2, 3, 5]
    draws = TrainingDraws([splits.train], seed=0)
    assert {draws[0, n].target for n in range(4)} == {"entailment", "not_entailment"}
    whole = load_task("rte", tmp_path, "train")
    assert whole.score(dict.fromkeys(whole.example_ids(), "entailment")) == {"accuracy": 50.0}
    assert splits.dev.score(dict.fromkeys(splits.dev.example_ids(), "entailment")).keys() == {"accuracy"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.csv", b'sentence1,sentence2,label\na,b,0\n"a,b,0\n', "train.csv, line 3"),
        ("train.csv", b"sentence1,sentence2,label\na,b,0\na,0\n", "line 3: expected 3 cells .* found 2"),
        ("train.csv", b"sentence1,sentence2,label\na,b,c,0\n", "line 2: expected 3 cells .* found 4"),
        ("train.tsv", b"sentence1\tsentence2\tlabel\na\tb\t0\nx\xff\tb\t1\n", "train.tsv, line 3"),
        ("train.jsonl", b'{"label": 0, \n', "line 1, column 12: expected one JSON object"),
        ("train.json", b'[{"label":', "line 1, column 11: the file is not complete JSON"),
        ("train.parquet", b"PAR1xxxxPAR1", "train.parquet is not a complete Parquet file"),
    ],
)
def test_damage_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        load_task("rte", tmp_path, "train")
    assert "again" not in str(error.value)


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_damaged_folder_of_save_to_disk_is_named(tmp_path: Path, file: str, damage: str) -> None:
    rows = [row | {"sentence": f"text {n}"} for n, row in enumerate(rows_of("sst2") * 40)]
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(str(tmp_path))
    path = tmp_path / "train" / file
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        load_task("sst2", tmp_path, "train")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "save_to_disk"])
def test_a_missing_column_is_named_with_those_found(kind: str, tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "text2": "b", "label": 0}] * 3
    if kind == "save_to_disk":
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(str(tmp_path))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    elif kind == "csv":
        (tmp_path / "train.csv").write_text("sentence1,text2,label\na,b,0\n")
    else:
        write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(
        ValueError, match="expected the columns sentence1, sentence2, label; sentence2 missing"
    ):
        load_task("rte", tmp_path, "train")


def test_labels_that_are_not_published_are_none(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{**row, "label": -1} for row in rows_of("rte", 4)])
    task = load_task("rte", tmp_path, "train")
    assert (task[0].targets, task[0].answer) == ((), "")
    assert task.score(dict.fromkeys(task.example_ids(), "entailment")) == {}
    with pytest.raises(ValueError, match="train_split=train of rte has no published answers"):
        load_splits(DataOptions(task="rte", data_dir=tmp_path), seed=0)


def test_a_split_too_small_to_divide_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", rows_of("qnli", 9))
    with pytest.raises(
        ValueError, match=r"validation split of qnli is empty: .* published split 'train', which has only 9"
    ):
        load_task("qnli", tmp_path, "validation")


def test_unknown_tasks_get_the_closest_names() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'sst-2'; there are: vqav2, .*; closest: sst2"):
        load_task("sst-2", None, "train")
