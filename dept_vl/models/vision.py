"""Frozen image encoders: CLIP, SigLIP, DINOv2 and other transformers vision models, and any timm model.

Every encoder is loaded by the standard `from_pretrained` from a Hub name or a local folder (timm
models through transformers' own timm wrapper), with its own image processor beside it, and gives
`(batch, tokens, d_vision)`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from dept_vl._utils.images import check_shape, to_rgb
from dept_vl._utils.io import one_line
from dept_vl.models.checks import check_processor, check_weights, loading
from dept_vl.models.options import LARGEST_GRID, ImageFit

CONVOLUTIONAL = 4
"""Dimensions of a convolutional tower's output, (batch, channels, height, width)."""

SUPPORTED = "vision models of transformers (CLIP, SigLIP, DINOv2, ViT and their like) and of timm (timm/...)"
"""Image encoders, for messages."""


@dataclass(frozen=True)
class VisionOptions:
    """What is read of an image encoder, as files have it; see `VisionEncoder`."""

    layer: int
    class_token: bool
    pooled_grid: int


class VisionEncoder(nn.Module):
    """Images in, visual tokens out; never trained.

    Args:
        model: A transformers vision model (a timm model in its wrapper counts).
        processor: Its image processor.
        layer: Which hidden state is read: -1 the last, -2 the penultimate.
        class_token: Keep the class token (and registers) in front of the patch tokens.
        pooled_grid: Adaptively max-pool the patch grid to `pooled_grid` x `pooled_grid` tokens
            (published for CLIP RN101: 7x7 to 6x6); 0 keeps every patch.
        exif: Turn images as their EXIF orientation says where they are read.
        image_fit: See `ImageFit`.

    Attributes:
        own_fit: What the processor does by itself.
        image_fit: What is done: `squash`, `crop` or `pad`.

    Raises:
        ValueError: If there is no such layer, grid or fit.
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
        """Load from a Hub name or a local folder.

        Args:
            name_or_path: Such as `openai/clip-vit-base-patch32`, `timm/resnet50.a1_in1k` or a folder.
            **options: `layer`, `class_token`, `pooled_grid`, `exif`, `image_fit` of the constructor.

        Raises:
            OSError: If there is no such model, as transformers says it.
            ValueError: If it brings code of its own, or has no such layer.
        """
        # Said plainly: left out, transformers asks at the terminal whether to run code of the model's folder.
        with loading(name_or_path, "an image encoder"):
            try:
                config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
            except ValueError as error:  # a type of which transformers knows nothing
                problem = one_line(error).partition(". ")[0]
                raise ValueError(
                    f"{name_or_path} is no image encoder: {problem}. Supported are {SUPPORTED}"
                ) from None
        # A two-tower checkpoint (CLIP, SigLIP) names its image half; the rest is never loaded.
        config = getattr(config, "vision_config", config)
        with loading(name_or_path, "an image encoder"):
            model, info = AutoModel.from_pretrained(
                name_or_path,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if model.main_input_name != "pixel_values":
            raise ValueError(
                f"{name_or_path} is no image encoder: {type(model).__name__} reads {model.main_input_name}. "
                f"Supported are {SUPPORTED}"
            )
        # timm's processor exists for one backend; asking for another makes transformers warn.
        backend = {"backend": "pil"} if config.model_type == "timm_wrapper" else {}
        check_weights(name_or_path, info, unused="pooler")
        with loading(name_or_path, "an image encoder"):
            processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False, **backend)
            check_processor(processor, name_or_path)
            return cls(model, processor, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and processor in the standard layout."""
        cast(PreTrainedModel, self.model).save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def options(self) -> dict[str, int | bool]:
        """The constructor's options that belong to a backbone, as `from_pretrained` takes them."""
        return {
            "layer": self.layer,
            "class_token": self.class_token,
            "pooled_grid": self.pooled_grid,
        }

    def weights(self) -> dict[str, Tensor]:
        """Everything that features depend on besides options, by name."""
        return self.model.state_dict()

    def fit_of(self, recorded: ImageFit) -> ImageFit:
        """What a recorded fit means for this encoder: `own` is one of the others."""
        return self.own_fit if recorded == "own" else recorded

    def preprocess(self, images: list[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
        """Fit, resize and normalise as the encoder was trained, in RGB whatever the images are in.

        Raises:
            ValueError: If an image is too long for its width, or too large after resizing.
        """
        size = getattr(self.processor, "size", None)
        own = self.image_fit == self.own_fit
        for image in images:
            check_shape(*image.size, getattr(size, "shortest_edge", None) if own else None)
        rgb = [to_rgb(image) for image in images]
        height, width = self.pixel_shape[1:]
        # What has the shape already is left to the processor, unless that would cut a margin off.
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
        """What the processor does with an image that is three times too wide; seen from its pixels."""
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
        """What the processor says of itself; timm's has the same under other names."""
        return {**vars(self.processor), **getattr(self.processor, "data_config", {})}

    def _cuts_margin(self) -> bool:
        """Whether the processor resizes to more than the encoder reads, and cuts the rest off."""
        settings = self._settings()
        edges = [getattr(settings.get("size"), name, None) for name in ("shortest_edge", "height")]
        shortest = min(self.pixel_shape[1:])
        return next(filter(None, edges), shortest) // (settings.get("crop_pct") or 1.0) > shortest

    def _fitted(self, image: Image.Image) -> Image.Image:
        """An image at the encoder's size, in one step."""
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
        """What the processor makes of an image that has the encoder's size."""
        config = getattr(self.processor, "data_config", None)
        if config is not None:
            from timm.data.transforms_factory import create_transform

            whole: Any = create_transform(**{**config, "crop_pct": 1.0}, is_training=False)
            pixels: Tensor = whole(image)
            return pixels[None]
        off = {name: False for name in ("do_resize", "do_center_crop") if hasattr(self.processor, name)}
        return cast(Tensor, self.processor(images=[image], return_tensors="pt", **off)["pixel_values"])

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stay in evaluation mode: a frozen tower has no dropout and no running statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, pixel_values: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens d_vision"]:
        """Visual tokens of preprocessed images.

        Raises:
            ValueError: If there is no such layer, or a class token is asked for at one that timm gives
                without.
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
        if hidden.dim() == CONVOLUTIONAL:
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
        """Class token and registers in front of the patches."""
        timm_model = getattr(self.model, "timm_model", None)
        if timm_model is not None:
            return int(getattr(timm_model, "num_prefix_tokens", 0))
        patch: int = cast(Any, self.model).config.patch_size
        return token_count - (height // patch) * (width // patch)
