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

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.families import (
    Parts,
    check_model,
    describe_model,
    model_name,
    over_items,
    special_tokens,
)
from dept_vl.adapters.offload import device_of
from dept_vl.models.padding import insert, packing, take
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.initialise import initialise

_MODEL = re.compile(r"(?<![^.])model\.")


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
    embedding = parts.embedding
    initialise(
        prompt,
        "vocabulary",
        # Through the module, which may scale (T5Gemma 2).
        lambda ids: embedding(ids.to(device_of(embedding))).cpu().float(),
        vocabulary_size=embedding.weight.shape[0],
        special_tokens=(*parts.image_tokens, *special_tokens(parts.encoder)),
        generator=torch.Generator().manual_seed(seed),
    )
    return prompt


def attach(model: PreTrainedModel, prompt: DePT) -> "Attached":
    """Put a prompt on a model, freeze the model, and return the handle that takes both back.

    Args:
        model: Of a class in `SUPPORTED`; not yet wrapped or compiled.
        prompt: Moved to the device that the model's word embeddings run on. `new_prompt` makes one.

    Raises:
        ValueError: If the model is not supported, or the prompt does not fit its width or positions.

    Example:
        >>> import dept_vl  # `blip2` is a Blip2ForConditionalGeneration
        >>> prompt = dept_vl.build_prompt("dept", blip2, prompt_length=6, rank=2, max_source_length=8)
        >>> attached = dept_vl.attach(blip2, prompt)
        >>> attached.detach()
    """
    parts = Parts.of(model)
    if prompt.d_model != parts.width:
        raise ValueError(
            f"the prompt is {prompt.d_model} wide and {model_name(model)} is {parts.width} wide; build the "
            f"prompt with d_model={parts.width}"
        )
    if prompt.needs_encoder or prompt.visual_offset is not None:
        raise UsageError(
            "a ready-made model takes what changes its text alone: pt, dept, adept and the like, without "
            f"visual_offset; this prompt is of method {prompt.describe()['method']}"
        )
    if parts.positions is not None and prompt.prompt_length >= parts.positions:
        raise ValueError(
            f"the prompt has {prompt.prompt_length} vectors and the text encoder of {model_name(model)} has "
            f"{parts.positions} positions for prompt, image and text together; shorten the prompt "
            "(prompt_length)"
        )
    kind: Any = type(model)
    return _attached_to(kind)(model, prompt.to(device_of(parts.embedding)), parts)


class Attached(nn.Module):
    """A model with a prompt on it; made by `attach` or `load`.

    `model(...)` and `model.generate(...)` read the prompt until `detach`, and so does this module, which
    passes its arguments on. Give this module, which holds the prompt's parameters, to `accelerator.prepare`
    or DistributedDataParallel: of the bare model they would find nothing to train. In a `with` statement
    it detaches itself at the end. One thread at a time may call the model. Its generation settings stay the
    model's own, whoever calls: say what you want (`generate(..., num_beams=1, do_sample=False)`).

    transformers' trainers take it as a model. Their checkpoints, and `state_dict`, hold the prompt alone:

        trainer = Trainer(model=attached, args=TrainingArguments("run", learning_rate=0.3),
                          train_dataset=rows, data_collator=collate)  # rows as the processor makes them
        trainer.train()
        attached.save("adapters/blip2")

    Attributes:
        model: The ready-made model, frozen until `detach`.
        prompt: What is trained.

    Example:
        >>> import dept_vl  # `blip2` is a Blip2ForConditionalGeneration
        >>> prompt = dept_vl.build_prompt("dept", blip2, prompt_length=6, rank=2, max_source_length=8)
        >>> with dept_vl.attach(blip2, prompt) as attached:
        ...     attached.save("adapters/blip2", task="vqav2")
        >>> attached = dept_vl.Attached.load("adapters/blip2", blip2)
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
        # A state is what is trained: the model is written and read by itself.
        self.register_state_dict_post_hook(_forget_model)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_no_model)  # type: ignore[no-untyped-call]
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
        """Attach what `save` wrote, to continue training or to answer.

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
        check_model(adapter, model)
        return attach(model, adapter.build_prompt())

    def save(self, folder: str | Path, *, task: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """Write `adapter.safetensors` and `adapter.json`, the same files as of any other adapter.

        Args:
            folder: Made if it is missing.
            task: What it was trained on.
            metrics: Figures to keep with it.
        """
        self.adapter(task=task, metrics=metrics).save(folder)

    def adapter(self, *, task: str = "", metrics: Mapping[str, float] | None = None) -> Adapter:
        """Copy the prompt into an adapter; see `save`."""
        return Adapter.of_prompt(self.prompt, describe_model(self.model), task=task, metrics=metrics or {})

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the adapter, and not the model; what transformers passes besides does not change that."""
        self.save(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the adapter, and not the model; see `Adapter.push_to_hub`."""
        return self.adapter().push_to_hub(repo_id, **options)

    def __getattr__(self, name: str) -> Any:
        """What a trainer asks a model for, such as its configuration, is the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet, as in unpickling
                raise
            if name == "base_model":  # trainers of decoder-only models compute a loss of their own from it
                raise AttributeError(
                    f"{model_name(self.model)} is an encoder-decoder, whose loss is its own: a trainer that "
                    "computes it from hidden states, as TRL's SFTTrainer does, is for decoder-only models. "
                    "Derive from it: class Seq2SeqSFTTrainer(SFTTrainer): "
                    "compute_loss = transformers.Trainer.compute_loss"
                ) from None
            return getattr(self.model, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self.model),), self.__dict__

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
            given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"a prompted encoder needs an attention_mask of the shape of its tokens, {tuple(ids.shape)}, "
                f"that is zero on padding; found {given}"
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
        tokens = "no tokens were seen"
        if seen is not None:
            ids, embedded = (tensor.to(embeddings.device) for tensor in seen)
            tokens = f"the tokens seen last are {tuple(ids.shape)}"
            if embedded.shape == embeddings.shape:
                # Values cannot be asked for while compiling.
                if torch.compiler.is_compiling():
                    return ids
                same = (embedded == embeddings).all(-1) | ~self._is_text(ids)
                if bool(same.all()):
                    return ids
                tokens = "the tokens seen last have others"
        raise ValueError(
            "the prompt has to know which embeddings are of text and which of images: the encoder got "
            f"embeddings of shape {tuple(embeddings.shape)}, and {tokens}. Give the model input_ids, not "
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
                f"the text encoder of {model_name(self.model)} has {limit} positions and the input needs "
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


@functools.cache
def _attached_to(kind: Any) -> type[Attached]:
    """`Attached` with the signature of a model's `forward`, by which trainers choose columns and labels."""

    def forward(self: Attached, *inputs: Any, num_items_in_batch: Any = None, **named: Any) -> Any:
        return over_items(self.model(*inputs, **named), named.get("labels"), num_items_in_batch)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    # Of a step all tokens count, and their first one too, which a type of loss says of some.
    content = {"forward": forward, "accepts_loss_kwargs": True, "loss_type": None}
    content |= {"__doc__": Attached.__doc__, "__module__": __name__}
    return type(Attached.__name__, (Attached,), content)


def _empty(kind: Any) -> Attached:
    """A copy of an attached model, about to be filled."""
    cls = _attached_to(kind)
    return cls.__new__(cls)


def _forget_model(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        del state[name]


def _miss_no_model(module: nn.Module, keys: Any) -> None:
    names = {f"model.{name}" for name in module.get_submodule("model").state_dict()}
    # With the names of modules around this one in front.
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if not any(key[m.start() :] in names for m in _MODEL.finditer(key))
    ]
