"""Visual features in memory: each image encoded once, and what is said of images that cannot be read."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoTokenizer

from dept_vl.data import features
from dept_vl.data.collate import Collator, Draw
from dept_vl.data.feature_store import write_features
from dept_vl.data.features import FeatureTable, load_pixels, table_bytes
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.base import Example

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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
    write_features(
        vision,
        paths[0].parents[1],
        repeated,
        paths[0].parents[1] / "features",
        Accelerator(cpu=True),
        batch_size=2,
    )
    assert read == [*paths, *paths]
    assert encoded == [2, 2, 1] * 2


def test_unreadable_image_is_named(vision: VisionEncoder, paths: list[Path]) -> None:
    whole = paths[2].read_bytes()
    for content in (b"no image", whole[: len(whole) // 2], b""):
        paths[2].write_bytes(content)
        table = FeatureTable.encode(vision, paths, progress=False)
        assert list(table.errors) == [paths[2]]
        table.check([paths[1]])
        with pytest.raises(ValueError, match="is not a readable image") as error:
            table.check([paths[1], paths[2]])
        assert str(paths[2]) in str(error.value)


def test_missing_image_is_named(vision: VisionEncoder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image at .*nowhere\.png"):
        load_pixels(vision, tmp_path / "nowhere.png")


def test_table_bytes_is_what_the_table_takes(vision: VisionEncoder, paths: list[Path]) -> None:
    table = FeatureTable.encode(vision, paths, progress=False)
    assert table_bytes(vision, len(paths)) == sum(shard.nbytes for shard in table.shards)


@pytest.mark.parametrize("width", [20_000, 60_000, 1_000_000])
@pytest.mark.parametrize("content", [False, True])
def test_a_line_is_no_usable_image(vision: VisionEncoder, tmp_path: Path, width: int, content: bool) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (width, 1)).save(path)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"found {width:,} x 1 pixels") as error:
        load_pixels(vision, path.read_bytes() if content else path)
    assert time.perf_counter() - started < 2
    assert (str(path) in str(error.value)) == (not content)
    table = FeatureTable.encode(vision, [path], progress=False)
    assert table.errors.keys() == {path}


def test_an_image_without_memory_is_a_bad_image(
    vision: VisionEncoder, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(vision, "processor", exhausted)
    with pytest.raises(ValueError, match="is not a usable image: MemoryError"):
        load_pixels(vision, paths[0])
