"""Visual features, in memory and from files; files that are damaged, unfinished, or of another encoder."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import random_image
from helpers import write_vqa
from runs import (
    assert_same,
    in_two_processes,
    log,
    reset_accelerate,
    start_two_processes,
    tiny_run,
    with_,
)
from transformers import AutoTokenizer

from dept_vl import features
from dept_vl.assess import AssessConfig, assess
from dept_vl.backbone import Backbone
from dept_vl.batch import Collator, Draw
from dept_vl.cli import parse_extraction
from dept_vl.config import BackboneOptions, DataOptions, ExtractConfig, RunConfig
from dept_vl.extract import extract
from dept_vl.features import (
    DTYPES,
    FeatureTable,
    image_keys,
    load_pixels,
    open_features,
    read_index,
    table_bytes,
    write_features,
)
from dept_vl.files import write_atomically
from dept_vl.model import PromptedModel
from dept_vl.run import run
from dept_vl.tasks.example import Example
from dept_vl.vision import VisionEncoder
from scripts import bench_features, extract_features

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SHARDS = [f"features-{number:05d}.safetensors" for number in range(3)]


@pytest.fixture
def vision(vision_folders: dict[str, Path]) -> VisionEncoder:
    return VisionEncoder.from_pretrained(vision_folders["clip"])


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Images of two splits, which have files of one name."""
    modes = ["RGB", "L", "RGB", "RGBA", "RGB"]
    found = [
        tmp_path / f"{'train' if number < 3 else 'val'}/{number % 3}.png" for number in range(len(modes))
    ]
    for seed, (path, mode) in enumerate(zip(found, modes, strict=True)):
        path.parent.mkdir(exist_ok=True)
        random_image((40 + seed, 36), seed, mode).save(path)
    return found


def write(vision: VisionEncoder, paths: list[Path], folder: Path, **options: Any) -> int:
    """Three shards; how many images were encoded."""
    options = {"dtype": "float32", "shard_images": 2, "batch_size": 2} | options
    return write_features(vision, paths[0].parents[1], paths, folder, Accelerator(cpu=True), **options)


def opened(vision: VisionEncoder, paths: list[Path], folder: Path) -> FeatureTable:
    return open_features(vision, paths[0].parents[1], paths, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- in memory


def test_table_equals_live_encoding(
    vision: VisionEncoder, paths: list[Path], language_folders: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(language_folders["t5"])
    table = FeatureTable.encode(vision, paths, batch_size=2, progress=False)
    draws = [
        Draw(Example(number, "vqa: what ?", pair, ()))
        for number, pair in enumerate([(paths[4], paths[1]), (paths[0], paths[3]), (paths[2], paths[2])])
    ]
    looked_up, live = (
        Collator(tokenizer, max_source_length=20, max_target_length=9, images=images)(draws)
        for images in (table, vision)
    )
    assert looked_up.visual_features is not None
    assert live.pixel_values is not None
    assert looked_up.pixel_values is None
    encoded = vision(live.pixel_values.flatten(0, 1)).unflatten(0, (3, 2))
    torch.testing.assert_close(looked_up.visual_features, encoded)
    assert looked_up.visual_features.shape == (3, 2, vision.token_count, vision.d_vision)
    assert len({tuple(row.flatten().tolist()) for row in table([[path] for path in paths])}) == len(paths)


def test_each_image_is_read_and_encoded_once(
    vision: VisionEncoder, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    encoded: list[int] = []

    def counting(vision: VisionEncoder, path: Path) -> torch.Tensor:
        read.append(path)
        return load_pixels(vision, path)

    monkeypatch.setattr(features, "load_pixels", counting)
    vision.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    repeated = [*paths, *paths[::-1], paths[0]]
    table = FeatureTable.encode(vision, repeated, batch_size=2, progress=False)
    assert read == paths
    assert encoded == [2, 2, 1]
    assert torch.equal(table([[paths[1], paths[1]]])[0, 0], table([[paths[1]]])[0, 0])
    assert write(vision, repeated, paths[0].parents[1] / "features") == len(paths)
    assert read == [*paths, *paths]
    assert encoded == [2, 2, 1] * 2


def test_unreadable_image_is_named(vision: VisionEncoder, paths: list[Path]) -> None:
    whole = paths[2].read_bytes()
    for content in (b"no image", whole[: len(whole) // 2], b""):
        paths[2].write_bytes(content)
        table = FeatureTable.encode(vision, paths, progress=False)
        assert list(table.errors) == [paths[2]]
        table.check([paths[1]])
        with pytest.raises(ValueError, match="is no readable image") as error:
            table.check([paths[1], paths[2]])
        assert str(paths[2]) in str(error.value)


def test_missing_image_is_named(vision: VisionEncoder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image at .*nowhere\.png"):
        load_pixels(vision, tmp_path / "nowhere.png")


def test_table_bytes_is_what_the_table_takes(vision: VisionEncoder, paths: list[Path]) -> None:
    table = FeatureTable.encode(vision, paths, progress=False)
    assert table_bytes(vision, len(paths)) == sum(shard.nbytes for shard in table.shards)


# -- in files


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_hold_what_the_table_does(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, dtype: Any
) -> None:
    assert write(vision, paths, tmp_path / "features", dtype=dtype) == 5
    table = FeatureTable.encode(vision, paths, batch_size=2, progress=False)
    mapped = opened(vision, paths, tmp_path / "features")
    assert mapped.dtype == dtype
    # One file after the other, and back and forth between them.
    for order in ([0, 1, 2, 3, 4], [4, 0, 3, 1, 2, 2]):
        examples = [[paths[place]] for place in order]
        found = mapped(examples)
        assert found.dtype == DTYPES[dtype]
        assert torch.equal(found, table(examples).to(DTYPES[dtype]))
    assert opened(vision, paths[3:], tmp_path / "features").places.keys() == {*paths[3:]}


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("language", ["t5", "bart"])
def test_the_loss_is_that_of_live_features(
    make_backbone: Callable[..., Backbone],
    paths: list[Path],
    tmp_path: Path,
    language: str,
    dtype: Any,
    rtol: float,
) -> None:
    backbone = make_backbone(language)
    assert backbone.vision is not None
    write(backbone.vision, paths, tmp_path / "features", dtype=dtype)
    draws = [Draw(Example(n, "vqa: what ?", (path,), ()), "red", 0.6) for n, path in enumerate(paths)]
    model, losses, gradients = PromptedModel(backbone).eval(), [], []
    backbone.freeze(visual_projection=False)
    projection = backbone.visual_projection
    assert projection is not None
    for images in (
        opened(backbone.vision, paths, tmp_path / "features"),
        FeatureTable.encode(backbone.vision, paths, batch_size=2, progress=False),
        backbone.vision,
    ):
        batch = Collator(backbone.tokenizer, 20, 9, images)(draws)
        loss = model(**batch.training_inputs()).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, projection.linear.weight)[0])
    assert losses[0] == pytest.approx(losses[2], rel=rtol)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=5 * rtol * gradients[2].abs().max())
    if dtype == "float32":
        assert losses[0] == losses[1]
        assert torch.equal(gradients[0], gradients[1])
    else:
        assert losses[0] != losses[2]  # the files are what was read


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("weights", ""),
        ("architecture", ""),
        ("preprocessing", ""),
        ("vision_layer", "-2"),
        ("class_token", "True"),
        ("pooled_grid", "2"),
        ("dtype", "float16"),
    ],
)
def test_another_encoder_is_refused_with_both_named(
    vision: VisionEncoder,
    vision_folders: dict[str, Path],
    paths: list[Path],
    tmp_path: Path,
    part: str,
    expected: str,
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    before = contents(folder)
    made_by = read_index(folder)["fingerprint"]
    options: dict[str, Any] = {
        "vision_layer": {"layer": -2},
        "class_token": {"class_token": True},
        "pooled_grid": {"pooled_grid": 2},
    }
    other = VisionEncoder.from_pretrained(vision_folders["clip"], **options.get(part, {}))
    if part == "weights":  # one number of them all
        with torch.no_grad():
            largest = max(other.model.parameters(), key=torch.numel)
            largest.view(-1)[-2] += 1e-3
    elif part == "architecture":
        other.model.config.hidden_act = "relu"  # type: ignore[union-attr]
    elif part == "preprocessing":
        other.processor.image_mean = [0.1, 0.2, 0.3]
    here = features.fingerprint(other)
    calls: list[Callable[[], Any]] = [lambda: write(other, paths, folder, dtype=expected or "float32")]
    if part != "dtype":
        calls = [lambda: write(other, paths, folder), lambda: opened(other, paths, folder)]
    for call in calls:
        with pytest.raises(ValueError, match=f"of another encoder.* differ in {part}") as error:
            call()
        said_expected, said_found = str(error.value).split("Expected ")[1].split("; found ")
        assert f"{part} {expected or here[part]}" in said_expected
        assert f"{part} {made_by[part]}" in said_found
        assert f"weights {here['weights']}" in said_expected
        assert f"weights {made_by['weights']}" in said_found
        assert contents(folder) == before


def test_the_same_encoder_of_another_place_is_the_same(
    vision: VisionEncoder, vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    vision.save_pretrained(tmp_path / "copy")
    again = VisionEncoder.from_pretrained(tmp_path / "copy")
    assert features.fingerprint(again) == features.fingerprint(vision)
    assert features.fingerprint(vision) != features.fingerprint(
        VisionEncoder.from_pretrained(vision_folders["siglip"])
    )


@pytest.mark.parametrize("damage", ["truncated", "a bit", "gone", "empty", "of another place"])
def test_a_damaged_shard_is_made_again_and_never_read(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    before = contents(folder)
    shard = folder / SHARDS[1]
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[-7] ^= 4
    if damage == "gone":
        shard.unlink()
    else:
        kinds = {"truncated": whole[:-100], "a bit": bytes(damaged), "empty": b""}
        shard.write_bytes(kinds.get(damage, (folder / SHARDS[0]).read_bytes()))
    if damage in ("truncated", "gone", "empty"):
        with pytest.raises(ValueError, match=rf"{shard} is damaged: expected {len(whole):,} bytes, found .*"):
            opened(vision, paths, folder)
    untouched = (folder / SHARDS[0]).stat().st_mtime_ns
    assert write(vision, paths, folder) == 2
    assert contents(folder) == before
    assert (folder / SHARDS[0]).stat().st_mtime_ns == untouched
    assert write(vision, paths, folder) == 0
    opened(vision, paths, folder)


def test_a_shard_that_says_another_size_is_not_read(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    # The last one holds one image, the others two.
    index = read_index(folder)
    shutil.copy(folder / SHARDS[2], folder / SHARDS[1])
    index["shard_bytes"][1] = index["shard_bytes"][2]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} is damaged: expected float32 \(2, .*found .*\(1, "):
        opened(vision, paths, folder)


def test_an_extraction_that_was_stopped_goes_on(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(vision, paths, tmp_path / "whole")
    folder = tmp_path / "features"

    def stop(path: Path, content: bytes) -> None:
        if path.name == SHARDS[1]:
            (folder / f"{SHARDS[1]}.partial").write_bytes(content[:50])  # as a kill leaves it
            raise KeyboardInterrupt
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_atomically", stop)
        with pytest.raises(KeyboardInterrupt):
            write(vision, paths, folder)
    with pytest.raises(ValueError, match=r"are not finished; scripts/extract_features\.py goes on"):
        opened(vision, paths, folder)
    kept = (folder / SHARDS[0]).stat().st_mtime_ns
    # What has begun is not another's to go on with either.
    with pytest.raises(ValueError, match="differ in dtype"):
        write(vision, paths, folder, dtype="float16")
    assert write(vision, paths, folder) == 3
    assert (folder / SHARDS[0]).stat().st_mtime_ns == kept
    assert contents(folder) == contents(tmp_path / "whole")


def test_further_images_are_added(vision: VisionEncoder, paths: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "features"
    assert write(vision, paths[2:4], folder) == 2
    with pytest.raises(FileNotFoundError, match=r"3 of 5 images have no visual features .*first: .*train/0"):
        opened(vision, paths, folder)
    # Shards keep their size, whatever is said.
    assert write(vision, paths, folder, shard_images=100) == 3
    assert sorted(contents(folder)) == [*SHARDS[:3], "index.json"]
    assert write(vision, paths[4:], folder) == 0
    table = FeatureTable.encode(vision, paths, batch_size=1, progress=False)
    examples = [[path] for path in paths]
    torch.testing.assert_close(opened(vision, paths, folder)(examples), table(examples))


def test_an_image_that_changes_is_encoded_anew(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    random_image((64, 64), 99).save(paths[3])
    with pytest.raises(ValueError, match=rf"{paths[3]} is not the image whose visual features are in"):
        opened(vision, paths, folder)
    assert write(vision, paths, folder) == 2
    table = FeatureTable.encode(vision, paths, progress=False)
    examples = [[path] for path in paths]
    torch.testing.assert_close(opened(vision, paths, folder)(examples), table(examples))


@pytest.mark.parametrize("missing", [True, False])
def test_an_image_that_cannot_be_read_stops_the_extraction_or_is_noted(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, missing: bool
) -> None:
    folder = tmp_path / "features"
    good = paths[2].read_bytes()
    if missing:
        paths[2].unlink()
    else:
        paths[2].write_bytes(good[:60])
    said = rf"{paths[2]}.*--on_bad_image skip goes on without it"
    with pytest.raises(ValueError, match=said):
        write(vision, paths, folder)
    assert sorted(contents(folder)) == [SHARDS[0], "index.json"]
    # The first shard is there.
    assert write(vision, paths, folder, skip_unreadable=True) == 3
    table = opened(vision, paths, folder)
    assert table.errors.keys() == {paths[2]}
    with pytest.raises(ValueError, match=str(paths[2])):
        table.check([paths[2]])
    table.check([path for path in paths if path != paths[2]])
    assert write(vision, paths, folder, skip_unreadable=True) == 0
    with pytest.raises(ValueError, match=said):
        write(vision, paths, folder)
    paths[2].write_bytes(good)
    assert write(vision, paths, folder) == 2
    assert not opened(vision, paths, folder).errors
    write(vision, paths, tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


def test_numbers_too_large_for_half_precision_are_refused(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path
) -> None:
    vision.register_forward_hook(lambda module, inputs, output: 1e5 * output.sign())
    with pytest.raises(ValueError, match=r"too large for float16; bfloat16 and float32 hold"):
        write(vision, paths, tmp_path / "half", dtype="float16")
    assert write(vision, paths, tmp_path / "brain", dtype="bfloat16") == 5


def test_a_worker_that_is_spawned_maps_the_files(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path
) -> None:
    write(vision, paths, tmp_path / "features")
    table = opened(vision, paths, tmp_path / "features")
    pickled = pickle.dumps(table)
    assert len(pickled) < table_bytes(vision, 1)
    examples = [[path] for path in paths]
    assert torch.equal(pickle.loads(pickled)(examples), table(examples))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "expected the file to be an object"),
        ({"format_version": 2}, "has format version 2; this dept_vl reads 1"),
        ({"format_version": None}, "expected format_version to be a whole number"),
        ({"fingerprint": {}}, "expected fingerprint to have the fields"),
        ({"shape": [16]}, "expected shape to be the tokens and width"),
        ({"shape": [16, 25]}, r"expected shape \[16, 24\], found \[16, 25\]"),
        ({"shape": [16, 2**80]}, r"expected shape \[16, 24\]"),
        ({"shard_images": 0}, "expected shard_images to be 1 or more"),
        ({"shard_images": 3}, "expected shard_bytes of 2 shards, found 3"),
        ({"shard_images": 10**30}, "expected shard_bytes of 1 shards, found 3"),
        ({"shard_bytes": [1, 2]}, "expected shard_bytes of 3 shards, found 2"),
        ({"shard_bytes": "all"}, "expected shard_bytes to be"),
        ({"images": []}, "expected images to name one or more"),
        ({"images": ["a.png"] * 5}, "expected images to name one or more, each once"),
        ({"image_bytes": [1]}, "expected image_bytes of 5 images, found 1"),
        ({"unreadable": {"a.png": 3}}, "expected unreadable"),
        ({"more": 1}, "unknown"),
    ],
)
def test_a_damaged_index_is_refused(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, change: Any, said: str
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    path = folder / "index.json"
    index = json.loads(path.read_text())
    path.write_bytes(change if isinstance(change, bytes) else json.dumps(index | change).encode())
    with pytest.raises(ValueError, match=said) as error:
        opened(vision, paths, folder)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_index_leads_to_no_file_outside_the_data(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    index = read_index(folder)
    index["images"][0] = "../secret.png"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected the name of an image inside its folder"):
        write(vision, paths, folder)


def test_an_image_is_known_by_its_path_below_the_data_folder() -> None:
    images = ["train/0/a.png", "b.png"]
    for root in (Path(), Path("data"), Path("/data/x"), Path("../data")):
        assert image_keys([root / image for image in images], root) == images


# -- scripts and runs


@pytest.fixture
def config(tmp_path: Path, language_folders: dict[str, Path], vision_folders: dict[str, Path]) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa", images=5), dev_split="val", test_split="val")
    made = tiny_run(data, vision=vision_folders["clip"], language=language_folders["t5"], max_steps=4)
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
    assert extract_features.main(extraction) == [folder_of(config)]
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
        evaluated.append(assess(AssessConfig(run=tmp_path / "run", **options)).evaluation)
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0].predictions) == 7


def test_a_run_without_the_files_that_it_is_to_use_says_how_to_make_them(config: RunConfig) -> None:
    with pytest.raises(FileNotFoundError, match=r"no visual features at .*features: .*extract_features\.py"):
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
        ValueError, match=r"began with visual features in float32 and would go on with float16"
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


def test_two_processes_write_what_one_does(extraction: ExtractConfig, tmp_path: Path) -> None:
    extract(extraction)
    other = replace(extraction, data=replace(extraction.data, features_dir=tmp_path / "two"))
    in_two_processes(extract, other)
    assert sorted(contents(tmp_path / "two")) == [
        *(f"features-{n:05d}.safetensors" for n in range(4)),
        "index.json",
    ]
    assert contents(tmp_path / "two") == contents(extraction.data.data_dir / "features")  # type: ignore[operator]


def extract_and_die(config: ExtractConfig, shards: int) -> None:
    """Killed when so many shards of this process are written, as a machine that loses its power."""
    left = [shards]

    def dying(path: Path, content: bytes) -> None:
        write_atomically(path, content)
        left[0] -= path.name != "index.json"
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    features.write_atomically = dying  # type: ignore[attr-defined]
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
    assert contents(folder) == contents(extraction.data.data_dir / "features")  # type: ignore[operator]


def test_a_full_disk(extraction: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "features"
    config = replace(extraction, data=replace(extraction.data, features_dir=folder))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(path: Path, content: bytes) -> None:
        if path.name == SHARDS[1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_atomically", full)
        try:
            with pytest.raises(OSError) as error:
                extract(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    message = str(error.value)
    assert f"no room for {folder / SHARDS[1]}: File too large; free some space there. No shard" in message
    assert "the same command goes on" in message
    assert sorted(contents(folder)) == [SHARDS[0], "index.json"]
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
    with pytest.raises(ValueError, match=rf"{broken} is no readable image.*--on_bad_image skip"):
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
    with pytest.raises(ValueError, match="shard_images is 0; expected 1 to"):
        parse_extraction("Encode.", ["--shard_images", "0"])


def test_reading_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = bench_features.BenchConfig(
        tmp_path, images=7, shard_images=3, tokens=2, d_vision=4, batches=2, batch_size=5, rounds=1
    )
    found = bench_features.main(replace(config, json_out=tmp_path / "bench.json"))
    assert found.rows_per_second > 0
    assert json.loads((tmp_path / "bench.json").read_text())["rows_per_second"] == found.rows_per_second
    assert "rows of 2 x 4 float16 a second" in capsys.readouterr().out
