"""Own data: images where they lie, splits and scores, and runs on them."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_files import OWN, PHOTOS, QUESTION, lines, own, written
from PIL import Image
from runs import forget_checksums, with_

import dept_vl
from dept_vl._utils import embedded
from dept_vl._utils.embedded import embedded_bytes
from dept_vl._utils.errors import UsageError
from dept_vl._utils.images import missing_files, read_image
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig
from dept_vl.data.shots import draw_shots
from dept_vl.data.splits import data_options
from dept_vl.inference import predict as bulk
from dept_vl.inference.options import PredictConfig
from dept_vl.inference.predict import predict
from dept_vl.tasks import TASKS, load_task
from dept_vl.tasks.base import hold_out_images
from dept_vl.tasks.metrics.own import anls, edit_distance, general_vqa_accuracy, normalise_own
from dept_vl.tasks.metrics.vqa import vqa_accuracy
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.tasks.own.split import image_groups, leaks
from dept_vl.training.extract import extract
from dept_vl.training.options import ExtractConfig
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

POOL = pa.proxy_memory_pool(pa.default_memory_pool())
"""Counts what is allocated; it outlives all of that."""


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


def test_a_link_that_leads_elsewhere_keeps_no_rows(tmp_path: Path) -> None:
    photos = [(PHOTOS / name).read_bytes() for name in ("IMG_0001.JPG", "scan-3.png")]
    for number, photo in enumerate(photos):
        table = pa.table({"image": [{"bytes": photo, "path": None}], "question": ["q"], "answer": ["a"]})
        pq.write_table(table, tmp_path / f"v{number}.parquet")
    link = tmp_path / "latest.parquet"
    for number in (0, 1):
        link.unlink(missing_ok=True)
        link.symlink_to(f"v{number}.parquet")
        assert embedded_bytes(own(link)[0].images[0]) == photos[number]
    assert embedded_bytes(own(tmp_path / "v0.parquet")[0].images[0]) == photos[0]


def test_a_folder_in_the_data_has_references_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    photo = (PHOTOS / "scan-3.png").read_bytes()
    table = pa.table({"image": [{"bytes": photo, "path": None}], "question": ["q"], "answer": ["a"]})
    pq.write_table(table, tmp_path / "sub/a.parquet")
    for folder in (tmp_path, tmp_path / "sub"):
        assert embedded_bytes(own(folder)[0].images[0]) == photo


@pytest.mark.parametrize("kind", ["List", "Sequence", "brackets"])
def test_classes_in_lists_have_their_names(tmp_path: Path, kind: str) -> None:
    classes: Any = {"names": ["blue", "red"], "_type": "ClassLabel"}
    feature = [classes] if kind == "brackets" else {"feature": classes, "_type": kind}
    metadata = {"huggingface": json.dumps({"info": {"features": {"answers": feature}}})}
    columns = {"image": ["IMG_0001.JPG"] * 2, "question": ["a", "b"], "answers": [[1, 0, 1], [-1]]}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "a.parquet")
    task = own(tmp_path / "a.parquet")
    assert [task[n].answers for n in (0, 1)] == [("red", "blue", "red"), ()]


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


def test_held_out_examples_and_shots_share_no_image_with_the_others(tmp_path: Path) -> None:
    images = [{"bytes": path.read_bytes()} for path in sorted(PHOTOS.iterdir())[:4]]
    rows = [{"image": images[n % 4], "question": f"what {n}?", "answer": "ab"[n % 8 // 4]} for n in range(16)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "one.parquet")
    pairs = [
        QUESTION | {"images": list(pair)} for pair in (("scan-3", "scan-7"), ("scan-7", "scan-3"), ("4", "4"))
    ]
    for row in pairs:
        del row["image"]
    one, two = own(tmp_path / "one.parquet"), own(written(tmp_path, lines(*pairs)))
    contents = [n % 4 for n in range(16)]
    for seed in range(3):
        rest, held_out = hold_out_images(one, 2, seed)
        sides = [
            {contents[one.example_ids().index(key)] for key in part.example_ids()}
            for part in (rest, held_out)
        ]
        assert sides[0].isdisjoint(sides[1])
        shots = draw_shots(one, 2, seed)
        assert {contents[n] for n in shots.train}.isdisjoint(contents[n] for n in shots.dev)
    assert sorted(map(len, hold_out_images(two, 1, 0))) == [1, 2]


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


def test_rows_without_a_split_and_names_of_train_are_one_split(tmp_path: Path) -> None:
    splits = ("", "train", "Training", "test", "val")
    names = ("scan-3.png", "scan-3.png", "IMG_0001.JPG", "IMG_0001.JPG", "scan-7.png")
    rows = [QUESTION | {"image": name, "split": split} for name, split in zip(names, splits, strict=True)]
    task = own(written(tmp_path, lines(*rows)))
    assert task.leaks == ("1 of the 1 images of test are in train too",)


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
    written(tmp_path, lines(QUESTION), "more.jsonl")
    assert "more.jsonl" in load_task("vqa", data=tmp_path, split="validation").notes[0]
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
        ("A", ["a", "a", "A"], 1.0),
        ("", ["a", "a", "A"], 0.0),
        ("the", ["a", "a", "A"], 0.0),
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
    for place in ("evaluate", "predict"):
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
    options = {"own": replace(config.data.own, images=PHOTOS), "features_dir": tmp_path / "away"}
    away = with_(config, data=options)  # images beside the table's would lie there
    for count in ("4 images encoded, 0 were there", "0 images encoded, 4 were there"):
        extract(ExtractConfig(data=away.data, backbone=away.backbone))
        assert count in capsys.readouterr().out


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
