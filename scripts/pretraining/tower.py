"""Training of the vision tower, with labels for each cell of rendered scenes."""

import time
from random import Random

import torch
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperModel, get_cosine_schedule_with_warmup
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from dept_vl.models.prompted import IGNORE_INDEX
from dept_vl.models.vision import VisionEncoder
from pretraining.batches import CELL_CLASSES, DrawnCells, cells, loader, on_device
from pretraining.options import PretrainConfig
from study_data.render import GRID, IMAGE_SIZE, SHAPES, sample_scene

VISION_ARCHITECTURE = "resnet10t"
VISION_ARGS = {"channels": (32, 64, 96, 128), "stem_width": 16, "output_stride": 16}
"""A narrow ResNet of timm. Stride 16 makes 4 x 4 visual tokens of a 64-pixel image."""
PIXELS = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}
OFFSET_WEIGHT = 5.0
"""Loss weight of the offset in a cell, measured in cells."""


def pretrain_vision(config: PretrainConfig) -> tuple[VisionEncoder, dict[str, float]]:
    """Train the tower to predict the object centred in each cell, its offset, and the cell's own position."""
    device = config.device
    tower = TimmWrapperModel(
        TimmWrapperConfig(
            architecture=VISION_ARCHITECTURE,
            model_args=VISION_ARGS,
            do_pooling=False,
            num_labels=0,
            pretrained_cfg=PIXELS,
        )
    ).to(device)
    sizes = [len(classes) for classes in CELL_CLASSES.values()]
    heads = nn.Linear(VISION_ARGS["channels"][-1], sum(sizes) + GRID**2 + 2).to(device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.vision_lr, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.vision_steps // 10, config.vision_steps)
    # Most cells are empty.
    shape_weights = torch.tensor([1.0] * len(SHAPES) + [0.3], device=device)
    places = torch.arange(GRID**2, device=device)

    def logits(pixels: Tensor) -> list[Tensor]:
        tokens = tower(pixel_values=pixels).last_hidden_state.flatten(2).transpose(1, 2)
        return list(heads(tokens).split([*sizes, GRID**2, 2], dim=-1))

    drawn = iter(loader(DrawnCells(config.seed, config.vision_batch), config.num_workers))
    started = time.perf_counter()
    for step in range(config.vision_steps):
        pixels, targets, offsets = on_device(next(drawn), device)
        *named, placed, found = logits(pixels)
        loss = nn.functional.cross_entropy(placed.flatten(0, 1), places.repeat(len(pixels)))
        filled = targets[:, 1] != IGNORE_INDEX
        # The offset in the cell, which questions about thirds of the image and comparisons need.
        loss = loss + OFFSET_WEIGHT * nn.functional.smooth_l1_loss(found[filled], offsets[filled], beta=0.1)
        for scores, target, weight in zip(named, targets.unbind(1), [shape_weights, None, None], strict=True):
            loss = loss + nn.functional.cross_entropy(
                scores.flatten(0, 1), target.flatten(), weight=weight, ignore_index=IGNORE_INDEX
            )
        take_step(loss, parameters, optimizer)
        schedule.step()
        if step % 250 == 0:
            seconds = time.perf_counter() - started
            print(f"vision {step}/{config.vision_steps} loss {loss.item():.3f} {seconds:.0f}s", flush=True)

    tower.eval()
    rng = Random(config.seed + 3)
    fresh = [sample_scene(rng) for _ in range(config.evaluation_scenes)]
    pixels, targets, offsets = on_device(cells(fresh), device)
    with torch.no_grad():
        *named, _, found = logits(pixels)
    filled = targets[:, 1] != IGNORE_INDEX
    scores = {
        attribute: (scores.argmax(-1) == target)[filled].float().mean().item()
        for attribute, scores, target in zip(CELL_CLASSES, named, targets.unbind(1), strict=True)
    }
    scores["pixels off"] = (found - offsets)[filled].abs().mean().item() * IMAGE_SIZE / GRID
    print(f"vision accuracy on fresh scenes: {scores}", flush=True)
    processor = TimmWrapperImageProcessor(pretrained_cfg=PIXELS, architecture=VISION_ARCHITECTURE)
    return VisionEncoder(tower.cpu(), processor), scores


def take_step(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Take one optimizer step with clipped gradients."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
