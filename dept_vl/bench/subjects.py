"""Tiny models with something trained on them: three kinds behind one interface, to be probed."""

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl import family
from dept_vl.attach import Attached, attach
from dept_vl.backbone import Backbone
from dept_vl.bench.ready_made import inputs_of, ready_made
from dept_vl.bench.tiny import D_MODEL, IMAGE_SIZE, VOCABULARY, language_model, spread_out, tokenizer, tower
from dept_vl.checkpoint import Adapter
from dept_vl.dept import DePT
from dept_vl.language import VisualPositionBias
from dept_vl.many import PromptTable, RowPrompts
from dept_vl.model import PromptedModel
from dept_vl.step import recompute_activations

Inputs = dict[str, Tensor]
BASELINES = ("bitfit", "lora")
SIZES = {"prompt_length": 4, "rank": 2, "max_source_length": 12}
LENGTHS = (7, 4, 5)
"""Tokens of the texts of a batch."""
ANSWER = 5
"""Tokens of a target."""


class NotThere(Exception):
    """There is no such thing to be asked of."""


class Subject:
    """A model in evaluation mode, with something trained on it that is far from where training starts.

    Made anew it is the same to the bit.

    Args:
        method: Of `family.METHODS` or `BASELINES`.

    Attributes:
        method: As given.
        inputs: A batch of texts of different lengths, each with its image if there are images.
        labels: Their targets, all of one length.
        bare_logits: What the base says of them with nothing trained on it.
        end: The token that ends an answer.
        module: What is called.

    Raises:
        NotThere: If there is no such method for the model.
    """

    inputs: Inputs
    labels: Tensor
    bare_logits: Tensor
    end: int
    module: nn.Module

    def __init__(self, method: str) -> None:
        self.method = method

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by learning rate."""
        raise NotImplementedError

    def again(self) -> "Subject":
        """The same, made anew."""
        raise NotImplementedError

    def logits(self, inputs: Inputs, labels: Tensor | None = None) -> Tensor:
        """Of each token of the targets, those before it given; without gradients."""
        with torch.no_grad():
            out: Tensor = self.module(**inputs, labels=self.labels if labels is None else labels).logits
        return out

    def loss(self) -> Tensor:
        """Of the batch."""
        out: Tensor = self.module(**self.inputs, labels=self.labels).loss
        return out

    def answer(self, inputs: Inputs, **options: Any) -> Tensor:
        """Generated tokens, without the decoder's start."""
        tokens: Tensor = cast(Any, self.module).generate(**inputs, **options)
        return tokens[:, 1:].contiguous()

    def unpadded(self, row: int) -> Inputs:
        """A row of the batch alone."""
        real = self.inputs["attention_mask"][row] == 1
        of_text = ("input_ids", "attention_mask")
        return {
            name: value[row : row + 1, real] if name in of_text else value[row : row + 1]
            for name, value in self.inputs.items()
        }

    def checkpoint(self) -> None:
        """Switch gradient checkpointing on."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what was trained."""
        raise NotImplementedError

    def loaded(self, folder: Path) -> "Subject":
        """What was written, on a fresh base."""
        raise NotImplementedError

    def without(self) -> Iterator[Tensor]:
        """Logits with the adapter switched off, then with the adapter taken off."""
        raise NotThere

    def folded(self) -> Tensor:
        """Logits of the form for inference alone."""
        raise NotThere

    def mixed(self) -> tuple[Tensor, list[bool]]:
        """Logits of a batch of which some rows go without the adapter, and which rows have it."""
        raise NotThere


@cache
def backbone_of(language: str, vision: str | None, bias: VisualPositionBias) -> Backbone:
    """A backbone that came from the disk; to be copied."""
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        place = Path(folder) / language
        spread_out(language_model(language)).save_pretrained(place)
        tokenizer(language).save_pretrained(place)
        seen_by = None if vision is None else Path(folder) / vision
        if seen_by is not None and vision is not None:
            for part in tower(vision):
                part.save_pretrained(seen_by)
        try:
            backbone = Backbone.from_pretrained(language=place, vision=seen_by, visual_position_bias=bias)
        except ValueError as error:
            # What is refused is refused under the same name every time.
            error.args = (str(error).replace(f"{folder}/", ""),)
            raise
    return backbone.eval()


def texts(backbone: Backbone) -> Inputs:
    """Random words, padded on the right, and images if the backbone sees them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), backbone.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if backbone.vision is not None:
        size = (len(LENGTHS), 1, 3, IMAGE_SIZE, IMAGE_SIZE)
        inputs["pixel_values"] = torch.randn(size, generator=generator)
    return inputs


def targets(rows: int) -> Tensor:
    """Random words of the same length."""
    return torch.randint(5, 140, (rows, ANSWER), generator=torch.Generator().manual_seed(2))


def new_prompt(method: str) -> DePT:
    """A prompt as if it were trained."""
    if method in BASELINES:
        raise NotThere
    torch.manual_seed(0)
    prompt = family.build(cast(family.Method, method), D_MODEL, **SIZES)
    train_at_random(prompt.parameters(), 1.0)
    return prompt.eval()


def train_at_random(parameters: Iterator[nn.Parameter], size: float) -> None:
    """Move parameters as if they were trained; the same way each time."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


class Composed(Subject):
    """A `PromptedModel`: an image encoder, or none, and a language model."""

    def __init__(self, method: str, language: str, vision: str | None, bias: VisualPositionBias) -> None:
        super().__init__(method)
        self.parts = (language, vision, bias)
        backbone = backbone_of(*self.parts)
        self.inputs, self.labels = texts(backbone), targets(len(LENGTHS))
        self.end = backbone.language.config.eos_token_id
        self.module = PromptedModel(backbone).eval()
        self.bare_logits = self.logits(self.inputs)
        self.module = self.trained().eval()

    def trained(self) -> PromptedModel:
        """The model with what the method trains."""
        backbone = copy.deepcopy(backbone_of(*self.parts))
        if self.method not in BASELINES:
            return PromptedModel(backbone, new_prompt(self.method))
        if self.method == "lora":
            torch.manual_seed(0)
            backbone.add_lora(2)
        else:
            backbone.freeze(language=False, but="biases")
        train_at_random((p for p in backbone.language.parameters() if p.requires_grad), 0.3)
        return PromptedModel(backbone)

    @property
    def model(self) -> PromptedModel:
        """What is called."""
        return cast(PromptedModel, self.module)

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """See `Subject`."""
        return self.model.parameter_groups()

    def again(self) -> "Composed":
        """See `Subject`."""
        return Composed(self.method, *self.parts)

    def answer(self, inputs: Inputs, **options: Any) -> Tensor:
        """See `Subject`."""
        tokens = self.model.generate(**inputs, **options)
        return (
            tokens[:, 1:].contiguous() if self.model.backbone.language.config.is_encoder_decoder else tokens
        )

    def checkpoint(self) -> None:
        """See `Subject`."""
        recompute_activations(self.model.backbone.language)

    def save(self, folder: Path) -> None:
        """See `Subject`."""
        Adapter.of(self.model, task="", metrics={}).save(folder)

    def loaded(self, folder: Path) -> "Composed":
        """See `Subject`."""
        other = copy.copy(self)
        other.module = Adapter.load(folder).build(copy.deepcopy(backbone_of(*self.parts))).eval()
        return other

    def without(self) -> Iterator[Tensor]:
        """See `Subject`."""
        if self.model.prompt is None:
            raise NotThere
        self.module = PromptedModel(self.model.backbone).eval()
        yield self.logits(self.inputs)

    def folded(self) -> Tensor:
        """See `Subject`."""
        if self.model.prompt is None:
            raise NotThere
        self.module = self.model.folded()
        return self.logits(self.inputs)

    def mixed(self) -> tuple[Tensor, list[bool]]:
        """See `Subject`."""
        if self.model.prompt is None:
            raise NotThere
        on, backbone = [True, False, True], self.model.backbone
        table = PromptTable([None, copy.deepcopy(self.model.prompt)], backbone)
        other = copy.copy(self)
        other.module = PromptedModel(backbone, RowPrompts(table, torch.tensor(on).long())).eval()
        return other.logits(self.inputs), on


@cache
def ready_made_of(name: str) -> PreTrainedModel:
    """A ready-made model, frozen as `attach` does it, because some kernels differ; to be copied."""
    torch.manual_seed(0)
    return ready_made(name).requires_grad_(False)


class ReadyMade(Subject):
    """A ready-made vision-language model with a prompt attached."""

    def __init__(self, method: str, name: str) -> None:
        super().__init__(method)
        self.name = name
        bare = ready_made_of(name)
        self.inputs = inputs_of(name)
        self.labels = targets(len(self.inputs["input_ids"]))
        self.end = getattr(bare, "language_model", bare).generation_config.eos_token_id
        self.module = bare
        self.bare_logits = self.logits(self.inputs)
        self.module = attach(copy.deepcopy(bare), new_prompt(method)).eval()

    @property
    def attached(self) -> Attached:
        """What is called."""
        return cast(Attached, self.module)

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """See `Subject`."""
        return self.attached.parameter_groups()

    def again(self) -> "ReadyMade":
        """See `Subject`."""
        return ReadyMade(self.method, self.name)

    def checkpoint(self) -> None:
        """See `Subject`."""
        self.attached.model.gradient_checkpointing_enable({"use_reentrant": False})

    def save(self, folder: Path) -> None:
        """See `Subject`."""
        self.attached.save(folder)

    def loaded(self, folder: Path) -> "ReadyMade":
        """See `Subject`."""
        other = copy.copy(self)
        other.module = Attached.load(folder, copy.deepcopy(ready_made_of(self.name))).eval()
        return other

    def without(self) -> Iterator[Tensor]:
        """See `Subject`."""
        with self.attached.disabled():
            yield self.logits(self.inputs)
        model = self.attached.model
        self.attached.detach()
        self.module = model
        yield self.logits(self.inputs)


class InPeft(Subject):
    """A language model that PEFT has wrapped."""

    def __init__(self, method: str, language: str) -> None:
        from peft import get_peft_model

        from dept_vl.peft_plugin import DeptConfig

        super().__init__(method)
        if method not in ("pt", "dept"):
            raise NotThere
        self.language = language
        backbone = backbone_of(language, None, "none")
        self.inputs, self.labels = texts(backbone), targets(len(LENGTHS))
        self.end = backbone.language.config.eos_token_id
        self.module = self.base()
        self.bare_logits = self.logits(self.inputs)
        config = DeptConfig(
            task_type="SEQ_2_SEQ_LM",
            prompt_init="random",
            prompt_length=SIZES["prompt_length"],
            rank=0 if method == "pt" else SIZES["rank"],
            max_source_length=SIZES["max_source_length"],
        )
        base = self.base()
        torch.manual_seed(0)
        model = get_peft_model(base, config).eval()
        train_at_random((p for p in model.parameters() if p.requires_grad), 1.0)
        self.module = model

    def base(self) -> PreTrainedModel:
        """The language model alone, as transformers has it."""
        torch.manual_seed(0)
        return spread_out(language_model(self.language)).eval()

    @property
    def model(self) -> Any:
        """What is called."""
        return self.module

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """See `Subject`."""
        (prompt,) = (module for module in self.module.modules() if isinstance(module, DePT))
        return {name: group for name, group in prompt.parameter_groups().items() if group}

    def again(self) -> "InPeft":
        """See `Subject`."""
        return InPeft(self.method, self.language)

    def checkpoint(self) -> None:
        """See `Subject`."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def save(self, folder: Path) -> None:
        """See `Subject`."""
        self.model.save_pretrained(folder)

    def loaded(self, folder: Path) -> "InPeft":
        """See `Subject`."""
        from peft import PeftModel

        other = copy.copy(self)
        other.module = PeftModel.from_pretrained(self.base(), folder).eval()
        return other

    def without(self) -> Iterator[Tensor]:
        """See `Subject`."""
        with self.model.disable_adapter():
            yield self.logits(self.inputs)
        self.module = self.model.unload()
        yield self.logits(self.inputs)

    def folded(self) -> Tensor:
        """See `Subject`."""
        self.module = self.model.merge_and_unload()
        return self.logits(self.inputs)

    def mixed(self) -> tuple[Tensor, list[bool]]:
        """See `Subject`."""
        on = [True, False, True]
        names = ["default" if with_prompt else "__base__" for with_prompt in on]
        with torch.no_grad():
            logits: Tensor = self.model(**self.inputs, labels=self.labels, adapter_names=names).logits
        return logits, on


ARCHITECTURES: dict[str, Callable[[str], Subject]] = {
    "T5": partial(Composed, language="t5", vision=None, bias="none"),
    "CLIP + T5": partial(Composed, language="t5", vision="clip", bias="none"),
    "CLIP + T5, relative": partial(Composed, language="t5", vision="clip", bias="relative"),
    "mT5": partial(Composed, language="mt5", vision=None, bias="none"),
    "CLIP + mT5": partial(Composed, language="mt5", vision="clip", bias="none"),
    "LongT5": partial(Composed, language="longt5-local", vision=None, bias="none"),
    "CLIP + LongT5": partial(Composed, language="longt5-local", vision="clip", bias="none"),
    "CLIP + LongT5, relative": partial(Composed, language="longt5-local", vision="clip", bias="relative"),
    "BART": partial(Composed, language="bart", vision=None, bias="none"),
    "CLIP + BART": partial(Composed, language="bart", vision="clip", bias="none"),
    "CLIP + BART, relative": partial(Composed, language="bart", vision="clip", bias="relative"),
    "GPT-2": partial(Composed, language="gpt2", vision=None, bias="none"),
    "CLIP + GPT-2": partial(Composed, language="gpt2", vision="clip", bias="none"),
    "Llama": partial(Composed, language="llama", vision=None, bias="none"),
    "CLIP + Llama": partial(Composed, language="llama", vision="clip", bias="none"),
    "BLIP-2": partial(ReadyMade, name="blip2"),
    "InstructBLIP": partial(ReadyMade, name="instructblip"),
    "Florence-2": partial(ReadyMade, name="florence2"),
    "T5Gemma 2": partial(ReadyMade, name="t5gemma2"),
    "T5 in PEFT": partial(InPeft, language="t5"),
    "BART in PEFT": partial(InPeft, language="bart"),
}
"""Models by name; "relative" is the `visual_position_bias`."""
