"""PEFT layers of `plugin`, which wrap the text encoder or the word embeddings of a model.

The wrapper of a text encoder puts prompts in front of the text and extends the masks. The wrapper of word
embeddings replaces the embeddings of placeholders (see `adapters.calls`).
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Bool, Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dept_vl.adapters.base_model import device_of
from dept_vl.adapters.calls import CONTAINER, PromptedCalls
from dept_vl.adapters.families import Parts
from dept_vl.models.language import LanguageModel
from dept_vl.models.padding import packing, take
from dept_vl.models.row_prompts import PromptTable, RowPrompts
from dept_vl.prompts.dept import DePT

BASE = "__base__"
"""Name in `adapter_names` for a row without a prompt."""


class DeptTunerLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Wrapper of a module with one prompt per adapter. It also has the attributes of the module."""

    adapter_layer_names = (CONTAINER,)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dept_prompt = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet, as during unpickling
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "dept." + super().__repr__()

    def update_layer(self, adapter_name: str, prompt: DePT, *, inference_mode: bool) -> None:
        """Add an adapter, on the device and in the data type of the wrapped module."""
        self.dept_prompt[adapter_name] = prompt
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter.

        Raises:
            ValueError: If more than one is given.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(
                f"one prompt is active at a time; got {list(adapter_names)}: for rows with different prompts "
                "pass adapter_names to forward or generate of an encoder-decoder"
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise a `ValueError`; prompts cannot be merged."""
        refuse_merging()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Remove the hooks and return the wrapped module. PEFT never asks to merge a prompt."""
        self.leave()
        part: nn.Module = self.base_layer
        return part

    @abstractmethod
    def leave(self) -> None:
        """Remove the hooks on other modules of the model."""

    @property
    def read_adapters(self) -> list[str]:
        """Active adapter of this layer in a list, which is empty if adapters are disabled."""
        return [] if self.disable_adapters else [n for n in self.active_adapters if n in self.dept_prompt]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        words: Any = base_layer
        if not isinstance(words, nn.Embedding):
            words = words.get_input_embeddings()
        return device_of(words), words.weight.dtype


class DeptWords(PromptedCalls, DeptTunerLayer):
    """Wrapper of a model's word embeddings; see `adapters.calls`."""

    def __init__(self, model: PreTrainedModel) -> None:
        parts = Parts.of(model)
        DeptTunerLayer.__init__(self, parts.embedding)
        self._enter(model, parts)
        # In a tuple, so that the model is not registered as a submodule of this wrapper.
        self._around = (model,)

    def current_prompt(self) -> DePT | None:
        """See `PromptedCalls`."""
        active = self.read_adapters
        return cast(DePT, self.dept_prompt[active[0]]) if active else None

    def leave(self) -> None:
        """See `DeptTunerLayer`."""
        self._leave(*self._around)

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings of tokens, with the prompt in place of the placeholders."""
        embedded: Tensor = self.base_layer(input)
        prompted = self._put(input, embedded)
        return embedded if prompted is None else prompted


class DeptLayer(DeptTunerLayer):
    """Wrapper of a text encoder that puts prompts in front of the text.

    A hook extends the cross-attention mask of `decoder` by the prompt.
    """

    def __init__(self, base_layer: nn.Module, decoder: nn.Module) -> None:
        super().__init__(base_layer)
        self._decoder_hook = decoder.register_forward_pre_hook(_lengthen_mask, with_kwargs=True)

    def leave(self) -> None:
        """Remove the hook on the decoder."""
        self._decoder_hook.remove()

    def forward(
        self,
        input_ids: Int[Tensor, "batch text"] | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch text d_model"] | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the encoder's output for `[P ; text]`, longer than the input by the longest prompt in use.

        `adapter_names` has the name of each row's adapter, `__base__` for none; None takes the active one.

        Raises:
            ValueError: If the text is too long for the encoder or the prompt, or if arguments have different
                lengths, or both or neither of `input_ids` and `inputs_embeds` are given.
        """
        active = self.read_adapters
        if self.disable_adapters or not (active or adapter_names):
            return self.base_layer(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        language = LanguageModel(self.base_layer, self.base_layer, type(self.base_layer).__name__)
        if input_ids is not None and inputs_embeds is None:
            embeddings = language.embed(input_ids)
        elif input_ids is None and inputs_embeds is not None:
            embeddings = inputs_embeds
        else:
            raise ValueError("give the encoder exactly one of input_ids and inputs_embeds")
        batch, text = embeddings.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, text, dtype=torch.long, device=embeddings.device)
        if attention_mask.shape != (batch, text):
            raise ValueError(
                f"the attention_mask has the shape {tuple(attention_mask.shape)}; expected {(batch, text)}, "
                "as the text"
            )
        if adapter_names is None:
            adapter_names = active * batch
        elif len(adapter_names) != batch:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {batch} respectively."
            )
        language.check_length(max(self.prompt_lengths(adapter_names)), text)
        embeddings, mask, columns = self._prompted(embeddings, attention_mask.bool(), adapter_names)
        return_dict = kwargs.pop("return_dict", None)
        output = self.base_layer(
            attention_mask=mask.to(attention_mask.dtype), inputs_embeds=embeddings, return_dict=True, **kwargs
        )
        output = _rearranged(output, columns)
        return output.to_tuple() if return_dict is False else output

    def prompt_lengths(self, adapter_names: Sequence[str]) -> list[int]:
        """Return the length of each row's prompt."""
        return [0 if name == BASE else self._prompt(name).prompt_length for name in adapter_names]

    def _prompt(self, name: str) -> DePT:
        return cast(DePT, self.dept_prompt[name])

    def _prompted(
        self,
        embeddings: Float[Tensor, "batch text d_model"],
        mask: Bool[Tensor, "batch text"],
        adapter_names: Sequence[str],
    ) -> tuple[
        Float[Tensor, "batch prompt_text d_model"],
        Bool[Tensor, "batch prompt_text"],
        Int[Tensor, "batch prompt_text"],
    ]:
        """Return `[P ; text ; padding]`, its mask, and the new column of each column of `[P ; text]`."""
        names = list(dict.fromkeys(adapter_names))
        prompts = [None if name == BASE else self._prompt(name) for name in names]
        rows = torch.tensor([names.index(name) for name in adapter_names], device=mask.device)
        # Padding is moved to the right, so that columns are positions, except in rows without a prompt.
        of_base = torch.tensor([name == BASE for name in adapter_names], device=mask.device)
        columns = packing(mask | of_base[:, None])
        prompt = prompts[0]
        if prompt is None or len(prompts) > 1:
            prompt = RowPrompts(PromptTable(prompts, embeddings[0]), rows)
        with_prompt, with_mask = prompt(take(embeddings, columns), take(mask, columns))
        longest = prompt.prompt_length
        missing = longest + mask.shape[1] - with_mask.shape[1]
        in_prompt = torch.arange(longest, device=mask.device).expand(len(mask), -1)
        lengths = torch.tensor(self.prompt_lengths(adapter_names), device=mask.device)
        return (
            nn.functional.pad(with_prompt, (0, 0, 0, missing)),
            nn.functional.pad(with_mask, (0, missing)),
            torch.cat([in_prompt, columns.argsort(dim=1) + lengths[:, None]], dim=1),
        )


def _rearranged(output: ModelOutput, columns: Int[Tensor, "batch column"]) -> ModelOutput:
    """Return an encoder's output with its columns in the order of `columns`."""
    output["last_hidden_state"] = take(output.last_hidden_state, columns)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(take(states, columns) for states in output.hidden_states)
    if output.get("attentions") is not None:
        output["attentions"] = tuple(
            take(take(weights, columns, 2), columns, 3) for weights in output.attentions
        )
    return output


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _lengthen_mask(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Extend the cross-attention mask by the prompt, unless it is as long as the encoder's output."""
    states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if states is None or mask is None or mask.dim() != 2 or states.shape[1] <= mask.shape[1]:
        return None
    seen = mask.new_ones(mask.shape[0], states.shape[1] - mask.shape[1])
    return args, kwargs | {"encoder_attention_mask": torch.cat([seen, mask], dim=1)}


def hide_unused(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], prompt_lengths: list[int]
) -> Call:
    """Mask the unused columns of rows whose prompt is not the longest; runs after `_lengthen_mask`."""
    states, mask = kwargs["encoder_hidden_states"], kwargs.get("encoder_attention_mask")
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    lengths = torch.tensor(prompt_lengths, device=mask.device)
    # Beams and returned sequences of a row are adjacent.
    lengths = lengths.repeat_interleave(mask.shape[0] // len(prompt_lengths))
    column = torch.arange(mask.shape[1], device=mask.device)
    unused = (column >= lengths[:, None]) & (column < max(prompt_lengths))
    return args, kwargs | {"encoder_attention_mask": mask.masked_fill(unused, 0)}


def tell_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> Call:
    """Add the adapter name of each row to the arguments of a module's call."""
    rows = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    copies = max(rows // len(adapter_names), 1)  # as in `hide_unused`
    return args, kwargs | {"adapter_names": [name for name in adapter_names for _ in range(copies)]}


def refuse_merging() -> NoReturn:
    """Raise a `ValueError` that explains why prompts cannot be merged."""
    raise ValueError(
        "DePT cannot be merged into the weights: the prompt is vectors in front of the text, and A @ B "
        "shifts the text by position; keep the adapter, or call unload() for the base model"
    )
