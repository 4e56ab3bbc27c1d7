"""A pretrained vision-language model of transformers as a backbone: any of `AutoModelForImageTextToText`.

Its processor makes the source, and a prompt goes in by `placeholders`. `VisionLanguageModel.probe` says
whether that works with a model, by running it.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
)

from dept_vl._utils.io import one_line
from dept_vl._utils.tensors import fingerprint
from dept_vl.models.backbone import Backbone
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.checks import check_weights, loading
from dept_vl.models.generation import GENERATING, generate
from dept_vl.models.language import Answerer
from dept_vl.models.placeholders import Placement, place, prompting
from dept_vl.models.source import CHAT, PER_TOKEN, SourceReader, TextForm
from dept_vl.models.tokens import IGNORE_INDEX, AnswerStyle, write_answers_as
from dept_vl.prompts.dept import DePT

MARK = "MARK"
"""Stands for an answer in a chat template."""
ANSWER_TYPE = {"paligemma": 1}
"""Token type of an answer, where it is not that of a text: PaliGemma reads all others both ways."""
PROBED = ("what is red", "what is the red one")
"""Questions of a probe, of different lengths."""
ATTENTION = ("q_proj", "v_proj", "q", "v")
"""Names of queries and values, where LoRA goes."""
ENDS = ("id", "index")
"""Of the names that the token of an image has in configurations."""
CLOSE = 1e-3
"""Difference that padding may make, as a share of the largest logit: sums come in another order."""


@dataclass(frozen=True)
class Source:
    """A source with its prompt, ready to be read.

    Attributes:
        prompt: None is none.
        placed: The tokens.
        more: What the model reads besides tokens: pixels.
    """

    prompt: DePT | None
    placed: Placement
    more: dict[str, Tensor]


class PretrainedReader(Answerer):
    """Scores and generates answers with the whole model.

    Args:
        model: Of transformers.
        name: For messages.
        encoder_decoder: Whether an answer is a sequence of its own.
        answer_type: Token type of an answer.
        special_tokens: Settings of `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        *,
        encoder_decoder: bool,
        answer_type: int,
        special_tokens: dict[str, Any],
    ) -> None:
        super().__init__(model, model, name)
        self.encoder_decoder, self.answer_type = encoder_decoder, answer_type
        self.special_tokens = special_tokens
        self.counts_text = True
        self.taken = set(inspect.signature(model.forward).parameters)
        # Models with positions in three dimensions make them from the tokens.
        self.counted = "position_ids" in self.taken and not any(
            hasattr(module, "get_rope_index") for module in (model, getattr(model, "model", None))
        )

    def embed(self, input_ids: Int[Tensor, "batch text"]) -> Float[Tensor, "batch text d_model"]:
        """Word embeddings as the model looks them up."""
        embeddings: Tensor = self.word_embeddings(input_ids)
        return embeddings

    def check_length(self, prompt: int, text: int, visual: int, answer: int) -> None:
        """See `FrozenBackbone.check_length`."""
        parts = {"prompt": prompt, "text": text, "image": visual}
        if not self.encoder_decoder:
            parts["answer"] = answer
        self.check_positions("encoder" if self.encoder_decoder else "context", **parts)

    @property
    def positions(self) -> int | None:
        """See `LanguageModel.positions`."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit

    def logits(
        self, encoded: Source, mask: Bool[Tensor, "batch source"], labels: Int[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target vocabulary"]:
        """Scores of each token of the answer, those before it given."""
        placed = encoded.placed
        self.check_length(0, placed.ids.shape[1], 0, labels.shape[1])
        inputs: dict[str, Any] = {"input_ids": placed.ids, "attention_mask": mask.long()}
        inputs |= placed.others | encoded.more
        if self.encoder_decoder:
            with prompting(self.word_embeddings, encoded.prompt, placed):
                separate: Tensor = self.model(**inputs, labels=labels, use_cache=False).logits
            return separate
        answered = labels != IGNORE_INDEX
        joined = torch.cat([mask, answered], dim=1)
        answer = labels.where(answered, self.special_tokens["pad_token_id"])
        inputs |= {"input_ids": torch.cat([placed.ids, answer], dim=1), "attention_mask": joined.long()}
        for name, row in placed.others.items():
            of_answer = row[:, -1:].expand(-1, labels.shape[1], *row.shape[2:])
            if name == "token_type_ids":
                of_answer = torch.full_like(of_answer, self.answer_type)
            inputs[name] = torch.cat([row, of_answer], dim=1)
        if self.counted:
            inputs["position_ids"] = (joined.cumsum(1) - 1).clamp(min=0)
        keep = labels.shape[1] + 1
        if "logits_to_keep" in self.taken:
            inputs["logits_to_keep"] = keep
        with prompting(self.word_embeddings, encoded.prompt, placed):
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits[:, -keep:-1]  # each token is foretold at the one before it

    def generate(
        self, encoded: Source, mask: Bool[Tensor, "batch source"], **options: Any
    ) -> Int[Tensor, "sequences target"]:
        """Decode; new tokens only, behind the decoder's start where there is one."""
        placed = encoded.placed
        width = placed.ids.shape[1]
        self.check_length(0, width, 0, options.get("max_new_tokens") or 0)
        allowed = options.get("prefix_allowed_tokens_fn")
        if allowed is not None and not self.encoder_decoder:
            options["prefix_allowed_tokens_fn"] = lambda row, tokens: allowed(row, tokens[width:])
        inputs = {"input_ids": placed.ids, "attention_mask": mask.long(), **placed.others, **encoded.more}
        # Threads of a server may share the model, and its hook with it.
        with GENERATING, prompting(self.word_embeddings, encoded.prompt, placed):
            tokens = generate(self.model, self.special_tokens, options, inputs)
        return tokens if self.encoder_decoder else tokens[:, width:]


class VisionLanguageModel(FrozenBackbone):
    """A pretrained vision-language model, frozen, with its processor.

    Args:
        model: Of a class of `AutoModelForImageTextToText`.
        processor: The model's.
        name: What an adapter calls it.
        text_form: How a question is asked: `chat`, or a text with `{text}`; empty for the usual form.
        exif: Turn images as their EXIF orientation says.

    Example:
        >>> from dept_vl.models.vlm import VisionLanguageModel
        >>> backbone = VisionLanguageModel.from_pretrained("Salesforce/blip2-flan-t5-xl")  # doctest: +SKIP
    """

    processor: SourceReader
    language_model: PretrainedReader

    def __init__(
        self, model: PreTrainedModel, processor: Any, *, name: str, text_form: str = "", exif: bool = True
    ) -> None:
        super().__init__()
        self.name, self.language, self.exif = name, model, exif
        self.vision = self.visual_projection = None
        self.visual_position_bias, self.object_order, self.visual_norm = "relative", "none", None
        config = model.config
        text = config.get_text_config()
        encoder_decoder = bool(config.is_encoder_decoder or text.is_encoder_decoder)
        self.text_form = text_form
        self.tokenizer = getattr(processor, "tokenizer", None)
        if self.tokenizer is None:
            raise ValueError(f"the processor of {name} has no tokenizer ({type(processor).__name__})")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        image = _image_token(config, name)
        self.processor = SourceReader(
            processor,
            TextForm.of(text_form, processor, config.model_type),
            list(inspect.signature(model.forward).parameters),
            [] if image is None else [image],
        )
        self._learn_form(image, encoder_decoder)
        self.language_model = PretrainedReader(
            model,
            name,
            encoder_decoder=encoder_decoder,
            answer_type=ANSWER_TYPE.get(config.model_type, 0),
            special_tokens=_special_tokens(model, self.tokenizer, encoder_decoder),
        )
        width: int = self.language_model.word_embeddings.weight.shape[1]
        self.d_model = width
        self.start = None if encoder_decoder else self.tokenizer.bos_token_id
        self.fingerprint = {
            "language": fingerprint(model.state_dict().items()),
            "model": type(model).__name__,
        }
        self.freeze()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, text_form: str = "", exif: bool = True
    ) -> "VisionLanguageModel":
        """Load a model and its processor from the Hub or the disk, in full precision.

        Args:
            name_or_path: Hub name or folder.
            text_form: See the class.
            exif: See the class.

        Raises:
            ValueError: If it reads no images or answers in no text, brings code of its own, or its files are
                damaged.
        """
        with loading(name_or_path, "a vision-language model"):
            try:
                config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
            except ValueError as error:  # a type of which transformers knows nothing, or code of its own
                problem = one_line(error).partition(". ")[0]
                raise ValueError(f"{name_or_path} is no vision-language model: {problem}") from None
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"{name_or_path} has type {config.model_type!r}, which answers no questions about images in "
                "transformers (AutoModelForImageTextToText); take one that does, or join two models by "
                "--vision and --language"
            )
        with loading(name_or_path, "a processor"):
            processor = _processor(name_or_path, config.model_type)
        model: PreTrainedModel
        with loading(name_or_path, "a vision-language model"):
            model, info = AutoModelForImageTextToText.from_pretrained(
                name_or_path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
        check_weights(name_or_path, info)
        return cls(model, processor, name=str(name_or_path), text_form=text_form, exif=exif)

    def image_encoder(self) -> nn.Module | None:
        """See `FrozenBackbone.image_encoder`."""
        part: nn.Module = self.language
        words = self.language_model.word_embeddings
        while any(module is words for module in part.modules()):
            inner = part.get_encoder(modality="image")
            if inner is part:
                return None
            part = inner
        return part

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
        if prompt.needs_encoder or prompt.visual_offset is not None:
            raise ValueError(
                "a pretrained model takes what changes its text alone: pt, dept, adept and the like, without "
                f"visual_offset; this prompt is of method {prompt.describe()['method']}"
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
    ) -> tuple[Source, Bool[Tensor, "batch source"]]:
        """See `FrozenBackbone.read`; the source with placeholders, still to be read."""
        more = dict(processed or {})
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
        """Check on the model itself that a prompt works, with so many images to a question.

        Raises:
            ValueError: If it does not, in one line.
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
            self.train(was_training)
        if problem:
            raise ValueError(
                f"a prompt does not work with {self.name} ({type(self.language).__name__}): {problem}"
            )

    def _problem(self, images: int) -> str:
        sources = [self._probe_source([text], images) for text in PROBED]
        if images > 1 and not self._images_grow(images):
            return f"it takes one image, and a question here has {images}"
        both = self._probe_source(list(PROBED), images)
        labels = torch.tensor([[self.placeholder, self.tokenizer.eos_token_id]], device=self.device)
        prompt = DePT(self.d_model, prompt_length=2, rank=1, max_source_length=10_000).to(self.device)
        prompt.init_prompt(self.embed(torch.tensor([[self.placeholder]], device=self.device))[0].float() * 2)
        nothing = DePT(self.d_model, prompt_length=0, rank=1, max_source_length=10_000).to(self.device)

        def logits(prompt: DePT | None, source: dict[str, Tensor]) -> Tensor:
            encoded, mask = self.read(
                prompt, source["input_ids"], source["attention_mask"], processed=_besides(source)
            )
            given = labels.repeat(len(source["input_ids"]), 1)
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
        if far > CLOSE * torch.cat(prompted).abs().max():
            return f"padding changes its logits, by up to {far:.2g}"
        return ""

    def _images_grow(self, images: int) -> bool:
        """Whether that many images have more tokens than one."""
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

    def _learn_form(self, image: int | None, encoder_decoder: bool) -> None:
        """Find what the form adds to a question, which tokens are an image's, and how an answer goes on."""
        blank, reader = Image.new("RGB", (64, 64)), self.processor
        for nested in (True, False):
            reader.nested = nested
            try:
                source = reader.process([PROBED[0]], [[blank]])
                break
            except Exception as error:
                problem = f"{type(error).__name__}: {one_line(error)}"
        else:
            raise ValueError(
                f"the processor of {self.name} makes nothing of a question and an image: {problem}; give "
                "another --text_form, or the processor that belongs to the model"
            )
        ids = source["input_ids"][0].tolist()
        tokenizer = self.tokenizer
        special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        special -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        if image is not None and image not in ids:
            raise ValueError(
                f"the processor of {self.name} is not its model's: expected tokens {image} for an image, as "
                "in config.json, found none; put the processor beside the model that it belongs to"
            )
        around = set()
        if image is not None:
            first, last = ids.index(image), len(ids) - 1 - ids[::-1].index(image)
            for step, place_ in ((-1, first), (1, last)):
                while 0 <= place_ + step < len(ids) and ids[place_ + step] in special:
                    place_ += step
                    around.add(ids[place_])
            reader.image_tokens = torch.tensor(sorted({image, *around}))
        of_text = tokenizer(PROBED[0], add_special_tokens=False).input_ids
        text = reader.is_text(source["input_ids"], source["attention_mask"].bool())
        reader.frame = self.frame = max(0, int(text.sum()) - len(of_text))
        words = [n for n in of_text if n not in special and n not in reader.image_tokens.tolist()]
        if not words or tokenizer.unk_token_id in of_text:
            raise ValueError(f"the tokenizer of {self.name} knows no words: {PROBED[0]!r} becomes {of_text}")
        self.placeholder = words[0]
        self._learn_answers(ids, special, encoder_decoder)

    def _learn_answers(self, ids: list[int], special: set[int], encoder_decoder: bool) -> None:
        """Find out how an answer goes on behind a source, and what ends it."""
        tokenizer, reader = self.tokenizer, self.processor
        if encoder_decoder:
            if tokenizer(MARK).input_ids[-1] != tokenizer.eos_token_id:  # T5Gemma's ends no text by itself
                write_answers_as(tokenizer, AnswerStyle(lead="", end=tokenizer.eos_token_id, start=1))
            return
        end = tokenizer.eos_token_id
        if reader.form.ask == CHAT:
            answer = {"role": "assistant", "content": [{"type": "text", "text": MARK}]}
            whole = reader.processor.apply_chat_template(
                [*reader.conversation(PROBED[0], 1), answer], tokenize=False
            )
            behind = tokenizer(whole.partition(MARK)[2].strip(), add_special_tokens=False).input_ids
            end = next((n for n in behind[:1] if n in special), end)
        open_ = tokenizer.decode(ids[-4:])[-1:]
        write_answers_as(tokenizer, AnswerStyle(lead="\n" if open_.isspace() else None, end=end, start=0))


def open_backbone(model: str | Path | None = None, **options: Any) -> FrozenBackbone:
    """Load a pretrained model, or a composed backbone (see `Backbone.from_pretrained`).

    Args:
        model: Hub name or folder; None joins a backbone.
        **options: Of the class.
    """
    if model is None:
        return Backbone.from_pretrained(**options)
    return VisionLanguageModel.from_pretrained(model, **options)


def _image_token(config: PretrainedConfig, name: str) -> int | None:
    """The placeholder of images; None where a model has none.

    Raises:
        ValueError: If there is one of videos alone.
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


def _special_tokens(model: PreTrainedModel, tokenizer: Any, encoder_decoder: bool) -> dict[str, Any]:
    """Settings of `generate` that the model and its tokenizer imply."""
    style: AnswerStyle | None = getattr(tokenizer, "answer_style", None)
    ends = {tokenizer.eos_token_id} | ({style.end} if style else set())
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(ends)}
    if not encoder_decoder:
        return ids
    for module in model.modules():
        if hasattr(module, "prepare_decoder_input_ids_from_labels"):
            first = module.prepare_decoder_input_ids_from_labels(torch.tensor([[tokenizer.eos_token_id]]))
            return ids | {"decoder_start_token_id": int(first[0, 0])}
    return ids | {"decoder_start_token_id": model.config.get_text_config().decoder_start_token_id}


def _besides(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in source.items() if name not in ("input_ids", "attention_mask")}
