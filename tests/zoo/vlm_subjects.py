"""Pretrained vision-language models with something trained on them, to be probed as any backbone."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import Tensor
from zoo.subjects import Composed, Inputs, NotThere, Subject
from zoo.vlms import saved

from dept_vl.models.prompted import PromptedModel
from dept_vl.models.tokens import end_token
from dept_vl.models.vlm import VisionLanguageModel, open_backbone

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
        bare, end = PromptedModel(backbone).eval(), end_token(backbone.tokenizer)
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
