"""Ablation of object order and image fit, on questions about positions in rendered scenes.

    python scripts/ablate_images.py

Object order: the shipped backbone with its pretrained position vectors (own), without any (none), or with
random ones instead (frozen, trained). Image fit: scenes twice as wide as high, with objects in the outer
quarters too, squashed, cropped or padded.

Each run trains a prompt and the visual projection on the same questions, and is scored on the same questions
about other scenes. Finished runs are kept, so the same command resumes.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from dept_vl._utils.io import write_atomically
from dept_vl._utils.options import Options, Positive, Seed
from dept_vl._utils.stats import interval
from dept_vl._utils.tables import markdown_table
from dept_vl.cli import entry, parse_options
from dept_vl.config import BackboneOptions, DataOptions, OptimOptions, PromptOptions, RunConfig, TrainOptions
from dept_vl.tasks.own.options import OwnOptions
from pretraining.questions import FAMILIES, PHRASINGS
from study_data.render import render, sample_scene

if TYPE_CHECKING:
    from dept_vl.models.options import ImageFit, ObjectOrder

ASKED = ("place", "relation", "neighbour colour")
STRETCH = {"square": 1, "wide": 2}


@dataclass(frozen=True)
class AblationConfig(Options):
    """Configuration of the ablation."""

    backbone: Path = Path("data/tiny-clip-t5")
    """Backbone that all runs start from."""
    seeds: tuple[Seed, ...] = (1, 2, 3, 4, 5)
    """Random seeds, with one run of each kind per seed. All kinds are run with a seed before the next one."""
    max_steps: Positive = 100
    """Steps of every run."""
    batch_size: Positive = 16
    """Batch size."""
    train_scenes: Positive = 1000
    """Number of training scenes, with one question each."""
    test_scenes: Positive = 400
    """Number of test scenes, with one question each."""
    output_dir: Path = Path("runs/ablation")
    """Folder of data, backbones and runs."""


@dataclass(frozen=True)
class Kind:
    """Variant that one row of the table shows."""

    images: str
    order: str
    """Object order of the backbone; own leaves it unchanged."""
    fit: "ImageFit" = "squash"

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return f"{self.images},order={self.order},fit={self.fit}"


KINDS = (
    *(Kind("square", order) for order in ("own", "none", "frozen", "trained")),
    *(Kind("wide", "own", fit) for fit in ("squash", "crop", "pad")),
)


def main(config: AblationConfig) -> str:
    """Run everything that is not finished, write the tables after every seed, and return the last one."""
    import torch

    from dept_vl.training.run import run_once

    torch.set_num_threads(1)
    for images, stretch in STRETCH.items():
        write_questions(config, config.output_dir / images, stretch)
    scores: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    table = ""
    for seed in config.seeds:
        for kind in KINDS:
            result = run_once(run_of(config, kind, seed))
            scores[kind].append(next(iter(result.scores.values())))
        table = write_results(config, scores)
    print(table)
    return table


def write_questions(config: AblationConfig, folder: Path, stretch: int) -> None:
    """Write images with one question each, unless they exist."""
    table = folder / "questions.jsonl"
    if table.is_file():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, rows = Random(0), []
    splits = ["train"] * config.train_scenes + ["test"] * config.test_scenes
    for number, split in enumerate(splits):
        scene, fact = sample_scene(rng), None
        while fact is None:  # not every scene admits every question
            scene = sample_scene(rng)
            family = rng.choice(ASKED)
            fact = FAMILIES[family][0](scene, rng) if len(scene.objects) > 1 else None
        question = rng.choice(PHRASINGS[family]).format(*fact.slots)
        render(scene, stretch).save(folder / "images" / f"{number}.png")
        row = {"image": f"images/{number}.png", "question": question, "answer": fact.answer}
        rows.append(row | {"split": split})
    write_atomically(table, "".join(json.dumps(row) + "\n" for row in rows).encode())


def run_of(config: AblationConfig, kind: Kind, seed: int) -> RunConfig:
    """Return the configuration of a run."""
    steps = config.max_steps
    folder = config.output_dir / kind.images
    return RunConfig(
        data=DataOptions(
            task="vqa",
            dev_limit=8,  # decides nothing: there is only one evaluation, after the last step
            own=OwnOptions(data=str(folder / "questions.jsonl"), holdout_share=0.01),
        ),
        backbone=BackboneOptions(
            backbone=with_order(config, kind.order, seed), image_fit=kind.fit, backbone_dropout=False
        ),
        prompt=PromptOptions(prompt_length=20, alpha=1.0),
        train=TrainOptions(
            max_steps=steps,
            eval_every=steps,
            checkpoint_every=0,
            per_device_batch_size=config.batch_size,
            eval_batch_size=64,
            seed=seed,
        ),
        optim=OptimOptions(warmup_steps=steps // 10),
        output_dir=config.output_dir / "runs" / kind.folder / f"seed{seed}",
    )


def with_order(config: AblationConfig, order: str, seed: int) -> Path:
    """Return the folder of a copy of the backbone with new position vectors, or without any."""
    import torch

    from dept_vl.models.backbone import Backbone

    if order == "own":
        return config.backbone
    folder = config.output_dir / "backbones" / (order if order == "none" else f"{order}{seed}")
    if not (folder / "backbone.json").is_file():
        given = Backbone.from_pretrained(config.backbone)
        torch.manual_seed(seed)
        named: ObjectOrder = "none" if order == "none" else "frozen" if order == "frozen" else "trained"
        made = Backbone(given.vision, given.language, given.tokenizer, name=folder.name, object_order=named)
        assert made.visual_projection is not None
        assert given.visual_projection is not None
        kept = given.visual_projection.state_dict()
        kept.pop("object_order.weight", None)
        made.visual_projection.load_state_dict(kept, strict=False)
        made.save_pretrained(folder)
    return folder


def write_results(config: AblationConfig, scores: dict[Kind, list[float]]) -> str:
    """Write all scores and a table of means with intervals; return the table."""
    rows = [[kind.images, kind.order, kind.fit, str(interval(found))] for kind, found in scores.items()]
    table = markdown_table(["images", "object order", "image fit", "exact match"], rows)
    settings = asdict(replace(config, seeds=config.seeds[: len(next(iter(scores.values())))]))
    settings = {name: value for name, value in settings.items() if name != "output_dir"}
    content = {"settings": settings, "rows": [asdict(k) | {"scores": s} for k, s in scores.items()]}
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_atomically(config.output_dir / "ablation.json", text.encode())
    write_atomically(config.output_dir / "ablation.md", (table + "\n").encode())
    return table


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(AblationConfig, arguments, "ablate_images.py", __doc__)))
