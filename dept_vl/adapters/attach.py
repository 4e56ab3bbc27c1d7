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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.calls import PromptedCalls, is_prompted
from dept_vl.adapters.families import Parts, check_model, describe_model, model_name, over_items
from dept_vl.adapters.offload import device_of
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
    parts.check_length(prompt.prompt_length, 1)
    if is_prompted(model):
        raise ValueError(f"{model_name(model)} has a prompt already; detach that one first")
    kind: Any = type(model)
    return _attached_to(kind)(model, prompt.to(device_of(parts.embedding)), parts)


class Attached(PromptedCalls, nn.Module):
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
        self._active = True
        self._unfrozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._unfrozen:
            parameter.requires_grad_(False)
        # A state is what is trained: the model is written and read by itself.
        self.register_state_dict_post_hook(_forget_model)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_no_model)  # type: ignore[no-untyped-call]
        self._hook = parts.embedding.register_forward_hook(self._look_up, with_kwargs=True)
        # Trainers replace `forward`, and call what is within the model.
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

    def current_prompt(self) -> DePT | None:
        """See `PromptedCalls`."""
        return self.prompt if self._active else None

    def _look_up(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], embedded: Tensor
    ) -> Tensor | None:
        return self._put((*inputs, *named.values())[0], embedded)

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
