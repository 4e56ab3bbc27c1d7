"""Features of a data set, written by a script and used by runs, on one process and on two."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import write_vqa
from PIL import Image
from runs import (
    assert_same,
    files,
    in_two_processes,
    log,
    reset_accelerate,
    start_two_processes,
    with_,
)

from dept_vl._utils.io import write_atomically
from dept_vl.cli import parse_extraction
from dept_vl.config import BackboneOptions, DataOptions, EvaluateConfig, RunConfig
from dept_vl.data import feature_store as feature_files
from dept_vl.data.feature_index import read_index
from dept_vl.data.feature_store import shard_name
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training.extract import extract
from dept_vl.training.options import ExtractConfig
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run
from scripts import bench_features

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SHARDS = [shard_name(number) for number in range(3)]


@pytest.fixture
def config(tmp_path: Path, make_run: Callable[..., RunConfig]) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa", images=5), dev_split="val", test_split="val")
    made = make_run(data, max_steps=4)
    return with_(made, output_dir=tmp_path / "run")


@pytest.fixture
def extraction(config: RunConfig) -> ExtractConfig:
    """Ten images in four shards."""
    return ExtractConfig(
        data=config.data, backbone=config.backbone, dtype="float32", shard_images=3, batch_size=2
    )


def folder_of(config: RunConfig) -> Path:
    assert config.data.data_dir is not None
    return config.data.data_dir / "features"


def test_a_run_from_files_is_a_live_run(
    config: RunConfig, extraction: ExtractConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = with_(config, data={"features": "live"}, output_dir=tmp_path / "live")
    run(live)
    reset_accelerate()
    assert extract(extraction) == [folder_of(config)]
    said = capsys.readouterr().out
    assert "10 images of vqav2: " in said
    assert "10 images encoded, 0 were there" in said
    reset_accelerate()
    run(with_(config, data={"features": "cached"}))
    assert f"visual features: float32 from {folder_of(config)}" in capsys.readouterr().out
    assert_same(tmp_path / "live", tmp_path / "run", atol=1e-5)
    for one, other in zip(log(tmp_path / "live"), log(tmp_path / "run"), strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-5)
    # The choice of auto.
    reset_accelerate()
    run(with_(config, output_dir=tmp_path / "auto"))
    assert_same(tmp_path / "auto", tmp_path / "run")
    evaluated = []
    for choice in ("cached", "live"):
        reset_accelerate()
        options: dict[str, Any] = {
            "features": choice,
            "output_dir": tmp_path / f"scored {choice}",
            "limit": 7,
        }
        evaluated.append(score_run(EvaluateConfig(run=tmp_path / "run", **options)).evaluation)
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0].predictions) == 7


def test_a_run_without_the_files_that_it_is_to_use_says_how_to_make_them(config: RunConfig) -> None:
    with pytest.raises(FileNotFoundError, match=r"no visual features at .*features: .*dept-vl features"):
        run(with_(config, data={"features": "cached"}))


def test_a_run_goes_on_with_features_of_the_same_precision_alone(
    config: RunConfig, extraction: ExtractConfig
) -> None:
    run(config)  # in memory
    folder = Path(config.output_dir or "")
    (folder / "summary.json").unlink()
    reset_accelerate()
    extract(replace(extraction, dtype="float16"))
    again = replace(config, resume="auto")
    reset_accelerate()
    with pytest.raises(
        ValueError, match=r"began with visual features in float32 and would continue with float16"
    ):
        run(again)
    for options in ({"features": "live"}, {"feature_memory": 0.0, "features": "live"}):
        reset_accelerate()
        assert run(with_(again, data=options)).exit_status == 0
        (folder / "summary.json").unlink()
    shutil.rmtree(folder_of(config))
    reset_accelerate()
    extract(extraction)
    reset_accelerate()
    assert run(again).exit_status == 0


@pytest.mark.parametrize("layout", ["own", pytest.param("vqav2", marks=pytest.mark.slow)])
def test_an_image_of_the_same_size_that_was_changed_later_is_encoded_again(
    config: RunConfig,
    extraction: ExtractConfig,
    tmp_path: Path,
    layout: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = tmp_path / "vqa" / "train2014" / "COCO_train2014_000000000001.jpg"
    if layout == "own":
        folder = tmp_path / "own"
        folder.mkdir()
        image = folder / "1.png"
        rows = [{"image": f"{n}.png", "question": "what ?", "answer": "red"} for n in range(4)]
        for row in rows:
            Image.new("RGB", (40, 32), (200, 40, 10 * len(row["image"]))).save(folder / row["image"])
        parts = [{**row, "split": part} for row in rows for part in ("train", "validation", "test")]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, parts)))
        data = DataOptions(own=OwnOptions(data=str(folder / "rows.jsonl")))
        config, extraction = replace(config, data=data), replace(extraction, data=data)
    extract(extraction)
    was, stat = image.read_bytes(), image.stat()
    Image.new("RGB", (40, 32), (10, 250, 90)).save(image)
    image.write_bytes(image.read_bytes().ljust(len(was), b"\0"))
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert image.stat().st_size == len(was)
    assert image.read_bytes() != was
    reset_accelerate()
    with pytest.raises(ValueError, match=rf"1 of \d+ images have changed in size or time .*\({image}\)"):
        run(with_(config, data={"features": "cached"}))
    reset_accelerate()
    capsys.readouterr()
    run(with_(config, output_dir=tmp_path / "auto"))
    assert "images have changed and are encoded again" in capsys.readouterr().out
    reset_accelerate()
    run(with_(config, data={"features": "live"}, output_dir=tmp_path / "live"))
    assert_same(tmp_path / "live", tmp_path / "auto", atol=1e-5)


def test_two_processes_write_what_one_does(extraction: ExtractConfig, tmp_path: Path) -> None:
    extract(extraction)
    other = replace(extraction, data=replace(extraction.data, features_dir=tmp_path / "two"))
    in_two_processes(extract, other)
    assert sorted(files(tmp_path / "two")) == [
        *(f"features-{n:05d}.safetensors" for n in range(4)),
        "index.json",
    ]
    assert files(tmp_path / "two") == files(extraction.data.data_dir / "features")  # type: ignore[operator]


def extract_and_die(config: ExtractConfig, shards: int) -> None:
    """Killed when so many shards of this process are written, as a machine that loses its power."""
    left = [shards]

    def dying(path: Path, content: bytes) -> None:
        write_atomically(path, content)
        left[0] -= path.name != "index.json"
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    feature_files.write_atomically = dying  # type: ignore[attr-defined]
    extract(config)


def test_two_processes_go_on_after_a_kill(extraction: ExtractConfig, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    config = replace(extraction, data=replace(extraction.data, features_dir=folder))
    assert start_two_processes(extract_and_die, config, 1) == [-signal.SIGKILL] * 2
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert sorted(kept) == SHARDS[:2]
    # One alone goes on with what two began.
    extract(config)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    reset_accelerate()
    extract(extraction)
    assert files(folder) == files(extraction.data.data_dir / "features")  # type: ignore[operator]


def test_a_full_disk(extraction: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "features"
    config = replace(extraction, data=replace(extraction.data, features_dir=folder))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(path: Path, content: bytes) -> None:
        if path.name == SHARDS[1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(feature_files, "write_atomically", full)
        try:
            with pytest.raises(OSError) as error:
                extract(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    message = str(error.value)
    assert f"no room for {folder / SHARDS[1]}: File too large; free some space there. No shard" in message
    assert "the same command resumes" in message
    assert sorted(files(folder)) == [SHARDS[0], "index.json"]
    kept = (folder / SHARDS[0]).stat().st_mtime_ns
    reset_accelerate()
    extract(config)
    assert (folder / SHARDS[0]).stat().st_mtime_ns == kept
    assert read_index(folder)["shard_bytes"] is not None


def test_a_folder_that_may_not_be_written(
    extraction: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "mine":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    config = replace(extraction, data=replace(extraction.data, features_dir=tmp_path / "mine"))
    with pytest.raises(PermissionError, match=r"no permission for .*mine: .* another --features_dir"):
        extract(config)


def test_missing_and_broken_images_of_a_data_set(
    config: RunConfig, extraction: ExtractConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = extraction.data.data_dir
    assert data_dir is not None
    missing, broken = sorted((data_dir / "train2014").iterdir())[:2]
    whole = missing.read_bytes()
    missing.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 5 images of vqav2 are missing"):
        extract(extraction)
    missing.write_bytes(whole)
    broken.write_bytes(b"no image")
    reset_accelerate()
    with pytest.raises(ValueError, match=rf"{broken} is not a readable image.*--on_bad_image skip"):
        extract(extraction)
    missing.unlink()
    reset_accelerate()
    extract(replace(extraction, data=replace(extraction.data, on_bad_image="skip")))
    assert "warning: 2 images cannot be read, the first: no image at" in capsys.readouterr().out
    reset_accelerate()
    result = run(with_(config, data={"features": "cached"}))
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["skipped_examples"] > 0


def test_splits_are_those_of_a_run_unless_said(extraction: ExtractConfig) -> None:
    write_vqa(extraction.data.data_dir or Path(), images=5, subtypes=("train2014", "val2014", "test2015"))
    for splits, count in (((), 10), (("train",), 5), (("test", "train"), 10)):
        reset_accelerate()
        chosen = replace(extraction.data, features_dir=Path(f"{extraction.data.data_dir}-{len(splits)}"))
        folder = extract(replace(extraction, data=chosen, splits=splits))[0]
        assert len(read_index(folder)["images"]) == count


def test_a_task_of_texts_has_nothing_to_encode(
    extraction: ExtractConfig, tmp_path: Path, vision_folders: dict[str, Path]
) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "fine", "label": 1, "idx": 0}\n')
    config = replace(extraction, data=DataOptions(task="sst2", data_dir=tmp_path), splits=("train",))
    with pytest.raises(ValueError, match="sst2 has no images to encode"):
        extract(config)
    reset_accelerate()
    with pytest.raises(ValueError, match="expected an image encoder; give --vision"):
        extract(replace(config, backbone=BackboneOptions(language="t5")))


def test_flags_go_before_the_configuration_of_a_run(tmp_path: Path) -> None:
    content = {
        "data": {"task": "gqa", "test_split": "testdev"},
        "backbone": {"backbone": "data/tiny-clip-t5"},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    flags = ["--config", str(tmp_path / "config.json"), "--data_dir", "data/other", "--dtype", "bfloat16"]
    config = parse_extraction("Encode.", [*flags, "--splits", "train", "val"])
    assert (config.data.task, config.data.data_dir) == ("gqa", Path("data/other"))
    assert config.data.test_split == "testdev"
    assert config.backbone.backbone == Path("data/tiny-clip-t5")
    assert (config.dtype, config.splits) == ("bfloat16", ("train", "val"))
    with pytest.raises(ValueError, match="shard_images is 0; expected 1 or more"):
        parse_extraction("Encode.", ["--shard_images", "0"])


def test_reading_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = bench_features.BenchConfig(
        tmp_path, images=7, shard_images=3, tokens=2, d_vision=4, batches=2, batch_size=5, rounds=1, files=20
    )
    found = bench_features.main(replace(config, json_out=tmp_path / "bench.json"))
    assert found.rows_per_second > 0
    assert found.checksum_gib_per_second >= 0
    assert found.look_seconds is not None
    assert json.loads((tmp_path / "bench.json").read_text())["rows_per_second"] == found.rows_per_second
    assert "rows of 2 x 4 float16 a second" in capsys.readouterr().out
