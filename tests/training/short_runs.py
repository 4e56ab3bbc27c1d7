"""Runs of a few steps that answer questions, for the tests of what they leave and how they end."""

from pathlib import Path

import torch
from runs import tensors, tiny_run

from dept_vl.config import DataOptions, RunConfig
from dept_vl.models.backbone import Backbone

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_vqa.py"
FILES = {
    *(
        ".checksums.json",
        "config.json",
        "features.json",
        "identity.json",
        "log.jsonl",
        "predictions.json",
        "answers.png",
        "summary.json",
        "summary.md",
        "report.html",
    ),
    *(f"{which}/adapter.{kind}" for which in ("best", "last") for kind in ("json", "safetensors")),
    *(f"{which}/.checksums.json" for which in ("best", "last")),
}
STEPS = 6


def short_run(
    language: str, data_dir: Path, language_folders: dict[str, Path], vision_folders: dict[str, Path]
) -> RunConfig:
    """A run of a few steps on a language model with CLIP, without dropout."""
    return tiny_run(
        DataOptions(data_dir=data_dir, holdout_images=1),
        vision=vision_folders["clip"],
        language=language_folders[language],
        max_steps=STEPS,
        eval_every=3,
    )


def assert_trained(folder: Path, config: RunConfig) -> None:
    """Nothing is equal merely because nothing moved."""
    backbone = pristine(config)
    found = tensors(folder)
    assert found["prompt.offset_b"].abs().max() > 1e-4
    before = backbone.visual_projection.linear.weight  # type: ignore[union-attr]
    assert (found["visual_projection.linear.weight"] - before).abs().max() > 1e-4


def pristine(config: RunConfig) -> Backbone:
    """The backbone as the run found it, its new projection drawn with the run's seed."""
    torch.manual_seed(config.train.seed)
    return Backbone.from_pretrained(vision=config.backbone.vision, language=config.backbone.language)
