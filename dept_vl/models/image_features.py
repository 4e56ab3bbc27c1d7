"""Image features of pretrained models, which can be computed in advance and stored.

The features are the outputs of a model's `get_image_features`, such as the vectors of BLIP-2's Q-Former or
the projected patches of LLaVA, PaliGemma, Gemma 3, Florence-2 and T5Gemma 2. Models whose features depend on
the question, or whose number of features depends on the image, are not supported.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from dept_vl._utils.errors import UsageError
from dept_vl._utils.images import to_rgb
from dept_vl.models.source import QUESTION, SourceReader
from dept_vl.models.vision import VisionEncoder

PIXELS, FEATURES = "pixel_values", "image_features"
"""Keys of the pixels of images in a source, and of the features that replace them."""
SIZES = ((64, 64), (640, 160), (200, 900))
"""Sizes of the test images for whether all images have the same number of tokens."""
OTHER_QUESTION = "is it two"


class ImageFeatures(VisionEncoder):
    """Image encoder of a pretrained model, with the interface of `VisionEncoder`.

    Raises:
        UsageError: If the model's image features cannot be stored.
    """

    def __init__(self, model: PreTrainedModel, reader: SourceReader, *, exif: bool) -> None:
        nn.Module.__init__(self)
        self.model, self.reader, self.exif = model, reader, exif
        self.processor = reader.processor.image_processor
        self.layer, self.class_token, self.pooled_grid = -1, False, 0
        self.own_fit = self.image_fit = "own"
        source = reader.process([QUESTION], [[Image.new("RGB", SIZES[0])]])
        problem = self._problem(source)
        if problem:
            raise UsageError(f"image features of {type(model).__name__} cannot be stored: {problem}")
        self.pixel_shape = tuple(source[PIXELS].shape[1:])
        with torch.no_grad():
            made = encoded(model, source)
        self.token_count, self.d_vision = made.pooler_output[0].shape
        self.own_weights = {
            f"{prefix}.{name}": tensor
            for prefix, part in image_parts(model, source).items()
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        }
        if any(tensor.requires_grad for tensor in self.own_weights.values()):
            raise UsageError("image features cannot be stored while what computes them is trained")

    def _problem(self, source: Mapping[str, Tensor]) -> str:
        """Return the reason why features cannot be stored, or an empty string."""
        if not hasattr(self.model, "get_image_features"):
            return "it has no method get_image_features"
        other = self.reader.process([OTHER_QUESTION], [[Image.new("RGB", SIZES[0])]])
        read = inputs_of(self.model, source)
        asked = sorted(n for n in read if n not in other or not torch.equal(read[n].cpu(), other[n].cpu()))
        if asked:
            return f"they depend on the question ({', '.join(asked)})"
        pixels = [self.reader.process([QUESTION], [[Image.new("RGB", size)]])[PIXELS] for size in SIZES]
        if len(read) > 1 or len({one.shape for one in pixels}) > 1 or len(pixels[0]) != 1:
            return "their number depends on the size of the image"
        return ""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model, for worker processes that only preprocess images."""
        return {**vars(self), "_modules": {}, "own_weights": {}}

    def weights(self) -> dict[str, Tensor]:
        """See `VisionEncoder.weights`."""
        return self.own_weights

    def preprocess(self, images: list[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
        """See `VisionEncoder.preprocess`."""
        for image in images:
            self.reader.check_image(image)
        return torch.cat([self.reader.process([QUESTION], [[to_rgb(image)]])[PIXELS] for image in images])

    @torch.no_grad()
    def forward(
        self, pixel_values: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens d_vision"]:
        """See `VisionEncoder.forward`."""
        pooled = encoded(self.model, {PIXELS: pixel_values}).pooler_output
        return pooled if isinstance(pooled, Tensor) else torch.stack(list(pooled))


def inputs_of(model: PreTrainedModel, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a source that are arguments of the model's `get_image_features`."""
    taken = inspect.signature(model.get_image_features).parameters
    device = model.get_input_embeddings().weight.device
    return {name: value.to(device) for name, value in source.items() if name in taken}


def encoded(model: PreTrainedModel, source: Mapping[str, Tensor]) -> Any:
    """Return the output of `get_image_features` for a source, in evaluation mode."""
    was_training = {part for part in model.modules() if part.training}
    model.eval()
    try:
        return model.get_image_features(**inputs_of(model, source), return_dict=True)
    finally:
        for part in was_training:
            part.training = True


@torch.no_grad()
def output_of(model: PreTrainedModel, reader: SourceReader) -> tuple[type, bool]:
    """Return the class of the model's image output, and whether its features are a single tensor."""
    made = encoded(model, reader.process([QUESTION], [[Image.new("RGB", SIZES[0])]]))
    return type(made), isinstance(made.pooler_output, Tensor)


@torch.no_grad()
def image_parts(model: PreTrainedModel, source: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return the modules that a model reads images with, and the modules that contain them, by name."""
    parts = {name: part for name, part in model.named_modules() if hasattr(part, "get_image_features")}
    hooks = [
        module.register_forward_pre_hook(lambda part, _, name=name: parts.update({name: part}))
        for name, module in model.named_modules()
    ]
    try:
        encoded(model, source)
    finally:
        for hook in hooks:
            hook.remove()
    return parts


@contextmanager
def given_features(model: PreTrainedModel, output: tuple[type, bool]) -> Iterator[None]:
    """Let a model take image features in place of pixels within a `with` statement.

    `output` is the class and form of the image output; see `output_of`.
    """
    kind, together = output

    def given(pixel_values: Tensor, *_: Any, **__: Any) -> Any:
        return kind(pooler_output=pixel_values if together else list(pixel_values))

    makers = [part for part in model.modules() if hasattr(part, "get_image_features")]
    replaced: list[tuple[nn.Module, str, Any]] = [(maker, "get_image_features", given) for maker in makers]
    if hasattr(model, "qformer"):  # BLIP-2's `generate` does not call `get_image_features`
        replaced += [
            (model.vision_model, "forward", lambda pixel_values, **_: BaseModelOutput(pixel_values)),
            (
                model.qformer,
                "forward",
                lambda encoder_hidden_states, **_: BaseModelOutput(encoder_hidden_states),
            ),
            (model.language_projection, "forward", lambda states: states),
        ]
    for part, name, function in replaced:
        vars(part)[name] = function
    try:
        yield
    finally:
        for part, name, _ in replaced:
            del vars(part)[name]
