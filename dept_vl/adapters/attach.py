"""Attach a prompt to a model of transformers by hooks, which can be removed again.

Encoder-decoders (BLIP-2 and InstructBLIP with FLAN-T5, Florence-2, T5Gemma 2) and decoder-only models (LLaVA,
Qwen-VL, PaliGemma, Gemma 3, InternVL, ...) are supported, with images or for text alone. The soft prompt P is
inserted after padding and the start token (see `models.prompt_hook`), and takes m of the model's positions.
Logits and sequences have the same length as without a prompt. The offset is added to the text tokens of the
source, by their position among the text tokens of the row. Tokens from the first to the last token of an
image are not text. Nor is the answer of a decoder-only model, which begins with the first label.
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
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.base_model import device_of
from dept_vl.adapters.calls import PromptedCalls, refuse_second
from dept_vl.adapters.families import Parts, check_model, describe_model, model_name, over_items
from dept_vl.models.prompt_hook import check_text_alone
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.initialise import initialise

_MODEL = re.compile(r"(?<![^.])model\.")


def new_prompt(
    model: PreTrainedModel,
    *,
    prompt_length: int,
    rank: int,
    max_source_length: int,
    alpha: float = 8.0,
    seed: int = 0,
) -> DePT:
    """Return an untrained prompt for a model, initialised with words of the model's vocabulary.

    Raises:
        ValueError: If the model is not supported, or a size is out of range.
    """
    parts = Parts.of(model)
    embedding = parts.embedding
    vocabulary, width = embedding.weight.shape
    prompt = DePT(
        width, prompt_length=prompt_length, rank=rank, max_source_length=max_source_length, alpha=alpha
    )
    initialise(
        prompt,
        "vocabulary",
        # The module is called, because it may scale its embeddings (T5Gemma 2).
        lambda ids: embedding(ids.to(device_of(embedding))).cpu().float(),
        vocabulary_size=vocabulary,
        special_tokens=parts.special_tokens,
        generator=torch.Generator().manual_seed(seed),
    )
    return prompt


def attach(model: PreTrainedModel, prompt: DePT) -> "Attached":
    """Attach a prompt to a model and freeze the model; `Attached.detach` undoes both.

    Args:
        model: Model of a class in `families.SUPPORTED`, not yet wrapped or compiled.
        prompt: Prompt, as from `new_prompt`. It is moved to the device of the model's word embeddings.

    Raises:
        UsageError: If the prompt's method changes visual tokens or the encoder's output.
        ValueError: If the model is not supported, already has a prompt, or has another hidden size or too few
            positions.

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
    check_text_alone(prompt)
    parts.check_length(prompt.prompt_length, 1)
    refuse_second(model)
    kind: Any = type(model)
    return _attached_to(kind)(model, prompt.to(device_of(parts.embedding)), parts)


class Attached(PromptedCalls, nn.Module):
    """Model with an attached prompt, as returned by `attach` or `load`.

    Until `detach`, calls of `model` and `model.generate` use the prompt, and so do calls of this module,
    which forwards them to the model. Pass this module to `accelerator.prepare` or DistributedDataParallel,
    because it has the prompt's parameters and the model has no trainable ones. A `with` statement detaches
    the prompt at its end. Several threads may call the model at a time. The model's own generation settings
    apply unless you override them (`generate(..., num_beams=1, do_sample=False)`).

    It can be passed to transformers' trainers. Their checkpoints, and `state_dict`, contain only the prompt:

        trainer = Trainer(model=attached, args=TrainingArguments("run", learning_rate=0.3),
                          train_dataset=rows, data_collator=collate)  # rows as the processor makes them
        trainer.train()
        attached.save("adapters/blip2")

    Attributes:
        model: Model of transformers, frozen until `detach`.
        prompt: Trainable prompt.

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
        self._active = True
        self._unfrozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._unfrozen:
            parameter.requires_grad_(False)
        # The state dict has only the prompt; the model is saved and loaded separately.
        self.register_state_dict_post_hook(_forget_model)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_no_model)  # type: ignore[no-untyped-call]
        self._hook = parts.embedding.register_forward_hook(self._look_up, with_kwargs=True)
        # This module gets hooks too, because trainers replace `forward` and call modules inside the model.
        self._enter(model, parts, self)

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        model: PreTrainedModel,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Attached":
        """Attach a saved adapter to a model, for inference or further training.

        Args:
            name_or_folder: Folder of the adapter, or repository on the Hub; see `Adapter.from_pretrained`.
            model: Model that the adapter was trained on.
            revision: Branch, tag or commit of the repository.
            token: Token for private and gated repositories.

        Raises:
            FileNotFoundError: If there is no adapter in the folder or repository.
            PermissionError: If the repository is gated, or the token is not accepted.
            ValueError: If the adapter is damaged, or was trained on another model.
        """
        adapter = Adapter.from_pretrained(name_or_folder, revision=revision, token=token)
        check_model(adapter, model)
        return attach(model, adapter.build_prompt())

    def save(self, folder: str | Path, *, task: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """Save the prompt as an adapter, with `adapter.safetensors` and `adapter.json`.

        Args:
            folder: Output folder, which is created if it does not exist.
            task: Task that the prompt was trained on.
            metrics: Metrics to save with the prompt.
        """
        self.adapter(task=task, metrics=metrics).save(folder)

    def adapter(self, *, task: str = "", metrics: Mapping[str, float] | None = None) -> Adapter:
        """Return an adapter with a copy of the prompt; see `save`."""
        return Adapter.of_prompt(self.prompt, describe_model(self.model), task=task, metrics=metrics or {})

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save the adapter without the model; further arguments of transformers are ignored."""
        self.save(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the adapter without the model; see `Adapter.push_to_hub`."""
        return self.adapter().push_to_hub(repo_id, **options)

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the model that this module lacks, such as its configuration."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet, as during unpickling
                raise
            # Trainers of decoder-only models compute their own loss from `base_model`.
            if name == "base_model" and self._parts.encoder_decoder:
                raise AttributeError(
                    f"{model_name(self.model)} is an encoder-decoder, whose loss is its own: a trainer that "
                    "computes it from hidden states, as TRL's SFTTrainer does, is for decoder-only models. "
                    "Derive from it: class Seq2SeqSFTTrainer(SFTTrainer): "
                    "compute_loss = transformers.Trainer.compute_loss"
                ) from None
            return getattr(self.model, name)

    def _get_name(self) -> str:
        """Return the name of the model's class, by which Trainer decides to shift labels when it smooths."""
        name: str = self.model._get_name()
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self.model),), self.__dict__

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by learning-rate group, for `optim.build_optimizer`."""
        return {name: group for name, group in self.prompt.parameter_groups().items() if group}

    def current_prompt(self) -> DePT | None:
        """See `PromptedCalls`."""
        return self.prompt if self._active else None

    def _look_up(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], embedded: Tensor
    ) -> Tensor | None:
        prompted: Tensor | None = self._put((*inputs, *named.values())[0], embedded)
        return prompted

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the model with the prompt."""
        try:
            return self.model(*inputs, **named)
        except BaseException:  # after a KeyboardInterrupt, torch runs no hooks
            self._call.end()
            raise

    def generate(self, *inputs: Any, **named: Any) -> Any:
        """Generate with the model and the prompt."""
        return self.model.generate(*inputs, **named)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the prompt within a `with` statement."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    def detach(self) -> None:
        """Remove the hooks and unfreeze the model, which is then as it was before `attach`."""
        self._hook.remove()
        self._leave(self.model)
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        self._unfrozen = []

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


@functools.cache
def _attached_to(kind: Any) -> type[Attached]:
    """Return a subclass of `Attached` whose `forward` has the signature of `kind.forward`, for trainers."""

    def forward(self: Attached, *inputs: Any, num_items_in_batch: Any = None, **named: Any) -> Any:
        made = Attached.forward(self, *inputs, **named)
        return over_items(made, named.get("labels"), num_items_in_batch)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    # Trainers average the loss over all label tokens of a step, including the first token of each row.
    content = {"forward": forward, "accepts_loss_kwargs": True, "loss_type": None}
    content |= {"__doc__": Attached.__doc__, "__module__": __name__}
    return type(Attached.__name__, (Attached,), content)


def _empty(kind: Any) -> Attached:
    """Return an uninitialised `Attached` for a model class, for unpickling."""
    cls = _attached_to(kind)
    return cls.__new__(cls)


def _forget_model(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        del state[name]


def _miss_no_model(module: nn.Module, keys: Any) -> None:
    names = {f"model.{name}" for name in module.get_submodule("model").state_dict()}
    # The keys may begin with the names of modules around this one.
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if not any(key[m.start() :] in names for m in _MODEL.finditer(key))
    ]
