"""Extraction of the visual features of a data set. The command `dept-vl features` uses this."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from dept_vl._utils.printable import say
from dept_vl._utils.processes import main_first
from dept_vl._utils.terminal import waiting
from dept_vl.config import BackboneOptions, DataOptions
from dept_vl.data.feature_index import read_index
from dept_vl.data.feature_source import GIB, features_folder
from dept_vl.data.feature_store import DTYPES, write_features
from dept_vl.data.splits import check_images, image_root, load_split
from dept_vl.models.backbone import Backbone
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.models.vision import VisionEncoder
from dept_vl.training.errors import explained
from dept_vl.training.options import ExtractConfig


def extract(config: ExtractConfig) -> list[Path]:
    """Encode every image of the splits once, shared among processes. Images already encoded are skipped.

    Returns:
        Folder of each task's features.

    Raises:
        FileNotFoundError: If data or images are missing.
        ValueError: If a task has no images, an image cannot be read and may not be skipped, or the folder
            holds features of another encoder.
    """
    disable_progress_bar()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    vision = load_vision(config.backbone).to(accelerator.device)
    folders = []
    for options in (config.data, *config.also):
        options = replace(options, on_bad_image=config.data.on_bad_image)
        folder = features_folder(options)
        with main_first(accelerator):  # the first to read converts the files for all
            paths = image_files(options, config.splits)
        size = len(paths) * vision.token_count * vision.d_vision * DTYPES[config.dtype].itemsize / GIB
        say(f"{len(paths):,} images of {options.task}: {size:.3g} GiB in {config.dtype} to {folder}")
        with explained(
            folder, "--features_dir", "No shard that was written is lost: the same command resumes"
        ):
            encoded = write_features(
                vision,
                image_root(options),
                paths,
                folder,
                accelerator,
                dtype=config.dtype,
                shard_images=config.shard_images,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                skip_unreadable=config.data.on_bad_image == "skip",
            )
        index = read_index(folder)
        say(f"{encoded:,} images encoded, {len(index['images']) - encoded:,} were there")
        if unreadable := index["unreadable"]:
            first = next(iter(unreadable.values()))
            say(f"warning: {len(unreadable):,} images cannot be read, the first: {first}")
        folders.append(folder)
    accelerator.end_training()
    return folders


@waiting("reading the data")
def image_files(options: DataOptions, splits: tuple[str, ...]) -> list[Path]:
    """Return the distinct images of the given splits, by default of the splits that a run reads."""
    names = splits or options.splits()
    paths: dict[Path, None] = {}
    for name in dict.fromkeys(filter(None, names)):
        task = load_split(options, name)
        paths |= dict.fromkeys(check_images(task, options.on_bad_image or "raise").image_files())
    if not paths:
        raise ValueError(f"{options.task} has no images to encode")
    return list(paths)


@waiting("loading the model")
def load_vision(options: BackboneOptions) -> VisionEncoder:
    """Load the image encoder without the language model; ValueError if the options name none."""
    if options.model is not None:
        features = open_backbone(**options.loading()).image_features()
        assert features is not None
        return features
    fit, vision = options.loading()["image_fit"], None
    if options.backbone is not None:
        vision = Backbone.from_pretrained(options.backbone, exif=options.exif, image_fit=fit).vision
    elif options.vision is not None:
        vision = VisionEncoder.from_pretrained(
            options.vision,
            layer=options.vision_layer,
            class_token=options.class_token,
            pooled_grid=options.pooled_grid,
            exif=options.exif,
            image_fit=fit or "squash",
        )
    if vision is None:
        raise ValueError("expected an image encoder; give --vision, or a --backbone that has one")
    return vision
