"""Options of the models; imports no torch."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dept_vl._utils.errors import UsageError
from dept_vl._utils.options import Options
from dept_vl.prompts.options import PositiveSize

VisualPositionBias = Literal["none", "relative"]
"""Position information of visual tokens in the language model.

`none`: none, as published. T5's relative bias is zero for every pair with a visual token. BART's learned
positions are only added to the text (and not to the prompt).
`relative`: the unchanged Hugging Face encoder, in which every position of `[prompt ; text ; visual]` counts.
Decoder-only models with images always use it.
"""

ObjectOrder = Literal["frozen", "trained", "none"]
"""Position vector that is added to each visual token for its place in the image.

`frozen`: random and never trained, as published. `trained`: trained and counted with the visual projection.
`none`: no vector. With `visual_position_bias` none, the language model then reads a set of patches.
"""

VisualNorm = Literal["once", "twice"]
"""Number of times that visual tokens are normalised: by the projection, and by BART's `layernorm_embedding`.

`once`: only by the projection, as published. `twice`: by both, as in the unchanged encoder, in older runs,
and always with `visual_position_bias` relative. T5 has no such norm.
"""

ImageFit = Literal["squash", "crop", "pad", "own"]
"""Method to fit an image to the input shape of the image encoder, which is usually square.

`squash`: resize both sides, as published. Nothing is lost, but the aspect ratio changes.
`crop`: crop the centre. For a photograph of 640 x 480, this loses a quarter.
`pad`: keep the aspect ratio and pad with the mean colour.
`own`: use the method of the encoder's own processor (CLIP crops, SigLIP squashes), as in older runs. An image
that already has the aspect ratio is left to the processor, unless that would cut off a margin.
"""
BEFORE_ORDER: dict[str, str] = {"object_order": "none", "visual_norm": "twice", "image_fit": "own"}
"""Defaults for older files, which lack these options."""


LoadIn = Literal["", "4bit", "8bit"]
"""Quantisation of a pretrained model's linear layers by bitsandbytes; empty for full precision."""

TrainedPart = Literal["all", "biases", "lora"]
"""Part of the language model that is trained if it is not frozen."""


LARGEST_GRID = 256
"""Largest side of a pooled grid; vision towers have about 50 patches per side at most."""


@dataclass(frozen=True)
class BackboneOptions(Options):
    """The frozen models."""

    backbone: Path | None = None
    """Folder of a saved backbone, such as data/tiny-clip-t5. Alternatives: model, or vision and language."""
    model: str | None = None
    """Hub name or folder of a pretrained model: a vision-language model of AutoModelForImageTextToText, such
    as Salesforce/blip2-flan-t5-xl or Qwen/Qwen2.5-VL-3B-Instruct, or, for text alone, a model of
    AutoModelForCausalLM or AutoModelForSeq2SeqLM."""
    text_form: str = ""
    """Form of the questions to model: chat for its chat template, or a text with {text} (and {image}). By
    default, its chat template if it has one, else the form of its authors. Saved with the adapter."""
    load_in: LoadIn = ""
    """Quantise the linear layers of model to 4bit (NF4) or 8bit by bitsandbytes. Prompts and gradients stay
    in full precision."""
    device_map: Literal["", "auto"] = ""
    """auto: spread model over all devices of one process and the memory of the CPU."""
    vision: str | None = None
    """Hub name or folder of the image encoder, such as openai/clip-vit-base-patch32."""
    language: str | None = None
    """Hub name or folder of the encoder-decoder, such as google-t5/t5-base or facebook/bart-base, or of a
    decoder-only model, such as openai-community/gpt2 or Qwen/Qwen2.5-0.5B."""
    vision_layer: Annotated[int, Field(ge=-1000, le=1000)] = -1
    """Hidden state of the image encoder to use: -1 for the last, -2 for the penultimate."""
    class_token: bool = False
    """Keep the image encoder's class token."""
    pooled_grid: Annotated[int, Field(ge=0, le=LARGEST_GRID)] = 0
    """Side of the square grid that patches are max-pooled to; 0 to keep all patches."""
    exif: bool = True
    """Rotate images by their EXIF orientation; --no_exif uses pixels as they are stored."""
    image_fit: ImageFit | Literal["auto"] = "auto"
    """Method to make images square. squash: resize both sides (published); crop: crop the centre; pad: pad
    with the mean colour; own: method of the encoder's processor, as in older runs; auto: value in the
    backbone folder, else squash."""
    visual_position_bias: VisualPositionBias = "none"
    """Positions of visual tokens in the language model. none: none (published); relative: those of the
    unchanged model, as always in decoder-only models."""
    object_order: ObjectOrder | Literal["auto"] = "auto"
    """Position vector of each visual token. frozen: random, not trained (published); trained: trained with
    the visual projection; none: no vector; auto: value in the backbone folder, else frozen."""
    visual_norm: VisualNorm | Literal["auto"] = "auto"
    """Norms of visual tokens. once: that of the projection (published); twice: also BART's norm of
    embeddings, as in older runs; auto: value in the backbone folder, else once. T5 has no such norm."""
    backbone_dropout: bool = True
    """Use the dropout of the frozen language model in training."""
    train_projection: bool = True
    """Train the visual projection, as in all published results."""
    train_backbone: bool = False
    """Train the language model too (full fine-tuning), as an upper bound for comparisons."""
    train_only: TrainedPart = "all"
    """Part that train_backbone trains: all; biases (BitFit; in T5, which has none, the scales of norms); or
    lora, which peft adds to the query and value projections of the attention."""
    lora_rank: PositiveSize = 8
    """Rank of LoRA."""

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `models.pretrained_vlm.open_backbone`.

        Raises:
            UsageError: If an option does not apply to the kind of backbone that is given.
        """
        if self.model is not None:
            free = {"model", "text_form", "exif", "backbone_dropout", "load_in", "device_map"}
            free |= {"train_projection", "train_backbone", "train_only", "lora_rank"}
            options = [f for f in fields(self) if f.name not in free]
            if changed := [f"--{f.name}" for f in options if getattr(self, f.name) != f.default]:
                raise UsageError(f"--model is a whole model; leave out {', '.join(changed)}")
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
