"""The registry of tasks: light to list, and a task that is defined here takes part in everything."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image, ImageDraw
from runs import with_

from dept_vl._utils.errors import UnknownNameError
from dept_vl.cli import parse
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig, differences, to_json
from dept_vl.data.splits import load_splits
from dept_vl.inference.loading import load
from dept_vl.studies.options import TransferConfig
from dept_vl.studies.transfer import transfer
from dept_vl.tasks import TASKS, load_task, register_task
from dept_vl.tasks.base import Example, Task
from dept_vl.tasks.io.predictions import PredictionFormat
from dept_vl.tasks.io.rows import NO_ROWS, Rows
from dept_vl.training.options import ReportConfig
from dept_vl.training.report.remake import remake
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run
from scripts import train_caption, train_gqa, train_nlvr2

SCHEMA = pa.schema({"id": pa.string(), "image": pa.string(), "answers": pa.list_(pa.string())})
QUESTION = "how many squares?"


@dataclass(frozen=True)
class Squares(Task):
    """Count the squares: the recipe of `register_task`, step by step."""

    rows: Rows = NO_ROWS
    folder: Path = Path()

    name = "squares"
    prefix = "count: "
    id_column = "id"
    prediction_format = PredictionFormat("id", "count", "str")
    dev_split = "dev"
    test_split = "test"

    def read(self, root: Path, split: str) -> "Squares":
        """Read `SPLIT.json`."""
        return replace(
            self, rows=Rows.of(json.loads((root / f"{split}.json").read_text()), SCHEMA), folder=root
        )

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        answer = row["answers"][0]
        return Example(
            example_id=row["id"],
            source_text=self.source(QUESTION),
            images=(self.folder / row["image"],),
            targets=((answer, 1.0),),
            question=QUESTION,
            answer=answer,
            answers=(answer,),
        )


@pytest.fixture
def squares() -> Iterator[None]:
    """The task, registered for a test."""
    register_task(Squares())
    yield
    TASKS.unregister("squares")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Its files: pictures with one or two squares, half of each."""
    root = tmp_path / "squares"
    root.mkdir()
    for split, size in (("train", 16), ("dev", 4), ("test", 6)):
        rows = []
        for number in range(size):
            picture, count = Image.new("RGB", (24, 24)), number % 2 + 1
            for corner in range(count):
                ImageDraw.Draw(picture).rectangle((2 + 12 * corner, 4, 8 + 12 * corner, 10), fill="red")
            name = f"{split}-{number}"
            picture.save(root / f"{name}.png")
            rows.append({"id": name, "image": f"{name}.png", "answers": [str(count)]})
        (root / f"{split}.json").write_text(json.dumps(rows))
    return root


@pytest.mark.usefixtures("fresh_accelerate", "squares")
def test_a_new_task_takes_part_in_everything(
    folder: Path, scenes: Path, tmp_path: Path, make_run: Callable[..., RunConfig]
) -> None:
    # Trained and scored on the splits that the task names.
    config = with_(
        make_run(DataOptions(task="squares", data_dir=folder, max_lost_answers=1.0)),
        output_dir=tmp_path / "run",
    )
    result = run(config)
    assert list(result.scores) == ["accuracy"]
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [row["id"] for row in predictions] == [f"test-{number}" for number in range(6)]
    assert "squares test: accuracy (0-100)" in (tmp_path / "run" / "summary.md").read_text()

    # Evaluated on another split.
    found = score_run(EvaluateConfig(run=tmp_path / "run", split="dev"))
    assert found.output_dir == tmp_path / "run" / "squares-dev"
    assert found.evaluation.scores == load_task("squares", folder, "dev").score(found.evaluation.predictions)

    # Reported on.
    assert QUESTION in remake(ReportConfig(tmp_path / "run")).read_text()

    # Asked a question of our own.
    assert isinstance(load(tmp_path / "run").answer(folder / "test-0.png", QUESTION), str)

    # Transferred from and to.
    vqav2 = with_(config, data=DataOptions(data_dir=scenes / "vqav2", holdout_images=2), output_dir=None)
    (tmp_path / "vqav2.json").write_text(json.dumps(to_json(vqav2)))
    few = TransferConfig(
        source=(str(tmp_path / "run"),),
        target="vqav2",
        data_dir=scenes / "vqav2",
        k=(1,),
        seeds=1,
        starts=("prompt",),
        output_dir=tmp_path / "from",
    )
    transfer(few, more_to_come=True)
    to = replace(
        few,
        source=("vqav2",),
        source_config=(tmp_path / "vqav2.json",),
        target="squares",
        config=tmp_path / "run" / "config.json",
        data_dir=folder,
        output_dir=tmp_path / "to",
    )
    transfer(to, more_to_come=True)
    for name, target in (("from", "vqav2"), ("to", "squares")):
        assert json.loads((tmp_path / name / "transfer.json").read_text())["target"] == target


@pytest.mark.usefixtures("squares")
def test_a_task_is_found_by_its_name_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    Path("data").mkdir()
    folder.rename("data/squares")
    assert len(load_task("squares")) == 16
    register_task(Squares())  # as by running its cell again
    with pytest.raises(ValueError, match="'squares' is registered already"):
        register_task(type("Other", (Squares,), {})())
    for wrong in (Squares, "squares"):
        with pytest.raises(TypeError):
            register_task(wrong)
    with pytest.raises(ValueError, match="name that a folder can have"):
        register_task(type("Other", (Squares,), {"name": "../squares"})())
    Path("data/squares/none.json").write_text("[]")
    with pytest.raises(ValueError, match="none of squares has no examples"):
        load_splits(DataOptions(task="squares", train_split="none"), 0)
    with pytest.raises(UnknownNameError) as error:
        load_task("sqares")
    assert error.value.closest[0] == "squares"


def test_an_unregistered_task_is_unknown() -> None:
    with pytest.raises(UnknownNameError):
        DataOptions(task="squares").splits()


def test_listing_the_tasks_imports_no_engine() -> None:
    code = (
        "import sys; from dept_vl.tasks import TASKS; assert 'rte' in list(TASKS)\n"
        "print(*{'torch', 'pyarrow', 'transformers', 'numpy', 'PIL'} & {*sys.modules})"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == []


@pytest.mark.parametrize("name", TASKS)
def test_a_blank_task_knows_its_name_and_has_no_examples(name: str) -> None:
    task = TASKS[name]
    assert (task.name, len(task), task.example_call != "") == (name, 0, True)
    assert task.train_split
    assert task.test_split


@pytest.mark.parametrize(
    ("task", "splits"),
    [
        ("vqav2", ("train", "", "val")),
        ("gqa", ("train", "val", "testdev")),
        ("nlvr2", ("train", "dev", "test1")),
        ("coco", ("train", "val", "test")),
        ("rte", ("train", "validation", "test")),
    ],
)
def test_splits_left_out_are_the_tasks_own(task: str, splits: tuple[str, str, str]) -> None:
    assert DataOptions(task=task).splits() == splits
    assert DataOptions(task=task, train_split="", test_split="").splits() == splits
    held_out = "validation" if task == "rte" else ""
    assert DataOptions(task=task, dev_split="").splits()[1] == held_out
    assert DataOptions(task, None, "a", "b", test_split="c").splits() == ("a", "b", "c")


@pytest.mark.parametrize(
    ("task", "script"), [("gqa", train_gqa), ("coco", train_caption), ("nlvr2", train_nlvr2)]
)
def test_one_script_trains_what_another_does(task: str, script: object) -> None:
    one, other = parse(RunConfig(), "", ["--task", task]), parse(script.DEFAULTS, "", [])
    assert one == other
    assert one.data.splits() == other.data.splits()


@pytest.mark.parametrize(("task", "longest"), [("vqav2", 20), ("gqa", 20), ("nlvr2", 72), ("rte", 256)])
def test_texts_are_as_long_as_their_tasks(task: str, longest: int, tmp_path: Path) -> None:
    def chosen(*flags: str) -> int:
        return parse(RunConfig(), "", flags).prompt.max_source_length

    assert chosen("--task", task) == longest
    assert chosen("--task", task, "--max_source_length", "20") == 20
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"data": {"task": "vqav2"}, "also": [{"task": task}]}))
    assert chosen("--config", str(file)) == longest
    file.write_text(json.dumps({"data": {"task": task}, "prompt": {"max_source_length": 21}}))
    assert chosen("--config", str(file)) == 21


def test_a_run_of_an_older_version_goes_on() -> None:
    now = to_json(RunConfig(data=DataOptions(task="vqav2"), also=(DataOptions(task="rte"),)))
    before = to_json(RunConfig(data=DataOptions(task="vqav2"), also=(DataOptions(task="rte"),)))
    for data in (before["data"], *before["also"]):
        data |= {"train_split": "train", "dev_split": "", "test_split": ""}
    assert differences(before, now) == []
    before["data"]["dev_split"] = "minival"
    assert differences(before, now) == ["data.dev_split='minival' -> ''"]
