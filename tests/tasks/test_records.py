"""The streaming reader against `json.load`, wherever the chunks end, and on every kind of damage."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dept_vl.tasks.io import records
from dept_vl.tasks.io.records import field, read_lines, read_list, read_mapping

SOURCE = "https://example.org/data"
DAMAGED = "cut short or damaged"
RECORDS: list[dict[str, Any]] = [
    {"id": 1, "text": 'a "quoted" \\ back/slash\n\tand } ] , : marks'},
    {"id": -20, "text": "é ü 漢字 \U0001f600 \u2028", "": ""},
    {
        "id": 3,
        "numbers": [0, -0.5, 1.25, 1e5, 2.5e-7, 1e300, 2**63 - 1],
        "nested": {"a": [{}, [[]], {"b": None}]},
    },
    {"words": [True, False, None]},
    {},
]
READERS = (
    (lambda path: read_list(path, "rows", SOURCE), '{"rows": [%s]}'),
    (lambda path: read_mapping(path, SOURCE), '{"7": %s}'),
    (lambda path: read_list(path, "", SOURCE), "[%s]"),
    (lambda path: read_lines(path, SOURCE), "%s\n"),
)
"""Each reader with a file of one record."""

each_reader = pytest.mark.parametrize(
    ("read", "form"), READERS, ids=["read_list", "read_mapping", "read_list without a key", "read_lines"]
)
Read = Callable[[Path], Iterator[Any]]

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=4), plain, max_size=4)
layouts = st.sampled_from(
    [{}, {"indent": 1}, {"separators": (",", ":")}, {"separators": (" \t,\r\n ", " : ")}]
)
any_document = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "official.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(read: Read, path: Path) -> str:
    """The error's message: a ValueError of one line that names the file."""
    with pytest.raises(ValueError) as caught:
        list(read(path))
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}])
def test_same_as_json_load_wherever_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ascii_only: bool, layout: dict[str, Any]
) -> None:
    rows = RECORDS
    document = {
        "info": {"a": [1.5, {}], "b": {}},
        "none": None,
        "rows": rows,
        "license": [[], {"x": [1]}, ""],
    }
    path = write(tmp_path, json.dumps(document, ensure_ascii=ascii_only, **layout))
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({f"k{n}\u20ac": row for n, row in enumerate(rows)}), encoding="utf-8")
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows, **layout), encoding="utf-8")
    length = len(path.read_text(encoding="utf-8"))
    for chunk in (*range(1, 40), 64, 101, 256, length - 1, length, length + 1, 10 * length):
        monkeypatch.setattr(records, "CHUNK", chunk)
        assert list(read_list(path, "rows", SOURCE)) == json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert list(read_mapping(mapping, SOURCE)) == list(json.loads(mapping.read_text()).items())
        assert list(read_list(array, "", SOURCE)) == json.loads(array.read_text(encoding="utf-8"))


@any_document
@given(
    rows=st.lists(objects, min_size=1, max_size=4),
    before=objects,
    after=objects,
    layout=layouts,
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_same_as_json_load_on_any_document(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    before: dict[str, Any],
    after: dict[str, Any],
    layout: dict[str, Any],
    ascii_only: bool,
    chunk: int,
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    others = {f"{name}?": value for name, value in (after | before).items()}
    document = {name: others[name] for name in list(others)[: len(before)]} | {"rows": rows} | others
    path = write(tmp_path, json.dumps(document, ensure_ascii=ascii_only, **layout))
    assert list(read_list(path, "rows", SOURCE)) == rows
    write(tmp_path, json.dumps(rows, ensure_ascii=ascii_only, **layout))
    assert list(read_list(path, "", SOURCE)) == rows
    mapping = {str(number): row for number, row in enumerate(rows)}
    write(tmp_path, json.dumps(mapping, ensure_ascii=ascii_only, **layout))
    assert dict(read_mapping(path, SOURCE)) == mapping
    # `splitlines` would know more line ends than a file does.
    write(tmp_path, "\n\n \n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows))
    assert list(read_lines(path, SOURCE)) == rows


@pytest.mark.parametrize(
    "number",
    ["0", "-0", "12", "-7", "1.5", "-1.25", "1e5", "1E+5", "2e-7", "1.5e+10"],
)
def test_number_at_the_end_of_a_chunk_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """After the "1", the "1." and the "1e+" of "1e+5" there is a whole number before the border too."""
    path = write(tmp_path, f'{{"version":{number},"rows":[{{"x":{number}}}],"last":{number}}}')
    for chunk in range(1, 45):
        monkeypatch.setattr(records, "CHUNK", chunk)
        (row,) = read_list(path, "rows", SOURCE)
        assert row == {"x": float(number)}
        assert isinstance(row["x"], type(json.loads(number)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_blanks_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    path = write(tmp_path, ' \t\r\n{ "a" :\n[ ] , "rows"\t: [ { "x" : 1 } \r\n, { } ] , "b" : { } } \n\n ')
    assert list(read_list(path, "rows", SOURCE)) == [{"x": 1}, {}]


def test_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    for read, form in READERS:
        write(tmp_path, b"\xef\xbb\xbf" + (form % '{"x": "y"}').encode())
        (row,) = read(tmp_path / "official.json")
        assert row in ({"x": "y"}, ("7", {"x": "y"}))


@each_reader
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_no_number_of_json_is_refused(tmp_path: Path, read: Read, form: str, number: str) -> None:
    """But in lines, where `json.loads` takes it."""
    path = write(tmp_path, form % f'{{"x": {number}}}')
    if read is READERS[3][0]:
        (row,) = read(path)
        assert str(row["x"]) == str(float(number))
    else:
        assert SOURCE in refused(read, path)


@each_reader
def test_half_a_character_is_read(tmp_path: Path, read: Read, form: str) -> None:
    """As it is, or, by ijson in C, as a question mark."""
    (row,) = read(write(tmp_path, form % r'{"x": "a\ud83d"}'))
    row = row[1] if isinstance(row, tuple) else row
    assert row in ({"x": "a\ud83d"}, {"x": "a?"})


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_cut_anywhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Behind the wanted list too: the rest is small in the official files, and a cut file is damaged.

    Whoever takes records one by one has had them by then; `convert` keeps none of a file that fails.
    """
    monkeypatch.setattr(records, "CHUNK", chunk)
    read_rows = READERS[0][0]
    whole = {
        read_rows: json.dumps({"info": {"year": 2017.5}, "rows": RECORDS[1:2], "license": {"id": [1, "€"]}}),
        READERS[1][0]: json.dumps({"1": RECORDS[0], "2": {"x": "€"}}, ensure_ascii=False),
        READERS[2][0]: json.dumps(RECORDS[3:], indent=1),
    }
    for read, text in whole.items():
        content = text.encode()
        list(read(write(tmp_path, content + b" \n")))
        for length in range(len(content)):
            message = refused(read, write(tmp_path, content[:length]))
            assert SOURCE in message


def test_lines_cut_within_a_line_are_refused(tmp_path: Path) -> None:
    """At the end of one nothing shows: only the number of records, known to the task, can tell."""
    text = "\n".join(json.dumps(row) for row in RECORDS[:3])
    whole = {len("\n".join(text.split("\n")[:lines])) for lines in (1, 2, 3)}
    for length in range(len(text)):
        path = write(tmp_path, text[:length])
        if length in whole or length - 1 in whole:
            assert list(read_lines(path, SOURCE)) == RECORDS[: text[:length].rstrip().count("\n") + 1]
        else:
            assert SOURCE in refused(lambda path: read_lines(path, SOURCE), path)


@each_reader
@pytest.mark.parametrize(
    "extra",
    ['{"8": {}}', "]", ",", "x", "\0", "null"],
    ids=["object", "bracket", "comma", "x", "nul", "null"],
)
def test_something_behind_the_end_is_refused(tmp_path: Path, read: Read, form: str, extra: str) -> None:
    """Such as a second file, written behind the first by a download taken up again."""
    refused(read, write(tmp_path, (form % "{}").rstrip() + " " + extra))


@each_reader
@pytest.mark.parametrize("content", ["", " \n ", "\ufeff"], ids=["empty", "blank", "mark"])
def test_empty_file_is_refused(tmp_path: Path, read: Read, form: str, content: str) -> None:
    assert SOURCE in refused(read, write(tmp_path, content))


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (READERS[0][0], '{"rows": []}'),
        (READERS[1][0], "{}"),
        (READERS[2][0], "[]"),
    ],
)
def test_no_records_are_refused(tmp_path: Path, read: Read, content: str) -> None:
    assert "found none" in refused(read, write(tmp_path, content))


@each_reader
def test_missing_file_is_told_with_its_source(tmp_path: Path, read: Read, form: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"official\.json in .*{tmp_path.name}.*{SOURCE}"):
        list(read(tmp_path / "official.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"other": [{"x": 1}], "more": {}}', "under 'rows', found none"),
        ("{}", "under 'rows', found none"),
        ('{"rows": {"x": 1}}', "under 'rows', found none"),
        ('{"rows": null}', "under 'rows', found none"),
        ('{"rows": "[{}]"}', "under 'rows', found none"),
        ('[{"rows": 1}]', "under 'rows', found none"),
        ("3", "under 'rows', found none"),
        ('{"rows": [1]}', "entry 0: expected an object, found 1"),
        ('{"rows": [{}, [{}]]}', "entry 1: expected an object, found [{}]"),
        ('{"rows": [{}, null]}', "entry 1: expected an object, found None"),
        ('{"rows": [{},]}', DAMAGED),
        ('{"rows": [{} {}]}', DAMAGED),
        ('{"rows": [,{}]}', DAMAGED),
        ('{"rows": [{}],}', DAMAGED),
        ("{'rows': [{}]}", DAMAGED),
        ('{1: [], "rows": [{}]}', DAMAGED),
        ('{"rows" [{}]}', DAMAGED),
        ('{"info": [1 2], "rows": [{}]}', DAMAGED),
        ('{"info": {"a" 1}, "rows": [{}]}', DAMAGED),
        ('{"rows": [{"x": tru}]}', DAMAGED),
        ('{"rows": [{"x": "a\nb"}]}', DAMAGED),
        ('{"rows": [{"x": "\\q"}]}', DAMAGED),
        ('{"rows": [{"x": 01}]}', DAMAGED),
        ('{"rows": [{"x": .5}]}', DAMAGED),
    ],
)
@pytest.mark.parametrize("chunk", [1, 6, 1 << 20])
def test_other_content_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str, chunk: int
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    assert message in refused(READERS[0][0], write(tmp_path, content))


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (READERS[1][0], '[{"x": 1}]', "an object of objects"),
        (READERS[1][0], '{"1": {}, "2": 5}', "entry '2': expected an object, found 5"),
        (READERS[2][0], '{"rows": [{}]}', "a list of objects"),
        (READERS[0][0], '{"rows": [{"x": 1, "x": 1}]}', "entry 0: the key 'x' stands twice"),
        (READERS[0][0], '{"rows": [{}, {"x": [{"y": 1, "y": 2}]}]}', "entry 1: the key 'y'"),
        (READERS[1][0], '{"a": {}, "b": {"x": 1, "x": 2}}', "entry 'b': the key 'x' stands"),
        (READERS[2][0], '[{}, {}, {"x": 1, "x": 2}]', "entry 2: the key 'x' stands"),
        (READERS[3][0], '{}\n{"x": {"x": 1, "x": 2}}\n', "line 2: the key 'x' stands"),
        (READERS[2][0], "[{}, 5]", "entry 1: expected an object, found 5"),
        (READERS[3][0], "{}\n\n[1, 2]\n", "line 3: expected a JSON object, found"),
        (READERS[3][0], '{}\n{"a": 1} {"b": 2}\n', "line 2, column 10: expected a JSON object"),
    ],
)
def test_other_containers_are_refused(tmp_path: Path, read: Read, content: str, message: str) -> None:
    assert message in refused(read, write(tmp_path, content))


@each_reader
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80", "é".encode("latin-1")])
def test_other_encodings_are_refused(tmp_path: Path, read: Read, form: str, bad: bytes) -> None:
    refused(read, write(tmp_path, (form % '{"x": "?"}').encode().replace(b"?", bad)))
    refused(read, write(tmp_path, (form % '{"x": "?"}').encode("utf-16")))


@each_reader
@pytest.mark.parametrize("mark", ["[", '{"a":'])
def test_deep_nesting_is_refused(tmp_path: Path, read: Read, form: str, mark: str) -> None:
    refused(read, write(tmp_path, form % (f'{{"x": {mark * 100_000}')))
    refused(read, write(tmp_path, form % (f'{{"x": {"[" * 201}{" " * records.CHUNK}{"]" * 201}}}')))


@each_reader
def test_brackets_in_texts_are_not_nesting(tmp_path: Path, read: Read, form: str) -> None:
    record = {"x": '[{"' * records.CHUNK + "\\", "y": [[1]] * 300}
    assert len(list(read(write(tmp_path, form % json.dumps(record))))) == 1


@each_reader
@pytest.mark.parametrize("digits", [20, 5000])
def test_huge_numbers_are_refused(tmp_path: Path, read: Read, form: str, digits: int) -> None:
    """Of more than 64 bits; in lines, of more digits than `json.load` takes."""
    path = write(tmp_path, form % f'{{"x": {digits * "9"}}}')
    if read is READERS[3][0] and digits == 20:
        assert list(read(path)) == [{"x": 10**20 - 1}]
    else:
        refused(read, path)


def test_keys_that_repeat_are_all_told(tmp_path: Path) -> None:
    """Where `json.load` would keep the last; `convert` refuses the second."""
    assert list(read_mapping(write(tmp_path, '{"1": {"x": 1}, "1": {}}'), SOURCE)) == [
        ("1", {"x": 1}),
        ("1", {}),
    ]


def peak_of(read: Read, path: Path) -> int:
    tracemalloc.start()
    count = 0
    try:
        for _ in read(path):
            count += 1
        return tracemalloc.get_traced_memory()[1]
    except ValueError:
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_one_record_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of records wanted and of those passed over, of a damaged file too."""
    monkeypatch.setattr(records, "CHUNK", 1 << 12)
    monkeypatch.setattr(records, "LONGEST_PARSED", 0)
    text = 50 * "what is it? "
    rows = json.dumps([{"id": number, "text": text} for number in range(400)])
    mapping = json.dumps({str(number): {"text": text} for number in range(400)})
    cases = [
        (READERS[0][0], f'{{"rows": {rows}}}'),
        (READERS[0][0], f'{{"rows": [{{}}], "behind": {rows}, "more": {mapping}}}'),
        (READERS[0][0], f'{{"before": {rows}, "more": {mapping}, "rows": [{{}}]}}'),
        (READERS[0][0], f'{{"rows": [{{"x": tru}}], "behind": {rows}}}'),
        (READERS[1][0], mapping),
        (READERS[2][0], rows),
        (READERS[3][0], rows.replace("}, ", "}\n")[1:-1]),
    ]
    for read, content in cases:
        assert len(content) > 240_000
        assert peak_of(read, write(tmp_path, content)) < 80_000


def test_file_is_closed_when_reading_stops(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for read, form in READERS:
        rows = read(write(tmp_path, form % "{}"))
        next(rows)
        rows.close()  # type: ignore[attr-defined]
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]


def test_field_is_checked() -> None:
    record: dict[str, Any] = {"id": 7, "text": "a", "flag": True, "none": None, "list": [1]}
    assert field(record, "id", int, "here") == 7
    assert field(record, "id", (int, str), "here") == 7
    assert field(record, "text", (int, str), "here") == "a"
    assert field(record, "list", list, "here") == [1]
    for name, kind, message in (
        ("gone", int, "here: expected 'gone' to be int, found no such field"),
        ("none", int, "here: expected 'none' to be int, found None"),
        ("flag", int, "here: expected 'flag' to be int, found True"),
        ("text", int, "here: expected 'text' to be int, found 'a'"),
        ("id", (str, list), "here: expected 'id' to be str or list, found 7"),
    ):
        with pytest.raises(ValueError) as caught:
            field(record, name, kind, "here")  # type: ignore[arg-type]
        assert str(caught.value) == message


def test_field_shows_only_the_beginning_of_a_value() -> None:
    with pytest.raises(ValueError) as caught:
        field({"text": [10**6 * "a"]}, "text", str, "here")
    assert len(str(caught.value)) < 200
