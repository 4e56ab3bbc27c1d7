"""Pretrained vision-language models with something trained on them, to be probed as any backbone."""

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from zoo.subjects import Composed, InPeft, Inputs, NotThere, ReadyMade, Subject
from zoo.vlms import saved

from dept_vl.models.padding import packing, take
from dept_vl.models.pretrained_vlm import VisionLanguageModel, open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.tokens import IGNORE_INDEX, style_of

QUESTIONS = ("what colour is the star ?", "how many ?", "is it red ?")
LONGEST = 40
"""Tokens of a question in its form."""


@cache
def pretrained(name: str) -> VisionLanguageModel:
    """A model that came from the disk; to be copied."""
    with TemporaryDirectory() as folder:
        backbone = open_backbone(model=saved(name, Path(folder) / name))
    assert isinstance(backbone, VisionLanguageModel)
    backbone.name = name  # adapters name it
    return backbone.eval()


def asked(backbone: VisionLanguageModel, rows: range) -> Inputs:
    """Questions, each about an image of its own colour and shape."""
    images = [Image.new("RGB", (40 - 8 * row, 32), (200, 60 * row, 40)) for row in rows]
    made = backbone.processor(
        [QUESTIONS[row] for row in rows],
        [[image] if backbone.reads_images else [] for image in images],
        [LONGEST] * len(rows),
    )
    inputs: dict[str, Any] = {name: made.pop(name) for name in ("input_ids", "attention_mask")}
    return inputs | {"processed": made}


class Pretrained(Composed):
    """A model behind `--model`, which reads images or text alone."""

    base = staticmethod(pretrained)
    longest = LONGEST

    def __init__(self, method: str, name: str) -> None:
        backbone = pretrained(name)
        bare, end = PromptedModel(backbone).eval(), style_of(backbone.tokenizer).end
        Subject.__init__(self, method, (name,), bare, asked(backbone, range(len(QUESTIONS))), end)
        self.module = self.trained().eval()

    def unpadded(self, row: int) -> Inputs:
        """See `Subject`."""
        return asked(self.module.backbone, range(row, row + 1))

    def answer(self, inputs: Inputs, **options: Any) -> Tensor:
        """See `Subject`."""
        tokens = self.module.generate(**inputs, eos_token_id=self.end, **options)
        return tokens[:, 1:].contiguous() if self.module.backbone.language_model.encoder_decoder else tokens

    def folded(self) -> Tensor:
        """A prompt stays as it is: the word table is that of images too."""
        raise NotThere


def joined(inputs: Inputs, answer: Tensor, answer_type: int) -> Inputs:
    """Source and answer in one sequence, as decoder-only models are trained."""
    more = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    more["token_type_ids"] = torch.full_like(answer, answer_type)
    more["mm_token_type_ids"] = torch.zeros_like(answer)
    return {name: torch.cat([row, more[name]], 1) if name in more else row for name, row in inputs.items()}


class Continued(Subject):
    """A decoder-only model that is called as transformers has it: the answer stands behind the source."""

    longest = LONGEST
    task_type = "CAUSAL_LM"

    @staticmethod
    def base(name: str) -> PreTrainedModel:
        """The model alone; to be copied."""
        return copy.deepcopy(pretrained(name).language)

    @staticmethod
    def source(name: str, rows: range = range(len(QUESTIONS))) -> tuple[Inputs, int]:
        """A batch, padded on the left as for answers, and the token that ends an answer."""
        backbone = pretrained(name)
        backbone.tokenizer.padding_side = "left"
        inputs: dict[str, Any] = asked(backbone, rows)
        return {**inputs.pop("processed"), **inputs}, style_of(backbone.tokenizer).end

    def _given(self, inputs: Inputs, labels: Tensor) -> Inputs:
        """What is trained on: source, answer, and padding on the right."""
        whole = joined(inputs, labels, pretrained(*self.names).language_model.answer_type)
        of_source = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        whole["labels"] = torch.cat([of_source, labels], dim=1)
        shape, order = whole["input_ids"].shape, packing(whole["attention_mask"].bool())
        return {name: take(row, order) if row.shape == shape else row for name, row in whole.items()}

    def logits(self, inputs: Inputs, labels: Tensor | None = None) -> Tensor:
        """See `Subject`."""
        labels = self.labels if labels is None else labels
        given = self._given(inputs, labels)
        with torch.no_grad():
            found: Tensor = self.module(**given).logits
        answered = given["labels"].roll(-1, 1) != IGNORE_INDEX  # a token is told by the column before it
        return found[answered].view(*labels.shape, -1)

    def loss(self) -> Tensor:
        """See `Subject`."""
        found: Tensor = self.module(**self._given(self.inputs, self.labels)).loss
        return found

    def answer(self, inputs: Inputs, **options: Any) -> Tensor:
        """See `Subject`."""
        tokens: Tensor = self.module.generate(**inputs, eos_token_id=self.end, **options)
        return tokens[:, inputs["input_ids"].shape[1] :]

    def unpadded(self, row: int) -> Inputs:
        """See `Subject`."""
        return self.source(*self.names, range(row, row + 1))[0]


class ContinuedReadyMade(Continued, ReadyMade):
    """A decoder-only model with a prompt attached."""


class ContinuedInPeft(Continued, InPeft):
    """A decoder-only model that PEFT has wrapped."""

    def mixed(self) -> tuple[Tensor, list[bool]]:
        """See `Subject`."""
        self.module(**self._given(self.inputs, self.labels), adapter_names=["default", "__base__", "default"])
        raise AssertionError("PEFT took them")


PRETRAINED: dict[str, Callable[[str], Subject]] = {
    "BLIP-2": partial(Pretrained, name="blip2"),
    "InstructBLIP": partial(Pretrained, name="instructblip"),
    "Florence-2": partial(Pretrained, name="florence2"),
    "T5Gemma 2": partial(Pretrained, name="t5gemma2"),
    "LLaVA": partial(Pretrained, name="llava"),
    "LLaVA-NeXT": partial(Pretrained, name="llava_next"),
    "LLaVA-OneVision": partial(Pretrained, name="llava_onevision"),
    "Qwen2-VL": partial(Pretrained, name="qwen2_vl"),
    "Qwen2.5-VL": partial(Pretrained, name="qwen2_5_vl"),
    "Qwen3-VL": partial(Pretrained, name="qwen3_vl"),
    "PaliGemma": partial(Pretrained, name="paligemma"),
    "PaliGemma 2": partial(Pretrained, name="paligemma2"),
    "Idefics3": partial(Pretrained, name="idefics3"),
    "SmolVLM": partial(Pretrained, name="smolvlm"),
    "Gemma 3": partial(Pretrained, name="gemma3"),
    "InternVL": partial(Pretrained, name="internvl"),
    "BLIP-2, OPT": partial(Pretrained, name="blip2_opt"),
    "InstructBLIP, Vicuna": partial(Pretrained, name="instructblip_vicuna"),
    "GPT-2, --model": partial(Pretrained, name="gpt2_text"),
    "Llama, --model": partial(Pretrained, name="llama_text"),
    "T5, --model": partial(Pretrained, name="t5_text"),
    "BART, --model": partial(Pretrained, name="bart_text"),
}
"""Models of `--model`, by name."""
ENCODER_DECODERS = ("BLIP-2", "InstructBLIP", "Florence-2", "T5Gemma 2", "T5, --model", "BART, --model")
CONTINUED: dict[str, Callable[[str], Subject]] = {
    f"{title.removesuffix(', --model')}, attached": partial(ContinuedReadyMade, name=made.keywords["name"])
    for title, made in PRETRAINED.items()
    if title not in ENCODER_DECODERS
} | {
    "GPT-2 in PEFT": partial(ContinuedInPeft, language="gpt2_text"),
    "LLaVA in PEFT": partial(ContinuedInPeft, language="llava"),
}
"""Decoder-only models with a prompt that is attached, or added by PEFT, by name."""
