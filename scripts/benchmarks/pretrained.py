"""Pretrained models with random weights in published sizes: bare, prompted, with LoRA, at equal length.

The bare model is called as in transformers, with as many further words in its source as the prompt has
vectors. Its embeddings need a gradient, so that its backward pass is as deep as with a prompt.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    Blip2Config,
    Florence2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    T5Config,
)

from benchmarks.backbones import Inputs, Shape
from benchmarks.methods import Runner, build_prompt
from dept_vl.adapters.attach import attach
from dept_vl.models.checks import load_tokenizer
from dept_vl.models.image_features import FEATURES, PIXELS, encoded, given_features, output_of
from dept_vl.models.pretrained_vlm import VisionLanguageModel
from dept_vl.models.prompted import PromptedModel, sequence_loss
from dept_vl.models.source import PER_TOKEN
from dept_vl.models.tokens import IGNORE_INDEX

Width = Literal["tiny", "small", "real"]
TEXT, ANSWER, NEW_TOKENS = 24, 4, 10
"""Number of tokens of each text, of each training target, and of each generated answer."""
LENGTH = 40
"""Vectors of the prompt, and further words for the bare model."""
ASKED = Shape(TEXT, 0.0, TEXT + 2, True)
TINY_VOCABULARY = 1024
WORDS = 500
"""Texts are drawn from token ids below this; the ids of image tokens are higher."""


@dataclass(frozen=True)
class Picture:
    """Image in the form that a model reads.

    Attributes:
        ids: Token ids of the image.
        shown: Function that draws pixels and related inputs for a number of images.
        typed: Whether the model needs to know which tokens are of images.
    """

    ids: tuple[int, ...]
    shown: Callable[[int], dict[str, Tensor]]
    typed: bool = False

    def source(self, texts: Tensor, mask: Tensor) -> Inputs:
        """Return inputs with an image in front of each text."""
        ids = torch.tensor(self.ids).repeat(len(texts), 1)
        source = {
            "input_ids": torch.cat([ids, texts], dim=1),
            "attention_mask": torch.cat([torch.ones_like(ids), mask], dim=1),
        }
        if self.typed:
            source["mm_token_type_ids"] = (source["input_ids"] == self.ids[1]).long()
        return source | self.shown(len(texts))


def blip2(width: Width) -> tuple[PretrainedConfig, Picture]:
    """Return configuration and image of BLIP-2: FLAN-T5-XL and ViT-g if real, FLAN-T5-base if small."""
    d_model, d_ff, layers, heads = {
        "tiny": (64, 64, 2, 2),
        "small": (768, 2048, 12, 12),
        "real": (2048, 5120, 24, 32),
    }[width]
    vocabulary = TINY_VOCABULARY if width == "tiny" else 32128
    vision: dict[str, int] = {}
    if width != "real":
        size = {"tiny": 64, "small": 384}[width]
        vision = {"hidden_size": size, "intermediate_size": 4 * size}
        vision |= {"num_hidden_layers": 2, "num_attention_heads": size // 32}
    text = T5Config(
        vocab_size=vocabulary,
        d_model=d_model,
        d_kv=64,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config={"encoder_hidden_size": vision.get("hidden_size", 1408), **vision},
        text_config=text.to_dict(),
        num_query_tokens=32,
        image_token_index=vocabulary - 28,
    )
    return config, Picture((vocabulary - 28,) * 32, _pixels(224))


def florence2(width: Width) -> tuple[PretrainedConfig, Picture]:
    """Return configuration and image of Florence-2.

    Real is large at 768 pixels (577 tokens), small is base at 256 pixels (65 tokens).
    """
    pixels = {"tiny": 128, "small": 256, "real": 768}[width]
    d_model, layers, d_ff = {"tiny": (64, 2, 64), "small": (768, 6, 3072), "real": (1024, 12, 4096)}[width]
    vocabulary = TINY_VOCABULARY if width == "tiny" else 51289
    embed = {"tiny": 16, "small": 128, "real": 256}[width]
    groups = [1] * 4 if width == "tiny" else [embed >> 5 << place for place in range(4)]
    text = BartConfig(
        vocab_size=vocabulary,
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=d_ff,
        decoder_ffn_dim=d_ff,
        max_position_embeddings=4096,
        forced_eos_token_id=None,
    )
    config = Florence2Config(
        vision_config={
            "embed_dim": [16] * 4 if width == "tiny" else [embed << place for place in range(4)],
            "num_heads": groups,
            "num_groups": groups,
            "projection_dim": d_model,
        },
        text_config=text.to_dict(),
        image_token_id=vocabulary - 1,
    )
    return config, Picture((vocabulary - 1,) * ((pixels // 32) ** 2 + 1), _pixels(pixels))


def qwen(width: Width) -> tuple[PretrainedConfig, Picture]:
    """Return configuration and image of Qwen2.5-VL.

    Real is 3B at 448 pixels (256 tokens), small has 12 layers at 224 pixels (64 tokens).
    """
    d_model, d_ff, layers, heads = {
        "tiny": (256, 64, 2, 2),
        "small": (1024, 4096, 12, 8),
        "real": (2048, 11008, 36, 16),
    }[width]
    side = {"tiny": 8, "small": 16, "real": 32}[width]
    depth, seen, inner = {"tiny": (2, 64, 64), "small": (4, 512, 1368), "real": (32, 1280, 3420)}[width]
    vocabulary = TINY_VOCABULARY if width == "tiny" else 151936
    start, end, image = (vocabulary - place for place in (284, 283, 281))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": d_model,
            "intermediate_size": d_ff,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={
            "depth": depth,
            "hidden_size": seen,
            "num_heads": seen // 32 if width == "tiny" else 16,
            "intermediate_size": inner,
            "out_hidden_size": d_model,
            "fullatt_block_indexes": [7, 15, 23, 31] if width == "real" else [depth - 1],
            "window_size": 112,
        },
        tie_word_embeddings=True,
        **{"image_token_id": image, "vision_start_token_id": start, "vision_end_token_id": end},
    )

    def shown(count: int) -> dict[str, Tensor]:
        grid = torch.tensor([[1, side, side]] * count)
        return {PIXELS: torch.randn(count * side * side, 1176), "image_grid_thw": grid}

    return config, Picture((start, *[image] * (side * side // 4), end), shown, typed=True)


def _pixels(size: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda count: {PIXELS: torch.randn(count, 3, size, size)}


MODELS: dict[str, Callable[[Width], tuple[PretrainedConfig, Picture]]] = {
    "blip2": blip2,
    "florence2": florence2,
    "qwen2.5-vl": qwen,
}
METHODS = {
    "bare": "model alone",
    "bare40": "model alone, 40 words more",
    "attached40": "DePT (m=40), attached",
}
"""Methods in addition to `methods.METHODS`."""
AT_EQUAL_LENGTH = ("bare40", "dept40")
PLAN = {
    "train": ("bare", *AT_EQUAL_LENGTH, "pt100", "lora8"),
    "cached": AT_EQUAL_LENGTH,
    "labels": ("bare40", "attached40"),
    f"generate{NEW_TOKENS}": (*AT_EQUAL_LENGTH, "attached40"),
}
"""Methods by kind of work, for every model."""
VARIABLE = ("qwen2.5-vl",)
"""Models whose number of image tokens depends on the image size, so that features are not stored."""


def of_pretrained(model: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the methods to measure on a pretrained model, by pair of shape (`vl`) and work."""
    return {
        ("vl", work): methods
        for work, methods in PLAN.items()
        if not (work == "cached" and model in VARIABLE)
    }


class Processor:
    """Processor that puts the tokens of an image in front of a text, since random weights come without one.

    Args:
        tokenizer: Any tokenizer.
        picture: Form of the image.
    """

    def __init__(self, tokenizer: Any, picture: Picture) -> None:
        self.tokenizer, self.picture = tokenizer, picture

    def __call__(self, text: list[str], **_: Any) -> Inputs:
        """See `source.SourceReader.process`."""
        made = self.tokenizer(text, padding=True, return_tensors="pt")
        return self.picture.source(made.input_ids, made.attention_mask)


def build_pretrained(
    name: str, width: Width, tokenizer: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> VisionLanguageModel:
    """Build a frozen model with random weights, as `--model` would load it.

    Args:
        name: Name in `MODELS`.
        width: Published size, or a smaller one.
        tokenizer: Folder of any tokenizer.
        device: Device of the model.
        dtype: Data type of the weights.
    """
    config, picture = MODELS[name](width)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(before)
    processor = Processor(load_tokenizer(tokenizer), picture)
    return VisionLanguageModel(model.eval(), processor, name=f"{name}, random weights").eval()


def draw_pretrained(backbone: VisionLanguageModel, size: int, seed: int, *, cached: bool = False) -> Inputs:
    """Draw a batch of inputs for `PromptedModel` on the model's device.

    Args:
        backbone: Backbone from `build_pretrained`.
        size: Batch size.
        seed: Random seed.
        cached: Whether to give features of the images instead of pixels.
    """
    torch.manual_seed(seed)
    picture = cast(Processor, backbone.processor.processor).picture
    texts = torch.randint(5, WORDS, (size, TEXT))
    source = picture.source(texts, torch.ones_like(texts)) | {
        "labels": torch.randint(5, WORDS, (size, ANSWER))
    }
    source = {name: tensor.to(backbone.device) for name, tensor in source.items()}
    source[PIXELS] = source[PIXELS].to(backbone.language_model.word_embeddings.weight.dtype)
    if cached:
        with torch.no_grad():
            made = encoded(backbone.language, source).pooler_output
        source[FEATURES] = made if isinstance(made, Tensor) else torch.stack(list(made))
        del source[PIXELS]
    own = ("input_ids", "attention_mask", "labels")
    return {name: source.pop(name) for name in own} | {"processed": source}


def sharing(module: nn.Module) -> Any:
    """Return a copy of a module that shares its weights but has its own hooks and layers."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def build_pretrained_runners(
    names: Sequence[str], backbone: VisionLanguageModel, work: str = "train"
) -> dict[str, Runner]:
    """Return a runner for each method.

    Args:
        names: Names in `PLAN`.
        backbone: Backbone ready for a step. Its weights are shared.
        work: Kind of work in `PLAN`.
    """
    answered = int(work.removeprefix("generate")) if work.startswith("generate") else 0
    return {name: _runner(name, backbone, work, answered) for name in names}


def _runner(name: str, backbone: VisionLanguageModel, work: str, answered: int) -> Runner:
    if name.startswith("bare"):
        model = sharing(backbone.language)
        model.get_input_embeddings().register_forward_hook(_need)
        return _called(backbone, model, work, answered, more=LENGTH if name == "bare40" else 0)
    if name == "lora8":
        with_lora = sharing(backbone)
        with_lora.add_lora(8)
        return _ours(PromptedModel(with_lora, None), answered)
    length = int("".join(filter(str.isdigit, name)))
    prompt = build_prompt(backbone.d_model, ASKED, length).to(backbone.device)
    if name.startswith("attached"):
        return _called(backbone, attach(sharing(backbone.language), prompt), work, answered)
    return _ours(PromptedModel(backbone, prompt), answered)


def _ours(model: PromptedModel, answered: int) -> Runner:
    """Return a runner for a model loaded by `--model`."""
    model.eval()  # the backbone has no dropout here
    trained = [parameter for group in model.parameter_groups().values() for parameter in group]
    length = 0 if model.prompt is None else model.prompt.prompt_length

    def forward(batch: Inputs) -> Tensor:
        if not answered:
            loss: Tensor = model(**batch).loss
            return loss
        given = {name: value for name, value in batch.items() if name != "labels"}
        return model.generate(**given, **_greedy(answered))

    return Runner(forward, [model], [] if answered else trained, length)


def _called(backbone: VisionLanguageModel, model: Any, work: str, answered: int, *, more: int = 0) -> Runner:
    """Return a runner for a transformers model that is called directly.

    Args:
        backbone: Backbone of this package with the same model.
        model: Model to call, bare or with an attached prompt.
        work: Kind of work in `PLAN`. With `labels` the model computes the loss.
        answered: Number of tokens to generate; 0 trains.
        more: Number of further words in front of the source.
    """
    prompt = getattr(model, "prompt", None)
    trained = [] if prompt is None or answered else list(prompt.parameters())
    length = more if prompt is None else prompt.prompt_length
    output = output_of(backbone.language, backbone.processor)
    joined = not backbone.language_model.encoder_decoder and not answered

    def prepare(batch: Inputs) -> Inputs:
        given = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            **batch["processed"],
        }
        labels = batch["labels"]
        for name, row in given.items():
            if name == "input_ids" or name == "attention_mask" or name.endswith(PER_TOKEN):
                front = row.new_full((len(row), more), int(name == "attention_mask"))
                front += backbone.placeholder * (name == "input_ids")
                behind = labels * (name == "input_ids") + int(name == "attention_mask")
                given[name] = torch.cat([front, row, *([behind] if joined else [])], dim=1)
        if FEATURES in given:
            given[PIXELS] = given.pop(FEATURES)
        return given | {"labels": labels, "cached": FEATURES in batch["processed"]}

    def forward(given: Inputs) -> Tensor:
        given = dict(given)
        labels = given.pop("labels")
        with given_features(model, output) if given.pop("cached") else nullcontext():
            if answered:
                special = backbone.language_model.special_tokens
                tokens: Tensor = model.generate(**given, **_greedy(answered), **special)
                return tokens
            if work == "labels" or not joined:
                if joined:
                    source = given["input_ids"].shape[1] - ANSWER
                    labels = nn.functional.pad(labels, (source, 0), value=IGNORE_INDEX)
                loss: Tensor = model(**given, labels=labels, use_cache=False).loss
                return loss
            logits = model(**given, logits_to_keep=ANSWER + 1, use_cache=False).logits[:, :-1]
            return sequence_loss(logits, labels)

    return Runner(forward, [model], trained, length, prepare)


def _greedy(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": 1}


def _need(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Require a gradient of the embeddings, so that the backward pass is as deep as with a prompt."""
    return output.requires_grad_() if torch.is_grad_enabled() else output
