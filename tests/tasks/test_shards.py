"""The files of a table: every row once, or an error that names what is missing or there twice."""

from pathlib import Path

import pytest

from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.files import check_shards
from dept_vl.tasks.own.find import find_tables
from dept_vl.tasks.text.source import find_files

SHARDS = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        SHARDS,
        [name.replace(".", "-54ed883c.") for name in SHARDS],
        ["train.jsonl", "test.jsonl"],
        ["a/train.jsonl", "b/train.jsonl"],
        [*SHARDS, "test-1-of-1.jsonl"],
    ],
)
def test_whole_tables_are_taken(names: list[str]) -> None:
    check_shards(map(Path, names))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (SHARDS[1:], r"1 file\(s\) of 2"),
        ([*SHARDS, "train.jsonl"], r"1 file\(s\) of 1 and 2 file\(s\) of 2"),
        ([*SHARDS, "train-00000-of-00001.jsonl"], r"1 file\(s\) of 1 and 2 file\(s\) of 2"),
        ([*SHARDS, "train-00001-of-00002.csv"], r"3 file\(s\) of 2"),
        (["train.jsonl", "train.csv"], r"2 file\(s\) of 1"),
    ],
)
def test_what_is_missing_or_twice_is_named(tmp_path: Path, names: list[str], told: str) -> None:
    for name in names:
        (tmp_path / name).write_text('{"sentence": "good", "label": 1}\n')
    with pytest.raises(UsageError, match=told):
        find_tables(str(tmp_path))
    if {Path(name).suffix for name in names} == {".jsonl"}:
        with pytest.raises(UsageError, match=told):
            find_files(tmp_path, None, "train")
