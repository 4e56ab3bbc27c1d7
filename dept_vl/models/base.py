"""What the pipeline asks of a backbone, whichever it is: `Backbone` (composed) or `VisionLanguageModel`."""

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
"""In the names that peft gives to the tensors of LoRA."""


class FrozenBackbone(nn.Module, ABC):
    """The models that a prompt is trained on, frozen unless `freeze` is called with other values.

    Attributes:
        name: What an adapter calls it.
        tokenizer: Makes the tokens of answers and, of a composed backbone, of texts.
        language: What is frozen, or adapted: the language model, or the whole pretrained model.
        language_model: It in the wrapper that scores and generates answers.
        vision: The vision tower of a composed backbone; None without one, or where `language` has it.
        visual_projection: Of a composed backbone.
        processor: Makes sources of texts and images, where the model has one of its own.
        d_model: Width of the word embeddings.
        fingerprint: Hashes of the frozen weights, by part.
        exif: Whether images are turned as their EXIF orientation says; None if none are read.
        text_form: How a pretrained model is asked; empty for its usual form, None for a composed backbone.
        load_in: How a pretrained model's linear layers are quantised; empty if they are not.
        frame: Text tokens that the form of a question adds to it.
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
        """Whether a question may be about images."""
        return self.exif is not None

    @property
    def image_fit(self) -> ImageFit | None:
        """How images get the shape of the image encoder's pixels; None where that is not chosen."""
        return None if self.vision is None else self.vision.image_fit

    def image_features(self) -> VisionEncoder | None:
        """What encodes images before any text is read, so that it may be kept; None without images.

        Raises:
            UsageError: If that cannot be.
        """
        return self.vision

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the word embeddings."""
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
        """Read a source with a prompt, for `language_model.logits` and `language_model.generate`.

        Args:
            prompt: None reads the source as it is.
            input_ids: Tokens, padded on either side.
            attention_mask: Non-zero on tokens.
            word_table: Instead of the word embeddings; see `PromptedModel.folded`.
            pixel_values: Of a composed backbone: preprocessed images, or
            visual_features: what the vision tower gave for them; neither for text alone.
            processed: What else `processor` made of the source.

        Returns:
            What the wrapper takes, and its mask.
        """

    def with_projection(self, projection: nn.Module | None) -> "FrozenBackbone":
        """Return the same models, shared and not copied, with another visual projection.

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

    def image_encoder(self) -> nn.Module | None:
        """The part of `language` that encodes images, which stays frozen; None without one."""
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
        """Names of the queries and values of the attention; None where peft knows them itself."""
        names = {name.rpartition(".")[2] for name, _ in self.language.named_modules()}
        # As peft has it for T5, and not for all of its relatives.
        return ["q", "v"] if {"q", "v"} <= names else None

    def embed(self, input_ids: Int[Tensor, "batch text"]) -> Float[Tensor, "batch text d_model"]:
        """Word embeddings as the language model uses them (BART's scale included)."""
        return self.language_model.embed(input_ids)

    def word_size(self) -> float:
        """Root mean square of the embeddings of common words, as the language model uses them."""
        words = self.language_model.word_embeddings.weight
        common = torch.arange(min(COMMON_TOKENS, len(words)), device=words.device)
        return float(self.embed(common[None]).detach().float().square().mean().sqrt())

    def probe(self, images: int = 1) -> None:  # a composed backbone was made for prompts
        """Check on the model itself that a prompt works, with so many images to a question.

        Raises:
            ValueError: If it does not, in one line.
        """

    @abstractmethod
    def check_prompt(self, prompt: "DePT") -> None:
        """Refuse a prompt of a method that acts where the model cannot be reached.

        Raises:
            ValueError: With what to take instead.
        """

    def check_length(self, prompt: int, text: int, visual: int, answer: int = 0) -> None:
        """Refuse an input for which the language model has too few positions.

        An encoder-decoder's answer has positions of its own and is not counted.

        Raises:
            ValueError: With the limit and what each part takes of it.
        """
        self.language_model.check_length(prompt, text, visual, answer)
