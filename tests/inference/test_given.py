"""Whatever form an image has, it is the same image; what is none gets a clear error."""

import base64
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
import torch
from conftest import random_image
from pages import many_of
from PIL import Image

from dept_vl._utils.images import read_image
from dept_vl.inference.given import as_image, as_images
from dept_vl.inference.loading import load
from dept_vl.inference.mixed import load_many
from dept_vl.inference.predictor import as_questions
from dept_vl.models.backbone import Backbone

Forms = dict[str, Any]


@pytest.fixture
def forms(tmp_path: Path) -> Forms:
    """One image in every form."""
    image = random_image((12, 8), 1)
    path = tmp_path / "a.png"
    image.save(path)
    content = path.read_bytes()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    code = base64.b64encode(content).decode()
    return {
        "path": path,
        "text": str(path),
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "read before": _read_before(content),
        "file": path.open("rb"),
        "pillow": image,
        "data URL": f"data:image/png;base64,{code}",
        "data URL, capitals": f"data:image/png;BASE64,{code}",
        "data URL, quoted": f"DATA:image/png,{quote_from_bytes(content)}",
        "HWC": array,
        "CHW": array.transpose(2, 0, 1),
        "int64": array.astype(np.int64),
        "float": array.astype(np.float32) / 255,
        "with alpha": np.concatenate([array, np.full((8, 12, 1), 9, np.uint8)], 2),
        "not contiguous": np.ascontiguousarray(array[:, ::-1])[:, ::-1],
        "tensor CHW": tensor.permute(2, 0, 1),
        "tensor HWC": tensor,
        "tensor float": tensor.permute(2, 0, 1).double() / 255,
        "tensor with gradient": (tensor.permute(2, 0, 1).double() / 255).requires_grad_(),
        "row with bytes": {"bytes": content, "path": "elsewhere.png"},
        "row with path": {"bytes": None, "path": str(path)},
        "row with image": {"image": image, "question": "what?"},
        "row with image that is not decoded": {"image": {"bytes": content, "path": None}},
    }


def _read_before(content: bytes) -> io.BytesIO:
    file = io.BytesIO(content)
    file.read()
    return file


def test_every_form_is_the_same_image(forms: Forms) -> None:
    expected = np.asarray(forms["pillow"])
    for name, form in forms.items():
        assert (np.asarray(read_image(as_image(form))) == expected).all(), name
    for several in (list(forms.values()), tuple(forms.values()), np.stack([forms["HWC"]] * 3)):
        found, single = as_images(several, pairs=False)
        assert not single
        assert len(found) == len(several)
        assert all((np.asarray(read_image(one)) == expected).all() for (one,) in found)
    paths = [forms["path"]] * 3
    for column in (np.array(list(map(str, paths))), np.array(paths, object)):  # of a data frame
        found, single = as_images(column, pairs=False)
        assert (len(found), single) == (3, False)
        assert all((np.asarray(read_image(one)) == expected).all() for (one,) in found)
        assert as_images(column[:2], pairs=True)[1]
    half = forms["tensor float"].bfloat16()
    close = np.asarray(read_image(as_image(half))).astype(int)
    assert abs(close - expected).max() <= 1


def test_grey_images() -> None:
    grey = np.arange(96, dtype=np.uint8).reshape(8, 12)
    for form in (grey, grey[..., None], grey[None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert (np.asarray(read_image(as_image(form))) == grey[..., None]).all()


def test_where_the_channels_are_if_both_fit() -> None:
    array = np.zeros((3, 5, 3), np.uint8)
    array[0] = 200
    assert read_image(as_image(array)).size == (5, 3)
    assert read_image(as_image(torch.from_numpy(array))).size == (3, 5)


@pytest.mark.parametrize(
    "odd",
    [
        3,
        object(),
        {"bytes": None, "path": None},
        {"question": "what?"},
        io.StringIO("text"),
        np.zeros((2, 8, 12), np.uint8),
        np.zeros(8, np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.full((8, 12, 3), 1.01),
        np.full((8, 12, 3), -0.01),
        np.full((8, 12, 3), np.nan),
        np.full((8, 12, 3), 256),
        np.full((8, 12, 3), "a"),
        np.zeros((8, 12, 3), complex),
        np.zeros((8, 12), bool),
        "data:image/png;base64",
        "data:image/png;base64,%%%",
    ],
)
def test_what_is_no_image_is_refused(odd: Any) -> None:
    with pytest.raises(ValueError, match=r"^image"):
        as_images(odd, pairs=False)
    with pytest.raises(ValueError, match=r"^image 2 of 2"):
        as_images([Image.new("RGB", (2, 2)), odd], pairs=False)


def test_answers_are_the_same_in_every_form(
    make_backbone: Callable[..., Backbone], forms: Forms, tmp_path: Path
) -> None:
    backbone = make_backbone("t5")
    many = many_of(backbone, tmp_path)
    predictor = load(tmp_path / "colours", backbone=backbone)
    path = forms["path"]
    expected = predictor.answer(path, "what?")
    usual = {name: form for name, form in forms.items() if name != "file"}  # a file is read by the first
    assert predictor.answer(list(usual.values()), "what?") == [expected] * len(usual)
    assert predictor.answer(np.stack([forms["HWC"]] * 2), "what?") == [expected] * 2
    assert predictor.answer(forms["HWC"], ["what?", "what?"]) == [expected] * 2
    assert many.answer(forms["tensor CHW"], "what?", adapters="colours") == expected
    pairs = load(tmp_path / "pairs", backbone=backbone)
    pair = pairs.answer((path, path), "both are red")
    assert pairs.answer([forms["HWC"], forms["tensor CHW"]], "both are red") == pair
    assert pairs.answer(np.stack([forms["HWC"]] * 2), "both are red") == pair
    assert pairs.answer([[forms["HWC"], forms["bytes"]]] * 2, "both are red") == [pair] * 2
    with pytest.raises(ValueError, match="2 images and 3 questions"):
        predictor.answer([path, path], ["a", "b", "c"])


@pytest.mark.parametrize("odd", [b"what?", None, 3, {"what?": 1}, ["what?", None]])
def test_what_is_no_question_is_refused(odd: Any) -> None:
    with pytest.raises(ValueError, match="expected a"):
        as_questions(odd)


def test_adapters_without_names_are_refused() -> None:
    for odd in ("runs/vqa", ["runs/vqa"]):
        with pytest.raises(ValueError, match="by name"):
            inspect.unwrap(load_many)(odd)  # without the tests' own check of types


def test_rows_of_datasets(forms: Forms, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [str(forms["path"])] * 2})
    rows = rows.cast_column("image", datasets.Image())
    expected = np.asarray(forms["pillow"])
    raw = rows.cast_column("image", datasets.Image(decode=False))
    for images in (rows["image"], [rows[0], rows[1]], raw["image"], list(raw)):
        found, _ = as_images(images, pairs=False)
        assert [(np.asarray(read_image(one)) == expected).all() for (one,) in found] == [True, True]
