"""Tiny models with something trained on them: three kinds behind one interface, to be probed."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo.models import D_MODEL, IMAGE_SIZE, VOCABULARY, language_model, spread_out, tokenizer, tower
from zoo.ready_made import inputs_of, ready_made

from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.attach import Attached, attach
from dept_vl.models.backbone import Backbone
from dept_vl.models.options import VisualPositionBias
from dept_vl.models.precision import recompute_activations
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.row_prompts import PromptTable, RowPrompts
from dept_vl.prompts.base import METHODS, sized
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.methods import build

Inputs = dict[str, Tensor]
BASELINES = ("bitfit", "lora")
SIZES = {"prompt_length": 4, "rank": 2, "max_source_length": 12}
LENGTHS = (7, 4, 5)
"""Tokens of the texts of a batch."""
ANSWER = 5
"""Tokens of a target."""


class NotThere(Exception):
    """There is no such thing to be asked of."""


class Subject(ABC):
    """A model in evaluation mode, with something trained on it that is far from where training starts.

    Each kind takes a method and the names of its base; made anew of them it is the same to the bit.

    Args:
        method: Of `base.METHODS` or `BASELINES`.
        names: Of the base.
        bare: The base, with nothing trained on it.
        inputs: A batch of texts of different lengths, each with its image if there are images.
        end: The token that ends an answer.

    Attributes:
        method, names, inputs, end: As given.
        labels: Targets of the batch, all of one length.
        bare_logits: What the base says of them.
        module: What is called: at first the base, then the base with what was trained.

    Raises:
        NotThere: If there is no such method for the model.
    """

    module: Any

    def __init__(
        self, method: str, names: tuple[Any, ...], bare: nn.Module, inputs: Inputs, end: int
    ) -> None:
        self.method, self.names, self.inputs, self.end = method, names, inputs, end
        self.labels = targets(len(inputs["input_ids"]))
        self.module = bare
        self.bare_logits = self.logits(inputs)

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by learning rate."""
        groups: dict[str, list[nn.Parameter]] = self.module.parameter_groups()
        return groups

    def again(self) -> "Subject":
        """The same, made anew."""
        return type(self)(self.method, *self.names)

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
        tokens: Tensor = self.module.generate(**inputs, **options)
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
        self.module.gradient_checkpointing_enable({"use_reentrant": False})

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """What was written, on a fresh base."""

    def loaded(self, folder: Path) -> "Subject":
        """The same with what was written."""
        other = copy.copy(self)
        other.module = self.load(folder).eval()
        return other

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


def new_prompt(method: str, longest: int = SIZES["max_source_length"]) -> DePT:
    """A prompt for texts of so many tokens, as if it were trained."""
    if method in BASELINES:
        raise NotThere
    torch.manual_seed(0)
    sizes = SIZES | {"max_source_length": longest} | ({"rank": 0} if method == "pt" else {})
    if not METHODS[method].has_prompt:
        sizes |= {"prompt_length": 0}
    prompt = build(sized(method, d_model=D_MODEL, **sizes))
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

    module: PromptedModel
    base = staticmethod(backbone_of)
    longest = SIZES["max_source_length"]

    def __init__(self, method: str, language: str, vision: str | None, bias: VisualPositionBias) -> None:
        names, backbone = (language, vision, bias), backbone_of(language, vision, bias)
        end = backbone.language.config.eos_token_id
        super().__init__(method, names, PromptedModel(backbone).eval(), texts(backbone), end)
        self.module = self.trained().eval()

    def trained(self) -> PromptedModel:
        """The model with what the method trains."""
        backbone = copy.deepcopy(self.base(*self.names))
        if self.method not in BASELINES:
            return PromptedModel(backbone, new_prompt(self.method, self.longest))
        if self.method == "lora":
            torch.manual_seed(0)
            backbone.add_lora(2)
        else:
            backbone.freeze(language=False, but="biases")
        train_at_random((p for p in backbone.language.parameters() if p.requires_grad), 0.3)
        return PromptedModel(backbone)

    def answer(self, inputs: Inputs, **options: Any) -> Tensor:
        """See `Subject`."""
        tokens = self.module.generate(**inputs, **options)
        return (
            tokens[:, 1:].contiguous() if self.module.backbone.language.config.is_encoder_decoder else tokens
        )

    def checkpoint(self) -> None:
        """See `Subject`."""
        recompute_activations(self.module.backbone.language)

    def save(self, folder: Path) -> None:
        """See `Subject`."""
        Adapter.of(self.module, task="", metrics={}).save(folder)

    def load(self, folder: Path) -> PromptedModel:
        """See `Subject`."""
        return Adapter.load(folder).build(copy.deepcopy(self.base(*self.names)))

    def without(self) -> Iterator[Tensor]:
        """See `Subject`."""
        if self.module.prompt is None:
            raise NotThere
        self.module = PromptedModel(self.module.backbone).eval()
        yield self.logits(self.inputs)

    def folded(self) -> Tensor:
        """See `Subject`."""
        if self.module.prompt is None:
            raise NotThere
        self.module = self.module.folded()
        return self.logits(self.inputs)

    def mixed(self) -> tuple[Tensor, list[bool]]:
        """See `Subject`."""
        if self.module.prompt is None:
            raise NotThere
        on, backbone = [True, False, True], self.module.backbone
        language_model = backbone.language_model
        with torch.no_grad():
            table = PromptTable(
                [None, copy.deepcopy(self.module.prompt)],
                language_model.word_embeddings.weight,
                padding_first=language_model.counts_text,
            )
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

    longest = SIZES["max_source_length"]

    def __init__(self, method: str, name: str) -> None:
        bare = self.base(name)
        super().__init__(method, (name,), bare, *self.source(name))
        self.module = attach(copy.deepcopy(bare), new_prompt(method, self.longest)).eval()

    @staticmethod
    def base(name: str) -> PreTrainedModel:
        """The model without a prompt; to be copied."""
        return ready_made_of(name)

    @staticmethod
    def source(name: str) -> tuple[Inputs, int]:
        """A batch, and the token that ends an answer."""
        bare = ready_made_of(name)
        return inputs_of(name), getattr(bare, "language_model", bare).generation_config.eos_token_id

    def checkpoint(self) -> None:
        """See `Subject`."""
        self.module.model.gradient_checkpointing_enable({"use_reentrant": False})

    def save(self, folder: Path) -> None:
        """See `Subject`."""
        self.module.save(folder)

    def load(self, folder: Path) -> Attached:
        """See `Subject`."""
        return Attached.load(folder, copy.deepcopy(self.base(*self.names)))

    def without(self) -> Iterator[Tensor]:
        """See `Subject`."""
        with self.module.disabled():
            yield self.logits(self.inputs)
        model = self.module.model
        self.module.detach()
        self.module = model
        yield self.logits(self.inputs)


class InPeft(Subject):
    """A language model that PEFT has wrapped."""

    longest = SIZES["max_source_length"]
    task_type = "SEQ_2_SEQ_LM"

    def __init__(self, method: str, language: str) -> None:
        from peft import get_peft_model

        from dept_vl.adapters.peft.plugin import DeptConfig

        if method not in ("pt", "dept"):
            raise NotThere
        super().__init__(method, (language,), self.base(language), *self.source(language))
        config = DeptConfig(
            task_type=self.task_type,
            prompt_init="random",
            prompt_length=SIZES["prompt_length"],
            rank=0 if method == "pt" else SIZES["rank"],
            max_source_length=self.longest,
        )
        base = self.base(language)
        torch.manual_seed(0)
        self.module = get_peft_model(base, config).eval()
        train_at_random((p for p in self.module.parameters() if p.requires_grad), 1.0)

    @staticmethod
    def base(language: str) -> PreTrainedModel:
        """The language model alone, as transformers has it."""
        torch.manual_seed(0)
        return spread_out(language_model(language)).eval()

    @staticmethod
    def source(language: str) -> tuple[Inputs, int]:
        """A batch, and the token that ends an answer."""
        backbone = backbone_of(language, None, "none")
        return texts(backbone), backbone.language.config.eos_token_id

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """See `Subject`."""
        (prompt,) = (module for module in self.module.modules() if isinstance(module, DePT))
        return {name: group for name, group in prompt.parameter_groups().items() if group}

    def save(self, folder: Path) -> None:
        """See `Subject`."""
        self.module.save_pretrained(folder)

    def load(self, folder: Path) -> nn.Module:
        """See `Subject`."""
        from peft import PeftModel

        model: nn.Module = PeftModel.from_pretrained(self.base(*self.names), folder)
        return model

    def without(self) -> Iterator[Tensor]:
        """See `Subject`."""
        with self.module.disable_adapter():
            yield self.logits(self.inputs)
        self.module = self.module.unload()
        yield self.logits(self.inputs)

    def folded(self) -> Tensor:
        """See `Subject`."""
        self.module = self.module.merge_and_unload()
        return self.logits(self.inputs)

    def mixed(self) -> tuple[Tensor, list[bool]]:
        """See `Subject`."""
        on = [True, False, True]
        names = ["default" if with_prompt else "__base__" for with_prompt in on]
        with torch.no_grad():
            logits: Tensor = self.module(**self.inputs, labels=self.labels, adapter_names=names).logits
        return logits, on


COMPOSED: dict[str, Callable[[str], Subject]] = {
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
    "BLIP-2, attached": partial(ReadyMade, name="blip2"),
    "InstructBLIP, attached": partial(ReadyMade, name="instructblip"),
    "Florence-2, attached": partial(ReadyMade, name="florence2"),
    "T5Gemma 2, attached": partial(ReadyMade, name="t5gemma2"),
    "T5 in PEFT": partial(InPeft, language="t5"),
    "BART in PEFT": partial(InPeft, language="bart"),
}
"""Models by name; "relative" is the `visual_position_bias`."""
