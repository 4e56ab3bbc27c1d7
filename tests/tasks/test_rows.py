"""Rows against plain lists, and what is left behind when converting them fails."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dept_vl.tasks.io import rows as rows_module
from dept_vl.tasks.io.rows import Rows, cache_folder, convert

SCHEMA = pa.schema({"id": pa.int64(), "kind": pa.string(), "answers": pa.list_(pa.string())})


def records(count: int = 7, *, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": number, "kind": "cba"[number % 3], "answers": [f"a{number}"] * (number % 4)}
        for number in range(start, start + count)
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DEPT_VL_CACHE", str(folder))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "official.json"
    path.write_text("{}")
    return path


def made(source: Path, content: Sequence[dict[str, Any]] | None = None) -> Rows:
    given_records = iter(records() if content is None else content)
    return convert("task-split", [source], SCHEMA, given_records, unique="id")


def unread() -> Iterator[dict[str, Any]]:
    raise AssertionError("the records were read again")
    yield


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


# Rows themselves


def forms(folder: Path, content: list[dict[str, Any]]) -> list[Rows]:
    """The same rows in memory, from one file and from two."""
    files = []
    for name, part in (("all", content), ("head", content[:3]), ("tail", content[3:])):
        path = folder / f"{name}.source"
        path.write_text(name)
        files.extend(convert(name, [path], SCHEMA, iter(part), unique="id").files)
    return [Rows.of(content, SCHEMA), Rows.open(files[:1]), Rows.open(files[1:])]


def check_like_list(rows: Rows, expected: list[dict[str, Any]]) -> None:
    assert len(rows) == len(expected)
    assert list(rows) == expected
    for index in range(-len(expected), len(expected)):
        assert rows[index] == expected[index]
        assert rows.value("answers", index) == expected[index]["answers"]
    for index in (len(expected), -len(expected) - 1, 10**9):
        with pytest.raises(IndexError, match=f"of {len(expected)}"):
            rows[index]
        with pytest.raises(IndexError):
            rows.value("id", index)
    for name in SCHEMA.names:
        assert rows.column(name).to_pylist() == [row[name] for row in expected]
    assert rows.distinct("kind") == list(dict.fromkeys((row["kind"],) for row in expected))
    pairs = [(row["kind"], row["id"]) for row in expected]
    assert rows.distinct("kind", "id") == list(dict.fromkeys(pairs))


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 50_000])
def test_rows_are_like_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", chunk_rows)
    content = records()
    for rows in forms(tmp_path, content):
        check_like_list(rows, content)
        backwards = rows.subset([6, 5, 3, 3, 0, -1])
        check_like_list(backwards, [content[place] for place in (6, 5, 3, 3, 0, -1)])
        check_like_list(backwards.subset(np.array([0, -2, 2])), [content[6], content[0], content[3]])
        check_like_list(rows.subset([]), [])
        check_like_list(rows.subset([]).subset([]), [])
        check_like_list(Rows.of([], SCHEMA), [])


@settings(max_examples=30, deadline=None)
@given(
    ids=st.lists(st.integers(0, 9), max_size=12),
    data=st.data(),
    wanted=st.lists(st.integers(-2, 12), max_size=5),
    keep=st.booleans(),
)
def test_choosing_is_like_a_list(ids: list[int], data: st.DataObject, wanted: list[int], keep: bool) -> None:
    content = [{"id": id_, "kind": "ab"[place % 2], "answers": [str(id_)]} for place, id_ in enumerate(ids)]
    rows = Rows.of(content, SCHEMA)
    for _ in range(2):
        places = range(-len(content), len(content))
        chosen = data.draw(st.lists(st.sampled_from(places), max_size=8)) if content else []
        rows, content = rows.subset(chosen), [content[place] for place in chosen]
        assert list(rows) == content
    kept = [row for row in content if (row["id"] in wanted) == keep]
    assert list(rows.where("id", wanted, keep=keep)) == kept
    assert list(rows.where("kind", "a").where("id", wanted, keep=keep)) == [
        row for row in kept if row["kind"] == "a"
    ]
    assert rows.distinct("id", "kind") == list(dict.fromkeys((row["id"], row["kind"]) for row in content))


def test_distinct_keeps_the_order_of_many() -> None:
    """More than fit into one of Arrow's batches."""
    numbers = np.random.default_rng(0).permutation(70_000)
    rows = Rows(pa.table({"id": pa.array(numbers % 40_000)}))
    assert [value for (value,) in rows.distinct("id")] == list(dict.fromkeys((numbers % 40_000).tolist()))


@pytest.mark.parametrize("indices", [[7], [-8], [0, 1, 99]])
def test_no_such_row_is_refused_at_once(indices: list[int]) -> None:
    rows = Rows.of(records(7), SCHEMA)
    with pytest.raises(IndexError):
        rows.subset(indices)
    with pytest.raises(IndexError):
        Rows.of(records(9), SCHEMA).subset(range(7)).subset(indices)


@pytest.mark.parametrize("places", [None, [3, 1, 0]])
def test_pickle_maps_the_file(source: Path, places: list[int] | None) -> None:
    """A spawned worker gets the file's name and the places, not the columns."""
    content = records(20_000)
    rows = made(source, content)
    if places is not None:
        rows, content = rows.subset(places), [content[place] for place in places]
    mapped = pa.total_allocated_bytes()
    sent = pickle.dumps(rows)
    again = pickle.loads(sent)
    assert pa.total_allocated_bytes() - mapped < 10_000
    assert len(sent) < 1_000
    assert again.files == rows.files
    assert list(again) == content


def test_rows_in_memory_are_pickled_whole() -> None:
    rows = Rows.of(records(), SCHEMA).subset([4, 2])
    assert list(pickle.loads(pickle.dumps(rows))) == [records()[4], records()[2]]


# Converting


def test_records_are_read_once(source: Path, cache: Path) -> None:
    first = made(source)
    again = convert("task-split", [source], SCHEMA, unread(), unique="id")
    assert list(again) == list(first) == records()
    assert files_in(cache) == list(first.files) == list(again.files)
    assert first.files[0].name.startswith("task-split-")


@pytest.mark.parametrize("change", ["size", "middle", "path", "schema", "converter", "second source"])
def test_changed_source_is_converted_anew(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    (old,) = made(source).files
    stat, schema, sources = source.stat(), SCHEMA, [source]
    if change == "size":
        source.write_text("{ }")
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "middle":  # which neither size nor time tell
        source.write_text("[]")
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (source.stat().st_size, source.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    elif change == "path":
        sources = [source.rename(tmp_path / "moved.json")]
    elif change == "schema":
        schema = SCHEMA.set(0, pa.field("id", pa.int32()))
    elif change == "converter":
        monkeypatch.setattr(rows_module, "CONVERTER_VERSION", rows_module.CONVERTER_VERSION + 1)
    else:
        sources = [source, source]
    rows = convert("task-split", sources, schema, iter(records(3, start=100)), unique="id")
    assert list(rows) == records(3, start=100)
    assert rows.files != (old,)


def test_a_source_of_another_time_is_not_converted_again(source: Path) -> None:
    first = made(source)
    os.utime(source, ns=(1, 1))
    assert convert("task-split", [source], SCHEMA, unread(), unique="id").files == first.files


FLIPS = """
import random, sys
from pathlib import Path
from dept_vl._utils.errors import DamagedFileError
from dept_vl.tasks.io.rows import Rows

path, generator = Path(sys.argv[1]), random.Random(0)
whole = path.read_bytes()
for number in range(100):
    damaged = bytearray(whole)
    damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
    other = path.with_name(f"{number}.arrow")
    other.write_bytes(damaged)
    try:
        Rows.open([other])
    except DamagedFileError as error:
        assert str(other) in str(error)
        continue
    raise SystemExit(f"damage {number} was not noticed")
"""


def test_a_flipped_bit_never_reaches_arrow(source: Path) -> None:
    (path,) = made(source).files
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, str(path)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_same_source_by_another_path_is_not_converted_again(tmp_path: Path, source: Path) -> None:
    first = made(source)
    (tmp_path / "link").symlink_to(tmp_path)
    again = convert("task-split", [tmp_path / "link" / source.name], SCHEMA, unread(), unique="id")
    assert again.files == first.files


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "text", "metadata"])
def test_damaged_cache_is_made_anew(
    source: Path, cache: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = made(source).files
    content = path.read_bytes()
    # What Arrow says of a footer that leads nowhere is an OSError, of other damage an ArrowInvalid.
    start = content.rindex(b"\xff\xff\xff\xff", 0, len(content) // 2)
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:-20],
            "zeros": bytes(len(content)),
            "text": b"no Arrow file",
            "metadata": content[: start + 8] + bytes(64) + content[start + 72 :],
        }[damage]
    )
    rows = made(source, records(5))
    assert list(rows) == records(5)
    assert files_in(cache) == [path]
    assert str(path) in capsys.readouterr().err


def test_duplicate_ids_are_refused(source: Path, cache: Path) -> None:
    with pytest.raises(ValueError) as caught:
        made(source, [*records(5), *records(3, start=2), *records(1)])
    assert str(caught.value) == (
        f"{source}: id 0 is there more than once, as do 3 others; expected every id once"
    )
    assert files_in(cache) == []
    with pytest.raises(ValueError, match="id 4 is there more than once"):
        made(source, [*records(5), *records(1, start=4)])
    assert list(made(source)) == records()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("damaged"),
        FileNotFoundError("gone"),
        OSError(5, "Input/output error"),
        KeyboardInterrupt(),
        RuntimeError("other"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("before", [0, 5])
def test_error_in_the_records_comes_out_and_leaves_nothing(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, before: int
) -> None:
    """The same error: that a source cannot be read says nothing of the cache folder."""
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", 2)

    def broken() -> Iterator[dict[str, Any]]:
        yield from records(before)
        raise error

    with pytest.raises(type(error)) as caught:
        convert("task-split", [source], SCHEMA, broken(), unique="id")
    assert caught.value is error
    assert files_in(cache) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", 2**63),
        ("id", "7"),
        ("kind", "half a pair: \ud83d"),
        ("kind", 7),
        ("answers", [1]),
        ("answers", [["a"]]),
    ],
)
def test_record_that_does_not_fit_is_refused(source: Path, cache: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"every '{name}' to fit") as caught:
        made(source, [*records(3), {"id": 9, "kind": "a", "answers": [], name: value}])
    assert str(caught.value).startswith(f"{source}, record 4: ")
    assert "\n" not in str(caught.value)
    assert files_in(cache) == []


def unwritable(problem: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if problem == "a file":
        cache.write_text("")
    elif problem == "below a file":
        cache.write_text("")
        monkeypatch.setenv("DEPT_VL_CACHE", str(cache / "deeper"))
    elif problem == "a broken link":
        cache.symlink_to(cache / "nowhere" / "else")
    else:  # where not even root may write
        monkeypatch.setenv("DEPT_VL_CACHE", "/proc/self/fdinfo")


@pytest.mark.parametrize("problem", ["a file", "below a file", "a broken link", "not writable"])
def test_unwritable_cache_folder_is_told(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    if problem == "not writable" and not Path("/proc/self/fdinfo").is_dir():
        pytest.skip("no folder that root cannot write")
    unwritable(problem, cache, monkeypatch)
    with pytest.raises(OSError, match=r"cannot write the columns of official\.json to ") as caught:
        made(source)
    message = str(caught.value)
    assert str(cache_folder()) in message
    assert message.endswith("make room there, or set DEPT_VL_CACHE to another folder")
    assert "\n" not in message


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import pyarrow as pa
from dept_vl.tasks.io.rows import convert

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
schema = pa.schema({"id": pa.int64(), "text": pa.string()})

def converted(name):
    records = ({"id": number, "text": 20 * "x"} for number in range(51_000))
    return convert(name, [Path(sys.argv[1])], schema, records, unique="id")

whole = converted("whole").files[0].stat().st_size
for room in (0, 100, 1000, whole // 2, whole - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        converted("full")
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_full_disk_is_told_and_leaves_nothing(source: Path, cache: Path) -> None:
    """With room for nothing, for the start, for a part, for all but the last byte."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.startswith(f"OSError cannot write the columns of official.json to {cache} (")
        assert "File too large" in line
        assert "make room there" in line
    (left,) = files_in(cache)
    assert left.name.startswith("whole-")


TOGETHER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from dept_vl.tasks.io.rows import convert

mine, other = Path(sys.argv[2]), Path(sys.argv[3])

def records():
    for number in range(1000):
        yield {"id": number}
        if number == 500:
            mine.touch()
            while not other.exists():
                time.sleep(0.01)

rows = convert("together", [Path(sys.argv[1])], pa.schema({"id": pa.int64()}), records(), unique="id")
assert rows.column("id").to_pylist() == list(range(1000))
"""


def test_two_processes_convert_at_once(tmp_path: Path, source: Path, cache: Path) -> None:
    """Each waits in the middle until the other is there too."""
    flags = [str(tmp_path / "one"), str(tmp_path / "two")]
    both = [
        subprocess.Popen([sys.executable, "-c", TOGETHER, str(source), *order], stderr=subprocess.PIPE)
        for order in (flags, flags[::-1])
    ]
    for process in both:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    assert len(files_in(cache)) == 1


def test_two_of_one_process_number_convert_at_once(source: Path, cache: Path) -> None:
    """As in containers that share a cache folder, where every process may be number 1."""
    with ThreadPoolExecutor(2) as pool:
        in_the_middle = Barrier(2, timeout=60)

        def slow() -> Iterator[dict[str, Any]]:
            yield from records(3)
            in_the_middle.wait()
            yield from records(4, start=3)

        results = [pool.submit(convert, "both", [source], SCHEMA, slow(), unique="id") for _ in range(2)]
        for result in results:
            assert list(result.result(timeout=60)) == records()
    assert len(files_in(cache)) == 1


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("DEPT_VL_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("DEPT_VL_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dept_vl"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "dept_vl"
