"""Time from JPEG files to features: stages, number of workers, and the cost of stored features."""

import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from benchmarks.backbones import SHAPES, SIZES, build_backbone, draw_batch
from benchmarks.gpu.results import TOKENIZER, Entry, Measuring
from benchmarks.methods import build_runners, write_images
from dept_vl._utils.images import read_image
from dept_vl.data.feature_store import open_features, write_features
from dept_vl.data.features import FeatureTable, load_pixels
from dept_vl.models.backbone import Backbone
from dept_vl.models.precision import hold_frozen_in_bfloat16
from dept_vl.models.vision import VisionEncoder

PLANNED = 120_000
"""Number of images, about as many as VQAv2 uses for training and validation."""


def measure(measuring: Measuring, root: Path) -> None:
    """Measure the stages of an image, encoding by number of workers, and stored features."""
    small = measuring.small
    backbone = build_backbone(SIZES["tiny" if small else "base"], root / TOKENIZER, vision=True)
    backbone = backbone.to(measuring.device).train(False)
    vision = backbone.vision
    assert vision is not None
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), 8 if small else 1024)
        measuring.entry("an image, ms", _stages, measuring, vision, paths)
        for workers in (0, 2) if small else (8, 4, 0):
            measuring.entry(f"{workers} workers", _encode, vision, paths, workers)
        measuring.entry("cached features", _cached, measuring, backbone, paths)


def _stages(measuring: Measuring, vision: VisionEncoder, paths: list[Path]) -> Entry:
    device, few = measuring.device, paths[:64]
    images = [read_image(path) for path in few]
    pixels = torch.stack([load_pixels(vision, path) for path in few])
    moved = pixels.to(device)
    whole = {
        "decode": lambda: [read_image(path).convert("RGB") for path in few],
        "resize and normalise": lambda: [vision.preprocess([image]) for image in images],
        "resize and normalise, one thread": lambda: _on_one_thread(vision, images),
        "copy": lambda: pixels.to(device),
        "tower": lambda: vision(moved),
    }
    if device.type == "cuda":
        pinned = pixels.pin_memory()
        whole["copy, pinned"] = lambda: pinned.to(device, non_blocking=True)
    figures: Entry = {name: measuring.milliseconds(step)["ms"] / len(few) for name, step in whole.items()}
    return figures | {"processor": type(vision.processor).__name__, "threads": torch.get_num_threads()}


def _on_one_thread(vision: VisionEncoder, images: list[Image.Image]) -> None:
    """Preprocess images on one thread, like a data loader worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for image in images:
            vision.preprocess([image])
    finally:
        torch.set_num_threads(threads)


def _encode(vision: VisionEncoder, paths: list[Path], workers: int) -> Entry:
    count = len(paths) if workers else max(1, len(paths) // 4)
    started = time.perf_counter()
    FeatureTable.encode(vision, paths[:count], num_workers=workers, progress=False)
    rate = count / (time.perf_counter() - started)
    return {"images_per_second": rate, "images": count, "planned_120000_minutes": PLANNED / rate / 60}


def _cached(measuring: Measuring, backbone: Backbone, paths: list[Path]) -> Entry:
    """Compare steps that look up and copy stored features with steps on the same tensors."""
    device, batch_size = measuring.device, 2 if measuring.small else 256
    few, vision = paths[:512], backbone.vision
    assert vision is not None
    features = few[0].parent / "features"
    write_features(vision, few[0].parent, few, features, Accelerator(cpu=device.type == "cpu"))
    table = open_features(vision, few[0].parent, few, features)
    runner = build_runners(["dept40"], backbone, SHAPES["vl"])["dept40"]
    if device.type == "cuda":
        hold_frozen_in_bfloat16(backbone.language)
    drawn = draw_batch(backbone, SHAPES["vl"], batch_size, 0, multiple=8)
    batch = {name: tensor.to(device) for name, tensor in drawn.items()}
    named = [[few[number % len(few)]] for number in range(batch_size)]

    def step(**given: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = runner.forward(batch | given)
        loss.backward()  # type: ignore[no-untyped-call]
        assert runner.optimizer is not None
        runner.optimizer.step()
        runner.optimizer.zero_grad()

    held = measuring.milliseconds(step)["ms"]
    looked_up = measuring.milliseconds(lambda: step(visual_features=table(named).to(device)))["ms"]
    alone = measuring.milliseconds(lambda: table(named).to(device))["ms"]
    return {
        "step_ms": held,
        "step_with_look_up_ms": looked_up,
        "look_up_and_copy_ms": alone,
        "waiting": max(0.0, 1 - held / looked_up),
    }
