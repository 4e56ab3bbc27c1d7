"""How a small backbone is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dept_vl._utils.options import Options, Positive, Rate, Seed, Workers
from dept_vl.models.options import ObjectOrder

SPATIAL = ("place", "distance", "further", "relation", "neighbour", "neighbour colour", "extreme", "more")
"""Families about places; `more` fits every scene, so that a question is always found."""


@dataclass(frozen=True)
class PretrainConfig(Options):
    """How a small backbone is made."""

    output_dir: Path = Path("data/tiny-clip-t5")
    """Folder the backbone is written to, and its name; must not exist yet."""
    language: Literal["t5", "bart"] = "t5"
    """What the language model is."""
    object_order: ObjectOrder = "frozen"
    """Of the backbone that is written; frozen: the places are learnt here, and frozen from then on."""
    vision_only: bool = False
    """Make the vision tower alone, for backbones to start from."""
    vision_from: Path | None = None
    """Folder with a finished vision tower (--vision_only)."""
    language_from: Path | None = None
    """Backbone to go on from: its language model and visual projection, which is fitted to another tower."""
    evaluate_only: bool = False
    """Measure the backbone in output_dir again instead of making one."""
    seed: Seed = 0
    """Of scenes, questions and weights."""
    num_workers: Workers = 0
    """Processes that draw scenes and questions."""
    vision_steps: Positive = 2500
    """Steps of the vision tower."""
    vision_batch: Positive = 80
    """Scenes per vision step, each drawn afresh."""
    vision_lr: Rate = 3e-3
    """Peak learning rate of the vision tower."""
    scenes: Positive = 60_000
    """Scenes whose features are cached for the language stage."""
    language_steps: Positive = 5000
    """Steps of the language model."""
    language_minutes: Rate = 0.0
    """Instead stop after this time, whatever the speed; 0 takes the steps."""
    language_batch: Positive = 64
    """Questions per step (fewer captions and pairs, which are longer)."""
    processes: Positive = 1
    """That share each step of the language model: each has a part of the batch (on CPUs)."""
    language_lr: Rate = 1e-2
    """Peak rate of language model and visual projection, relative to each tensor's own scale
    (Adafactor): AdamW stayed on the first plateau for far longer."""
    spatial_share: Rate = 0.5
    """Share of the questions that are about places and comparisons of them."""
    spatial: tuple[str, ...] = SPATIAL
    """Families of these, with `more`; one that is named twice is asked twice as often."""
    affirmative_share: Rate = 0.15
    """Share of the steps, at the start, without negated and comparing questions. Yes and no mean the
    opposite in the two, and learning both at once from nothing stays at chance for long."""
    bf16: bool = True
    """Train the language model under bfloat16 autocast on a CPU; 1.5 times as fast where it has that."""
    d_model: Positive = 256
    """Width of the language model."""
    encoder_layers: Positive = 3
    """Layers of its encoder."""
    decoder_layers: Positive = 2
    """Layers of its decoder."""
    evaluation_scenes: Positive = 1500
    """Fresh scenes that the record's figures are measured on."""

    @property
    def device(self) -> torch.device:
        """A GPU if there is one."""
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
