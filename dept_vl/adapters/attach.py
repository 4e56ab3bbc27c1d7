"""A prompt on a ready-made encoder-decoder vision-language model, by hooks that leave no trace.

| family       | class                                    | what is prompted                          |
|--------------|------------------------------------------|-------------------------------------------|
| BLIP-2       | `Blip2ForConditionalGeneration`          | encoder of its T5 (not OPT: no encoder)   |
| InstructBLIP | `InstructBlipForConditionalGeneration`   | encoder of its T5 (not Vicuna)            |
| Florence-2   | `Florence2ForConditionalGeneration`      | encoder of its BART                       |
| T5Gemma 2    | `T5Gemma2ForConditionalGeneration`       | text model in its encoder                 |

All four write the image's features over placeholder tokens of the source. The text encoder then reads
`[P ; E]` with the offset on the embeddings of the text alone: a token's position is its place among the text
tokens of its row, wherever image and padding are, and P stands in front of the first token that is not
padding. Every position counts as the stock encoder counts it: BART's learned ones too, so that P takes m of
them, and T5Gemma 2's windows, so that in its sliding layers only what is near the front sees P. The decoder's
cross-attention mask grows by the m positions of P.

Three hooks do it: on the word embeddings (which tokens are text?), before the text encoder, and before the
decoder (its mask). They are entered by `forward` and `generate` alike.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl._utils.tensors import load_exactly
from dept_vl.adapters.adapter import Adapter
from dept_vl.models.backbone import fingerprint
from dept_vl.models.padding import insert, packing, take
from dept_vl.prompts.dept import COMMON_TOKENS, DePT, sample_vocabulary

SUPPORTED = {
    "Blip2ForConditionalGeneration": "Salesforce/blip2-flan-t5-xl",
    "InstructBlipForConditionalGeneration": "Salesforce/instructblip-flan-t5-xl",
    "Florence2ForConditionalGeneration": "florence-community/Florence-2-base",
    "T5Gemma2ForConditionalGeneration": "google/t5gemma-2-270m-270m",
}
"""Classes of transformers, each with a checkpoint of the Hub that it reads."""


@dataclass(frozen=True)
class Parts:
    """What the hooks are put on.

    Attributes:
        embedding: Looks the source's tokens up, placeholders included.
        encoder: Reads embeddings; the text encoder alone.
        decoder: Attends to what the encoder gave.
        image_tokens: Ids of the placeholders, and of the tokens that fence an image in.
        positions: How many the encoder has; None where there is no limit.
    """

    embedding: nn.Embedding
    encoder: nn.Module
    decoder: nn.Module
    image_tokens: tuple[int, ...]
    positions: int | None

    @property
    def width(self) -> int:
        """Of the embeddings (d)."""
        width: int = self.embedding.weight.shape[1]
        return width

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Parts":
        """Find them in a model.

        Raises:
            ValueError: If the model is of no supported class, has no encoder, or names no placeholder.
        """
        supported = "; ".join(f"{name} (such as {hub})" for name, hub in SUPPORTED.items())
        known = [c.__name__ for c in type(model).__mro__ if c.__name__ in SUPPORTED]
        if not known:
            raise ValueError(
                f"a prompt cannot be attached to a {type(model).__name__}; supported are {supported}. Attach "
                "before the model is wrapped or compiled; for an image encoder and a language model of your "
                "own choice there is dept_vl.Backbone"
            )
        config = model.config
        if known[0].startswith("T5Gemma2"):
            config = model.config.encoder
            encoder, decoder = model.get_encoder().text_model, model.get_decoder()
        else:
            holder = model.model if known[0].startswith("Florence2") else model
            language = holder.language_model
            if not language.config.is_encoder_decoder:
                raise ValueError(
                    f"the language model of {_name(model)} is a {type(language).__name__}, which has no "
                    f"encoder to prompt; take a checkpoint with FLAN-T5 such as {SUPPORTED[known[0]]}"
                )
            encoder, decoder = language.get_encoder(), language.get_decoder()
        names = ("image_token_id", "boi_token_id", "eoi_token_id")
        ids = [getattr(config, name, None) for name in names]
        if ids[0] is None:
            raise ValueError(
                f"the configuration of {_name(model)} has no image_token_id, without which images cannot be "
                "told from text; load the checkpoint's current revision"
            )
        return cls(
            embedding=model.get_input_embeddings(),
            encoder=encoder,
            decoder=decoder,
            image_tokens=tuple(token for token in ids if token is not None),
            positions=getattr(encoder.config, "max_position_embeddings", None),
        )


def new_prompt(
    model: PreTrainedModel, *, prompt_length: int, rank: int, max_source_length: int, seed: int = 0
) -> DePT:
    """A prompt of the model's width that starts from words of its vocabulary.

    Args:
        model: To be prompted.
        prompt_length: See `DePT`, as for the other sizes.
        rank: Of the offset.
        max_source_length: Longest text in tokens, without the placeholders of images.
        seed: Chooses the words.

    Raises:
        ValueError: If the model is not supported, or a size is out of range.
    """
    parts = Parts.of(model)
    prompt = DePT(parts.width, prompt_length=prompt_length, rank=rank, max_source_length=max_source_length)
    ids = sample_vocabulary(
        min(COMMON_TOKENS, parts.embedding.weight.shape[0]),
        prompt_length,
        torch.Generator().manual_seed(seed),
        exclude=(*parts.image_tokens, *_special_tokens(parts.encoder)),
    )
    with torch.no_grad():
        # Through the module, which may scale (T5Gemma 2).
        prompt.init_prompt(parts.embedding(ids.to(parts.embedding.weight.device)).cpu().float())
    return prompt


def attach(model: PreTrainedModel, prompt: DePT) -> "Attached":
    """Put a prompt on a model, freeze the model, and return the handle that takes both back.

    Args:
        model: Of a class in `SUPPORTED`; not yet wrapped or compiled.
        prompt: Moved to the device of the model's word embeddings. `new_prompt` makes one.

    Raises:
        ValueError: If the model is not supported, or the prompt does not fit its width or positions.
    """
    parts = Parts.of(model)
    if prompt.d_model != parts.width:
        raise ValueError(
            f"the prompt is {prompt.d_model} wide and {_name(model)} is {parts.width} wide; build the prompt "
            f"with d_model={parts.width}"
        )
    if parts.positions is not None and prompt.prompt_length >= parts.positions:
        raise ValueError(
            f"the prompt has {prompt.prompt_length} vectors and the text encoder of {_name(model)} has "
            f"{parts.positions} positions for prompt, image and text together; shorten the prompt "
            "(prompt_length)"
        )
    return Attached(model, prompt.to(parts.embedding.weight.device), parts)


class Attached(nn.Module):
    """A model with a prompt on it; made by `attach` or `load`.

    `model(...)` and `model.generate(...)` read the prompt until `detach`, and so does this module, which
    passes its arguments on. Give this module, which holds the prompt's parameters, to `accelerator.prepare`
    or DistributedDataParallel: of the bare model they would find nothing to train. In a `with` statement
    it detaches itself at the end. One thread at a time may call the model.

    Attributes:
        model: The ready-made model, frozen until `detach`.
        prompt: What is trained.
    """

    def __init__(self, model: PreTrainedModel, prompt: DePT, parts: Parts) -> None:
        super().__init__()
        self.model = model
        self.prompt = prompt
        self._parts = parts
        self._active = True
        self._seen: tuple[Tensor, Tensor] | None = None
        self._unfrozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._unfrozen:
            parameter.requires_grad_(False)
        self._hooks = [
            parts.embedding.register_forward_hook(self._see_tokens, with_kwargs=True),
            parts.encoder.register_forward_pre_hook(self._prompt_encoder, with_kwargs=True),
            parts.decoder.register_forward_pre_hook(self._lengthen_mask, with_kwargs=True),
        ]

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        model: PreTrainedModel,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Attached":
        """Attach what `save` wrote; to go on training, or to answer.

        Args:
            name_or_folder: Its folder, or a repository on the Hub (see `Adapter.from_pretrained`).
            model: That it was trained on.
            revision: Branch, tag or commit of the repository.
            token: For private and gated repositories.

        Raises:
            FileNotFoundError: If there is no adapter in the folder or repository.
            PermissionError: If the repository is gated, or the token is not accepted.
            ValueError: If it is damaged, or was trained on another base.
        """
        adapter = Adapter.from_pretrained(name_or_folder, revision=revision, token=token)
        _check_base(adapter, model)
        prompt = adapter.new_prompt()
        tensors = {name.removeprefix("prompt."): tensor for name, tensor in adapter.tensors.items()}
        load_exactly(prompt, tensors, "the adapter's", "prompt.")
        return attach(model, prompt)

    def save(self, folder: str | Path, *, task: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """Write `adapter.safetensors` and `adapter.json`, the same files as of any other adapter.

        Args:
            folder: Made if it is missing.
            task: What it was trained on.
            metrics: Figures to keep with it.
        """
        Adapter.of_prompt(self.prompt, _base(self.model), task=task, metrics=metrics or {}).save(folder)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by learning rate: prompt, low_rank; for `optim.build_optimizer`."""
        return {name: group for name, group in self.prompt.parameter_groups().items() if group}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the model, with the prompt."""
        return self.model(*inputs, **named)

    def generate(self, *inputs: Any, **named: Any) -> Any:
        """Let the model generate, with the prompt."""
        return self.model.generate(*inputs, **named)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, the model reads no prompt; afterwards as before, whatever happens."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    def detach(self) -> None:
        """Take the hooks off, and set free what was frozen; the model is as it was before `attach`."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        self._hooks, self._unfrozen, self._seen = [], [], None

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _see_tokens(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], embedded: Tensor
    ) -> None:
        """Keep the tokens looked up last; the encoder is next."""
        ids = (*inputs, *named.values())[0]
        if ids.ndim == 2:  # none: a single placeholder, looked up to be compared with
            self._seen = (ids, embedded.detach())

    def _prompt_encoder(
        self, encoder: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the embeddings by `[P ; E + offset]`, and all that has their length."""
        if not self._active:
            self._seen = None
            return None
        if inputs:
            named |= dict(zip(inspect.signature(encoder.forward).parameters, inputs, strict=False))
        embeddings = named.get("inputs_embeds")
        if embeddings is None:
            embeddings = self._parts.embedding(named["input_ids"])
        ids = self._tokens_of(embeddings)
        mask = named.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"a prompted encoder needs an attention_mask of the shape of its tokens, {tuple(ids.shape)}, "
                f"that is zero on padding; found {found}"
            )
        self._check_length(ids.shape[1])
        text = mask.bool() & self._is_text(ids)
        prompt, embeddings = self._shift(embeddings, text)
        named |= {
            "input_ids": None,
            "inputs_embeds": insert(prompt, embeddings, mask),
            "attention_mask": insert(mask.new_ones(prompt.shape[:2]), mask, mask),
        }
        positions = named.get("position_ids")
        if positions is not None:
            first = torch.arange(prompt.shape[1], device=positions.device).expand(len(mask), -1)
            shifted = positions.expand_as(mask) + prompt.shape[1]
            named["position_ids"] = insert(first, shifted, mask)
        return (), named

    def _lengthen_mask(
        self, decoder: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add P to the cross-attention mask, if what the encoder gave has P in it."""
        states, mask = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
        length = self.prompt.prompt_length
        if not isinstance(mask, Tensor) or states is None or states.shape[1] != mask.shape[1] + length:
            return None
        return inputs, named | {
            "encoder_attention_mask": insert(mask.new_ones(len(mask), length), mask, mask)
        }

    def _tokens_of(self, embeddings: Float[Tensor, "batch source d_model"]) -> Int[Tensor, "batch source"]:
        """The ids that the embeddings were looked up by, before image features went into their places."""
        seen, self._seen = self._seen, None
        found = "no tokens were seen"
        if seen is not None:
            ids, embedded = (tensor.to(embeddings.device) for tensor in seen)
            found = f"the tokens seen last are {tuple(ids.shape)}"
            if embedded.shape == embeddings.shape:
                # Values cannot be asked for while compiling.
                if torch.compiler.is_compiling():
                    return ids
                same = (embedded == embeddings).all(-1) | ~self._is_text(ids)
                if bool(same.all()):
                    return ids
                found = "the tokens seen last have others"
        raise ValueError(
            "the prompt has to know which embeddings are of text and which of images: the encoder got "
            f"embeddings of shape {tuple(embeddings.shape)}, and {found}. Give the model input_ids, not "
            "inputs_embeds; if another prompt is attached to it, detach that one first"
        )

    def _is_text(self, ids: Int[Tensor, "batch source"]) -> Bool[Tensor, "batch source"]:
        text = torch.ones_like(ids, dtype=torch.bool)
        for token in self._parts.image_tokens:
            text &= ids != token
        return text

    def _check_length(self, source: int) -> None:
        limit, prompt = self._parts.positions, self.prompt.prompt_length
        if limit is not None and prompt + source > limit:
            raise ValueError(
                f"the text encoder of {_name(self.model)} has {limit} positions and the input needs "
                f"{prompt + source}: {prompt} prompt + {source} image and text; shorten the prompt "
                "(prompt_length) or the text"
            )

    def _shift(
        self, embeddings: Float[Tensor, "batch source d_model"], text: Bool[Tensor, "batch source"]
    ) -> tuple[Float[Tensor, "batch prompt d_model"], Float[Tensor, "batch source d_model"]]:
        """P for every row, and the embeddings with the offset where the text is.

        Raises:
            ValueError: If a text is longer than `max_source_length`.
        """
        # The prompt sees the text alone, moved together, so that a column is a position.
        longest = int(text.sum(1).max())
        columns = packing(text)[:, :longest]
        together, is_text = take(embeddings, columns), take(text, columns)
        prompted, _ = self.prompt(together, is_text)
        prompt, shifted = prompted.split([prompted.shape[1] - longest, longest], dim=1)
        # Shorter rows are filled up with what is no text.
        shifted = shifted.where(is_text[..., None], together)
        return prompt, embeddings.scatter(1, columns[..., None].expand_as(shifted), shifted)


def _name(model: PreTrainedModel) -> str:
    name: str = model.name_or_path
    return name or type(model).__name__


def _special_tokens(encoder: nn.Module) -> list[int]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    ids = (getattr(encoder.config, name, None) for name in names)
    return [token for token in ids if isinstance(token, int)]


def _base(model: PreTrainedModel) -> dict[str, Any]:
    """What an adapter says of the model that it belongs to."""
    # Weights that lie on no device (offloaded) are not at hand.
    weights = ((name, tensor) for name, tensor in model.state_dict().items() if not tensor.is_meta)
    embedding = model.get_input_embeddings().state_dict()
    return {
        "name": _name(model),
        "fingerprint": {
            "class": type(model).__name__,
            "embeddings": fingerprint(embedding.items()),
            "all": fingerprint(weights),
        },
        "visual_position_bias": "relative",  # every position counts, as the stock encoder does it
        "vision": None,
    }


def _check_base(adapter: Adapter, model: PreTrainedModel) -> None:
    """Refuse a model of another class or embedding table; warn of one with other weights elsewhere."""
    here, there = _base(model), adapter.backbone
    trained_on = there["fingerprint"] or {}
    if any(here["fingerprint"][key] != trained_on.get(key) for key in ("class", "embeddings")):
        raise ValueError(
            f"this adapter was trained on {there['name']} (fingerprint {there['fingerprint']}) and does not "
            f"fit {here['name']} (fingerprint {here['fingerprint']}); load the model it was trained on, in "
            "float32 or bfloat16: float16 rounds otherwise"
        )
    if here["fingerprint"]["all"] != trained_on["all"]:
        warnings.warn(
            f"this adapter was trained on {there['name']} (fingerprint {trained_on['all']}); {here['name']} "
            f"(fingerprint {here['fingerprint']['all']}) has the same word embeddings, but other weights: "
            "quantised, fine-tuned, or another checkpoint",
            stacklevel=3,
        )
