"""The table and the picture that a run leaves."""

from pathlib import Path
from typing import Any

import pytest
from helpers import COLOURS, write_vqa
from markupsafe import Markup
from PIL import Image

from benchmarks.plots import curve_plot, name_ends
from dept_vl._utils.stats import interval
from dept_vl._utils.tables import markdown_table
from dept_vl.data.pictures import MARGIN, RIGHT, TEXT_HEIGHT, TILE, WRONG, picture_grid
from dept_vl.tasks.vqav2 import VQAv2
from dept_vl.training.report.plots import COLOURS as METHOD_COLOURS
from dept_vl.training.report.plots import OTHERS, colour_of, drawn, score_plot

Pixel = tuple[int, int, int]


def test_table_is_aligned() -> None:
    table = markdown_table(["", "this run"], [["accuracy", 61.5], ["seconds in all", "7"]])
    assert table.splitlines() == [
        "|                | this run |",
        "| -------------- | -------: |",
        "| accuracy       |     61.5 |",
        "| seconds in all |        7 |",
    ]


def test_the_rule_of_a_narrow_column_is_markdown() -> None:
    assert markdown_table(["", "n"], []) == "|     |   n |\n| --- | --: |"


def test_table_of_uneven_rows_is_refused() -> None:
    with pytest.raises(ValueError):
        markdown_table(["a", "b"], [["c"]])


def test_a_cell_is_one_cell_whatever_it_says() -> None:
    table = markdown_table(["", "a|b"], [["<b>\n[x](http://y)", "`*c*` \x1b[31m"]])
    header, rule, row = table.splitlines()
    assert [line.count("|") for line in (header, rule, row)] == [3, 3, 3]
    assert not set("<[`*\x1b") & set(row)
    assert markdown_table(["refused [1]", "<= 0.70"], []).startswith("| refused [1] | <= 0.70 |")
    assert "`--a`" in markdown_table([Markup("`--a`")], [])


def test_a_method_has_one_colour_by_whatever_name() -> None:
    assert len({*METHOD_COLOURS.values(), OTHERS}) == len(METHOD_COLOURS) + 1
    for name in ("dept", "dept40", "dept40+compiled", "dept, m = 20", "dept + projection"):
        assert colour_of(name) == METHOD_COLOURS["dept"] == "#0072b2"
    for name in ("LoRA", "lora8", "LoRA + projection"):
        assert colour_of(name) == METHOD_COLOURS["LoRA"]
    assert colour_of("adept + images, m = 0") == METHOD_COLOURS["adept"]
    assert colour_of("full fine-tuning") == METHOD_COLOURS["full fine-tuning"]
    assert colour_of("zero-shot") == colour_of("floor") == OTHERS


def test_a_plot_has_its_texts_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    found: list[str] = []
    save = figure.savefig

    def saving(self: Any, path: Path) -> None:
        save(self, path)
        texts = [*self.axes[0].get_legend().get_texts(), self.axes[0].yaxis.label]
        found.extend(text.get_text() for text in texts)

    monkeypatch.setattr(figure, "savefig", saving)
    odd = "$\\frac{1$ \x1b[31m\ud800"
    assert score_plot({odd: {1: interval([1.0, 2.0])}}, tmp_path / "a.png", x="$$", y=odd)
    assert found == [r"$\frac{1$ \x1b[31m\ud800"] * 2


@pytest.mark.parametrize("log", [False, True])
def test_names_have_room_at_the_right_and_only_there(tmp_path: Path, log: bool) -> None:
    pytest.importorskip("matplotlib")
    lines = {"adept + images, m = 0": {n: interval([float(n), n + 1.0]) for n in (20, 40, 60)}}
    with drawn(tmp_path / "a.png", figsize=(7, 5), layout="constrained") as (pane,):
        pane.plot([20, 40, 60], [20.5, 40.5, 60.5])
        pane.set_xscale("log" if log else "linear")
        name_ends(pane, lines)
    assert pane.texts[0].get_window_extent().x1 < pane.bbox.x1
    assert 17 < pane.get_xlim()[0] < 20


def test_a_logarithmic_axis_has_plain_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    ticks: list[str] = []
    save = figure.savefig

    def saving(self: Any, path: Path) -> None:
        save(self, path)
        ticks.extend(label.get_text() for label in self.axes[0].get_xticklabels())

    monkeypatch.setattr(figure, "savefig", saving)
    curve = {n: interval([1.0, 2.0]) for n in (20.0, 60.0, 300.0)}
    assert curve_plot({"steps": {"dept": curve}}, tmp_path / "a.png", y="score", log=True)
    assert "100" in ticks
    assert not any(set("$^e") & set(label) for label in ticks)


@pytest.fixture
def task(tmp_path: Path) -> VQAv2:
    return VQAv2().load(write_vqa(tmp_path / "vqa", images=6), "val")


def answers(task: VQAv2, wrong: int) -> dict[int | str, str]:
    """The usual answers, but for the first so many images, whose questions are answered `wrong`."""
    images = sorted({task.images(index) for index in range(len(task))})[:wrong]
    return {
        task[index].example_id: "wrong" if task.images(index) in images else task[index].answer
        for index in range(len(task))
    }


def tiles(sheet: Image.Image, columns: int, rows: int) -> list[tuple[Pixel, set[Pixel]]]:
    """Of each tile, the pixel in its middle and all colours of the text below it."""
    found = []
    for row in range(rows):
        for column in range(columns):
            left, top = MARGIN + column * (TILE + MARGIN), MARGIN + row * (TILE + TEXT_HEIGHT + MARGIN)
            text = sheet.crop((left, top + TILE + 1, left + TILE, top + TILE + TEXT_HEIGHT))
            middle = sheet.getpixel((left + TILE // 2, top + TILE // 2))
            found.append((middle, {colour for _, colour in text.getcolors(maxcolors=100_000)}))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("columns", "rows"), [(3, 2), (2, 1)])
def test_picture_has_the_size_of_its_tiles(tmp_path: Path, task: VQAv2, columns: int, rows: int) -> None:
    path = tmp_path / "answers.png"
    picture_grid(task, answers(task, 2), path, columns=columns, rows=rows)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (
            MARGIN + columns * (TILE + MARGIN),
            MARGIN + rows * (TILE + TEXT_HEIGHT + MARGIN),
        )


def test_picture_shows_distinct_images_right_and_wrong(tmp_path: Path, task: VQAv2) -> None:
    path = tmp_path / "answers.png"
    picture_grid(task, answers(task, 3), path, columns=5, rows=1, mistakes=2)
    with Image.open(path) as sheet:
        shown = tiles(sheet, 5, 1)
    fills = [min(COLOURS, key=lambda name: distance(COLOURS[name], middle)) for middle, _ in shown]
    assert len(set(fills)) == 5
    red, green = (
        [fill for fill, (_, text) in zip(fills, shown, strict=True) if ink in text] for ink in (WRONG, RIGHT)
    )
    # The three first images are answered wrongly; two of them are shown.
    assert len(red) == 2
    assert set(red) < set(list(COLOURS)[:3])
    assert sorted(green) == sorted(list(COLOURS)[3:])


def test_picture_without_a_mistake_is_green_throughout(tmp_path: Path, task: VQAv2) -> None:
    path = tmp_path / "answers.png"
    picture_grid(task, answers(task, 0), path, columns=3, rows=2)
    with Image.open(path) as sheet:
        shown = tiles(sheet, 3, 2)
    assert all(RIGHT in text and WRONG not in text for _, text in shown)


def test_long_answers_stay_below_their_image(tmp_path: Path, task: VQAv2) -> None:
    path = tmp_path / "answers.png"
    long = dict.fromkeys(answers(task, 0), "W" * 8 + " wwwww wwwww")
    picture_grid(task, long, path, columns=2, rows=1, mistakes=2)
    with Image.open(path) as sheet:
        between = sheet.crop((MARGIN + TILE + 1, 0, 2 * MARGIN + TILE, sheet.height))
        assert len(between.getcolors()) == 1
        assert all(WRONG in text for _, text in tiles(sheet, 2, 1))


def test_picture_leaves_tiles_empty_where_images_are_few(tmp_path: Path, task: VQAv2) -> None:
    path = tmp_path / "answers.png"
    picture_grid(task.subset([0, 1, 2]), answers(task, 0), path, columns=3, rows=1)
    with Image.open(path) as sheet:
        shown = tiles(sheet, 3, 1)
    assert [len(text) > 1 for _, text in shown] == [True, False, False]


def distance(one: Pixel, other: Pixel) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def test_any_answer_can_be_drawn(tmp_path: Path, task: VQAv2) -> None:
    odd = dict.fromkeys(answers(task, 0), "\ud800 \x00\x1b[31m\u202e $x$")
    picture_grid(task, odd, tmp_path / "grid.png", columns=2, rows=1, mistakes=2)
    assert WRONG in tiles(Image.open(tmp_path / "grid.png"), 2, 1)[0][1]
