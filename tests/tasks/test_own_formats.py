"""Every format in which people have images and questions is read, learnt, scored and answered as it is.

The rows of each are written here in the layout that its authors publish, around eight rendered photographs.
"""

import base64
import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import with_

import dept_vl
from dept_vl._utils.images import read_image
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig
from dept_vl.inference.options import PredictConfig
from dept_vl.inference.predict import predict
from dept_vl.tasks import load_task
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

PHOTOS = sorted((Path(__file__).parents[1] / "fixtures" / "own" / "photos").iterdir())
COLOURS = ("red", "green", "blue", "yellow")
QUESTION = "what color is the shape?"
COUNT = len(PHOTOS)
Options = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A format.

    Attributes:
        write: Writes it into a folder, with answers or as a test set; returns the options that name it.
        task: What its rows ask for.
        primary: The metric that decides.
        answer: Of the second row.
        tests: Whether there are test sets without answers.
        images: Of a row.
    """

    write: Callable[[Path, bool], Options]
    task: str = "vqa"
    primary: str = "exact_match"
    answer: str = COLOURS[1]
    tests: bool = True
    images: int = 1


def answer_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def photographs(folder: Path, name: str) -> list[str]:
    """Copy the photographs to names like `{:012d}.jpg`; returns these."""
    names = [name.format(number) for number in range(COUNT)]
    for photo, called in zip(PHOTOS, names, strict=True):
        (folder / called).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, folder / called)
    return names


def plain(folder: Path, answered: bool) -> list[Options]:
    """Rows with the names of images, in the usual columns."""
    names = photographs(folder, "photos/{}.jpg")
    return [_row({"image": name, "question": QUESTION}, n, answered) for n, name in enumerate(names)]


def _row(row: Options, number: int, answered: bool) -> Options:
    return row | ({"answer": answer_of(number)} if answered else {})


def to_json(path: Path, content: Any) -> Options:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return {"data": str(path)}


def to_lines(path: Path, rows: list[Options]) -> Options:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": str(path)}


def to_csv(path: Path, rows: list[Options], delimiter: str = ",") -> Options:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return {"data": str(path)}


def to_parquet(path: Path, rows: list[Options]) -> Options:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return {"data": str(path)}


def with_bytes(folder: Path, answered: bool) -> list[Options]:
    """Rows that hold their images, as a data set with an `Image` column is written."""
    rows = plain(folder, answered)
    return [row | {"image": {"bytes": (folder / row["image"]).read_bytes(), "path": "x.jpg"}} for row in rows]


def saved_to_disk(folder: Path, answered: bool) -> Options:
    import datasets

    rows = [row | {"image": str(folder / row["image"])} for row in plain(folder, answered)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.save_to_disk(str(folder / "saved"))
    return {"data": str(folder / "saved"), "images": folder}


def saved_with_bytes(folder: Path, answered: bool) -> Options:
    import datasets

    features = datasets.Dataset.from_list(with_bytes(folder, answered)).cast_column("image", datasets.Image())
    features.save_to_disk(str(folder / "saved"))
    return {"data": str(folder / "saved")}


def from_hub(folder: Path, answered: bool) -> Options:
    to_parquet(folder / "hub" / "data" / "train-00000-of-00001.parquet", with_bytes(folder, answered))
    return {"data": "me/mine"}


def image_folder(folder: Path, answered: bool) -> Options:
    names = photographs(folder / "mine", "{}.png")
    labels = [{"file_name": name, "label": answer_of(n)} for n, name in enumerate(names)]
    to_csv(folder / "mine" / "metadata.csv", labels)
    return {"data": str(folder / "mine")}


def captioned_folder(folder: Path, answered: bool) -> Options:
    # Tables are read in the order of their folders' names.
    for split, some in (("test", range(1)), ("train", range(1, 7)), ("validation", range(7, 8))):
        names = photographs(folder / "mine" / split, "{}.png")
        rows = [{"file_name": names[n], "text": f"a {answer_of(n)} shape"} for n in some]
        to_lines(folder / "mine" / split / "metadata.jsonl", rows)
    return {"data": str(folder / "mine")}


def data_urls(folder: Path, answered: bool) -> Options:
    rows = plain(folder, answered)
    for row in rows:
        content = base64.b64encode((folder / row["image"]).read_bytes()).decode()
        row["image"] = f"data:image/jpeg;base64,{content}"
    return to_lines(folder / "rows.jsonl", rows)


def trl_messages(folder: Path, answered: bool) -> Options:
    rows = plain(folder, answered)
    return to_lines(
        folder / "rows.jsonl",
        [
            {
                "images": [row["image"]],
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
                    *(
                        [{"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}]
                        if answered
                        else []
                    ),
                ],
            }
            for row in rows
        ],
    )


def trl_completions(folder: Path, answered: bool) -> Options:
    rows = plain(folder, answered)
    return to_lines(
        folder / "rows.jsonl",
        [
            {
                "images": [row["image"]],
                "prompt": [{"role": "user", "content": QUESTION}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in rows
        ],
    )


def llava(folder: Path, answered: bool) -> Options:
    content = []
    for number, row in enumerate(plain(folder, answered)):
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
        turns += [{"from": "gpt", "value": row["answer"]}] if answered else []
        content.append({"id": str(number), "image": row["image"], "conversations": turns})
    return to_json(folder / "llava.json", content)


def ten(number: int, **more: Any) -> list[Options]:
    return [{"answer": answer_of(number), "answer_confidence": "yes", **more} for _ in range(10)]


def vizwiz(folder: Path, answered: bool) -> Options:
    names = photographs(folder / "train", "VizWiz_train_{:08d}.jpg")
    answers = [{"answers": ten(n), "answer_type": "other", "answerable": 1} for n in range(COUNT)]
    rows = [
        {"image": name, "question": QUESTION} | (answers[n] if answered else {})
        for n, name in enumerate(names)
    ]
    return to_json(folder / "annotations.json", rows) | {"images": folder / "train"}


def vqa(folder: Path, answered: bool, *, version: str = "v2_", fewer: bool = False) -> Options:
    """Questions and annotations as VQA and OK-VQA have them; VQA's first version, or with fewer fields."""
    photographs(folder / "train2014", "COCO_train2014_{:012d}.jpg")
    root, ids = folder / "files", range(COUNT)
    asked = [{"image_id": n, "question": QUESTION, "question_id": 10 * n} for n in ids]
    questions = root / f"{version}OpenEnded_mscoco_train2014_questions.json"
    to_json(questions, {"questions": asked} if fewer else {"info": {}, "license": {}, "questions": asked})
    types = {} if fewer else {"answer_type": "other", "question_type": "what"}
    given = [
        {"question_id": 10 * n, "image_id": n, "answers": ten(n, raw_answer="x", answer_id=1), **types}
        for n in ids
    ]
    if answered:
        name = f"{version}mscoco_train2014_annotations.json"
        to_json(root / name, {"annotations": given} if fewer else {"info": {}, "annotations": given})
    return {"data": str(root), "images": folder / "train2014"}


def gqa(folder: Path, answered: bool) -> Options:
    photographs(folder / "images", "{}.jpg")
    rows = {f"0{n}": {"imageId": str(n), "question": QUESTION} for n in range(COUNT)}
    rows = {key: _row(row, n, answered) for n, (key, row) in enumerate(rows.items())}
    return to_json(folder / "questions.json", rows) | {"images": folder / "images"}


def aokvqa(folder: Path, answered: bool) -> Options:
    photographs(folder / "train2017", "{:012d}.jpg")
    right = [{"correct_choice_idx": n % 4, "direct_answers": [answer_of(n)] * 10} for n in range(COUNT)]
    rows = [
        {"split": "train" if answered else "test", "image_id": n, "question_id": f"q{n}"}
        | {"question": QUESTION, "choices": list(COLOURS)}
        | (right[n] if answered else {})
        for n in range(COUNT)
    ]
    return to_json(folder / "aokvqa.json", rows) | {"images": folder / "train2017"}


def textvqa(folder: Path, answered: bool) -> Options:
    photographs(folder / "train_images", "00{}fe05.jpg")
    rows = [
        {"question": QUESTION, "image_id": f"00{n}fe05", "question_id": n, "set_name": "train"}
        | ({"answers": [answer_of(n)] * 10} if answered else {"set_name": "test"})
        for n in range(COUNT)
    ]
    return to_json(folder / "TextVQA.json", {"dataset_type": "train", "data": rows}) | {
        "images": folder / "train_images"
    }


def stvqa(folder: Path, answered: bool) -> Options:
    names = photographs(folder / "ST-VQA", "coco-text/COCO_train2014_{:012d}.jpg")
    rows = [
        {"file_path": name, "file_name": name.split("/")[1], "question": QUESTION, "question_id": n}
        | {"set_name": "train", "answers": [answer_of(n)] * 2}
        for n, name in enumerate(names)
    ]
    return to_json(folder / "train.json", {"dataset_name": "st-vqa", "data": rows}) | {
        "images": folder / "ST-VQA"
    }


def visual7w(folder: Path, answered: bool) -> Options:
    names = photographs(folder / "images", "v7w_{}.jpg")
    content = []
    for number, name in enumerate(names):
        wrong = [colour for colour in COLOURS if colour != answer_of(number)]
        pair = {"qa_id": number, "question": QUESTION, "type": "what", "image_id": number}
        pairs = [pair | {"answer": answer_of(number), "multiple_choices": wrong}]
        split = "test" if number == 0 else "val" if number == 2 else "train"
        content.append({"image_id": number, "filename": name, "split": split, "qa_pairs": pairs})
    return to_json(folder / "dataset_v7w.json", {"dataset": "v7w", "images": content}) | {
        "images": folder / "images"
    }


def flickr(folder: Path, answered: bool) -> Options:
    names = photographs(folder / "images", "{}_8k.jpg")
    content = [
        {
            "imgid": n,
            "filename": name,
            "split": "test" if n == 0 else "val" if n == 2 else "train",
            "sentids": [n],
            "sentences": [{"raw": f"a {answer_of(n)} shape", "tokens": [], "imgid": n, "sentid": n}],
        }
        for n, name in enumerate(names)
    ]
    return to_json(folder / "dataset_flickr8k.json", {"dataset": "flickr8k", "images": content}) | {
        "images": folder / "images"
    }


def coco2017(folder: Path, answered: bool) -> Options:
    names = photographs(folder / "train2017", "{:012d}.jpg")
    content = {
        "info": {},
        "licenses": [{"id": 1, "name": "x"}],
        "images": [{"id": n, "file_name": name, "license": 1} for n, name in enumerate(names)],
        "annotations": [{"id": n, "image_id": n, "caption": f"a {answer_of(n)} shape"} for n in range(COUNT)],
    }
    return to_json(folder / "captions_train2017.json", content) | {"images": folder / "train2017"}


def nlvr2(folder: Path, answered: bool) -> Options:
    for side in (0, 1):
        photographs(folder / "train", f"train-{{}}-0-img{side}.png")
    rows = [
        {"identifier": f"train-{n}-0-0", "sentence": "Both are red.", "directory": n, "synset": "x"}
        | ({"label": str(n % 2 == 0)} if answered else {})
        for n in range(COUNT)
    ]
    return to_lines(folder / "train.jsonl", rows) | {"images": folder / "train"}


FORMS = {
    "json": Form(lambda f, a: to_json(f / "rows.json", plain(f, a))),
    "jsonl": Form(lambda f, a: to_lines(f / "rows.jsonl", plain(f, a))),
    "csv": Form(lambda f, a: to_csv(f / "rows.csv", plain(f, a))),
    "tsv": Form(lambda f, a: to_csv(f / "rows.tsv", plain(f, a), "\t")),
    "parquet": Form(lambda f, a: to_parquet(f / "rows.parquet", plain(f, a))),
    "embedded bytes": Form(lambda f, a: to_parquet(f / "rows.parquet", with_bytes(f, a))),
    "save_to_disk": Form(saved_to_disk),
    "save_to_disk with bytes": Form(saved_with_bytes),
    "imagefolder": Form(image_folder, "labels", "accuracy", tests=False),
    "captioned imagefolder": Form(captioned_folder, "captions", "CIDEr", "", tests=False),
    "hub": Form(from_hub),
    "data urls": Form(data_urls),
    "trl messages": Form(trl_messages),
    "trl prompt and completion": Form(trl_completions, tests=False),
    "llava": Form(llava),
    "vizwiz": Form(vizwiz, primary="vqa_accuracy"),
    "ok-vqa": Form(lambda f, a: vqa(f, a, version=""), primary="vqa_accuracy"),
    "vqa v2": Form(vqa, primary="vqa_accuracy"),
    "vqa v1 with fewer fields": Form(lambda f, a: vqa(f, a, version="", fewer=True), primary="vqa_accuracy"),
    "gqa": Form(gqa),
    "a-okvqa": Form(aokvqa, primary="accuracy"),
    "textvqa": Form(textvqa, primary="vqa_accuracy"),
    "st-vqa": Form(stvqa, primary="vqa_accuracy", tests=False),
    "visual7w": Form(visual7w, primary="accuracy", tests=False),
    "flickr8k": Form(flickr, "captions", "CIDEr", "", tests=False),
    "coco 2017": Form(coco2017, "captions", "CIDEr", "", tests=False),
    "nlvr2": Form(nlvr2, answer="False", images=2),
}
TRAINED_ALWAYS = ("csv", "a-okvqa", "imagefolder")
"""The others are trained by the slow suite."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched of a data set is in a folder."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "hub"))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", FORMS)
def test_every_format_is_read_and_scored(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    task = load_task("vqa", split="all", **form.write(tmp_path, True))
    assert (task.name, task.primary, len(task), task.image_count) == (
        form.task,
        form.primary,
        COUNT,
        form.images,
    )
    assert not task.missing_images()
    wanted = list(range(COUNT))
    for place in wanted:
        pixels = [read_image(path).tobytes() for path in task[place].images]
        assert pixels == [read_image(PHOTOS[place]).tobytes()] * form.images
    assert task[1].answer == form.answer
    examples = [task[place] for place in wanted]
    if form.task == "captions":
        assert [example.answers for example in examples] == [(f"a {answer_of(n)} shape",) for n in wanted]
        return  # scored by the slow tests, and by those of captions
    perfect = task.score({example.example_id: example.answer for example in examples})
    assert (next(iter(perfect)), perfect[form.primary]) == (form.primary, 100)
    wrong = task.score({example.example_id: "nothing" for example in examples})
    assert wrong[form.primary] == 0


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.tests])
def test_sets_without_answers_are_read(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    task = load_task("vqa", split="all", **form.write(tmp_path, False))
    assert (len(task), task.image_count, task[1].answers) == (COUNT, form.images, ())
    assert task.score(dict.fromkeys(task.example_ids(), "red")) == {}


@pytest.mark.usefixtures("hub", "fresh_accelerate")
@pytest.mark.parametrize(
    "name",
    [name if name in TRAINED_ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in FORMS],
)
def test_every_format_is_learnt_scored_and_answered(
    name: str, tmp_path: Path, make_run: Callable[..., RunConfig]
) -> None:
    form = FORMS[name]
    own = OwnOptions.of(**form.write(tmp_path, True))
    data = DataOptions(own=own, max_lost_answers=1.0, meteor=False, num_beams=1)
    trained = with_(make_run(data, max_steps=1), output_dir=tmp_path / "run")
    scores = run(trained).scores
    assert form.primary in scores
    found = score_run(EvaluateConfig(run=tmp_path / "run", output_dir=tmp_path / "again"))
    assert {name: found.scores[name] for name in scores} == scores
    if form.tests:
        (tmp_path / "test").mkdir()
        own = OwnOptions.of(**form.write(tmp_path / "test", False))
        if name == "hub":
            own = OwnOptions(data=str(tmp_path / "test" / "hub"))
    output = tmp_path / "answers.jsonl"
    predict(PredictConfig((), str(tmp_path / "run"), own=own, output=output, split="all", device="cpu"))
    answers = [json.loads(line)["answer"] for line in output.read_text().splitlines()]
    assert len(answers) == COUNT
    if form.primary == "accuracy":
        assert set(answers) <= set(COLOURS)
    predictor = dept_vl.load(tmp_path / "run", device="cpu")
    images = [PHOTOS[0]] * form.images
    asked = QUESTION if form.task == "vqa" else ""
    assert isinstance(predictor.answer(tuple(images) if form.images > 1 else images[0], asked), str)
