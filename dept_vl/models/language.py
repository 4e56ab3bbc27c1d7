"""Encoder-decoders and decoder-only language models with a common interface: embed, encode, logits, generate.

|            | `EncoderDecoder` (T5, BART)                | `DecoderOnly` (GPT-2, Llama)                |
|------------|--------------------------------------------|---------------------------------------------|
| input      | `[prompt ; text ; visual]`, bidirectional  | `[prompt ; start ; visual ; text ; answer]` |
| `encode`   | returns the encoder's output               | returns the embeddings                      |
| padding    | on the right                               | on the left, so the answer follows the text |
| `generate` | returns a start token and the answer       | returns the answer                          |

A decoder-only model has the start token if its tokenizer puts one in front of texts, as Llama's does.
"""

import inspect
from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from dept_vl.models.checks import load_config, load_model
from dept_vl.models.generation import generate, special_tokens
from dept_vl.models.options import VisualPositionBias
from dept_vl.models.padding import pack
from dept_vl.models.positions import ENCODING, TextPositions
from dept_vl.models.prompt_hook import is_encoder_decoder
from dept_vl.models.tokens import IGNORE_INDEX, WORD, style_of

SUPPORTED = (
    "encoder-decoders with T5's or BART's positions (T5, FLAN-T5, mT5, UMT5, LongT5, BART, mBART, Pegasus, "
    "Marian) and decoder-only models (GPT-2, Llama, Mistral, Qwen2 and their like)"
)
"""Supported language models, for error messages."""


def load_language(name_or_path: str | Path) -> PreTrainedModel:
    """Load a language model from the Hub or a folder, in full precision.

    Raises:
        ValueError: If it is neither an encoder-decoder nor a decoder-only model, if it needs its own code, or
            if its files are damaged.
    """
    config = load_config(name_or_path, "a language model", SUPPORTED)
    encoder_decoder = config.is_encoder_decoder
    known = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        raise ValueError(
            f"{name_or_path} is of type {config.model_type!r}, which transformers has neither as an "
            "encoder-decoder nor as a decoder-only language model; load one such as google-t5/t5-base or "
            f"openai-community/gpt2: supported are {SUPPORTED}"
        )
    loader = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = load_model(loader, name_or_path, "a language model")
    return model


class LanguageModel:
    """Word embeddings and positions of a language model.

    `text_model` is the part that reads the text: the encoder, or the decoder of a decoder-only model.

    Attributes:
        encoder_decoder: Whether the model is an encoder-decoder.
        counts_text: Whether positions are counted from the first text column, whatever is in front of it.
        special_tokens: Settings from `generation.special_tokens`, set by `wrap_language_model`.
    """

    def __init__(self, model: PreTrainedModel, text_model: PreTrainedModel, name: str) -> None:
        self.model = model
        self.text_model = text_model
        self.name = name
        self.encoder_decoder = is_encoder_decoder(model.config)
        self.word_embeddings = text_model.get_input_embeddings()
        self.counts_text = False
        self.special_tokens: dict[str, Any] = {}

    def embed(self, input_ids: Int[Tensor, "batch text"]) -> Float[Tensor, "batch text d_model"]:
        """Return the word embeddings of tokens as the model uses them (with BART's scale)."""
        embeddings: Tensor = self.word_embeddings(input_ids)
        # BART's embedding module applies the scale. The encoders of Pegasus and Marian do so for input_ids.
        scales_itself = hasattr(self.word_embeddings, "embed_scale")
        scale: float = 1.0 if scales_itself else getattr(self.text_model, "embed_scale", 1.0)
        return embeddings * scale if scale != 1.0 else embeddings

    @property
    def positions(self) -> int | None:
        """Number of positions; None if there is no limit."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit

    def check_length(self, prompt: int, text: int, visual: int = 0, answer: int = 0) -> None:
        """Check that the model has enough positions for an input; see `check_positions`.

        The answer is not counted for an encoder-decoder, whose decoder has its own positions.
        """
        counted = 0 if self.encoder_decoder else answer
        check_positions(self.name, self.positions, prompt=prompt, text=text, visual=visual, answer=counted)


def check_positions(name: str, limit: int | None, **parts: int) -> None:
    """Check that a model has enough positions for all parts of an input.

    Raises:
        ValueError: If it has too few. The message has the limit and the length of each part.
    """
    needed = sum(parts.values())
    if limit is not None and needed > limit:
        lengths = " + ".join(f"{length} {part.replace('_', ' ')}" for part, length in parts.items() if length)
        raise ValueError(
            f"{name} has {limit} positions and the input needs {needed}: {lengths}; shorten the prompt "
            "(prompt_length) or the text (max_source_length)"
        )


class Answerer(LanguageModel, ABC):
    """Base class of language models that score and generate answers; see `LanguageModel` for arguments."""

    @abstractmethod
    def logits(
        self, encoded: Any, mask: Bool[Tensor, "batch source"], labels: Int[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target vocabulary"]:
        """Return the logits of each answer token, given the tokens before it."""

    @abstractmethod
    def generate(
        self, encoded: Any, mask: Bool[Tensor, "batch source"], **options: Any
    ) -> Int[Tensor, "sequences target"]:
        """Generate token ids of answers, after the decoder's start token if there is one."""


class EncoderDecoder(Answerer):
    """T5- or BART-like model, whose encoder reads the source and whose decoder answers.

    With `visual_normed`, visual tokens bypass the encoder's norm of embeddings.

    Raises:
        ValueError: If the encoder has neither T5's nor BART's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        visual_position_bias: VisualPositionBias,
        visual_normed: bool = False,
    ) -> None:
        super().__init__(model, model.get_encoder(), name)
        self.visual_position_bias = visual_position_bias
        if visual_position_bias == "none":
            self.counts_text = TextPositions(self.text_model, visual_normed).counts_text

    def encode(
        self,
        embeddings: Float[Tensor, "batch prompt_text d_model"],
        mask: Bool[Tensor, "batch prompt_text"],
        visual: Float[Tensor, "batch visual d_model"] | None,
        prompt_length: int,
    ) -> tuple[ModelOutput, Bool[Tensor, "batch source"]]:
        """Return the encoder's output and the cross-attention mask; see `Backbone.encode`."""
        visual_length = 0 if visual is None else visual.shape[1]
        if visual is not None:
            embeddings = torch.cat([embeddings, visual.to(embeddings.dtype)], dim=1)
            mask = torch.cat([mask, mask.new_ones(visual.shape[:2])], dim=1)
            if self.visual_position_bias == "relative":
                # Padding between text and image would shift the image's positions.
                embeddings, mask = pack(embeddings, mask)
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask.long()}  # LongT5 computes with it
        if self.visual_position_bias == "relative":
            return self.text_model(**inputs), mask
        # In a compiled graph, the segments are constants.
        with nullcontext() if torch.compiler.is_compiling() else ENCODING:
            return self.text_model(**inputs, segments=(prompt_length, visual_length)), mask

    def logits(
        self, encoded: ModelOutput, mask: Bool[Tensor, "batch source"], labels: Int[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target vocabulary"]:
        """Return the logits of each answer token, given the tokens before it."""
        logits: Tensor = self.model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits
        return logits

    def generate(
        self, encoded: ModelOutput, mask: Bool[Tensor, "batch source"], **options: Any
    ) -> Int[Tensor, "sequences target"]:
        """Generate token ids of answers, which begin with the decoder's start token."""
        inputs = {"encoder_outputs": encoded, "attention_mask": mask}
        return generate(self.model, self.special_tokens, options, inputs)


class DecoderOnly(Answerer):
    """GPT-2- or Llama-like model, in which prompt, text and answer are one sequence.

    A tokenizer without a padding token gets its end-of-text token as one.

    Raises:
        ValueError: If the model is bidirectional (BERT) or takes no position ids (Bloom, Mamba), or if the
            tokenizer has no end-of-text token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str) -> None:
        super().__init__(model, model.get_decoder(), name)
        if any(getattr(module, "is_causal", None) is False for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} reads both ways and cannot write an answer; take a model that reads "
                f"from left to right, or an encoder-decoder: supported are {SUPPORTED}"
            )
        missing = {"position_ids", "logits_to_keep"} - set(inspect.signature(model.forward).parameters)
        if missing:
            raise ValueError(
                f"{type(model).__name__}.forward takes no {' and no '.join(sorted(missing))}, without which "
                f"padding moves the text; supported are {SUPPORTED}"
            )
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {name} has no end of text, without which no answer ends; name one "
                "(eos_token) in its tokenizer_config.json"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.starts = int(tokenizer(WORD).input_ids[0] == tokenizer.bos_token_id)
        # Rows with different prompts then have their text in the same columns, until `encode` moves padding.
        self.counts_text = True

    def encode(
        self,
        embeddings: Float[Tensor, "batch prompt_text d_model"],
        mask: Bool[Tensor, "batch prompt_text"],
        visual: Float[Tensor, "batch visual d_model"] | None,
        prompt_length: int,
    ) -> tuple[ModelOutput, Bool[Tensor, "batch source"]]:
        """Return the embeddings and their mask, with padding on the left; see `Backbone.encode`."""
        if visual is not None:  # the question sees the image, and the answer follows the question
            front = prompt_length + self.starts
            seen = visual.to(embeddings.dtype)
            embeddings = torch.cat([embeddings[:, :front], seen, embeddings[:, front:]], dim=1)
            real = mask.new_ones(visual.shape[:2])
            mask = torch.cat([mask[:, :front], real, mask[:, front:]], dim=1)
        embeddings, mask = pack(embeddings, mask, padding_first=True)
        return BaseModelOutput(last_hidden_state=embeddings), mask

    def logits(
        self, encoded: ModelOutput, mask: Bool[Tensor, "batch source"], labels: Int[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target vocabulary"]:
        """Return the logits of each answer token, given the tokens before it.

        Raises:
            ValueError: If source and answer are longer than the context.
        """
        source, answered = encoded.last_hidden_state, labels != IGNORE_INDEX
        check_positions(self.name, self.positions, source=source.shape[1], answer=labels.shape[1])
        answer = self.embed(labels.where(answered, 0))  # any token will do, because it is masked
        mask = torch.cat([mask, answered], dim=1)
        logits: Tensor = self.model(
            inputs_embeds=torch.cat([source, answer], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=labels.shape[1] + 1,
        ).logits
        return logits[:, :-1]  # each token is predicted at the position before it

    def generate(
        self, encoded: ModelOutput, mask: Bool[Tensor, "batch source"], **options: Any
    ) -> Int[Tensor, "sequences target"]:
        """Generate token ids of answers, without the source.

        Raises:
            ValueError: If source and answer (`max_new_tokens`) are longer than the context.
        """
        source = encoded.last_hidden_state
        answer = options.get("max_new_tokens") or 0
        check_positions(self.name, self.positions, source=source.shape[1], answer=answer)
        # `generate` computes positions from the mask.
        inputs = {"inputs_embeds": source, "attention_mask": mask.long()}
        return generate(self.model, self.special_tokens, options, inputs)


def wrap_language_model(
    model: PreTrainedModel,
    tokenizer: Any,
    name: str,
    visual_position_bias: VisualPositionBias,
    visual_normed: bool = False,
) -> EncoderDecoder | DecoderOnly:
    """Wrap a language model of transformers in `EncoderDecoder` or `DecoderOnly`.

    Raises:
        ValueError: If the class raises it, or if the tokenizer does not fit the class.
    """
    wrapper: EncoderDecoder | DecoderOnly
    if model.config.is_encoder_decoder:
        wrapper = EncoderDecoder(model, name, visual_position_bias, visual_normed)
    else:
        wrapper = DecoderOnly(model, tokenizer, name)
    separate = style_of(tokenizer).lead is None
    if separate != model.config.is_encoder_decoder:
        expected = "ends every text" if model.config.is_encoder_decoder else "does not end a text"
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(WORD).input_ids)
        raise ValueError(
            f"{type(model).__name__} needs a tokenizer that {expected} with a special token; that of {name} "
            f"makes {pieces} of {WORD!r}: change add_eos_token in its tokenizer_config.json"
        )
    wrapper.special_tokens = special_tokens(model, tokenizer)
    return wrapper
