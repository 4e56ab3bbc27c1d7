"""The page of a run: whole in itself, safe whatever the data say, worst answers first."""

import base64
import io
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    ASKED,
    annotations_path,
    questions_path,
    read_rows,
    task_of,
    vqa_row,
    write_rows,
    write_vqa,
)
from PIL import Image
from runs import forget_checksums, in_two_processes, log, reset_accelerate, with_

import dept_vl.training.run
from dept_vl._utils.errors import is_user_error
from dept_vl._utils.run_files import REPORT_FILE
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig
from dept_vl.tasks import load_task
from dept_vl.tasks.io.predictions import ExampleId
from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.text.task import SCHEMA, TextTask
from dept_vl.tasks.vqav2 import SCHEMA as VQA_SCHEMA
from dept_vl.training.options import ReportConfig
from dept_vl.training.report.html import (
    BEST_SHOWN,
    SHOWN,
    Answered,
    Marks,
    _card,
    choose,
    mark,
    or_warn,
)
from dept_vl.training.report.page import BOTTOM, HEIGHT, LEFT, RIGHT, SIDE, TOP, WIDTH, templates, thumbnail
from dept_vl.training.report.page import chart as placed
from dept_vl.training.report.plots import COLOURS
from dept_vl.training.report.remake import BROWSERS, draw, remake
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ATTACK = '</style><script>alert(1)</script><img src=x onerror="alert(2)">\'"&\u202e\x00'
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "h3",
        "p",
        "div",
        "span",
        "b",
        "i",
    ),
    *("img", "table", "tr", "th", "td", "details", "summary", "svg", "path", "line", "text", "circle"),
}


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text between."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [found for _, found in self.tags if name in (found.get("class") or "").split()]


def read(folder: Path) -> Page:
    """The page in a folder, which asks for nothing and runs nothing."""
    content = (folder / REPORT_FILE).read_text()
    found = Page(content)
    assert {tag for tag, _ in found.tags} <= TAGS
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert not re.search(r"url\(|@import", content)
    assert "default-src 'none'" in content
    return found


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory,
    make_run: Callable[..., RunConfig],
) -> RunConfig:
    folder = tmp_path_factory.mktemp("report")
    data = DataOptions(
        data_dir=write_vqa(folder / "vqa", subtypes=("train2014", "val2014", "test2015")), holdout_images=1
    )
    config = make_run(data)
    return replace(config, output_dir=folder / "run")


@pytest.fixture(scope="module")
def finished(config: RunConfig) -> Path:
    reset_accelerate()
    return run(config).output_dir


def test_a_run_leaves_a_page_that_shows_it(finished: Path) -> None:
    found = read(finished)
    summary = json.loads((finished / "summary.json").read_text())
    for part in (
        "vqav2 val",
        "dept, m=3, r=2, s=16",
        f"{summary['trainable_parameters']['total']:,}",
        f"{summary['scores']['overall']:.2f}",
        *(
            "Loss",
            "Score on the dev split",
            "Learning rates",
            "offset_lr",
            "nats per answer token",
            "overall (0-100)",
            "answer type",
            "yes/no",
            "how many",
        ),
        *("Worst answers", "train.max_steps"),
        "Scores from 0 to 100: VQA accuracy",
    ):
        assert part in found.said, part
    assert re.search(r"humans: \S+ ×7 · two ×2 · Blue\.", found.said)
    assert any(question in found.said for question, _, _ in ASKED)
    # Four images with three questions each: there is room for all, whether right or wrong.
    assert len([tag for tag, _ in found.tags if tag == "img"]) == 12
    assert sum(tag == "svg" for tag, _ in found.tags) == 3


def test_the_page_is_made_again_from_the_folder(
    finished: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    (copy / REPORT_FILE).unlink()
    assert remake(ReportConfig(copy)) == copy / REPORT_FILE
    assert "report: " in capsys.readouterr().out
    assert (copy / REPORT_FILE).read_bytes() == (finished / REPORT_FILE).read_bytes()


def test_a_page_of_data_that_have_changed_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    known = json.loads((copy / "identity.json").read_text())
    known["content"]["vqav2.test"] = "7 rows 0123456789abcdef"
    forget_checksums(copy)
    (copy / "identity.json").write_text(json.dumps(known))
    remake(ReportConfig(copy))
    said = capsys.readouterr().out
    assert "vqav2.test=7 rows 0123456789abcdef -> " in said
    assert (copy / REPORT_FILE).is_file()


def test_an_evaluation_leaves_a_page(finished: Path, tmp_path: Path) -> None:
    found = score_run(EvaluateConfig(run=finished, split="train", output_dir=tmp_path / "evaluated"))
    page_found = read(found.output_dir)
    assert "vqav2 train" in page_found.said
    assert f"{found.evaluation.scores['overall']:.2f}" in page_found.said
    assert not page_found.of_class("chart")


def test_without_published_answers_nothing_is_called_right_or_wrong(finished: Path, tmp_path: Path) -> None:
    score_run(EvaluateConfig(run=finished, split="test", output_dir=tmp_path / "evaluated"))
    found = read(tmp_path / "evaluated")
    assert "No human answers are published" in found.said
    assert len(found.of_class("card")) == 4
    assert not any(found.of_class(name) for name in ("right", "partly", "wrong", "mark"))


def test_data_stay_data(config: RunConfig, tmp_path: Path) -> None:
    """Questions, answers and ids of files are shown as they are, and never obeyed."""
    data_dir = Path(shutil.copytree(config.data.data_dir or "", tmp_path / "vqa"))
    for split in ("train2014", "val2014"):
        for key in ("questions", "annotations"):
            name = f"v2_{'OpenEnded_' if key == 'questions' else ''}mscoco_{split}_{key}.json"
            rows = read_rows(data_dir / name, key)
            for row in rows:
                if key == "questions":
                    row["question"] = "q " + ATTACK
                else:
                    row["question_type"] = "t " + ATTACK
                    for answer in row["answers"]:
                        answer["answer"] = "a " + ATTACK
            write_rows(data_dir / name, key, rows)
    named = with_(config, data={"data_dir": data_dir}, output_dir=tmp_path / "<b onclick=alert(3)>run")
    folder = run(named).output_dir
    found = read(folder)
    shown = ATTACK.replace("\x00", r"\x00").replace("\u202e", r"\u202e")
    for start in "qat":
        assert f"{start} {shown}" in found.said
    assert "<b onclick=alert(3)>run" in found.said
    # The attack's own elements are none of the page's.
    assert not [tag for tag, found_ in found.tags if tag == "img" and found_.get("src") == "x"]


def text(value: object) -> str:
    """What a template makes of a value."""
    return templates().from_string("{{ value }}").render(value=value)


def part(name: str, *given: Any, **options: Any) -> str:
    """What a macro of the page makes of what it is given."""
    return str(getattr(templates().get_template("parts.html.j2").module, name)(*given, **options))


def chart(*given: Any, **options: Any) -> str:
    drawn = placed(*given, y="unit", **options)
    return "" if drawn is None else part("chart", drawn)


def test_half_characters_and_controls_do_no_harm() -> None:
    said = text("\ud800 \x1b[31m <a>\t\n")
    assert said == "\\ud800 \\x1b[31m &lt;a&gt;\t\n"
    empty = {"summary": None, "charts": [], "sections": [], "examples": 0, "about": said}
    templates().get_template("report.html.j2").render(empty, title="\udfff").encode()


def answered_vqa(*answers: list[str], predictions: list[str], root: Path = Path()) -> Answered:
    task = task_of(*answers, root=root)
    return Answered(task, "val", dict(enumerate(predictions)), {"overall": 1.0})


def test_worst_answers_come_first_and_of_these_the_most_agreed_on() -> None:
    ten, split, few = ["yes"] * 10, ["yes"] * 6 + ["no"] * 4, ["red"] * 8 + ["pink"] * 2
    answered = answered_vqa(few, split, ten, ten, few, predictions=["pink", "maybe", "no", "yes", "red"])
    found = mark(answered)
    assert found.marks == pytest.approx([0.6, 0, 0, 1, 1])
    assert choose(found, answered.task.images) == ([2, 1, 0], [3, 4])


def test_so_many_are_shown_and_each_of_another_image() -> None:
    def images(index: int) -> tuple[Path, ...]:
        return (Path(f"wrong {index % 80}" if index < 100 else f"right {index % 5}"),)

    marks = np.repeat([0.0, 1.0], 100)
    worst, best = choose(Marks(marks, np.ones(200), {}), images)
    assert (len(worst), len(best)) == (SHOWN - BEST_SHOWN, 5)
    assert max(worst) < 100 <= min(best)
    for shown in (worst, best):
        assert max(Counter(map(images, shown)).values()) == 1
    # Texts have no images, and are shown all the same.
    assert len(choose(Marks(np.zeros(10), np.ones(10), {}), lambda _: ())[0]) == 10


def test_accuracies_by_type_are_the_official_ones(scenes: Path) -> None:
    for name, split in (("vqav2", "val"), ("gqa", "val"), ("nlvr2", "dev")):
        task = load_task(name, scenes / name, split)
        predictions: dict[ExampleId, str] = {
            task[index].example_id: task[index].answer if index % 3 else "no" for index in range(len(task))
        }
        scores = task.score(predictions)
        found = mark(Answered(task, split, predictions, scores))
        assert 100 * found.marks.mean() == pytest.approx(scores[task.primary], abs=0.005)
        means = {
            kind: {k: 100 * sum(v) / len(v) for k, v in types.items()} for kind, types in found.kinds.items()
        }
        if name == "vqav2":
            for kind in ("answer type", "question type"):
                official = {
                    key.split("/", 1)[1]: value
                    for key, value in scores.items()
                    if key.startswith(kind.replace(" ", "_"))
                }
                assert means[kind] == pytest.approx(official, abs=0.005)
        if name == "gqa":
            queries = means["structural type"]["query"]
            assert queries == pytest.approx(scores["open"])
        if name == "nlvr2":
            assert means["label"].keys() == {"true", "false"}


def test_captions_are_marked_by_the_words_that_they_share(scenes: Path) -> None:
    task = load_task("coco", scenes / "coco", "test")
    example = task[0]
    assert task.mark(example, example.answers[-1].upper() + ".") == 1
    assert task.mark(example, "zebra") == 0
    assert 0 < task.mark(example, example.answers[0] + " zebra") < 1


@pytest.mark.parametrize(
    ("name", "answers", "prediction", "expected"),
    [
        ("sst2", ["positive"], "positive", 1.0),
        ("sst2", ["positive"], "negative", 0.0),
        ("stsb", ["4.2"], "3.2", 0.8),
        ("stsb", ["4.2"], "none", 0.0),
        ("newsqa", ["the red car", "a van"], "red truck", 0.5),
    ],
)
def test_text_answers_are_marked(name: str, answers: list[str], prediction: str, expected: float) -> None:
    row = {"id": 0, "source_text": "a text", "answers": answers, "group": ""}
    task = TextTask(name, Rows.of([row], SCHEMA))
    assert task.mark(task[0], prediction) == pytest.approx(expected)
    assert task[0].kinds == ((("class", "positive"),) if name == "sst2" else ())


def test_a_thumbnail_is_small_and_keeps_its_form(tmp_path: Path) -> None:
    Image.effect_noise((3000, 1500), 60).save(tmp_path / "large.png")
    found = thumbnail(tmp_path / "large.png")
    assert found is not None
    assert f'src="data:image/jpeg;base64,{found}"' in part("picture", "large.png", found)
    with Image.open(io.BytesIO(base64.b64decode(found))) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE, SIDE // 2))
    # The most that 48 pairs of images can take, noise being what JPEG is worst at.
    assert 2 * SHOWN * 2 * len(found) < 3_000_000


def test_an_image_that_is_gone_leaves_a_note(tmp_path: Path) -> None:
    (tmp_path / "broken <b>.jpg").write_bytes(b"no image")
    for name in ("missing.jpg", "broken <b>.jpg"):
        assert f"{text(name)} could not be read" in part("picture", name, thumbnail(tmp_path / name))


def test_a_page_that_fails_takes_nothing_with_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Path:
        assert (tmp_path / "run" / "summary.json").is_file()
        assert (tmp_path / "run" / "predictions.json").is_file()
        raise RuntimeError("out of ink")

    monkeypatch.setattr(dept_vl.training.run, "write_run_report", fail)
    assert run(with_(config, output_dir=tmp_path / "run")).scores
    assert "warning: report.html could not be written (out of ink)" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        or_warn(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_long_texts_are_cut() -> None:
    task = task_of(["yes"] * 10)
    long = replace(task, rows=Rows.of([vqa_row(0, ["yes"] * 10, question="why " * 1000)], VQA_SCHEMA))
    card = part("card", _card(Answered(long, "val", {0: "no " * 1000}, {}), 0, 0.0))
    longest = templates().get_template("parts.html.j2").module.longest  # type: ignore[attr-defined]
    assert len(card) < 3 * longest


def test_two_processes_write_one_page(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    in_two_processes(run, with_(config, output_dir=tmp_path / "run", train={"per_device_batch_size": 2}))
    found, alone = read(tmp_path / "run"), read(finished)
    assert len(found.of_class("card")) == len(alone.of_class("card"))


def points(picture: str) -> list[list[tuple[float, float]]]:
    """The curves of a chart."""
    drawn = re.findall(r' d="M([^"]+)"', picture)
    return [[tuple(map(float, p.split())) for p in path.split("L")] for path in drawn]  # type: ignore[misc]


def test_the_curve_of_a_run_is_of_its_losses(finished: Path) -> None:
    """Each point lies where the numbers beside the axes put its step and its loss."""
    losses = [(record["step"], record["loss"]) for record in log(finished) if "loss" in record]
    assert len(losses) == 2
    assert losses[0][1] != losses[1][1]
    page = (finished / REPORT_FILE).read_text()
    assert f":root {{ --method: {COLOURS['dept']}; }}" in page  # the method has one colour everywhere
    picture = page.split('aria-label="Loss"')[1].split("</svg>")[0]
    assert 'path class="one"' in picture
    (curve,) = points(picture)
    steps = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)<', picture)
    heights = re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', picture)
    for which, labels, shift in ((0, steps, 0.0), (1, heights, 3.5)):
        places, values = np.array(labels, float).T
        expected = np.interp([loss[which] for loss in losses], values, places - shift)
        assert [place[which] for place in curve] == pytest.approx(expected.tolist(), abs=0.15)


def test_a_chart_is_to_scale() -> None:
    (curve,) = points(chart("loss", {"loss": [(0, 4.0), (5, 2.0), (10, 0.0)]}))
    (x0, y0), (x1, y1), (x2, y2) = curve
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y1 - y0 == pytest.approx(y2 - y1)
    assert y0 < y2  # up is less, in a picture
    up = points(chart("rates", {"a": [(0, 1.0), (1, 0.1), (2, 0.01)], "b": [(1, 0.1)]}, logarithmic=True))
    assert up[0][1][1] - up[0][0][1] == pytest.approx(up[0][2][1] - up[0][1][1], abs=0.11)
    assert up[1][0] == up[0][1]


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [5.0, 5.0, 5.0], [1e-9, 1e9], [float("nan"), 2.0], [-3.0, 3.0], [99.99, 100.0]],
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_chart_of_odd_values_stays_inside(values: list[float], logarithmic: bool) -> None:
    picture = chart("odd", {"a": list(enumerate(values))}, logarithmic=logarithmic)
    places = [place for curve in points(picture) for place in curve]
    assert len(places) == sum(math.isfinite(value) and (value > 0 or not logarithmic) for value in values)
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in places)
    numbers = [float(n) for n in re.findall(r'[xy][12]?="(-?[\d.]+)"', picture)]
    assert all(0 <= number <= WIDTH for number in numbers)
    assert "nan" not in picture.lower()


def test_a_chart_without_points_is_none() -> None:
    assert chart("a", {}) == chart("a", {"b": []}) == chart("a", {"b": [(0, 0.0)]}, logarithmic=True) == ""


def test_a_long_curve_is_thinned_and_ends_where_it_ended() -> None:
    (curve,) = points(chart("loss", {"loss": [(step, 1.0 + step % 7) for step in range(30_001)]}))
    assert len(curve) < 700
    (whole,) = points(chart("loss", {"loss": [(0, 1.0), (30_000, 1.0 + 30_000 % 7), (2, 7.0)]}))
    assert curve[-1][0] == whole[1][0]


def test_curves_on_top_of_each_other_have_dashes() -> None:
    one, two = (chart("rates", {name: [(0, 1.0), (1, 2.0)] for name in names}) for names in ("a", "ab"))
    assert ('class="dashes"' in one, 'class="dashes"' in two) == (False, True)


def test_a_table_has_bars_of_the_shares() -> None:
    found = Page(part("table", ("type", "n"), [("<i>", "3"), ("b", "4")], share=[0.25, 1.5]))
    assert [attributes.get("style") for tag, attributes in found.tags if tag == "div"] == [
        "width:25.0%",
        "width:100.0%",
    ]
    assert "<i>" in found.said


def test_a_browser_draws_the_page(finished: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no Chromium to draw with")
    draw(finished / REPORT_FILE, tmp_path / "page.png", (800, 600))
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (800, 600)
        assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 10


def test_a_browser_that_fails_says_why(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = tmp_path / BROWSERS[0]
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for script, found in (("echo no display >&2; exit 3", "no display"), ("exit 0", "page.png")):
        browser.write_text(f"#!/bin/sh\n{script}\n")
        browser.chmod(0o755)
        with pytest.raises(RuntimeError, match=found) as raised:
            draw(finished / REPORT_FILE, tmp_path / "page.png", (800, 600))
        assert is_user_error(raised.value)


def test_rows_that_came_later_are_left_out(finished: Path, config: RunConfig, tmp_path: Path) -> None:
    assert config.data.data_dir is not None
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    data = Path(shutil.copytree(config.data.data_dir, tmp_path / "vqa"))
    content = json.loads((copy / "config.json").read_text())
    content["data"]["data_dir"] = str(data)
    forget_checksums(copy)
    (copy / "config.json").write_text(json.dumps(content))
    for path in (annotations_path(data, "val2014"), questions_path(data, "val2014")):
        key = path.stem.rpartition("_")[2]
        asked = read_rows(path, key)
        write_rows(path, key, [*asked, asked[0] | {"question_id": 987654}])
    remake(ReportConfig(copy))
    assert len(read(copy).of_class("card")) == len(read(finished).of_class("card"))
