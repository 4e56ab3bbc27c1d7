"""Frozen image encoders: CLIP, SigLIP, DINOv2 and other vision models of transformers, and any timm model.

Encoders are vision models of transformers (CLIP, SigLIP, DINOv2, ...), and timm models in its wrapper. They
are loaded with their image processors, and return features of shape `(batch, tokens, d_vision)`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from dept_vl._utils.images import check_shape, to_rgb
from dept_vl.models.checks import check_processor, load_config, load_model, loading
from dept_vl.models.options import LARGEST_GRID, ImageFit

SUPPORTED = "vision models of transformers (CLIP, SigLIP, DINOv2, ViT and their like) and of timm (timm/...)"
"""Supported image encoders, for error messages."""


@dataclass(frozen=True)
class VisionOptions:
    """Options of an image encoder in files; see `VisionEncoder`."""

    layer: int
    class_token: bool
    pooled_grid: int


class VisionEncoder(nn.Module):
    """Frozen image encoder that converts images to visual features.

    Args:
        model: Vision model of transformers, or a timm model in its wrapper.
        processor: Image processor of the model.
        layer: Index of the hidden state to return: -1 for the last, -2 for the penultimate.
        class_token: Whether to keep the class token (and registers) in front of the patch tokens.
        pooled_grid: Side of the square grid that patches are max-pooled to (published for CLIP RN101: 7x7 to
            6x6); 0 to keep every patch.
        exif: Whether to rotate images by their EXIF orientation.
        image_fit: See `ImageFit`.

    Attributes:
        own_fit: Fit of the image processor: `squash`, `crop` or `pad`.
        image_fit: Fit that is used: `squash`, `crop` or `pad`.

    Raises:
        ValueError: If the layer does not exist, or `pooled_grid` or `image_fit` has an invalid value.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        layer: int = -1,
        class_token: bool = False,
        pooled_grid: int = 0,
        exif: bool = True,
        image_fit: ImageFit = "squash",
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.processor = processor
        self.layer = layer
        self.class_token = class_token
        self.exif = exif
        if not 0 <= pooled_grid <= LARGEST_GRID:
            raise ValueError(f"expected pooled_grid to be 0 to {LARGEST_GRID}, got {pooled_grid}")
        self.pooled_grid = pooled_grid
        if image_fit not in get_args(ImageFit):
            raise ValueError(f"image_fit is one of {get_args(ImageFit)}; got {image_fit!r}")
        pixels = self._process([Image.new("RGB", (8, 8))])
        self.pixel_shape = tuple(pixels.shape[1:])
        self.own_fit: ImageFit = self._own_fit()
        self.image_fit = self.fit_of(image_fit)
        with torch.no_grad():
            features = self.forward(pixels)
        self.token_count: int = features.shape[1]
        self.d_vision: int = features.shape[2]

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> "VisionEncoder":
        """Load an image encoder from a Hub name or a local folder.

        Args:
            name_or_path: Folder or Hub name, such as `openai/clip-vit-base-patch32`, `timm/resnet50.a1_in1k`.
            **options: Arguments `layer`, `class_token`, `pooled_grid`, `exif` and `image_fit` of the class.

        Raises:
            OSError: If transformers finds no such model.
            ValueError: If the model needs its own code, is not an image encoder, or has no such layer.
        """
        config = load_config(name_or_path, "an image encoder", SUPPORTED)
        # Of a checkpoint with two towers (CLIP, SigLIP), only the vision tower is loaded.
        config = getattr(config, "vision_config", config)
        model = load_model(AutoModel, name_or_path, "an image encoder", unused="pooler", config=config)
        if model.main_input_name != "pixel_values":
            raise ValueError(
                f"{name_or_path} is not an image encoder: {type(model).__name__} reads "
                f"{model.main_input_name}. Supported are {SUPPORTED}"
            )
        # timm's processor exists for one backend; asking for another makes transformers warn.
        backend = {"backend": "pil"} if config.model_type == "timm_wrapper" else {}
        with loading(name_or_path, "an image encoder"):
            processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False, **backend)
            check_processor(processor, name_or_path)
            return cls(model, processor, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and processor in the format of transformers."""
        cast(PreTrainedModel, self.model).save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def options(self) -> dict[str, int | bool]:
        """Return the options that are saved with a backbone, as arguments of `from_pretrained`."""
        return {"layer": self.layer, "class_token": self.class_token, "pooled_grid": self.pooled_grid}

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors that the features depend on, by name."""
        return self.model.state_dict()

    def fit_of(self, recorded: ImageFit) -> ImageFit:
        """Return `recorded`, or the processor's own fit if it is `own`."""
        return self.own_fit if recorded == "own" else recorded

    def preprocess(self, images: list[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
        """Convert images to RGB, fit them to the encoder's input shape and normalise them.

        Raises:
            ValueError: If an image has too large an aspect ratio, or is too large after resizing.
        """
        size = getattr(self.processor, "size", None)
        own = self.image_fit == self.own_fit
        for image in images:
            check_shape(*image.size, getattr(size, "shortest_edge", None) if own else None)
        rgb = [to_rgb(image) for image in images]
        height, width = self.pixel_shape[1:]
        # Images with the right aspect ratio are left to the processor, unless it would cut off a margin.
        left = [own or (not self._cuts_margin() and one.width * height == one.height * width) for one in rgb]
        return torch.cat(
            [
                self._process([one]) if alone else self._normalise(self._fitted(one))
                for one, alone in zip(rgb, left, strict=True)
            ]
        )

    def _process(self, images: list[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
        pixels: Tensor = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels

    def _own_fit(self) -> ImageFit:
        """Return the processor's fit, which is inferred from its pixels of an image with ratio 3:1."""
        height, width = self.pixel_shape[1:]
        grey, white, edged = (
            Image.new("RGB", (3 * width, height), colour) for colour in ("grey", "white", "grey")
        )
        edged.paste("white", (0, 0, width // 2, height))
        plain, bright, marked = self._process([grey, white, edged])
        if torch.equal(plain, marked):
            return "crop"
        return "pad" if torch.equal(plain[:, 0, 0], bright[:, 0, 0]) else "squash"

    def _settings(self) -> dict[str, Any]:
        """Return the processor's settings. Those of timm's processor have other names."""
        return {**vars(self.processor), **getattr(self.processor, "data_config", {})}

    def _cuts_margin(self) -> bool:
        """Return whether the processor resizes images to more than the input shape and crops them."""
        settings = self._settings()
        edges = [getattr(settings.get("size"), name, None) for name in ("shortest_edge", "height")]
        shortest = min(self.pixel_shape[1:])
        return next(filter(None, edges), shortest) // (settings.get("crop_pct") or 1.0) > shortest

    def _fitted(self, image: Image.Image) -> Image.Image:
        """Return an image that is fitted to the encoder's input shape by `image_fit`."""
        settings = self._settings()
        height, width = self.pixel_shape[1:]
        resample = settings.get("resample") or settings.get("interpolation") or "bicubic"
        method = (
            Image.Resampling[resample.upper()] if isinstance(resample, str) else Image.Resampling(resample)
        )
        if self.image_fit == "squash":
            return image.resize((width, height), method)
        if self.image_fit == "crop":
            return ImageOps.fit(image, (width, height), method)
        mean = settings.get("image_mean") or settings.get("mean") or (0.5,) * 3
        return ImageOps.pad(image, (width, height), method, color=tuple(round(255 * value) for value in mean))

    def _normalise(self, image: Image.Image) -> Float[Tensor, "1 3 height width"]:
        """Return the processor's pixels of an image that has the encoder's input shape."""
        config = getattr(self.processor, "data_config", None)
        if config is not None:
            from timm.data.transforms_factory import create_transform

            whole: Any = create_transform(**{**config, "crop_pct": 1.0}, is_training=False)
            pixels: Tensor = whole(image)
            return pixels[None]
        off = {name: False for name in ("do_resize", "do_center_crop") if hasattr(self.processor, name)}
        return cast(Tensor, self.processor(images=[image], return_tensors="pt", **off)["pixel_values"])

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stay in evaluation mode, without dropout and without updates of running statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, pixel_values: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens d_vision"]:
        """Return the visual features of preprocessed images.

        Raises:
            ValueError: If the layer does not exist, or `class_token` is set for an inner layer of timm.
        """
        timm_model = getattr(self.model, "timm_model", None)
        if self.layer == -1:
            hidden = self.model(pixel_values=pixel_values).last_hidden_state
            if getattr(timm_model, "output_fmt", "NCHW") == "NHWC":
                hidden = hidden.permute(0, 3, 1, 2)
        else:
            outputs = self.model(pixel_values=pixel_values, output_hidden_states=True)
            count = len(outputs.hidden_states)
            if not -count <= self.layer < count:
                raise ValueError(
                    f"the image encoder has {count} hidden states and vision_layer is {self.layer}; choose "
                    f"one of {-count} to {count - 1}"
                )
            hidden = outputs.hidden_states[self.layer]
            if self.class_token and getattr(timm_model, "num_prefix_tokens", 0) > 0:
                raise ValueError(
                    "timm gives inner layers without class token, so class_token=True has nothing to keep at "
                    f"layer={self.layer}; use layer=-1, class_token=False or a tower of transformers"
                )
        if hidden.dim() == 4:  # of a convolutional encoder: (batch, channels, height, width)
            prefix, grid = hidden.new_empty(len(hidden), 0, hidden.shape[1]), hidden
        else:
            height, width = pixel_values.shape[-2:]
            split = self._prefix_tokens(hidden.shape[1], height, width)
            prefix, patches = hidden[:, :split], hidden[:, split:]
            rows = round(math.sqrt(patches.shape[1] * height / width))
            grid = patches.transpose(1, 2).unflatten(2, (rows, -1))
        if self.pooled_grid:
            grid = nn.functional.adaptive_max_pool2d(grid, self.pooled_grid)
        patches = grid.flatten(2).transpose(1, 2)
        return torch.cat([prefix, patches], dim=1) if self.class_token else patches

    def _prefix_tokens(self, token_count: int, height: int, width: int) -> int:
        """Return the number of tokens in front of the patches: class token and registers."""
        timm_model = getattr(self.model, "timm_model", None)
        if timm_model is not None:
            return int(getattr(timm_model, "num_prefix_tokens", 0))
        patch: int = cast(Any, self.model).config.patch_size
        return token_count - (height // patch) * (width // patch)
