"""Options of the pretraining."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dept_vl._utils.options import Options, Positive, Rate, Seed, Workers
from dept_vl.models.options import ObjectOrder

SPATIAL = ("place", "distance", "further", "relation", "neighbour", "neighbour colour", "extreme", "more")
"""Families of questions about positions. `more` fits every scene, so that there is always a question."""


@dataclass(frozen=True)
class PretrainConfig(Options):
    """Configuration of the pretraining of a small backbone."""

    output_dir: Path = Path("data/tiny-clip-t5")
    """Folder for the backbone, which must not exist. Its name is the backbone's name."""
    language: Literal["t5", "bart"] = "t5"
    """Architecture of the language model."""
    object_order: ObjectOrder = "frozen"
    """Object order of the saved backbone. With frozen, position vectors are learnt here and frozen later."""
    vision_only: bool = False
    """Train only the vision tower, for later backbones to start from."""
    vision_from: Path | None = None
    """Folder with a finished vision tower (from --vision_only)."""
    language_from: Path | None = None
    """Backbone to continue from: its language model, and its visual projection, fitted to the new tower."""
    evaluate_only: bool = False
    """Evaluate the backbone in output_dir again instead of training one."""
    seed: Seed = 0
    """Random seed of scenes, questions and weights."""
    num_workers: Workers = 0
    """Processes that draw scenes and questions."""
    vision_steps: Positive = 2500
    """Steps of the vision tower."""
    vision_batch: Positive = 80
    """Batch size of the vision tower. Each scene is newly drawn."""
    vision_lr: Rate = 3e-3
    """Peak learning rate of the vision tower."""
    scenes: Positive = 60_000
    """Scenes whose features are cached to train the language model."""
    language_steps: Positive = 5000
    """Steps of the language model."""
    language_minutes: Rate = 0.0
    """Minutes after which to stop instead; 0 uses the number of steps."""
    language_batch: Positive = 64
    """Batch size of questions. Batches of captions and pairs, which are longer, are smaller."""
    processes: Positive = 1
    """Processes that share each step of the language model, each with a part of the batch (on CPUs)."""
    language_lr: Rate = 1e-2
    """Peak learning rate of language model and visual projection, relative to each tensor's scale
    (Adafactor). AdamW stayed on the first plateau for far longer."""
    spatial_share: Rate = 0.5
    """Share of the questions that are about positions and compare them."""
    spatial: tuple[str, ...] = SPATIAL
    """Families of these questions, including `more`. A family that is named twice is asked twice as often."""
    affirmative_share: Rate = 0.15
    """Share of the steps, at the start, without negated and comparing questions. In these, yes and no mean
    the opposite, and learning both kinds at once from scratch stays at chance for long."""
    bf16: bool = True
    """Train the language model with bfloat16 autocast on a CPU; 1.5 times as fast if the CPU supports it."""
    d_model: Positive = 256
    """Hidden size of the language model."""
    encoder_layers: Positive = 3
    """Number of encoder layers."""
    decoder_layers: Positive = 2
    """Number of decoder layers."""
    evaluation_scenes: Positive = 1500
    """New scenes that the saved scores are measured on."""

    @property
    def device(self) -> torch.device:
        """A GPU if there is one, else the CPU."""
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
