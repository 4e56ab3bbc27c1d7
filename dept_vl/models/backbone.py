"""Composed backbones: a language model, alone or joined to a vision tower by a visual projection.

An encoder reads `[prompt ; text ; visual]`, as in VL-T5 (Cho et al. 2021) and VL-Adapter (Sung et al. 2022).
A decoder-only model reads the visual tokens in front of the text, as LLaVA (Liu et al. 2023) does; see
`language`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from dept_vl._utils.io import read_object, write_json
from dept_vl._utils.printable import printable
from dept_vl._utils.tensors import check_parameters, fingerprint, load_exactly, read_tensors
from dept_vl._utils.terminal import waiting
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.checks import check_tokenizer, load_tokenizer
from dept_vl.models.language import DecoderOnly, EncoderDecoder, load_language, wrap_language_model
from dept_vl.models.options import BEFORE_ORDER, ImageFit, ObjectOrder, VisualNorm, VisualPositionBias
from dept_vl.models.padding import packing, take
from dept_vl.models.projection import MAX_IMAGES, embedding_norm, new_projection
from dept_vl.models.row_prompts import RowPrompts, repeated
from dept_vl.models.vision import VisionEncoder, VisionOptions
from dept_vl.prompts.dept import DePT

BACKBONE_FILE = "backbone.json"
PROJECTION_FILE = "visual_projection.safetensors"
ENCODED, ENCODED_MASK = "encoded", "encoded_mask"
"""Keys of `processed` in `Backbone.read` for a source that was encoded earlier."""


@dataclass(frozen=True)
class BackboneFile:
    """Fields of `backbone.json`, which are also in an adapter's description of its backbone."""

    name: str
    visual_position_bias: VisualPositionBias
    object_order: ObjectOrder
    visual_norm: VisualNorm | None
    image_fit: ImageFit | None
    vision: VisionOptions | None


class Backbone(FrozenBackbone):
    """Backbone that is composed of a language model and, for images, a vision tower and a visual projection.

    Everything but the visual projection is frozen. For attributes, see `FrozenBackbone`.

    Args:
        vision: Image encoder, or None for text alone.
        language: T5- or BART-like encoder-decoder, or GPT-2- or Llama-like decoder.
        tokenizer: Tokenizer of the language model. Its padding side is set to the right.
        name: Name of the backbone in adapters.
        visual_position_bias: See `VisualPositionBias`; always relative for a decoder-only model with images.
        object_order: See `ObjectOrder`.
        visual_norm: See `VisualNorm`.

    Raises:
        ValueError: If an option has an unknown value, the language model is not supported or not with this
            `visual_position_bias`, or the tokenizer does not belong to it.

    Example:
        >>> import dept_vl
        >>> backbone = dept_vl.Backbone.from_pretrained("data/tiny-clip-t5")
        >>> any(parameter.requires_grad for parameter in backbone.language.parameters())
        False
    """

    language_model: EncoderDecoder | DecoderOnly

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
        # Set whatever the tokenizer's files say.
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        if vision is not None and not language.config.is_encoder_decoder:
            visual_position_bias = "relative"
        self.visual_position_bias = visual_position_bias
        # LongT5's encoder restricts self-attention to blocks of the source.
        in_blocks = hasattr(language.config, "encoder_attention_type")
        if vision is not None and visual_position_bias == "none" and in_blocks:
            raise ValueError(
                f"{name} ({type(language).__name__}) reads in blocks that share one table of relative "
                "positions, which cannot leave visual tokens out: give --visual_position_bias relative"
            )
        self.exif = None if vision is None else vision.exif
        self.object_order = "none" if vision is None else object_order
        self.visual_norm = None
        if vision is not None and embedding_norm(language) is not None:
            self.visual_norm = "twice" if visual_position_bias == "relative" else visual_norm
        self.language_model = wrap_language_model(
            language, tokenizer, name, visual_position_bias, self.visual_norm == "once"
        )
        check_tokenizer(tokenizer, language, name)
        self.d_model = self.language_model.word_embeddings.embedding_dim
        self.visual_projection = None
        if vision is not None:
            places = 0 if object_order == "none" else vision.token_count
            self.visual_projection = new_projection(language, vision.d_vision, places, self.word_size())
        # Computed before any training, so that it identifies the frozen weights even after fine-tuning.
        parts = {"language": language} | ({"vision": vision.model} if vision else {})
        self.fingerprint = {part: fingerprint(m.state_dict().items()) for part, m in parts.items()}
        self.freeze()

    @classmethod
    @waiting("loading the model")
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
        """Load a saved backbone, or join a vision tower and a language model.

        Args:
            backbone: Folder written by `save_pretrained`, with its own visual projection and options.
            vision: Hub name or folder of the image encoder (with `language`); None for text alone.
            language: Hub name or folder of the encoder-decoder or decoder-only model.
            vision_layer: See `VisionEncoder`.
            class_token: See `VisionEncoder`.
            pooled_grid: See `VisionEncoder`.
            exif: See `VisionEncoder`. It is not saved in the folder.
            visual_position_bias: See `VisualPositionBias`.
            object_order: See `ObjectOrder`; None uses the folder's value, or frozen without a folder.
            visual_norm: See `VisualNorm`; None uses the folder's value, or once without a folder.
            image_fit: See `ImageFit`; None uses the folder's value, or squash without a folder. Any other
                value overrides the folder's.

        Raises:
            ValueError: If both or neither of `backbone` and `language` are given, if an option differs from
                the folder's, or if the folder's files are damaged or do not belong together.
            FileNotFoundError: If the folder contains no backbone.
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
        for part in ("language", *(["vision"] if options["vision"] is not None else [])):
            if not (folder / part).is_dir():
                raise FileNotFoundError(
                    f"the backbone at {folder} is not whole: expected a folder {part} there"
                )
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
        """Save language model and tokenizer (language/), vision tower (vision/), projection and options."""
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

    def check_prompt(self, prompt: DePT) -> None:
        """See `FrozenBackbone.check_prompt`."""
        if prompt.needs_encoder and not self.language.config.is_encoder_decoder:
            raise ValueError(
                f"method memory changes an encoder's output, and {type(self.language).__name__} has no "
                "encoder; take adept, which changes the input, or LoRA (--train_backbone --train_only lora)"
            )
        if prompt.visual_offset is not None and self.vision is None:
            raise ValueError(
                f"visual_offset shifts visual tokens, and {self.name} reads no images; leave it out"
            )

    def read(
        self,
        prompt: DePT | None,
        input_ids: Int[Tensor, "batch text"],
        attention_mask: Int[Tensor, "batch text"] | Bool[Tensor, "batch text"],
        *,
        word_table: nn.Embedding | None = None,
        pixel_values: Float[Tensor, "batch images 3 height width"] | None = None,
        visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None,
        processed: Mapping[str, Tensor] | None = None,
    ) -> tuple[Any, Bool[Tensor, "batch source"]]:
        """Encode a source, or take its encoding from `processed`; see `FrozenBackbone.read`."""
        if processed is not None and ENCODED in processed:
            kept = processed[ENCODED]
            kept = kept if prompt is None else prompt.shift_memory(kept)
            return BaseModelOutput(last_hidden_state=kept), processed[ENCODED_MASK]
        mask = attention_mask.bool()
        # Padding is moved to the right first, so that a token's column is its position from here on.
        columns = packing(mask)
        mask = take(mask, columns)
        look_up = self.embed if word_table is None else word_table
        embeddings = look_up(take(input_ids, columns))
        visual = self.project(pixel_values=pixel_values, visual_features=visual_features)
        if prompt is None:
            return self.encode(embeddings, mask, visual)
        embeddings, mask = prompt(embeddings, mask)
        if visual is not None:
            visual = prompt.shift_visual(visual)
        once = isinstance(prompt, RowPrompts) and self.language.config.is_encoder_decoder
        again = repeated(embeddings, mask, visual) if once else None
        if again is not None:  # rows with the same encoder input are encoded once
            first, which = again
            visual = None if visual is None else visual[first]
            encoded, mask = self.encode(
                embeddings[first], mask[first], visual, prompt_length=prompt.prompt_length
            )
            encoded.last_hidden_state, mask = encoded.last_hidden_state[which], mask[which]
        else:
            encoded, mask = self.encode(embeddings, mask, visual, prompt_length=prompt.prompt_length)
        if prompt.needs_encoder:
            encoded.last_hidden_state = prompt.shift_memory(encoded.last_hidden_state)
        return encoded, mask

    def project(
        self,
        *,
        pixel_values: Float[Tensor, "batch images 3 height width"] | None = None,
        visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None,
    ) -> Float[Tensor, "batch visual d_model"] | None:
        """Return visual tokens of size `d_model` from pixels or features; None without images.

        Raises:
            ValueError: If images are given to a backbone without a vision tower, or more than `MAX_IMAGES`.
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
        """Run the encoder on `[prompt ; text ; visual]`, whose padding is on the right.

        Return its output and the mask for the decoder's cross-attention. For a decoder-only model, return the
        embeddings and their mask, with padding on the left.

        Raises:
            ValueError: If the input is longer than the language model's positions.
        """
        visual_length = 0 if visual is None else visual.shape[1]
        self.language_model.check_length(prompt_length, embeddings.shape[1] - prompt_length, visual_length)
        return self.language_model.encode(embeddings, mask, visual, prompt_length)
