"""Visual features in files; files that are damaged, unfinished, or of another encoder."""

import json
import os
import pickle
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import random_image
from PIL import Image
from runs import files, forking
from safetensors.torch import load_file, save_file

from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.io import write_atomically
from dept_vl._utils.terminal import Count
from dept_vl.data import feature_store as feature_files
from dept_vl.data.collate import Collator, Draw
from dept_vl.data.feature_index import digest, fingerprint, image_keys, read_index, write_index
from dept_vl.data.feature_store import DTYPES, open_features, write_features
from dept_vl.data.features import FeatureTable, load_pixels, table_bytes
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.base import Example

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SHARDS = [f"features-{number:05d}.safetensors" for number in range(3)]


def write(vision: VisionEncoder, paths: list[Path], folder: Path, **options: Any) -> int:
    """Three shards; how many images were encoded."""
    options = {"dtype": "float32", "shard_images": 2, "batch_size": 2} | options
    return write_features(vision, paths[0].parents[1], paths, folder, Accelerator(cpu=True), **options)


def opened(vision: VisionEncoder, paths: list[Path], folder: Path) -> FeatureTable:
    return open_features(vision, paths[0].parents[1], paths, folder)


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
        ("image_fit", "pad"),
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
    before = files(folder)
    made_by = read_index(folder)["fingerprint"]
    options: dict[str, Any] = {
        "vision_layer": {"layer": -2},
        "class_token": {"class_token": True},
        "pooled_grid": {"pooled_grid": 2},
        "image_fit": {"image_fit": "pad"},
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
    here = fingerprint(other)
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
        assert files(folder) == before


def test_the_same_encoder_of_another_place_is_the_same(
    vision: VisionEncoder, vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    vision.save_pretrained(tmp_path / "copy")
    again = VisionEncoder.from_pretrained(tmp_path / "copy")
    assert fingerprint(again) == fingerprint(vision)
    assert fingerprint(vision) != fingerprint(VisionEncoder.from_pretrained(vision_folders["siglip"]))


@pytest.mark.parametrize("damage", ["truncated", "a bit", "gone", "empty", "of another place"])
def test_a_damaged_shard_is_made_again_and_never_read(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    before = files(folder)
    shard = folder / SHARDS[1]
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[-7] ^= 4
    if damage == "gone":
        shard.unlink()
    else:
        kinds = {"truncated": whole[:-100], "a bit": bytes(damaged), "empty": b""}
        shard.write_bytes(kinds.get(damage, (folder / SHARDS[0]).read_bytes()))
    with pytest.raises(DamagedFileError, match=rf"{shard} is damaged"):
        opened(vision, paths, folder)
    opened(vision, paths[:2], folder)  # of the first shard alone
    untouched = (folder / SHARDS[0]).stat().st_mtime_ns
    assert write(vision, paths, folder) == 2
    assert files(folder) == before
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
    write_index(folder, index)
    with pytest.raises(DamagedFileError, match=rf"{SHARDS[1]} is damaged or belongs to other images"):
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
        patch.setattr(feature_files, "write_atomically", stop)
        with pytest.raises(KeyboardInterrupt):
            write(vision, paths, folder)
    with pytest.raises(ValueError, match=r"are not finished; dept-vl features resumes"):
        opened(vision, paths, folder)
    kept = (folder / SHARDS[0]).stat().st_mtime_ns
    # What has begun is not another's to go on with either.
    with pytest.raises(ValueError, match="differ in dtype"):
        write(vision, paths, folder, dtype="float16")
    assert write(vision, paths, folder) == 3
    assert (folder / SHARDS[0]).stat().st_mtime_ns == kept
    assert files(folder) == files(tmp_path / "whole")


def test_further_images_are_added(vision: VisionEncoder, paths: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "features"
    assert write(vision, paths[2:4], folder) == 2
    with pytest.raises(FileNotFoundError, match=r"3 of 5 images have no visual features .*first: .*train/0"):
        opened(vision, paths, folder)
    # Shards keep their size, whatever is said.
    assert write(vision, paths, folder, shard_images=100) == 3
    assert sorted(files(folder)) == [*SHARDS[:3], "index.json"]
    assert write(vision, paths[4:], folder) == 0
    table = FeatureTable.encode(vision, paths, batch_size=1, progress=False)
    examples = [[path] for path in paths]
    torch.testing.assert_close(opened(vision, paths, folder)(examples), table(examples))


def test_features_whose_images_are_gone_are_left_alone(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    write(vision, paths[:3], folder)
    before = files(folder)
    paths[1].unlink()
    for skip in (True, False):
        with pytest.raises(
            FileNotFoundError, match=r"1 of the 3 images whose visual features .*another --fea"
        ):
            write(vision, paths[3:], folder, skip_unreadable=skip)
        assert files(folder) == before
    assert len(opened(vision, paths[:3], folder).shards) == 2


def test_an_image_that_changes_is_encoded_anew(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    random_image((64, 64), 99).save(paths[3])
    with pytest.raises(ValueError, match=rf"1 of 5 images have changed .*\({paths[3]}\)"):
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
    said = rf"{paths[2]}.*--on_bad_image skip"
    counts = [*Count.begun]
    with pytest.raises(ValueError, match=said) as held:
        write(vision, paths, folder)
    assert held.traceback
    assert Count.begun == counts  # nothing goes on telling, though the error keeps what was at hand
    assert sorted(files(folder)) == [SHARDS[0], "index.json"]
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
    assert files(folder) == files(tmp_path / "whole")


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
        (b"[]", "another checksum"),
        ({"format_version": 3}, "has format version 3; this dept_vl reads 1 and 2"),
        ({"format_version": None}, "has format version None; this dept_vl reads 1 and 2"),
        (b'{"format_version": 2, "images": []}', "another checksum"),
    ],
)
def test_a_damaged_index_is_refused(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, change: Any, said: str
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    path = folder / "index.json"
    index = json.loads(path.read_text())
    index.pop("checksum")
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:  # as if it had been written so
        write_index(folder, index | change)
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
    write_index(folder, index)
    with pytest.raises(ValueError, match="expected the name of an image inside its folder"):
        write(vision, paths, folder)


@pytest.mark.parametrize("change", ["size", "time"])
def test_each_of_many_images_is_compared(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, change: str
) -> None:
    """Not a sample of them: every one, wherever it stands."""
    folder = tmp_path / "features"
    write(vision, paths, folder)
    for path in paths:
        content, stat = path.read_bytes(), path.stat()
        if change == "size":
            path.write_bytes(content + b"\0")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (change == "time")))
        with pytest.raises(ValueError, match=rf"1 of 5 images have changed .*\({path}\)"):
            opened(vision, paths, folder)
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        opened(vision, paths, folder)


def as_version_1(folder: Path) -> None:
    """Rewrite features as they were before their index kept times and a checksum."""
    index = read_index(folder)
    index["format_version"] = 1
    index["fingerprint"].pop("orientation")
    index.pop("image_times")
    for number in range(len(index["shard_bytes"])):
        shard = folder / SHARDS[number]
        features = load_file(shard)["features"]
        rows = slice(2 * number, 2 * number + 2)
        content = {
            "fingerprint": index["fingerprint"],
            "images": digest([index["images"][rows], index["image_bytes"][rows]]),
            "crc32": zlib.crc32(features.numpy().tobytes()),
            "unreadable": {},
        }
        save_file({"features": features}, shard, metadata={"dept_vl": json.dumps(content)})
        index["shard_bytes"][number] = shard.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("version", [1, 2])
def test_features_without_a_fit_are_of_the_encoders_own(
    vision_folders: dict[str, Path], paths: list[Path], tmp_path: Path, version: int
) -> None:
    own, cropped, squashed = (
        VisionEncoder.from_pretrained(vision_folders["clip"], image_fit=fit)
        for fit in ("own", "crop", "squash")
    )
    folder = tmp_path / "features"
    write(own, paths, folder)
    assert "image_fit" not in read_index(folder)["fingerprint"]
    if version == 1:
        as_version_1(folder)
    found = opened(cropped, paths, folder)([[path] for path in paths])
    assert torch.equal(found, cropped(torch.cat([load_pixels(own, path)[None] for path in paths]))[:, None])
    with pytest.raises(ValueError, match=r"differ in image_fit.*fit squash.*fit the encoder's own"):
        opened(squashed, paths, folder)
    with pytest.raises(ValueError, match=r"differ in image_fit"):
        write(squashed, paths, folder)


def test_features_of_version_1_are_of_pixels_as_stored(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "features"
    vision.image_fit = vision.own_fit
    write(vision, paths, folder)
    whole = opened(vision, paths, folder)([[path] for path in paths])
    as_version_1(folder)
    assert torch.equal(opened(vision, paths, folder)([[path] for path in paths]), whole)
    assert f"note: the visual features at {folder}" in capsys.readouterr().err
    damaged = bytearray((folder / SHARDS[1]).read_bytes())
    damaged[-7] ^= 4
    (folder / SHARDS[1]).write_bytes(damaged)
    with pytest.raises(DamagedFileError, match=SHARDS[1]):
        opened(vision, paths, folder)
    # An image that would be turned today: refused, made again, and read as stored where that is asked for.
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(paths[0]) as image:
        image.save(paths[0], exif=exif.tobytes())
    index = json.loads((folder / "index.json").read_text())
    index["image_bytes"][0] = paths[0].stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"EXIF orientation of 1 of 5 .*{paths[0]}"):
        opened(vision, paths, folder)
    assert write(vision, paths, folder) == 5
    turned = opened(vision, paths, folder)([[path] for path in paths])
    assert torch.equal(turned[1:], whole[1:])
    assert not torch.equal(turned[0], whole[0])
    vision.exif = False
    with pytest.raises(ValueError, match=r"of another encoder.* differ in orientation"):
        opened(vision, paths, folder)
    assert write(vision, paths, tmp_path / "stored") == 5
    assert torch.equal(opened(vision, paths, tmp_path / "stored")([[path] for path in paths]), whole)


def test_a_damaged_index_is_made_again(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "features"
    write(vision, paths, folder)
    before = files(folder)
    path = folder / "index.json"
    damaged = bytearray(before["index.json"])
    damaged[damaged.index(b"train")] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedFileError, match=str(path)):
        opened(vision, paths, folder)
    assert write(vision, paths, folder) == 0  # the shards are whole
    assert f"note: {path}" in capsys.readouterr().err
    assert files(folder) == before


def extract(
    root: Path, folder: Path, tower: Path, which: slice, own: Path, other: Path, patch: pytest.MonkeyPatch
) -> None:
    """Extract in a process of its own, slow enough to be in the middle when the other comes."""

    def slowly(path: Path, content: bytes) -> None:
        own.with_suffix(".writes").touch()
        time.sleep(0.4)
        write_atomically(path, content)

    patch.setattr(feature_files, "write_atomically", slowly)
    encoder = VisionEncoder.from_pretrained(tower)
    own.touch()
    while not other.exists():
        time.sleep(0.01)
    with own.with_suffix(".said").open("w") as said, redirect_stdout(said):
        write(encoder, sorted(root.rglob("*.png"))[which], folder)


def test_two_extractions_into_one_folder_follow_each_other(
    vision: VisionEncoder, vision_folders: dict[str, Path], paths: list[Path], tmp_path: Path
) -> None:
    """Two processes, each slow enough to be in the middle when the other comes; and one that is killed."""
    folder, root = tmp_path / "features", paths[0].parents[1]

    def start(which: slice, name: str, other: str) -> BaseProcess:
        arguments = (root, folder, vision_folders["clip"], which, tmp_path / name, tmp_path / other)
        process = forking().Process(target=extract, args=(*arguments, pytest.MonkeyPatch()))
        process.start()
        return process

    killed = start(slice(2, None), "killed", "killed")
    while not (tmp_path / "killed.writes").exists():
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    both = [start(slice(3), "first", "second"), start(slice(2, None), "second", "first")]
    for process in both:
        process.join(timeout=100)
    assert [process.exitcode for process in both] == [0, 0]
    said = "".join(path.read_text() for path in tmp_path.glob("*.said"))
    assert "another extraction is writing to" in said
    table = FeatureTable.encode(vision, paths, batch_size=1, progress=False)
    examples = [[path] for path in paths]
    torch.testing.assert_close(opened(vision, paths, folder)(examples), table(examples))


def test_an_image_is_known_by_its_path_below_the_data_folder() -> None:
    images = ["train/0/a.png", "b.png"]
    for root in (Path(), Path("data"), Path("/data/x"), Path("../data")):
        assert image_keys([root / image for image in images], root) == images
