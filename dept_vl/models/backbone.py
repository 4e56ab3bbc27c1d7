"""A vision tower and an encoder-decoder language model, joined by a visual projection; or text alone.

The language model's encoder reads `[text ; visual]`, with a prompt in front of the text when there
is one. Protocol: VL-T5 (Cho et al. 2021) and VL-Adapter (Sung et al. 2022). For text alone the language
model may also be decoder-only (see `language`).
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dept_vl._utils.io import read_object, write_json
from dept_vl._utils.printable import printable
from dept_vl._utils.tensors import check_parameters, fingerprint, load_exactly, read_tensors
from dept_vl.models.checks import check_tokenizer, load_tokenizer
from dept_vl.models.language import load_language, reads_in_blocks, wrap_language_model
from dept_vl.models.options import (
    BEFORE_ORDER,
    ImageFit,
    ObjectOrder,
    TrainedPart,
    VisualNorm,
    VisualPositionBias,
)
from dept_vl.models.projection import MAX_IMAGES, OBJECT_ORDER, embedding_norm, new_projection
from dept_vl.models.vision import VisionEncoder, VisionOptions

BACKBONE_FILE = "backbone.json"
PROJECTION_FILE = "visual_projection.safetensors"
LORA = "lora_"
"""In the names that peft gives to the tensors of LoRA."""


@dataclass(frozen=True)
class BackboneFile:
    """The fields of `backbone.json`."""

    name: str
    visual_position_bias: VisualPositionBias
    object_order: ObjectOrder
    visual_norm: VisualNorm | None
    image_fit: ImageFit | None
    vision: VisionOptions | None


class Backbone(nn.Module):
    """The models that a prompt is trained on.

    Everything but the visual projection is frozen unless `freeze` is told otherwise.

    Args:
        vision: Image encoder, or None for text alone.
        language: A T5- or BART-like encoder-decoder; for text alone also a GPT-2- or Llama-like decoder.
        tokenizer: Its tokenizer; padding is put on the right.
        name: What an adapter calls this backbone.
        visual_position_bias: See `VisualPositionBias`.
        object_order: See `ObjectOrder`.
        visual_norm: See `VisualNorm`.

    Attributes:
        language_model: `language` in the wrapper that reads and answers with it.
        fingerprint: Hashes of the frozen weights, by part: `language` and, for images, `vision`.

    Raises:
        ValueError: If the language model is not supported, or cannot read images, or not
            with this `visual_position_bias`.

    Example:
        >>> import dept_vl
        >>> backbone = dept_vl.Backbone.from_pretrained("data/tiny-clip-t5")
        >>> any(parameter.requires_grad for parameter in backbone.language.parameters())
        False
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        language: PreTrainedModel,
        tokenizer: Any,
        *,
        name: str,
        visual_position_bias: VisualPositionBias = "none",
        object_order: ObjectOrder = "frozen",
        visual_norm: VisualNorm = "once",
    ) -> None:
        super().__init__()
        for option, value, allowed in (
            ("visual_position_bias", visual_position_bias, VisualPositionBias),
            ("object_order", object_order, ObjectOrder),
            ("visual_norm", visual_norm, VisualNorm),
        ):
            if value not in get_args(allowed):
                raise ValueError(f"{option} is one of {get_args(allowed)}; got {value!r}")
        self.name = name
        self.vision = vision
        self.language = language
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "right"
        self.visual_position_bias = visual_position_bias
        if vision is not None and not language.config.is_encoder_decoder:
            raise ValueError(
                f"visual tokens are read by an encoder, and {name} has none ({type(language).__name__}): "
                "leave the vision tower out, or take an encoder-decoder such as google-t5/t5-base"
            )
        if vision is not None and visual_position_bias == "none" and reads_in_blocks(language):
            raise ValueError(
                f"{name} ({type(language).__name__}) reads in blocks that share one table of relative "
                "positions, which cannot leave visual tokens out: give --visual_position_bias relative"
            )
        self.object_order: ObjectOrder = "none" if vision is None else object_order
        self.visual_norm: VisualNorm | None = None
        if vision is not None and embedding_norm(language) is not None:
            self.visual_norm = "twice" if visual_position_bias == "relative" else visual_norm
        self.language_model = wrap_language_model(
            language, tokenizer, name, visual_position_bias, self.visual_norm == "once"
        )
        check_tokenizer(tokenizer, language, name)
        self.d_model: int = self.language_model.word_embeddings.embedding_dim
        self.visual_projection: nn.Module | None = None
        if vision is not None:
            places = 0 if object_order == "none" else vision.token_count
            self.visual_projection = new_projection(language, vision.d_vision, places)
        # Taken before any training, so that it names the frozen weights even after fine-tuning.
        parts = {"language": language} | ({"vision": vision.model} if vision else {})
        self.fingerprint = {part: fingerprint(m.state_dict().items()) for part, m in parts.items()}
        self.freeze()

    @property
    def image_fit(self) -> ImageFit | None:
        """How images get the shape of the image encoder's pixels; None without one."""
        return None if self.vision is None else self.vision.image_fit

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the word embeddings."""
        device: torch.device = self.language_model.word_embeddings.weight.device
        return device

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path | None = None,
        *,
        vision: str | Path | None = None,
        language: str | Path | None = None,
        vision_layer: int = -1,
        class_token: bool = False,
        pooled_grid: int = 0,
        exif: bool = True,
        visual_position_bias: VisualPositionBias = "none",
        object_order: ObjectOrder | None = None,
        visual_norm: VisualNorm | None = None,
        image_fit: ImageFit | None = None,
    ) -> "Backbone":
        """Load a folder written by `save_pretrained`, or join two models of the Hub or the disk.

        Args:
            backbone: Such a folder; it carries a trained visual projection and its own options.
            vision: Hub name or folder of the image encoder (with `language`); None for text alone.
            language: Hub name or folder of the encoder-decoder or, for text alone, of the decoder-only model.
            vision_layer: See `VisionEncoder`.
            class_token: See `VisionEncoder`.
            pooled_grid: See `VisionEncoder`.
            exif: See `VisionEncoder`; it belongs to no folder.
            visual_position_bias: See `VisualPositionBias`.
            object_order: See `ObjectOrder`; None takes the folder's own, else frozen.
            visual_norm: See `VisualNorm`; None takes the folder's own, else once.
            image_fit: See `ImageFit`; None takes the folder's own, else squash. A folder's may be changed.

        Raises:
            ValueError: If both or neither of `backbone` and `language` are given, or options besides a folder
                that it does not have, or the folder's files are damaged or do not belong together.
            FileNotFoundError: If the folder holds no backbone.
        """
        if (backbone is None) == (language is None):
            raise ValueError(
                "give either a backbone folder (--backbone data/tiny-clip-t5) or a language model, with "
                "or without a vision tower (--vision openai/clip-vit-base-patch32 "
                "--language google-t5/t5-base); "
                f"got backbone={backbone}, vision={vision}, language={language}"
            )
        if backbone is None:
            assert language is not None
            tower = None
            if vision is not None:
                read = {"layer": vision_layer, "class_token": class_token, "pooled_grid": pooled_grid}
                fit = image_fit or "squash"
                tower = VisionEncoder.from_pretrained(vision, **read, exif=exif, image_fit=fit)
            return cls(
                tower,
                load_language(language),
                load_tokenizer(language),
                name="+".join(str(part) for part in (vision, language) if part is not None),
                visual_position_bias=visual_position_bias,
                object_order=object_order or "frozen",
                visual_norm=visual_norm or "once",
            )
        folder = Path(backbone)
        if not (folder / BACKBONE_FILE).is_file():
            raise FileNotFoundError(
                f"no backbone at {folder}: expected {BACKBONE_FILE}, language/ and, for images, vision/ and "
                f"{PROJECTION_FILE} there; for models of the Hub give --vision and --language instead"
            )
        options = read_object(folder / BACKBONE_FILE, BackboneFile, BEFORE_ORDER)
        seen = options["vision"] or {}
        asked = {
            "vision": (vision, None),
            "vision_layer": (vision_layer, -1, seen.get("layer")),
            "class_token": (class_token, False, seen.get("class_token")),
            "pooled_grid": (pooled_grid, 0, seen.get("pooled_grid")),
            "visual_position_bias": (visual_position_bias, "none", options["visual_position_bias"]),
            "object_order": (object_order, None, options["object_order"]),
            "visual_norm": (visual_norm if options["visual_norm"] else None, None, options["visual_norm"]),
        }
        other = [f"{name}={value}" for name, (value, *taken) in asked.items() if value not in taken]
        if other:
            raise ValueError(
                f"{folder} is a whole backbone with options of its own, in {BACKBONE_FILE}; got "
                f"{', '.join(other)} besides: leave that out, or join two models by --vision and --language"
            )
        self = cls(
            VisionEncoder.from_pretrained(
                folder / "vision", **options["vision"], exif=exif, image_fit=image_fit or options["image_fit"]
            )
            if options["vision"] is not None
            else None,
            load_language(folder / "language"),
            load_tokenizer(folder / "language"),
            name=printable(options["name"]),
            visual_position_bias=options["visual_position_bias"],
            object_order=options["object_order"],
            visual_norm=options["visual_norm"] or "once",
        )
        if self.visual_projection is not None:
            tensors = read_tensors(folder / PROJECTION_FILE)
            check_parameters(tensors, folder / PROJECTION_FILE)
            load_exactly(self.visual_projection, tensors, f"{folder / PROJECTION_FILE}: its")
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vision/, language/ (with tokenizer), the visual projection and the options."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.language.save_pretrained(folder / "language")
        self.tokenizer.save_pretrained(folder / "language")
        options: dict[str, Any] = {
            "name": self.name,
            "visual_position_bias": self.visual_position_bias,
            "object_order": self.object_order,
            "visual_norm": self.visual_norm,
            "image_fit": self.image_fit,
            "vision": None,
        }
        if self.vision is not None and self.visual_projection is not None:
            self.vision.save_pretrained(folder / "vision")
            save_file(self.visual_projection.state_dict(), folder / PROJECTION_FILE)
            options["vision"] = self.vision.options()
        write_json(folder / BACKBONE_FILE, options, indent=2)

    def with_projection(self, projection: nn.Module | None) -> "Backbone":
        """The same models, not copied, behind another visual projection.

        Args:
            projection: Of the interface of `projection.VisualProjection`.
        """
        other = copy.copy(self)
        # `nn.Module` would share the table of its parts too.
        other._modules = {**self._modules, "visual_projection": projection}
        return other

    def freeze(
        self, *, language: bool = True, visual_projection: bool = False, but: TrainedPart = "all"
    ) -> None:
        """Choose what is frozen. The vision tower always is; nothing else sets `requires_grad`.

        Args:
            language: Freeze the whole language model.
            visual_projection: Freeze the visual projection.
            but: What of the language model is trained if it is not frozen.
        """
        self.language.requires_grad_(False)
        for parameter in [] if language else self._trained_parts(but):
            parameter.requires_grad_(True)
        if self.vision is not None and self.visual_projection is not None:
            self.vision.requires_grad_(False)
            self.visual_projection.requires_grad_(not visual_projection)
            order = getattr(self.visual_projection, OBJECT_ORDER, None)
            if order is not None and self.object_order == "frozen":
                order.requires_grad_(False)

    def _trained_parts(self, part: TrainedPart) -> list[nn.Parameter]:
        named = list(self.language.named_parameters())
        if part == "all":
            return [parameter for _, parameter in named]
        if part == "lora":
            return [parameter for name, parameter in named if LORA in name]
        biases = [parameter for name, parameter in named if name.endswith(".bias")]
        # T5 has none; the scales of its norms are as many and act as near.
        return biases or [parameter for _, parameter in named if parameter.dim() == 1]

    def add_lora(self, rank: int) -> None:
        """Put a low-rank pair beside each query and value of the attention, as peft does by default.

        Raises:
            ImportError: If peft is not installed.
            ValueError: If peft does not know which they are in this language model.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ImportError('LoRA needs peft: pip install -e ".[bench]"') from None
        names = {name.rpartition(".")[2] for name, _ in self.language.named_modules()}
        # As peft has it for T5, and not for all of its relatives.
        of_t5 = ["q", "v"] if {"q", "v"} <= names else None
        try:
            # The pair is scaled by alpha / rank.
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=of_t5)
            inject_adapter_in_model(config, self.language)
        except ValueError as error:
            raise ValueError(
                f"peft puts no LoRA on {self.name} ({type(self.language).__name__}): {error}; train biases "
                "or everything instead (--train_only biases, all)"
            ) from error
        self.freeze(language=False, but="lora")

    def embed(self, input_ids: Int[Tensor, "batch text"]) -> Float[Tensor, "batch text d_model"]:
        """Word embeddings as the language model uses them (BART's scale included)."""
        return self.language_model.embed(input_ids)

    def project(
        self,
        *,
        pixel_values: Float[Tensor, "batch images 3 height width"] | None = None,
        visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None,
    ) -> Float[Tensor, "batch visual d_model"] | None:
        """Visual tokens of the language model's width, from pixels or from features; None from neither.

        Raises:
            ValueError: If there are images and the backbone has no vision tower, or too many images.
        """
        if pixel_values is None and visual_features is None:
            return None
        if self.vision is None or self.visual_projection is None:
            raise ValueError(f"{self.name} has no vision tower and was given images; load it with --vision")
        if visual_features is None:
            assert pixel_values is not None
            features = self.vision(pixel_values.flatten(0, 1))
            visual_features = features.unflatten(0, pixel_values.shape[:2])
        if visual_features.shape[1] > MAX_IMAGES:
            raise ValueError(
                f"an example has {visual_features.shape[1]} images; the image-order embedding has "
                f"{MAX_IMAGES} rows"
            )
        projected: Tensor = self.visual_projection(visual_features)
        return projected

    def encode(
        self,
        embeddings: Float[Tensor, "batch prompt_text d_model"],
        mask: Bool[Tensor, "batch prompt_text"],
        visual: Float[Tensor, "batch visual d_model"] | None = None,
        *,
        prompt_length: int = 0,
    ) -> tuple[ModelOutput, Bool[Tensor, "batch source"]]:
        """Run the encoder over `[prompt ; text ; visual]`.

        Args:
            embeddings: Prompt and text, padding on the right.
            mask: False on padding.
            visual: Projected visual tokens, if there are images.
            prompt_length: How many of the first columns are prompt.

        Returns:
            The encoder's output and the mask for the decoder's cross-attention; of a decoder-only model
            the embeddings and their mask, padding first.

        Raises:
            ValueError: If the language model has no position for so long an input.
        """
        visual_length = 0 if visual is None else visual.shape[1]
        self.check_length(prompt_length, embeddings.shape[1] - prompt_length, visual_length)
        return self.language_model.encode(embeddings, mask, visual, prompt_length)

    def check_length(self, prompt: int, text: int, visual: int, answer: int = 0) -> None:
        """Refuse an input for which the language model has too few positions.

        An encoder-decoder's answer has positions of its own and is not counted.

        Raises:
            ValueError: With the limit and what each part takes of it.
        """
        self.language_model.check_length(prompt, text, visual, answer)
