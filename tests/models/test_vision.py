"""Every kind of image encoder gives frozen visual tokens of one form."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_VISION, IMAGE_SIZE, TOWERS, random_image, timm_processor, timm_tower
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from dept_vl.models.vision import VisionEncoder

PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "timm_vit": 3, "timm_resnet": 0}
"""Class token and registers."""
PATCHES = (IMAGE_SIZE // 8) ** 2
OWN_FIT = dict.fromkeys(TOWERS, "crop") | {"siglip": "squash"}
PHOTOGRAPH = (64, 48)
"""A photograph of 640 x 480 in small."""


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("tower", TOWERS)
def test_tokens_of_every_tower(vision_folders: dict[str, Path], pixels: Tensor, tower: str) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    tokens = vision(pixels)
    assert tokens.shape == (2, PATCHES, D_VISION)
    assert (vision.token_count, vision.d_vision) == (PATCHES, D_VISION)
    assert tokens.dtype == torch.float32
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("tower", TOWERS)
def test_class_token_and_registers_come_first_when_kept(
    vision_folders: dict[str, Path], pixels: Tensor, tower: str
) -> None:
    kept = VisionEncoder.from_pretrained(vision_folders[tower], class_token=True)
    without = VisionEncoder.from_pretrained(vision_folders[tower])
    prefix = PREFIX[tower]
    assert kept.token_count == prefix + PATCHES
    tokens = kept(pixels)
    assert torch.equal(tokens[:, prefix:], without(pixels))
    if prefix:
        stock = kept.model(pixel_values=pixels).last_hidden_state
        assert torch.equal(tokens[:, :prefix], stock[:, :prefix])


def test_tokens_are_the_image_half_of_clip(vision_folders: dict[str, Path], pixels: Tensor) -> None:
    whole = CLIPModel.from_pretrained(vision_folders["clip"]).eval()
    with torch.no_grad():
        expected = whole.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
    vision = VisionEncoder.from_pretrained(vision_folders["clip"])
    torch.testing.assert_close(vision(pixels), expected)
    assert not any("text" in name for name, _ in vision.named_parameters())


@pytest.mark.parametrize("tower", ["clip", "timm_resnet"])
def test_patches_are_read_row_by_row(vision_folders: dict[str, Path], tower: str) -> None:
    # A bright top left corner must move the first tokens most, whichever layout the tower has.
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    dark = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    lit = dark.clone()
    lit[..., :8, 8:16] = 3.0
    moved = (vision(lit) - vision(dark)).norm(dim=-1)[0]
    assert moved.argmax() == 1


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("side", [2, 3])
def test_pooled_grid_is_the_maximum_over_patches(
    vision_folders: dict[str, Path], pixels: Tensor, tower: str, side: int
) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    grid = vision(pixels).transpose(1, 2).unflatten(2, (4, 4))
    vision = VisionEncoder.from_pretrained(vision_folders[tower], pooled_grid=side)
    assert vision.token_count == side * side
    pooled = vision(pixels).transpose(1, 2).unflatten(2, (side, side))
    for row in range(side):
        for column in range(side):
            top, left = row * 4 // side, column * 4 // side
            bottom, right = -(-(row + 1) * 4 // side), -(-(column + 1) * 4 // side)
            expected = grid[:, :, top:bottom, left:right].amax((2, 3))
            assert torch.equal(pooled[:, :, row, column], expected)


def test_pooled_grid_leaves_the_class_token_alone(vision_folders: dict[str, Path], pixels: Tensor) -> None:
    kept = VisionEncoder.from_pretrained(vision_folders["clip"], class_token=True, pooled_grid=2)
    whole = VisionEncoder.from_pretrained(vision_folders["clip"], class_token=True)
    assert kept.token_count == 1 + 4
    assert torch.equal(kept(pixels)[:, 0], whole(pixels)[:, 0])


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2", "timm_vit"])
def test_penultimate_layer(vision_folders: dict[str, Path], pixels: Tensor, tower: str) -> None:
    last = VisionEncoder.from_pretrained(vision_folders[tower])
    penultimate = VisionEncoder.from_pretrained(vision_folders[tower], layer=-2)
    blocks = next(
        m for m in penultimate.model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == 3
    )
    seen: list[Tensor] = []
    blocks[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = penultimate(pixels)
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(tokens, expected[:, PREFIX[tower] :])
    assert tokens.shape == last(pixels).shape
    assert not torch.allclose(tokens, last(pixels))


def test_penultimate_stage_of_a_convolutional_tower(vision_folders: dict[str, Path], pixels: Tensor) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders["timm_resnet"], layer=-2)
    assert vision.d_vision == 16
    assert vision(pixels).shape == (2, vision.token_count, 16)


def test_inner_layer_of_timm_has_no_class_token_to_keep(vision_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="layer=-2"):
        VisionEncoder.from_pretrained(vision_folders["timm_vit"], layer=-2, class_token=True)


def test_channels_last_tower_of_timm(pixels: Tensor) -> None:
    swin = timm_tower(
        "swin_tiny_patch4_window7_224",
        img_size=IMAGE_SIZE,
        embed_dim=12,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    )
    vision = VisionEncoder(swin, timm_processor(swin))
    with torch.no_grad():
        expected = swin(pixel_values=pixels).last_hidden_state
    assert expected.shape == (2, 4, 4, 24)
    assert torch.equal(vision(pixels), expected.flatten(1, 2))
    assert (vision.token_count, vision.d_vision) == (16, 24)


@pytest.mark.parametrize("tower", TOWERS)
def test_stays_frozen_in_training(vision_folders: dict[str, Path], pixels: Tensor, tower: str) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    outer = nn.Sequential(vision).train()
    assert outer.training
    assert not any(module.training for module in vision.modules())
    before = {name: value.clone() for name, value in vision.state_dict().items()}
    tokens = vision(pixels.requires_grad_())
    assert not tokens.requires_grad
    # Running statistics of a ResNet are part of the state.
    for name, value in vision.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("tower", ["clip", "timm_resnet"])
def test_any_image_mode_is_preprocessed(vision_folders: dict[str, Path], tower: str, mode: str) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    image = random_image((50, 40)).convert(mode)
    pixels = vision.preprocess([image, random_image((9, 70), 1)])
    assert pixels.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert pixels.isfinite().all()
    assert torch.equal(pixels[:1], vision.preprocess([image.convert("RGB")]))


@pytest.mark.parametrize("tower", TOWERS)
def test_preprocessing_normalises(vision_folders: dict[str, Path], tower: str) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    black, white = (
        vision.preprocess([random_image((32, 32)).point(lambda _, level=level: level)]) for level in (0, 255)
    )
    assert black.max() < 0 < white.min()


@pytest.mark.parametrize("tower", TOWERS)
def test_saved_and_loaded_alike(
    vision_folders: dict[str, Path], tmp_path: Path, pixels: Tensor, tower: str
) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower], class_token=True, pooled_grid=2)
    vision.save_pretrained(tmp_path)
    again = VisionEncoder.from_pretrained(tmp_path, **vision.options())
    assert torch.equal(vision(pixels), again(pixels))
    image = random_image((50, 40))
    assert torch.equal(vision.preprocess([image]), again.preprocess([image]))


@pytest.mark.parametrize("tower", TOWERS)
def test_a_fit_decides_whether_an_edge_is_seen(vision_folders: dict[str, Path], tower: str) -> None:
    image = random_image(PHOTOGRAPH)
    marked = image.copy()
    marked.paste("white", (0, 0, PHOTOGRAPH[0] // 16, PHOTOGRAPH[1]))
    for fit in ("squash", "crop", "pad", "own"):
        vision = VisionEncoder.from_pretrained(vision_folders[tower], image_fit=fit)
        assert vision.image_fit == (OWN_FIT[tower] if fit == "own" else fit)
        pixels, changed = vision.preprocess([image]), vision.preprocess([marked])
        assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert torch.equal(pixels, changed) == (vision.image_fit == "crop")
        # Bars of an eighth above and below, of the mean colour.
        padded = bool((pixels[..., :4, :].abs() < 0.02).all() and (pixels[..., -4:, :].abs() < 0.02).all())
        assert padded == (fit == "pad")


@pytest.mark.parametrize("tower", TOWERS)
def test_an_encoders_own_fit_and_square_images_are_left_to_its_processor(
    vision_folders: dict[str, Path], tower: str
) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    square = dict.fromkeys(("squash", "crop", "pad"), (50, 50))
    for fit, size in [("own", PHOTOGRAPH), ("own", (40, 70)), *square.items()]:
        image = random_image(size)
        stock = vision.processor(images=[image], return_tensors="pt")["pixel_values"]
        again = VisionEncoder.from_pretrained(vision_folders[tower], image_fit=fit)
        assert torch.equal(again.preprocess([image]), stock)


@pytest.mark.parametrize("tower", ["clip", "timm_vit"])
def test_squashed_pixels_are_the_published_ones(vision_folders: dict[str, Path], tower: str) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    settings = vars(vision.processor) | getattr(vision.processor, "data_config", {})
    mean, std = (np.float32(settings.get(name) or settings[f"image_{name}"]) for name in ("mean", "std"))
    method = Image.Resampling.BICUBIC if tower == "clip" else Image.Resampling.BILINEAR
    image = random_image(PHOTOGRAPH)
    small = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), method), dtype=np.float32) / 255
    expected = torch.from_numpy((small - mean) / std).permute(2, 0, 1)[None]
    torch.testing.assert_close(vision.preprocess([image]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", ["dinov2", "timm_resnet"])
def test_nothing_of_a_squashed_image_is_cut(vision_folders: dict[str, Path], tower: str) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders[tower])
    vision.processor = copy.deepcopy(vision.processor)
    images = [random_image(size) for size in ((64, 128), (64, 64))]
    whole = vision.preprocess(images[:1])
    if tower == "dinov2":  # as published: resized to 256, of which 224 are read
        vision.processor.size.shortest_edge = 36
    else:
        vision.processor.data_config["crop_pct"] = 0.9
        vision.processor.__init__({**vision.processor.data_config, "architecture": "resnet10t"})
    assert torch.equal(vision.preprocess(images[:1]), whole)
    marked = images[1].copy()
    marked.paste("white", (0, 0, 1, 64))
    assert not torch.equal(vision.preprocess(images[1:]), vision.preprocess([marked]))


def test_no_fit_of_another_name(vision_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="'stretch'"):
        VisionEncoder.from_pretrained(vision_folders["clip"], image_fit="stretch")


def test_missing_folder_is_reported_by_transformers(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing-here"):
        VisionEncoder.from_pretrained(tmp_path / "nothing-here")
