"""A prompt on a ready-made model of transformers, by hooks that leave no trace.

Insert it with the hook of `models.placeholders` into encoder-decoders (BLIP-2 and InstructBLIP with FLAN-T5,
Florence-2, T5Gemma 2) and decoder-only models (LLaVA, Qwen-VL, PaliGemma, Gemma 3, InternVL, ...), with
images or for text alone. P stands behind padding and a start token, and takes m of the model's positions;
outputs keep the length that they have without it. The offset is added to the text of the source, by a
token's place among the text tokens of its row. Text is neither what stands between the first token of an
image and the last, nor the answer of a decoder-only model, which begins with the first label.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.families import Parts, check_model, describe_model, model_name, over_items
from dept_vl.adapters.offload import device_of
from dept_vl.models.padding import insert, packing, take
from dept_vl.models.placeholders import Placement, place, put, text_of
from dept_vl.models.source import PER_TOKEN
from dept_vl.models.tokens import IGNORE_INDEX
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.initialise import initialise

CALLS = ("forward", "generate")
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
    embedding = parts.embedding
    vocabulary, width = embedding.weight.shape
    prompt = DePT(width, prompt_length=prompt_length, rank=rank, max_source_length=max_source_length)
    initialise(
        prompt,
        "vocabulary",
        # Through the module, which may scale (T5Gemma 2).
        lambda ids: embedding(ids.to(device_of(embedding))).cpu().float(),
        vocabulary_size=vocabulary,
        special_tokens=parts.special_tokens,
        generator=torch.Generator().manual_seed(seed),
    )
    return prompt


def attach(model: PreTrainedModel, prompt: DePT) -> "Attached":
    """Put a prompt on a model, freeze the model, and return the handle that takes both back.

    Args:
        model: Of a class in `families.SUPPORTED`; not yet wrapped or compiled.
        prompt: Moved to the device that the model's word embeddings run on. `new_prompt` makes one.

    Raises:
        ValueError: If the model is not supported, has a prompt, or has another width or too few positions.

    Example:
        >>> import dept_vl  # `blip2` is a Blip2ForConditionalGeneration
        >>> prompt = dept_vl.build_prompt("dept", blip2, prompt_length=6, rank=2, max_source_length=8)
        >>> attached = dept_vl.attach(blip2, prompt)
        >>> attached.detach()
    """
    parts = Parts.of(model)
    width = parts.embedding.weight.shape[1]
    if prompt.d_model != width:
        raise ValueError(
            f"the prompt is {prompt.d_model} wide and {model_name(model)} is {width} wide; build the "
            f"prompt with d_model={width}"
        )
    if prompt.needs_encoder or prompt.visual_offset is not None:
        raise UsageError(
            "a ready-made model takes what changes its text alone: pt, dept, adept and the like, without "
            f"visual_offset; this prompt is of method {prompt.describe()['method']}"
        )
    parts.check_length(model_name(model), prompt.prompt_length, 1)
    if isinstance(getattr(getattr(model.forward, "func", None), "__self__", None), Attached):
        raise ValueError(f"{model_name(model)} has a prompt already; detach that one first")
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
        self._placed: Placement | None = None
        self._unfrozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._unfrozen:
            parameter.requires_grad_(False)
        # A state is what is trained: the model is written and read by itself.
        self.register_state_dict_post_hook(_forget_model)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_no_model)  # type: ignore[no-untyped-call]
        self._hook = parts.embedding.register_forward_hook(self._look_up, with_kwargs=True)
        self._before = {name: vars(model)[name] for name in CALLS if name in vars(model)}
        for name in CALLS:
            run = getattr(model, name, None)
            if run is not None:
                prompted: Any = functools.partial(self._call, run)
                prompted.__signature__ = inspect.signature(run)
                setattr(model, name, prompted)

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
            # Trainers of decoder-only models compute a loss of their own from it.
            if name == "base_model" and self._parts.encoder_decoder:
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
        self._hook.remove()
        for name in CALLS:
            vars(self.model).pop(name, None)
        vars(self.model).update(self._before)
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        self._unfrozen, self._before = [], {}

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _call(self, run: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """Run `forward` or `generate` with placeholders in what it reads and none in what it gives."""
        if not self._active or self._placed is not None:  # `generate` calls `forward`
            return run(*inputs, **named)
        named |= dict(zip(inspect.signature(run).parameters, inputs, strict=False))
        if named.get("inputs") is not None:  # as `generate` calls the tokens
            named["input_ids"] = named.pop("inputs")
        try:
            named |= self._prompted(named)
            made, placed = run(**named), self._placed
        finally:
            self._placed = None
        return made if placed is None or self._parts.encoder_decoder else self._shortened(made, placed)

    def _look_up(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], embedded: Tensor
    ) -> Tensor | None:
        ids = (*inputs, *named.values())[0]
        return None if self._placed is None else put(self.prompt, self._placed, ids, embedded)

    def _prompted(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """What changes of a call: the source gets placeholders, and `_placed` is what they stand for.

        Raises:
            ValueError: If the source is given in another way than by its tokens, or is too long.
        """
        ids, mask, length = named.get("input_ids"), named.get("attention_mask"), self.prompt.prompt_length
        if named.get("encoder_outputs") is not None:  # which may have P in them
            if mask is None or named["encoder_outputs"][0].shape[1] != mask.shape[1] + length:
                return {}
            return {"attention_mask": insert(mask.new_ones(len(mask), length), mask, mask)}
        if ids is None or named.get("inputs_embeds") is not None:
            raise ValueError(
                "the prompt has to know which embeddings are of text and which of images: give the model "
                "input_ids, not inputs_embeds"
            )
        for name in () if self._parts.encoder_decoder else ("past_key_values", "position_ids"):
            if named.get(name) is not None:
                raise ValueError(f"a prompted model makes its own {name}; leave yours out, or call generate")
        mask = torch.ones_like(ids) if mask is None else mask
        if getattr(mask, "shape", None) != ids.shape:
            raise ValueError(
                f"a prompted model needs an attention_mask of the shape of its tokens, {tuple(ids.shape)}, "
                f"that is zero on padding; found {getattr(mask, 'shape', type(mask).__name__)}"
            )
        self._parts.check_length(model_name(self.model), length, ids.shape[1])
        labels = None if self._parts.encoder_decoder else named.get("labels")
        self._placed = placed = place(
            self.prompt,
            ids,
            mask.bool(),
            self._is_text(ids, mask.bool(), labels),
            {name: row for name, row in named.items() if name.endswith(PER_TOKEN) and row is not None},
            placeholder=self._parts.placeholder,
            start=self._parts.start,
            padding_first=None,
        )
        changed = placed.others | {"input_ids": placed.ids, "attention_mask": placed.mask.to(mask.dtype)}
        if labels is not None:
            nothing = torch.full_like(placed.ids, IGNORE_INDEX)
            changed["labels"] = nothing.scatter(1, _given(placed, length), labels)
        positions = named.get("position_ids")
        if positions is not None:
            first = torch.arange(length, device=positions.device).expand(len(mask), -1)
            changed["position_ids"] = insert(first, positions.expand_as(mask) + length, mask)
        return changed

    def _is_text(
        self, ids: Int[Tensor, "batch source"], mask: Bool[Tensor, "batch source"], labels: Tensor | None
    ) -> Bool[Tensor, "batch source"]:
        """Where the offset goes.

        Raises:
            UsageError: If labels begin in front of all text.
        """
        text = text_of(ids, mask, torch.tensor(self._parts.image_tokens, dtype=torch.long))
        if labels is None:
            return text
        asked = text & ((labels != IGNORE_INDEX).cumsum(1) == 0)
        if self.prompt.offset_a is not None and text.any() and not asked.any():
            raise UsageError(
                "the labels leave no text of a question (-100), which the offset goes to; label the answer "
                "alone, or take a prompt without offset (rank=0)"
            )
        return asked

    def _shortened(self, made: Any, placed: Placement) -> Any:
        """What a decoder-only model gives, without the columns of placeholders."""
        if isinstance(made, tuple):
            return tuple(self._shortened(part, placed) for part in made)
        if isinstance(made, dict):
            for name in made.keys() & {"logits", "sequences"}:
                made[name] = self._shortened(made[name], placed)
        width = placed.ids.shape[1]
        if not isinstance(made, Tensor) or made.ndim < 2 or made.shape[1] < width:
            return made
        kept = _given(placed, self.prompt.prompt_length).repeat_interleave(len(made) // len(placed.ids), 0)
        behind = torch.arange(width, made.shape[1], device=kept.device).expand(len(kept), -1)
        return take(made, torch.cat([kept, behind], dim=1).to(made.device))


def _given(placed: Placement, length: int) -> Int[Tensor, "batch given"]:
    """The columns that are no placeholders, of which every row has as many."""
    given = (placed.columns < 0) | (placed.columns >= length)
    return packing(given)[:, : placed.ids.shape[1] - length]


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
