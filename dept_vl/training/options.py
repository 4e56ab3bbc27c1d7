"""Options of the commands around a run; this module imports no engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dept_vl._utils.options import Options, Positive, Workers
from dept_vl.models.options import BackboneOptions
from dept_vl.tasks.options import DataOptions, Precision


@dataclass(frozen=True)
class ExtractConfig(Options):
    """What visual features are extracted of, by what, and how they are stored."""

    data: DataOptions = field(default_factory=DataOptions)
    also: Annotated[tuple[DataOptions, ...], tyro.conf.Suppress] = ()
    """Further tasks, of a configuration file; their features go into folders of their own."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    splits: tuple[str, ...] = ()
    """Splits whose images are encoded; left out, those of training, dev and test."""
    dtype: Precision = "float16"
    """What features are stored in; bfloat16 and float32 hold larger numbers."""
    shard_images: Positive = 1024
    """Images in one file; a folder that is resumed keeps its own."""
    batch_size: Positive = 64
    """Images encoded at a time, per process."""
    num_workers: Workers = 0
    """Processes that read and preprocess images; 0 reads them in the encoding process."""


@dataclass(frozen=True)
class ReportConfig(Options):
    """Which run."""

    run: Path
    """Folder of a finished run."""
    picture: Path | None = None
    """PNG file to draw the page into, by Chromium."""
    size: tuple[Positive, Positive] = (1200, 1800)
    """Pixels of that picture across and down."""
    wait: bool = False
    """Wait while another process has the folder, rather than leave it."""
