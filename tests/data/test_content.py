"""What a split holds, in digits: the same however it is kept, others for any other content."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dept_vl._utils.embedded import embedded_path
from dept_vl.data.content import rows_content, sizes_content
from dept_vl.data.feature_index import file_stats
from dept_vl.tasks.io.rows import Rows

RECORDS = [
    {"id": number, "text": "é" * number, "answers": [str(k) for k in range(number % 3)], "score": number / 2}
    for number in range(7)
]
SCHEMA = pa.schema(
    {"id": pa.int64(), "text": pa.string(), "answers": pa.list_(pa.string()), "score": pa.float64()}
)
ROWS = Rows.of(RECORDS, SCHEMA)


def test_the_same_rows_have_the_same_digits(tmp_path: Path) -> None:
    """In a file, of several pieces, with columns in another order or of other widths, as a part of others."""
    expected = rows_content(ROWS)
    assert expected == "8ffc49191bf82c47"
    path = tmp_path / "rows.arrow"
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for start in (0, 3):
            writer.write_table(ROWS.table.slice(start, 4 if start else 3))
    assert rows_content(Rows(pa.ipc.open_file(pa.memory_map(str(path))).read_all())) == expected
    other = ROWS.table.select(["score", "answers", "text", "id"])
    narrow = pa.schema(
        {
            "score": pa.float32(),
            "answers": pa.large_list(pa.large_string()),
            "text": pa.string(),
            "id": pa.int32(),
        }
    )
    assert rows_content(Rows(other.cast(narrow))) == expected
    more = Rows.of([*RECORDS[3:], *RECORDS, *RECORDS], SCHEMA)
    assert rows_content(more.subset(np.arange(4, 11))) == expected
    assert rows_content(Rows(more.table.slice(11))) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"id": 9},
        {"text": "éé "},
        {"text": None},
        {"answers": []},
        {"answers": ["01"]},
        {"answers": ["0", "", "1"]},
        {"answers": None},
        {"score": 1.25},
        {"score": None},
    ],
)
def test_any_other_value_has_others(change: dict[str, object]) -> None:
    changed = Rows.of([*RECORDS[:2], {**RECORDS[2], **change}, *RECORDS[3:]], SCHEMA)
    assert rows_content(changed) != rows_content(ROWS)


def test_another_order_or_number_has_others() -> None:
    found = {rows_content(ROWS.subset(rows)) for rows in ([0, 1], [1, 0], [0], [1], [0, 0], [])}
    assert len(found) == 6
    # A letter more here and one less there.
    one, two = (
        Rows.of([{**RECORDS[0], "text": a}, {**RECORDS[1], "text": b}], SCHEMA)
        for a, b in (("ab", "c"), ("a", "bc"))
    )
    assert rows_content(one) != rows_content(two)


def test_sizes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, size in zip(paths, (1, 2), strict=False):
        path.write_bytes(b"x" * size)
    expected = sizes_content(paths)
    moved = [path.rename(tmp_path / f"{path.name}.png") for path in paths[:2]]
    assert sizes_content([*moved, paths[2]]) == expected
    found = {sizes_content(paths[:2]), sizes_content(moved), sizes_content(moved[::-1]), expected}
    paths[2].touch()
    assert len({*found, sizes_content([*moved, paths[2]])}) == 5


def test_names_that_no_file_can_have_are_of_missing_files(tmp_path: Path) -> None:
    names = ("a.png", "x" * 300 + ".png", "a/" * 3000 + "x.png", "loop")
    (tmp_path / "loop").symlink_to("loop")
    assert file_stats([tmp_path / name for name in names]) == [(0, 0)] * 4


def test_images_in_a_table_have_sizes_and_contents(tmp_path: Path) -> None:
    """The sizes are compared when a run goes on, the contents before features are used."""
    path = tmp_path / "rows.parquet"
    found = []
    for images in (b"one", b"two"), (b"one", b"TWO"), (b"one", b"three"):
        pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), path)
        paths = [Path(embedded_path(str(path), "image", row)) for row in range(3)]
        found.append((sizes_content(paths), file_stats(paths)))
    assert found[0][0] == found[1][0] != found[2][0]
    assert [size for size, _ in found[0][1]] == [3, 3, 0]
    assert found[0][1][0] == found[1][1][0]
    assert found[0][1][1] != found[1][1][1]
    assert found[0][1][2] == (0, 0)
