"""Common interface of the backbones: `Backbone` (composed) and `VisionLanguageModel` (pretrained)."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl.models.language import Answerer
from dept_vl.models.options import ImageFit, LoadIn, ObjectOrder, TrainedPart, VisualNorm, VisualPositionBias
from dept_vl.models.projection import OBJECT_ORDER
from dept_vl.models.source import SourceReader
from dept_vl.models.vision import VisionEncoder
from dept_vl.prompts.initialise import COMMON_TOKENS

if TYPE_CHECKING:
    from dept_vl.prompts.dept import DePT

LORA = "lora_"
"""Part of the name of every LoRA tensor of peft."""


class FrozenBackbone(nn.Module, ABC):
    """Base class of backbones: models that a prompt is trained on, frozen unless `freeze` unfreezes parts.

    Attributes:
        name: Name of the backbone in adapters.
        tokenizer: Tokenizer of answers and, in a composed backbone, of texts.
        language: Language model of a composed backbone, or the whole pretrained model.
        language_model: Wrapper of `language` that scores and generates answers.
        vision: Vision tower of a composed backbone; None for text alone and for pretrained models.
        visual_projection: Visual projection of a composed backbone, or None.
        processor: Reader that builds inputs from texts and images with a pretrained model's processor.
        d_model: Hidden size of the word embeddings.
        fingerprint: Hashes of the frozen weights by part.
        exif: Whether images are rotated by their EXIF orientation; None if the model reads no images.
        text_form: Form of a pretrained model's questions; empty for the usual one, None if composed.
        load_in: Quantisation of a pretrained model's linear layers; empty for none.
        frame: Number of text tokens that `text_form` adds to a question.
    """

    name: str
    tokenizer: Any
    language: PreTrainedModel
    language_model: Answerer
    vision: VisionEncoder | None
    visual_projection: nn.Module | None
    d_model: int
    fingerprint: dict[str, str]
    visual_position_bias: VisualPositionBias
    object_order: ObjectOrder
    visual_norm: VisualNorm | None
    exif: bool | None
    processor: SourceReader | None = None
    text_form: str | None = None
    load_in: LoadIn = ""
    frame = 0

    @property
    def reads_images(self) -> bool:
        """Whether the backbone reads images."""
        return self.exif is not None

    @property
    def image_fit(self) -> ImageFit | None:
        """How images are resized to the vision tower's input shape; None without a vision tower."""
        return None if self.vision is None else self.vision.image_fit

    def image_features(self) -> VisionEncoder | None:
        """Return the encoder whose image features can be computed in advance; None without images.

        Raises:
            UsageError: If the features cannot be computed in advance.
        """
        return self.vision

    @property
    def device(self) -> torch.device:
        """Device of the word embeddings, where inputs have to be."""
        device: torch.device = self.language_model.word_embeddings.weight.device
        return device

    @abstractmethod
    def read(
        self,
        prompt: "DePT | None",
        input_ids: Int[Tensor, "batch text"],
        attention_mask: Int[Tensor, "batch text"] | Bool[Tensor, "batch text"],
        *,
        word_table: nn.Embedding | None = None,
        pixel_values: Float[Tensor, "batch images 3 height width"] | None = None,
        visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None,
        processed: Mapping[str, Tensor] | None = None,
    ) -> tuple[Any, Bool[Tensor, "batch source"]]:
        """Encode a source with a prompt, for `language_model.logits` and `language_model.generate`.

        Inputs are those of `PromptedModel.encode`. `word_table` replaces the word embeddings; see
        `PromptedModel.folded`.

        Returns:
            Encoded source in the form that `language_model` takes, and its mask.
        """

    def with_projection(self, projection: nn.Module | None) -> "FrozenBackbone":
        """Return a backbone that shares all models with this one but has another visual projection."""
        other = copy.copy(self)
        # The shallow copy shares the dict of submodules, so it gets its own.
        other._modules = {**self._modules, "visual_projection": projection}
        return other

    def freeze(
        self, *, language: bool = True, visual_projection: bool = False, but: TrainedPart = "all"
    ) -> None:
        """Freeze or unfreeze parts of the backbone. The vision tower is always frozen.

        With `language` False, `but` can name the part of the language model that is trained.
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

    def image_encoder(self) -> nn.Module | None:
        """Return the part of `language` that encodes images and stays frozen, or None."""
        return None

    def _trained_parts(self, part: TrainedPart) -> list[nn.Parameter]:
        encoder = self.image_encoder()
        frozen = set() if encoder is None else {id(parameter) for parameter in encoder.parameters()}
        named = [(name, p) for name, p in self.language.named_parameters() if id(p) not in frozen]
        if part == "all":
            return [parameter for _, parameter in named]
        if part == "lora":
            return [parameter for name, parameter in named if LORA in name]
        biases = [parameter for name, parameter in named if name.endswith(".bias")]
        # T5 has no biases; the scales of its norms are trained instead.
        return biases or [parameter for _, parameter in named if parameter.dim() == 1]

    def add_lora(self, rank: int) -> None:
        """Add LoRA to the query and value projections of the attention, by peft.

        Raises:
            ImportError: If peft is not installed.
            ValueError: If peft does not know the target modules of this language model.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ImportError('LoRA needs peft: pip install -e ".[bench]"') from None
        try:
            # The pair is scaled by alpha / rank.
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=self._lora_targets())
            inject_adapter_in_model(config, self.language)
        except ValueError as error:
            raise ValueError(
                f"peft puts no LoRA on {self.name} ({type(self.language).__name__}): {error}; train biases "
                "or everything instead (--train_only biases, all)"
            ) from error
        self.freeze(language=False, but="lora")

    def _lora_targets(self) -> list[str] | None:
        """Return the names of the query and value projections; None for peft's own choice."""
        names = {name.rpartition(".")[2] for name, _ in self.language.named_modules()}
        # peft's choice for T5, which it does not know for all models of T5's architecture.
        return ["q", "v"] if {"q", "v"} <= names else None

    def embed(self, input_ids: Int[Tensor, "batch text"]) -> Float[Tensor, "batch text d_model"]:
        """Return the word embeddings of tokens as the language model uses them (with BART's scale)."""
        return self.language_model.embed(input_ids)

    def word_size(self) -> float:
        """Return the root mean square of the embeddings of the first `COMMON_TOKENS` tokens."""
        words = self.language_model.word_embeddings.weight
        common = torch.arange(min(COMMON_TOKENS, len(words)), device=words.device)
        return float(self.embed(common[None]).detach().float().square().mean().sqrt())

    def probe(self, images: int = 1) -> None:  # nothing to check in a composed backbone
        """Run the model to check that a prompt works with `images` images per question.

        Raises:
            ValueError: If a prompt does not work.
        """

    @abstractmethod
    def check_prompt(self, prompt: "DePT") -> None:
        """Check that the backbone supports the method of a prompt.

        Raises:
            ValueError: If it does not. The message names methods to use instead.
        """
