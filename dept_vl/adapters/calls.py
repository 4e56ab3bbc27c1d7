"""Hooks that insert a prompt into the calls of a model and remove its columns from the outputs.

Hooks on `forward` and a wrapper of `generate` insert the placeholders of `models.prompt_hook` into the
inputs, even if `forward` was replaced. `_put` then replaces the embeddings of the placeholders. They are not
compiled, because a compiled graph would keep the state of its first call.
"""

import copy
import functools
import inspect
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.families import Parts, model_name
from dept_vl.models.padding import insert, packing
from dept_vl.models.prompt_hook import Placement, place, put, text_of
from dept_vl.models.source import PER_TOKEN
from dept_vl.models.tokens import IGNORE_INDEX
from dept_vl.prompts.dept import DePT

CONTAINER = "dept_prompt"
"""Name of the `ModuleDict` of prompts in a module that PEFT's plugin wraps."""
GIVEN = "given"
"""Key of the mask of tokens that are not placeholders."""


class _Call(threading.local):
    """State of a prompted call. Each thread has its own, so several threads may call a model at a time.

    A call of `forward` sets `outermost`, a call of `generate` sets `generating`. While either is set, calls
    inside it do not add the prompt again. `end` resets both, also when the next call finds that an interrupt
    skipped the hook that should have done so.
    """

    placed: Placement | None = None
    given: Int[Tensor, "batch given"]
    outermost: int | None = None  # id of the module whose call began it
    generating: bool = False
    unlabelled: bool = False  # whether the source may hold an answer, which the offset must not be added to
    read: bool = False

    def end(self) -> None:
        """Leave the call."""
        self.placed, self.outermost, self.generating = None, None, False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Call, ()  # a copy of a model is in no call


class PromptedCalls:
    """Mixin for modules that hold a prompt and hook it into the calls of a model."""

    _parts: Parts
    _call: _Call

    @abstractmethod
    def current_prompt(self) -> DePT | None:
        """Return the active prompt, or None."""

    def _enter(self, model: PreTrainedModel, parts: Parts, *around: nn.Module) -> None:
        """Add the hooks to a model and to modules `around` it, which may be called instead of the model."""
        self._parts, self._call = parts, _Call()
        self._handles = [
            handle
            for module in (model, *around)
            for handle in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            )
        ]
        self._own_generate = {name: run for name, run in vars(model).items() if name == "generate"}
        if hasattr(model, "generate"):
            prompted: Any = functools.partial(self._generate, model, model.generate)
            prompted.__wrapped__ = model.generate  # has the signature
            vars(model)["generate"] = prompted

    def _leave(self, model: PreTrainedModel) -> None:
        """Remove the hooks, if they are still there."""
        if not self._handles:  # `generate` may be another prompt's by now
            return
        for handle in self._handles:
            handle.remove()
        vars(model).pop("generate", None)
        vars(model).update(self._own_generate)
        self._handles, self._own_generate = [], {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(
        self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompt = self.current_prompt()
        if self._call.outermost == id(module):  # torch runs no hook after a KeyboardInterrupt
            self._call.end()
        if prompt is None or self._call.generating or self._call.outermost is not None:
            return None  # no prompt, or inside another prompted call
        self._call.outermost = id(module)
        named = named | dict(zip(inspect.signature(module.forward).parameters, inputs, strict=False))
        return (), named | self._prompted(prompt, named)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], made: Any) -> Any:
        if self._call.outermost != id(module):
            return None
        placed = self._call.placed
        self._call.end()
        return None if made is None else self._as_given(made, placed)  # None after an error

    def _generate(self, model: Any, run: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        prompt = self.current_prompt()
        if prompt is None or self._call.generating:
            return run(*inputs, **named)
        self._call.end()  # a call may have been interrupted
        named |= dict(zip(inspect.signature(run).parameters, inputs, strict=False))
        if named.get("inputs") is not None:  # name of the token ids in `generate`
            named["input_ids"] = named.pop("inputs")
        if named.get("attention_mask") is None and named.get("input_ids") is not None:
            named["attention_mask"] = _mask_of(model, named)
        try:
            self._call.generating = True
            named |= self._prompted(prompt, named)
            if self._call.placed is not None and not self._parts.encoder_decoder:
                named |= _longer(model, named, prompt.prompt_length)
                named |= _reading_given(named, self._call.given, self._call.placed.ids.shape[1])
            return self._as_given(run(**named), self._call.placed)
        finally:
            self._call.end()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _put(self, ids: Any, embedded: Tensor) -> Tensor | None:
        """Return the embeddings of a source with its prompt, or None to leave them unchanged."""
        prompt, placed = self.current_prompt(), self._call.placed
        if prompt is None or placed is None:
            return None
        prompted = put(prompt, placed, ids, embedded)
        self._call.read |= prompted is not None
        if prompted is not None and self._call.unlabelled and prompted.requires_grad:
            prompted.register_hook(_needs_labels)  # type: ignore[no-untyped-call]  # trained in eval mode
        return prompted

    def _prompted(self, prompt: DePT, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return the changed arguments of a call, with placeholders in the source, and set `_call`.

        Raises:
            ValueError: If the source is not given as token ids, or is too long.
        """
        ids, mask, length = named.get("input_ids"), named.get("attention_mask"), prompt.prompt_length
        if named.get("encoder_outputs") is not None:  # they include P if they are longer than the mask by m
            if mask is None or named["encoder_outputs"][0].shape[1] != mask.shape[1] + length:
                raise ValueError(
                    f"encoder_outputs have to include the {length} vectors of the prompt, and come with the "
                    "attention_mask of the source without it; or give input_ids instead"
                )
            return {"attention_mask": insert(mask.new_ones(len(mask), length), mask, mask)}
        if ids is None or named.get("inputs_embeds") is not None:
            raise ValueError(
                "the prompt has to know which embeddings are of text and which of images: give the model "
                "input_ids, not inputs_embeds"
            )
        for name in () if self._parts.encoder_decoder else ("past_key_values", "position_ids"):
            if named.get(name) is not None:
                raise ValueError(f"a prompted model makes its own {name}; leave yours out, or call generate")
        if isinstance(named.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep has to be a number for a prompted model, whose sequence is longer than yours"
            )
        mask = torch.ones_like(ids) if mask is None else mask
        if getattr(mask, "shape", None) != ids.shape:
            raise ValueError(
                f"a prompted model needs an attention_mask of the shape of its tokens, {tuple(ids.shape)}, "
                f"that is zero on padding; found {getattr(mask, 'shape', type(mask).__name__)}"
            )
        self._parts.check_length(length, ids.shape[1])
        labels = None if self._parts.encoder_decoder else named.get("labels")
        others = {name: row for name, row in named.items() if name.endswith(PER_TOKEN) and row is not None}
        text = self._is_text(prompt, ids, mask.bool(), labels)
        # Repetition penalties count placeholders, so each row uses a token that it has already.
        own = ids.gather(1, text.int().argmax(1, keepdim=True))
        self._call.read = False
        self._call.placed = placed = place(
            prompt,
            ids,
            mask.bool(),
            text,
            others | {GIVEN: torch.ones_like(ids)},
            placeholder=own.where(text.any(1, keepdim=True), self._parts.placeholder),
            start=self._parts.start,
            padding_first=None,
        )
        # Every row has the same number of given tokens.
        self._call.given = packing(placed.others.pop(GIVEN).bool())[:, : ids.shape[1]]
        changed = placed.others | {"input_ids": placed.ids, "attention_mask": placed.mask.to(mask.dtype)}
        if labels is not None:
            changed["labels"] = torch.full_like(placed.ids, IGNORE_INDEX).scatter(1, self._call.given, labels)
        positions = named.get("position_ids")
        if positions is not None:
            first = torch.arange(length, device=positions.device).expand(len(mask), -1)
            changed["position_ids"] = insert(first, positions.expand_as(mask) + length, mask)
        return changed

    def _is_text(
        self,
        prompt: DePT,
        ids: Int[Tensor, "batch source"],
        mask: Bool[Tensor, "batch source"],
        labels: Tensor | None,
    ) -> Bool[Tensor, "batch source"]:
        """Return a mask of the text tokens, which the offset is added to.

        Raises:
            UsageError: If an offset has no labels in training, or the first one is in front of all text.
        """
        shifts = prompt.offset_a is not None or prompt.token_offset is not None
        self._call.unlabelled = shifts and labels is None and not self._parts.encoder_decoder
        if self._call.unlabelled and self._parts.embedding.training and torch.is_grad_enabled():
            _needs_labels()
        images = torch.tensor(self._parts.image_tokens, dtype=torch.long)
        source = mask if labels is None else mask & ((labels != IGNORE_INDEX).cumsum(1) == 0)
        text = text_of(ids, source, images)
        if shifts and not text.any() and text_of(ids, mask, images).any():
            raise UsageError(
                "the first label comes before all text, so the offset has no question to act on; set the "
                "labels of the question to -100, or take a prompt without offset (rank=0)"
            )
        return text

    def _as_given(self, made: Any, placed: Placement | None) -> Any:
        """Return the output of a decoder-only model without the columns of placeholders.

        Raises:
            UsageError: If the model did not read the prompt.
        """
        if placed is not None and not self._call.read:
            raise UsageError(
                "the prompt had no effect, because the model did not embed the whole source at once: call "
                "set_input_embeddings before attach, and remove prefill_chunk_size"
            )
        if placed is None or self._parts.encoder_decoder:
            return made
        if isinstance(made, tuple):  # loss, logits, and states and attentions of all columns
            return tuple(self._as_given(part, placed) if isinstance(part, Tensor) else part for part in made)
        if isinstance(made, dict):
            for name in made.keys() & {"logits", "sequences"}:
                made[name] = self._as_given(made[name], placed)
        width = placed.ids.shape[1]
        if not isinstance(made, Tensor) or made.ndim < 2 or made.shape[1] < width:
            return made
        if made.ndim == 2 and made.is_floating_point():  # the logits of one generated token
            return made
        kept = self._call.given.repeat_interleave(len(made) // len(placed.ids), 0)
        behind = torch.arange(width, made.shape[1], device=kept.device).expand(len(kept), -1)
        columns = torch.cat([kept, behind], dim=1).to(made.device)
        # Whole rows of logits: four times as fast as gathering every number of them.
        return made[torch.arange(len(made), device=made.device)[:, None], columns]


def _needs_labels(*_: Tensor) -> None:
    raise UsageError(
        "in training, a prompt with an offset needs labels, which show where the answer begins: pass them to "
        "the model (Trainer takes them for label_smoothing_factor and compute_loss_func), or take a prompt "
        "without offset (pt, rank=0)"
    )


def _reading_given(named: Mapping[str, Any], given: Int[Tensor, "batch given"], width: int) -> dict[str, Any]:
    """Return the caller's functions of a call of `generate`, changed to read tokens without placeholders."""

    def without(tokens: Int[Tensor, "sequences length"]) -> Int[Tensor, "sequences some"]:
        places = given.repeat_interleave(len(tokens) // len(given), 0)  # several beams or samples of a row
        return torch.cat([tokens.gather(1, places.to(tokens.device)), tokens[:, width:]], dim=1)

    def reading(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tokens, *others, **more: run(without(tokens), *others, **more)

    changed: dict[str, Any] = {
        name: type(named[name])(map(reading, named[name]))
        for name in ("logits_processor", "stopping_criteria")
        if named.get(name)
    }
    allowed = named.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        changed["prefix_allowed_tokens_fn"] = lambda row, tokens: allowed(
            row, torch.cat([tokens[given[row]], tokens[width:]])
        )
    streamer = named.get("streamer")
    if streamer is not None:  # gets the source once, then one token at a time
        changed["streamer"] = SimpleNamespace(
            put=lambda tokens: streamer.put(without(tokens) if tokens.ndim == 2 else tokens), end=streamer.end
        )
    return changed


def _mask_of(model: Any, named: Mapping[str, Any]) -> Int[Tensor, "batch source"]:
    """Return the mask of a call of `generate` without one: by the padding, as transformers."""
    ids = named["input_ids"]
    padding, ends = (_setting(model, named, f"{name}_token_id") for name in ("pad", "eos"))
    if padding is None or padding in (ends if isinstance(ends, list) else [ends]):
        return torch.ones_like(ids)
    found: Tensor = ids != padding
    return found.long()


def _longer(model: Any, named: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Return the limits of a call of `generate` on source and answer, increased by the placeholders."""
    limits = {
        f"{kind}_length": total + length
        for kind in ("max", "min")
        if (total := _setting(model, named, f"{kind}_length")) is not None
        and _setting(model, named, f"{kind}_new_tokens") is None
    }
    given = named.get("generation_config")
    if given is None or not limits:
        return limits
    changed = copy.deepcopy(given)
    changed.update(**limits)
    return {"generation_config": changed}


def _setting(model: Any, named: Mapping[str, Any], name: str) -> Any:
    """Return the value of an option in a call of `generate`, or None."""
    values = (
        named.get(name),
        getattr(named.get("generation_config"), name, None),
        getattr(model.generation_config, name, None),
    )
    return next((value for value in values if value is not None), None)


def refuse_second(model: PreTrainedModel) -> None:
    """Raise ValueError if a prompt is attached to a model, or PEFT has put one on it."""
    hooks = model._forward_pre_hooks.values()
    attached = any(isinstance(getattr(hook, "__self__", None), PromptedCalls) for hook in hooks)
    if attached or any(hasattr(module, CONTAINER) for module in model.modules()):
        raise ValueError(
            f"{model_name(model)} has a prompt already; detach that one first: call detach() on the object "
            "that attach returned, or unload() on PEFT's model"
        )
