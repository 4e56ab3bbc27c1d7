"""Runs that are logged to the real trackers, offline: TensorBoard, W&B, trackio."""

import json
import signal
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_vqa
from runs import files, in_two_processes, log, reset_accelerate, with_

from dept_vl.config import DataOptions, RunConfig
from dept_vl.training.run import run
from dept_vl.training.trackers import TRACKER_FILE, check_tracker, hyper_parameters

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STEPS = 4
FIGURES = {
    *("loss", "lr/prompt", "lr/low_rank", "lr/visual_projection", "samples_per_second"),
    *("tokens_per_second", "memory_gib", "seconds_left", "score", "dev/overall", "test/overall"),
}
"""Names that dashboards may rely on."""

Found = dict[str, list[tuple[int, float]]]
"""Steps and values by name."""


@pytest.fixture
def config(tmp_path: Path, make_run: Callable[..., RunConfig]) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa", images=3), holdout_images=1)
    config = make_run(data, max_steps=STEPS)
    return with_(config, output_dir=tmp_path / "run", train={"checkpoint_every": 1})


def stopped_and_resumed(config: RunConfig) -> Path:
    """The folder of a run that was sent SIGTERM in its third step, and then went on."""
    calls = 0
    step = torch.optim.AdamW.step

    def counting(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **options)

    again = with_(config, resume="auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counting)
        assert run(again).exit_status == 143
    reset_accelerate()
    time.sleep(1)  # W&B's offline files are called by the second
    assert run(again).exit_status == 0
    return Path(config.output_dir or "")


def assert_as_logged(folder: Path, found: Found) -> None:
    """The tracker has the names, steps and values of the run's own log."""
    assert found.keys() >= FIGURES
    for name in ("loss", "lr/prompt", "score", "dev/overall"):
        own = {line["step"]: line[name] for line in log(folder) if name in line}
        assert [step for step, _ in found[name]] == list(own)
        assert dict(found[name]) == pytest.approx(own)
    summary = json.loads((folder / "summary.json").read_text())
    assert found["test/overall"] == [(STEPS, pytest.approx(summary["scores"]["overall"]))]


def in_tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # As the server reads a folder: all files, what was purged left out.
    events = EventAccumulator(str(folder / "dept_vl"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard(config: RunConfig) -> None:
    pytest.importorskip("tensorboard")
    folder = stopped_and_resumed(with_(config, log_with="tensorboard"))
    assert_as_logged(folder, in_tensorboard(folder))
    (options,) = folder.rglob("hparams.yml")
    text = options.read_text()
    for line in (f"train.max_steps: {STEPS}", "prompt.rank: 2", "optim.prompt_lr: 0.05", "data.task: vqav2"):
        assert line in text.splitlines()


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of W&B's file of a run: a log as LevelDB has it, behind a header of seven bytes."""
    content, record = path.read_bytes(), b""
    place = 7
    while place < len(content):
        left_in_block = 32_768 - place % 32_768
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)  # behind a checksum
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def in_wandb(folder: Path) -> tuple[Found, dict[str, Any]]:
    """Figures and options of a run, of all its offline files in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, dict[int, float]] = {}
    options: dict[str, Any] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for content in wandb_records(path):
            record = Record()
            record.ParseFromString(content)
            options |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in items.items():
                found.setdefault(name, {}).setdefault(int(items["_step"]), value)
    return {name: sorted(steps.items()) for name, steps in found.items()}, options


def test_wandb(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = stopped_and_resumed(with_(config, log_with="wandb"))
    wandb.teardown()  # the process that writes the files ends, and they are whole
    found, options = in_wandb(folder)
    assert_as_logged(folder, found)
    assert options["train.max_steps"] == STEPS
    assert options["prompt.rank"] == 2
    assert options["trainable_parameters.prompt"] > 0
    # Both parts are of one run.
    key = json.loads((folder / TRACKER_FILE).read_text())["id"]
    assert {path.name for path in folder.glob("wandb/offline-run-*/*.wandb")} == {f"run-{key}.wandb"}


def test_trackio(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    folder = stopped_and_resumed(with_(config, log_with="trackio"))
    database = sqlite3.connect(tmp_path / "trackio" / "dept_vl.db")
    found: dict[str, dict[int, float]] = {}
    names = set()
    for name, step, values in database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
        names.add(name)
        for key, value in json.loads(values).items():
            found.setdefault(key, {})[step] = value
    assert_as_logged(folder, {name: sorted(steps.items()) for name, steps in found.items()})
    key = json.loads((folder / TRACKER_FILE).read_text())["id"]
    assert names == {f"run-{key}"}
    ((options,),) = database.execute("SELECT config FROM configs")
    assert json.loads(options)["train.max_steps"] == STEPS
    database.close()


@pytest.mark.parametrize("name", ["tensorboard", pytest.param("wandb", marks=pytest.mark.slow)])
def test_a_tracker_changes_no_result(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(config)
    reset_accelerate()
    run(with_(config, output_dir=tmp_path / "tracked", log_with=name))
    alone, tracked = files(tmp_path / "run"), files(tmp_path / "tracked")
    for file in ("best/adapter.safetensors", "last/adapter.safetensors", "predictions.json"):
        assert alone[file] == tracked[file]


def test_one_of_two_processes_logs(config: RunConfig) -> None:
    pytest.importorskip("tensorboard")
    in_two_processes(run, with_(config, log_with="tensorboard", train={"per_device_batch_size": 2}))
    folder = Path(config.output_dir or "")
    assert_as_logged(folder, in_tensorboard(folder))
    assert len(list(folder.glob("dept_vl/events.*"))) == 1


def test_a_run_without_a_name_has_its_tracker_in_its_own_folder(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    folder = run(with_(config, output_dir=None, log_with="tensorboard")).output_dir
    assert_as_logged(folder, in_tensorboard(folder))


def test_a_tracker_that_there_is_not_is_refused_before_anything_is_made(config: RunConfig) -> None:
    with pytest.raises(
        ValueError, match=r"log_with is 'tensorbord'; expected one of .*tensorboard, trackio, wandb"
    ):
        run(with_(config, log_with="tensorbord"))
    assert not Path(config.output_dir or "").exists()


def test_a_package_that_is_not_installed_is_named() -> None:
    from accelerate.tracking import get_available_trackers

    missing = {"clearml", "aim", "dvclive"} - set(map(str, get_available_trackers()))
    assert missing
    for name in missing:
        with pytest.raises(
            ImportError, match=rf"needs the package {name}, which is not installed: pip install {name}"
        ):
            check_tracker(name)
    check_tracker(None)


def test_a_package_of_an_extra_is_named_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dept_vl.training.trackers.get_available_trackers", list)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[trackio\]"'):
        check_tracker("trackio")


def test_hyper_parameters_are_flat_and_of_plain_types(config: RunConfig) -> None:
    several = with_(config, also=(DataOptions(task="gqa"),))
    options = hyper_parameters(several)
    assert options["data.task"] == "vqav2"
    assert options["also.0.task"] == "gqa"
    assert options["prompt.init_from"] == ""
    assert "log_with" not in options
    assert {type(value) for value in options.values()} <= {str, int, float, bool}
