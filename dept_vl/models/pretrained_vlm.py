"""Pretrained models of transformers as backbones: vision-language models, and language models alone.

The model's processor or tokenizer builds the source, and `placeholders` inserts the prompt.
`VisionLanguageModel.probe` runs the model to check that a prompt works with it.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import one_line
from dept_vl._utils.tensors import fingerprint
from dept_vl._utils.terminal import waiting
from dept_vl.models.backbone import Backbone
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.checks import load_config, load_model, loading
from dept_vl.models.image_features import FEATURES, ImageFeatures, image_parts, output_of
from dept_vl.models.options import LoadIn
from dept_vl.models.prompt_hook import check_text_alone, is_encoder_decoder, place
from dept_vl.models.quantised import fingerprint_of_words, keep_gradients, placing
from dept_vl.models.reader import PretrainedReader, Source
from dept_vl.models.source import PER_TOKEN, QUESTION, SourceReader, TextForm
from dept_vl.models.vision import VisionEncoder
from dept_vl.prompts.dept import DePT

PROBED = (QUESTION, "what is the red one")
"""Questions of `VisionLanguageModel.probe`, with different lengths."""
ATTENTION = ("q_proj", "v_proj", "q", "v")
"""Names of the query and value projections, which LoRA is added to."""
ENDS = ("id", "index")
"""Ends of the configuration keys for an image token, as in `image_token_id`."""
KINDS: tuple[tuple[Any, set[bool], str, Any], ...] = (
    (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        {True, False},
        "a vision-language model",
        AutoModelForImageTextToText,
    ),
    (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, {True}, "a language model", AutoModelForSeq2SeqLM),
    (MODEL_FOR_CAUSAL_LM_MAPPING, {False}, "a language model", AutoModelForCausalLM),
)
"""Supported configuration classes, whether such models are encoder-decoders, what messages call them, and the
class that loads them."""
SUPPORTED = "models that AutoModelForImageTextToText, AutoModelForSeq2SeqLM or AutoModelForCausalLM opens"
"""Supported models, for error messages."""
CLOSE = 1e-3
"""Largest change of logits by padding (sums in another order), as a share of the largest logit."""
CLOSE_IN_8_BITS = 0.05
"""`CLOSE` for models whose activations are rounded to 8 bits."""


class VisionLanguageModel(FrozenBackbone):
    """Frozen pretrained vision-language model or language model, with its processor.

    Args:
        model: Model of one of the kinds in `KINDS`.
        processor: Processor of the model, or its tokenizer for text alone.
        name: Name of the backbone in adapters.
        text_form: Form of a question: `chat`, or a text with `{text}`; empty for the model's usual form.
        exif: Whether to rotate images by their EXIF orientation.
        load_in: Quantisation of the model's linear layers; empty for none.
        spread: Whether the model is spread over several devices. Such a model is not moved by `to`.

    Raises:
        UsageError: If `text_form` has no `{text}`, or is `chat` and the processor has no chat template.
        ValueError: If the processor has no tokenizer or does not belong to the model.

    Example:
        >>> from dept_vl.models.pretrained_vlm import VisionLanguageModel
        >>> backbone = VisionLanguageModel.from_pretrained("Salesforce/blip2-flan-t5-xl")  # doctest: +SKIP
    """

    processor: SourceReader
    language_model: PretrainedReader

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        name: str,
        text_form: str = "",
        exif: bool = True,
        load_in: LoadIn = "",
        spread: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = getattr(processor, "tokenizer", processor)
        reads_images = self.tokenizer is not processor
        self.name, self.language, self.exif = name, model, exif if reads_images else None
        self.vision = self.visual_projection = None
        self.visual_position_bias, self.object_order, self.visual_norm = "relative", "none", None
        config = model.config
        self.text_form, self.load_in, self.spread = text_form, load_in, spread
        self._reads_images: list[nn.Module] | None = None
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"the processor of {name} has no tokenizer ({type(processor).__name__})")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        form = TextForm.of(text_form, processor, config.model_type)
        self.processor = SourceReader(processor, form, model, name, _image_token(config, name))
        self.frame, self.placeholder = self.processor.frame, self.processor.placeholder
        self.language_model = PretrainedReader(model, self.tokenizer, name)
        width: int = self.language_model.word_embeddings.weight.shape[1]
        self.d_model = width
        self.start = None if self.language_model.encoder_decoder else self.tokenizer.bos_token_id
        self.fingerprint = {
            "language": fingerprint(model.state_dict().items()),
            "model": type(model).__name__,
        }
        if load_in:  # word embeddings are not quantised, and are the same in every precision
            self.fingerprint["words"] = fingerprint_of_words(self)
        self.freeze()

    @classmethod
    @waiting("loading the model")
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        text_form: str = "",
        exif: bool = True,
        load_in: LoadIn = "",
        device_map: str = "",
    ) -> "VisionLanguageModel":
        """Load a model and its processor from the Hub or a folder, in full precision or quantised.

        `device_map` is `auto` to spread the model over the devices of this process; empty for one device. For
        the other options, see the class.

        Raises:
            UsageError: If bitsandbytes is needed and not installed, or `text_form` is invalid.
            ValueError: If the model is of none of `KINDS` or needs its own code, or if its files are damaged.
        """
        config = load_config(name_or_path, "a vision-language model", SUPPORTED)
        # Models of sound are listed with language models of the other kind (Whisper's decoder, Qwen2-Audio).
        kind = is_encoder_decoder(config)
        known = (row[2:] for row in KINDS if type(config) in row[0] and kind in row[1])
        what, opens = next(known, (None, None))
        if what is None:
            raise ValueError(
                f"{name_or_path} has type {config.model_type!r}, which answers no questions in transformers; "
                f"supported are {SUPPORTED}"
            )
        with loading(name_or_path, "a processor"):
            processor = _processor(name_or_path, config.model_type)
        model = load_model(opens, name_or_path, what, **placing(load_in, device_map))
        keep_gradients(model)
        return cls(
            model,
            processor,
            name=str(name_or_path),
            text_form=text_form,
            exif=exif,
            load_in=load_in,
            spread=len(set(getattr(model, "hf_device_map", {}).values())) > 1,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "VisionLanguageModel":
        """Move the model, unless it is spread over several devices."""
        return self if self.spread else super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def image_features(self) -> VisionEncoder:
        """See `FrozenBackbone.image_features`."""
        if not self.reads_images:
            raise UsageError(f"{self.name} ({type(self.language).__name__}) reads no images")
        return ImageFeatures(self.language, self.processor, exif=self.exif is not False)

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Set training or evaluation mode; modules that read images always stay in evaluation mode."""
        super().train(mode)
        if mode:
            for part in self._image_parts():
                part.training = False
        return self

    def _image_parts(self) -> Iterable[nn.Module]:
        if not hasattr(self.language, "get_image_features"):
            encoder = self.image_encoder()
            return () if encoder is None else encoder.modules()
        if self._reads_images is None:
            blank = self.processor.process([QUESTION], [[Image.new("RGB", (64, 64))]])
            self._reads_images = [*image_parts(self.language, blank).values()]
        return self._reads_images

    def image_encoder(self) -> nn.Module | None:
        """See `FrozenBackbone.image_encoder`."""
        part: Any = self.language
        words = self.language_model.word_embeddings
        while any(module is words for module in part.modules()):
            inner = part.get_encoder(modality="image")
            if inner is part:
                return None
            part = inner
        encoder: nn.Module = part
        return encoder

    def _lora_targets(self) -> list[str] | None:
        encoder = self.image_encoder()
        of_images = set() if encoder is None else set(encoder.modules())
        names = [
            name
            for name, module in self.language.named_modules()
            if name.rpartition(".")[2] in ATTENTION and module not in of_images
        ]
        return names or None

    def check_prompt(self, prompt: DePT) -> None:
        """See `FrozenBackbone.check_prompt`."""
        check_text_alone(prompt)

    def read(
        self,
        prompt: DePT | None,
        input_ids: Int[Tensor, "batch text"],
        attention_mask: Int[Tensor, "batch text"] | Bool[Tensor, "batch text"],
        *,
        processed: Mapping[str, Tensor] | None = None,
        **of_composed: Any,
    ) -> tuple[Source, Bool[Tensor, "batch source"]]:
        """Return the source with placeholders, which the model reads later; see `FrozenBackbone.read`.

        `of_composed` takes the inputs of composed backbones and ignores them.
        """
        more = dict(processed or {})
        if FEATURES in more and self.language_model.output_of_images is None:
            self.language_model.output_of_images = output_of(self.language, self.processor)
        others = {name: more.pop(name) for name in list(more) if name.endswith(PER_TOKEN)}
        mask = attention_mask.bool()
        placed = place(
            prompt,
            input_ids,
            mask,
            self.processor.is_text(input_ids, mask),
            others,
            placeholder=self.placeholder,
            start=self.start,
            padding_first=not self.language_model.encoder_decoder,
        )
        return Source(prompt, placed, more), placed.mask

    @torch.no_grad()
    def probe(self, images: int = 1) -> None:
        """Run the model to check that a prompt works with `images` images per question.

        Raises:
            ValueError: If a prompt does not work.
        """
        was_training = self.training
        self.eval()
        try:
            problem = self._problem(images)
        except Exception as error:
            raise ValueError(
                f"{self.name} ({type(self.language).__name__}) does not answer a question about {images} "
                f"image(s): {type(error).__name__}: {one_line(error)}"
            ) from error
        finally:
            with suppress(Exception):  # of a model that reads no image, its image parts cannot be found
                self.train(was_training)
        if problem:
            raise ValueError(
                f"a prompt does not work with {self.name} ({type(self.language).__name__}): {problem}"
            )

    def _problem(self, images: int) -> str:
        if images and not self.reads_images:
            return f"it reads no images, and a question here has {images}"
        sources = [self._probe_source([text], images) for text in PROBED]
        if images > 1 and not self._images_grow(images):
            return f"it takes one image, and a question here has {images}"
        both = self._probe_source(list(PROBED), images)
        labels = torch.tensor([[self.placeholder, self.tokenizer.eos_token_id]], device=self.device)
        prompt = DePT(self.d_model, prompt_length=2, rank=1, max_source_length=10_000).to(self.device)
        prompt.init_prompt(self.embed(torch.tensor([[self.placeholder]], device=self.device))[0].float() * 2)
        nothing = DePT(self.d_model, prompt_length=0, rank=1, max_source_length=10_000).to(self.device)

        def logits(prompt: DePT | None, source: dict[str, Tensor]) -> Tensor:
            processed = dict(source)
            ids, mask = processed.pop("input_ids"), processed.pop("attention_mask")
            encoded, mask = self.read(prompt, ids, mask, processed=processed)
            given = labels.repeat(len(ids), 1)
            return self.language_model.logits(encoded, mask, given).float()

        bare = logits(None, sources[0])
        if not bare.isfinite().all():
            return "its logits are not finite"
        if not torch.equal(bare, logits(nothing.eval(), sources[0])):
            return "a prompt of length zero with a zero offset changes its logits"
        prompted = [logits(prompt.eval(), source) for source in sources]
        if torch.equal(prompted[0], bare):
            return "the prompt does not change its logits"
        far = (logits(prompt, both) - torch.cat(prompted)).abs().max()
        close = CLOSE_IN_8_BITS if self.load_in == "8bit" else CLOSE
        if far > close * torch.cat(prompted).abs().max():
            return f"padding changes its logits, by up to {far:.2g}"
        return ""

    def _images_grow(self, images: int) -> bool:
        """Return whether this number of images gives more image tokens than one image."""
        counts = [
            torch.isin(
                self._probe_source([PROBED[0]], n)["input_ids"].cpu(), self.processor.image_tokens
            ).sum()
            for n in (1, images)
        ]
        return bool(counts[1] > counts[0])

    def _probe_source(self, texts: list[str], images: int) -> dict[str, Tensor]:
        blank = Image.new("RGB", (64, 64), (200, 40, 40))
        source = self.processor(texts, [[blank] * images] * len(texts), [10_000] * len(texts))
        return {name: value.to(self.device) for name, value in source.items()}


def open_backbone(model: str | Path | None = None, **options: Any) -> FrozenBackbone:
    """Load a pretrained model, or without `model` a composed backbone; see its `from_pretrained`."""
    if model is None:
        return Backbone.from_pretrained(**options)
    return VisionLanguageModel.from_pretrained(model, **options)


def _image_token(config: PretrainedConfig, name: str) -> int | None:
    """Return the id of the image token, or None if the configuration has none.

    Raises:
        ValueError: If the configuration has a token for videos but none for images.
    """
    image, video = (
        next((getattr(config, f"{kind}_{end}") for end in ENDS if hasattr(config, f"{kind}_{end}")), None)
        for kind in ("image_token", "video_token")
    )
    if image is None and video is not None:
        raise ValueError(
            f"{name} reads videos and no images: its config.json ({config.model_type}) names no token of an "
            "image; take a model that reads images"
        )
    return image


def _processor(name_or_path: str | Path, model_type: str) -> Any:
    try:
        return AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except OSError as error:
        if not Path(name_or_path).is_dir():
            raise
        raise ValueError(
            f"{name_or_path} holds no processor of a {model_type} ({one_line(error).partition('. ')[0]}): "
            "put its files and those of its tokenizer beside config.json (processor.save_pretrained)"
        ) from error
