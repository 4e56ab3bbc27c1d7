"""A table is answered into one file: in order, after any stop, by any number of processes, as by `answer`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image
from runs import in_two_processes, with_

import dept_vl
from dept_vl._utils.errors import DamagedFileError, InUseError, UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import DataOptions, RunConfig
from dept_vl.inference import predict as bulk
from dept_vl.inference.options import PredictConfig
from dept_vl.inference.predict import predict
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training.run import run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
OWN = Path(__file__).parents[1] / "fixtures" / "own"
PHOTOS = OWN / "photos"


@pytest.fixture(scope="module")
def runs_of(
    make_run: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """Folder of a run on a table of the fixtures."""
    root = tmp_path_factory.mktemp("bulk")

    def folder(table: str) -> str:
        if not (root / table).exists():
            own = OwnOptions(data=str(OWN / table), images=PHOTOS)
            data = DataOptions(own=own, max_lost_answers=1.0, meteor=False, num_beams=1)
            run(with_(make_run(data), output_dir=root / table))
        return str(root / table)

    return folder


@pytest.fixture
def asked(runs_of: Callable[[str], str], tmp_path: Path) -> PredictConfig:
    """Questions without answers, of a run on others."""
    own = OwnOptions(data=str(OWN / "qa.csv"), images=PHOTOS)
    return PredictConfig(
        (), runs_of("qa.csv"), own=own, output=tmp_path / "out" / "answers.jsonl", batch_size=5, device="cpu"
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_answered_in_order_as_by_the_predictor(
    asked: PredictConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked.output is not None
    assert predict(asked) == []
    found = rows(asked.output)
    table = dept_vl.load_task("vqa", split="all", **vars(asked.own))
    assert [row["id"] for row in found] == table.example_ids()
    examples = [table[place] for place in range(len(table))]
    assert [row["question"] for row in found] == [one.question for one in examples]
    predictor = dept_vl.load(asked.adapter, device="cpu")
    images, questions = [one.images[0] for one in examples], [one.question for one in examples]
    assert [row["answer"] for row in found] == predictor.answer(images, questions)
    assert "24 answers, 24 of them now" in capsys.readouterr().out
    assert [path.name for path in asked.output.parent.iterdir()] == ["answers.jsonl"]
    with pytest.raises(FileExistsError, match=r"answers\.jsonl"):
        predict(asked)


def stopped_after(batches: int, monkeypatch: pytest.MonkeyPatch, config: PredictConfig) -> None:
    """Start, and be killed after so many batches, in the middle of a line of the next."""
    whole = bulk._answers

    def some(*arguments: Any) -> Iterator[Any]:
        for number, answers in enumerate(whole(*arguments)):
            if number == batches:
                raise KeyboardInterrupt
            yield answers

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "_answers", some)
        with pytest.raises(KeyboardInterrupt):
            predict(config)


def cut(partial_file: Path, size: int) -> None:
    partial_file.write_bytes(partial_file.read_bytes()[:size])


def predict_here(config: PredictConfig) -> None:
    predict(config)


@pytest.mark.parametrize(("processes", "lost_bytes"), [(1, 0), (1, 90), (2, 90)])
def test_a_stop_changes_nothing(
    processes: int,
    lost_bytes: int,
    asked: PredictConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = replace(asked, output=tmp_path / "whole.jsonl")
    predict(whole)
    assert asked.output is not None
    assert whole.output is not None
    stopped_after(2, monkeypatch, asked)
    begun = asked.output.with_name("answers.jsonl.partial")
    assert len(begun.read_bytes().splitlines()) == 10
    cut(begun, len(begun.read_bytes()) - lost_bytes)
    assert not asked.output.exists()
    with pytest.raises(UsageError, match="decoding"):
        predict(replace(asked, task="vqav2"))
    with pytest.raises(UsageError, match="rows"):
        predict(replace(asked, own=replace(asked.own, data=str(OWN / "qa.jsonl"), columns=("id=question",))))
    photos = tmp_path / "photos"
    shutil.copytree(asked.own.images or PHOTOS, photos)
    Image.new("RGB", (50, 40), "red").save(photos / "scan-3.png")
    with pytest.raises(UsageError, match="images"):
        predict(replace(asked, own=replace(asked.own, images=photos)))
    if processes == 1:
        capsys.readouterr()
        predict(asked)
        assert f"{24 - (10 if not lost_bytes else 8)} of them now" in capsys.readouterr().out
    else:
        in_two_processes(predict_here, asked)
    assert asked.output.read_bytes() == whole.output.read_bytes()


def test_images_exchanged_after_a_stop_are_others(
    asked: PredictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(PHOTOS, photos)
    one, other = photos / "scan-3.png", photos / "scan-7.png"
    for time, (path, color) in enumerate(((one, "red"), (other, "blue"))):
        Image.new("RGB", (50, 40), color).save(path, "bmp")
        os.utime(path, (time, time))
    assert one.stat().st_size == other.stat().st_size
    config = replace(asked, own=replace(asked.own, images=photos))
    stopped_after(2, monkeypatch, config)
    first = one.rename(photos / "first")
    other.rename(one)
    first.rename(other)
    with pytest.raises(UsageError, match="images"):
        predict(config)
    copied = tmp_path / "copied"
    shutil.copytree(photos, copied)  # with the times, as `cp -p` does
    one, other = copied / "scan-3.png", copied / "scan-7.png"
    first = one.rename(copied / "first")
    other.rename(one)
    first.rename(other)
    predict(replace(config, own=replace(config.own, images=copied)))
    assert asked.output is not None
    assert len(rows(asked.output)) == 24


def test_an_adapter_described_otherwise_is_another(
    asked: PredictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(2, monkeypatch, asked)
    adapter = Adapter.load(Path(asked.adapter) / "best")
    assert adapter.prompt is not None
    scaled = adapter.prompt | {name: adapter.prompt[name] / 2 for name in ("alpha", "scale")}
    for other in (replace(adapter, question_case="keep"), replace(adapter, prompt=scaled)):
        other.save(tmp_path / "other")
        with pytest.raises(UsageError, match="other adapter"):
            predict(replace(asked, adapter=str(tmp_path / "other")))


def test_a_partial_file_holds_the_first_answers_in_order(
    asked: PredictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked.output is not None
    stopped_after(2, monkeypatch, asked)
    begun = asked.output.with_name("answers.jsonl.partial")
    lines = begun.read_bytes().splitlines(keepends=True)
    for edited in (lines[1:], [*lines, b"\n"], lines * 3, [lines[1], lines[0], *lines[2:]]):
        begun.write_bytes(b"".join(edited))
        with pytest.raises(DamagedFileError, match=r"answers\.jsonl\.partial"):
            predict(asked)
        assert begun.read_bytes() == b"".join(edited)


def test_a_file_that_appears_meanwhile_is_kept(asked: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    output = asked.output
    assert output is not None
    whole = bulk._write

    def write(*arguments: Any) -> int:
        output.write_text("of another program")
        return whole(*arguments)

    monkeypatch.setattr(bulk, "_write", write)
    with pytest.raises(FileExistsError, match=r"answers\.jsonl"):
        predict(asked)
    assert output.read_text() == "of another program"
    assert len(rows(output.with_name("answers.jsonl.partial"))) == 24


def test_a_partial_file_without_its_checksums(asked: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked.output is not None
    stopped_after(2, monkeypatch, asked)
    about = asked.output.with_name("answers.jsonl.partial.json")
    about.write_text("[]")
    with pytest.raises(DamagedFileError, match=about.name):
        predict(asked)
    about.unlink()
    with pytest.raises(UsageError, match=about.name):
        predict(asked)


@pytest.mark.slow
def test_two_machines_write_what_one_writes(asked: PredictConfig, tmp_path: Path) -> None:
    predict(replace(asked, output=tmp_path / "whole.jsonl"))
    assert asked.output is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--num_machines",
        "2",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    command = ["-m", "dept_vl", "predict", "--adapter", asked.adapter, "--data", str(asked.own.data)]
    command += [
        "--images",
        str(PHOTOS),
        "--output",
        str(asked.output),
        "--batch_size",
        "5",
        "--device",
        "cpu",
    ]
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", rank, *command, "--device", "cpu"], stdout=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    told = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert "rows a second on 2 processes" in told[0]
    assert asked.output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_has_one_writer(asked: PredictConfig) -> None:
    assert asked.output is not None
    asked.output.parent.mkdir()
    with (
        FileLock(asked.output.with_name(".answers.jsonl.lock")),
        pytest.raises(InUseError, match=r"answers\.jsonl"),
    ):
        predict(asked)


def test_unreadable_images_get_no_answer(
    asked: PredictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "good.png").write_bytes((PHOTOS / "scan-3.png").read_bytes())
    table = tmp_path / "table.jsonl"
    table.write_text(
        "".join(json.dumps({"image": name, "question": "is it red?"}) + "\n" for name in ("bad.png", "good"))
    )
    config = replace(asked, own=OwnOptions(data=str(table)))
    with pytest.raises(ValueError, match=r"bad\.png"):
        predict(config)
    predict(replace(config, on_bad_image="skip"))
    assert config.output is not None
    assert [row["answer"] is None for row in rows(config.output)] == [True, False]
    assert "1 rows have no readable image" in capsys.readouterr().out


def test_captions_need_images_alone(
    asked: PredictConfig, runs_of: Callable[[str], str], tmp_path: Path
) -> None:
    table = tmp_path / "images.csv"
    table.write_text("file_name\n" + "".join(f"{path.name}\n" for path in sorted(PHOTOS.iterdir())))
    own = OwnOptions(data=str(table), images=PHOTOS)
    config = replace(asked, own=own, adapter=runs_of("captions.jsonl"))
    predict(config)
    assert config.output is not None
    predictor = dept_vl.load(config.adapter, device="cpu")
    assert [row["answer"] for row in rows(config.output)] == predictor.answer(sorted(PHOTOS.iterdir()))
    with pytest.raises(UsageError, match="question"):
        predict(replace(config, adapter=asked.adapter, output=tmp_path / "other.jsonl"))


def test_a_run_may_name_the_form_of_its_rows(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    own = OwnOptions(data=str(OWN / "captions.jsonl"), images=PHOTOS)
    data = DataOptions(task="captions", own=own, max_lost_answers=1.0, meteor=False, num_beams=3)
    run(with_(make_run(data), output_dir=tmp_path / "run"))
    assert dept_vl.load(tmp_path / "run", device="cpu").decoding.num_beams == 3


@pytest.mark.parametrize("family", ["blip2", "llava"])
def test_pretrained_models_answer_tables(
    family: str, pretrained_folder: Callable[[str], Path], asked: PredictConfig, tmp_path: Path
) -> None:
    backbone = open_backbone(model=pretrained_folder(family)).eval()
    torch.manual_seed(0)
    prompt = DePT(backbone.d_model, prompt_length=3, rank=2, max_source_length=64)
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    Adapter.of(PromptedModel(backbone, prompt), task="vqav2", metrics={}).save(tmp_path / "adapter")
    predict(replace(asked, adapter=str(tmp_path / "adapter")))
    assert asked.output is not None
    found = rows(asked.output)
    table = dept_vl.load_task("vqa", split="all", **vars(asked.own))
    images = [table[place].images[0] for place in range(len(table))]
    predictor = dept_vl.load(tmp_path / "adapter", device="cpu")
    answers = [row["answer"] for row in found]
    assert answers == predictor.answer(images, [row["question"] for row in found])
    assert len(set(answers)) > 3
    texts = [*(table[place].question for place in range(2)), "what is this " * 20]
    room = 64 - backbone.frame  # of the question alone
    with pytest.warns(UserWarning, match=f"and is cut to {room}, as in training") as caught:
        predictor.answer(images[:3], texts)
    assert len(caught) == 1
    with pytest.raises(ValueError, match=r"image 2 of 2: .*1 x 300"):
        predictor.answer([images[0], Image.new("RGB", (1, 300))], "what?")


def test_choices_are_ranked(asked: PredictConfig, tmp_path: Path) -> None:
    own = OwnOptions(data=str(OWN / "aokvqa_like.json"), images=PHOTOS)
    output = tmp_path / "answers.ndjson"
    predict(replace(asked, own=own, output=output))
    table = dept_vl.load_task("vqa", split="all", **vars(own))
    assert all(row["answer"] in table[place].choices for place, row in enumerate(rows(output)))


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"output": None}, "--output"),
        ({"output": Path()}, "--output"),  # of an empty text
        ({"output": Path("answers.csv")}, r"answers\.jsonl"),
        ({"output": Path("answers.jsonl.gz")}, r"answers\.jsonl"),
        ({"inputs": ("a.jpg",)}, r"a\.jpg"),
        ({"own": OwnOptions()}, "--data"),
        ({"task": "nlvr2"}, "2 images"),
        ({"split": "nowhere"}, "nowhere"),
    ],
)
def test_options_that_do_not_fit(asked: PredictConfig, changed: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        predict(replace(asked, **changed))
