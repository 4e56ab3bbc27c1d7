"""Options of the models, by name; this module imports no engine."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dept_vl._utils.errors import UsageError
from dept_vl._utils.options import Options
from dept_vl.prompts.options import PositiveSize

VisualPositionBias = Literal["none", "relative"]
"""What the language model's own position signal says of visual tokens.

`none`: nothing, as published. T5's relative bias is zero for every pair with a visual token; BART's
learned positions count the text alone (the prompt has none either).
`relative`: the stock Hugging Face encoder on `[prompt ; text ; visual]`, every position counted. Decoder-only
models with images always do.
"""

ObjectOrder = Literal["frozen", "trained", "none"]
"""The vector that is added to each visual token for its place in the image.

`frozen`: random and never trained, as published. `trained`: with the visual projection, and counted with it.
`none`: no such vector; with `visual_position_bias` none the language model then reads a set of patches.
"""

VisualNorm = Literal["once", "twice"]
"""Whether visual tokens, which the projection has normed, pass through BART's `layernorm_embedding` as well.

`once`: they do not, as published. `twice`: they do, as in the stock encoder, in everything that was trained
before there was a choice, and always with `visual_position_bias` relative. T5 has no such norm.
"""

ImageFit = Literal["squash", "crop", "pad", "own"]
"""How an image gets the shape of the image encoder's pixels, which is square for most.

`squash`: both sides are resized, as published; nothing is lost, and shapes are distorted.
`crop`: the centre is cut out; of a photograph of 640 x 480 a quarter is never seen.
`pad`: the image keeps its shape between bars of the mean colour.
`own`: what the encoder's own processor does, which is one of these: CLIP's crops, SigLIP's squashes. All was
made with it before there was a choice. An image that has the shape already is always left to it.
"""
BEFORE_ORDER: dict[str, str] = {"object_order": "none", "visual_norm": "twice", "image_fit": "own"}
"""What older files leave out: what was built before there was a choice."""


LoadIn = Literal["", "4bit", "8bit"]
"""In how many bits bitsandbytes keeps the linear layers of a pretrained model; empty for full precision."""

TrainedPart = Literal["all", "biases", "lora"]
"""What of the language model is trained where it is not frozen."""


LARGEST_GRID = 256
"""Side of a pooled grid; towers have 50 or so at most."""


@dataclass(frozen=True)
class BackboneOptions(Options):
    """The frozen models."""

    backbone: Path | None = None
    """Folder of a saved backbone, such as data/tiny-clip-t5; or model, or vision and language, instead."""
    model: str | None = None
    """Hub name or folder of a pretrained vision-language model, such as Salesforce/blip2-flan-t5-xl or
    Qwen/Qwen2.5-VL-3B-Instruct: any of transformers' AutoModelForImageTextToText; or, for text alone, of
    AutoModelForCausalLM and AutoModelForSeq2SeqLM."""
    text_form: str = ""
    """How model is asked: chat for its chat template, or a text with {text} (and {image}); left out, the chat
    template where there is one, else as its authors ask it. The adapter keeps it."""
    load_in: LoadIn = ""
    """Keep the linear layers of model in 4bit (NF4) or 8bit, by bitsandbytes; prompts and gradients stay in
    full precision."""
    device_map: Literal["", "auto"] = ""
    """auto: one process spreads model over all its devices, and the memory of the processor."""
    vision: str | None = None
    """Hub name or folder of the image encoder, such as openai/clip-vit-base-patch32."""
    language: str | None = None
    """Hub name or folder of the encoder-decoder, such as google-t5/t5-base or facebook/bart-base, or of a
    decoder-only model, such as openai-community/gpt2 or Qwen/Qwen2.5-0.5B."""
    vision_layer: Annotated[int, Field(ge=-1000, le=1000)] = -1
    """Hidden state of the image encoder that is read: -1 the last, -2 the penultimate."""
    class_token: bool = False
    """Keep the image encoder's class token."""
    pooled_grid: Annotated[int, Field(ge=0, le=LARGEST_GRID)] = 0
    """Max-pool the patches to a square of this side; 0 keeps them all."""
    exif: bool = True
    """Turn images as their EXIF orientation says; --no_exif takes pixels as they are stored."""
    image_fit: ImageFit | Literal["auto"] = "auto"
    """How images become square. squash: resized, nothing is lost (published); crop: the centre is cut out;
    pad: between bars of the mean colour; own: what the encoder's processor does, as in older runs; auto: the
    backbone folder's own, else squash."""
    visual_position_bias: VisualPositionBias = "none"
    """none: the language model's own positions leave visual tokens out (published); relative: stock; of
    decoder-only models always relative."""
    object_order: ObjectOrder | Literal["auto"] = "auto"
    """Vector of each visual token's place. frozen: random, not trained (published); trained: with the visual
    projection; none: the language model reads a set of patches; auto: the backbone folder's own, else
    frozen."""
    visual_norm: VisualNorm | Literal["auto"] = "auto"
    """once: visual tokens bypass BART's norm of embeddings, having their own (published); twice: they pass
    through both, as in older runs; auto: the backbone folder's own, else once. T5 has no such norm."""
    backbone_dropout: bool = True
    """Dropout in the frozen language model while training."""
    train_projection: bool = True
    """Train the visual projection, as every published row does."""
    train_backbone: bool = False
    """Train the language model too: full fine-tuning, the ceiling to compare with."""
    train_only: TrainedPart = "all"
    """With train_backbone: all of it; biases alone (BitFit; T5 has none: the scales of its norms); or lora,
    the pairs of LoRA that peft adds to the attention's queries and values."""
    lora_rank: PositiveSize = 8
    """Rank of each pair of LoRA."""

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `models.vlm.open_backbone`.

        Raises:
            UsageError: If options of two models that are joined are given besides a whole one.
        """
        if self.model is not None:
            usual, free = BackboneOptions(), {"model", "text_form", "exif", "backbone_dropout"}
            free |= {"load_in", "device_map"}
            free |= {"train_projection", "train_backbone", "train_only", "lora_rank"}
            options = [f.name for f in fields(self) if f.name not in free]
            changed = [name for name in options if getattr(self, name) != getattr(usual, name)]
            if changed:
                these = ", ".join(f"--{name}" for name in changed)
                raise UsageError(f"--model is a whole model; leave out {these}")
            if self.load_in and self.train_backbone:
                raise UsageError(
                    f"--train_backbone trains weights, and --load_in {self.load_in} keeps them as whole "
                    "numbers: leave one of them out"
                )
            placing = {name: getattr(self, name) for name in ("load_in", "device_map") if getattr(self, name)}
            return {"model": self.model, "text_form": self.text_form, "exif": self.exif, **placing}
        for name in ("load_in", "device_map"):
            if getattr(self, name):
                raise UsageError(f"--{name} is for a pretrained model (--model); leave it out here")
        if self.text_form:
            raise UsageError("--text_form is how a pretrained model is asked (--model); leave it out here")
        names = ("backbone", "vision", "language", "vision_layer", "class_token", "pooled_grid", "exif")
        given = {name: getattr(self, name) for name in (*names, "visual_position_bias")}
        return given | {k: None if getattr(self, k) == "auto" else getattr(self, k) for k in BEFORE_ORDER}
