"""Options of the commands that prepare or follow a run. This module imports no model code."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dept_vl._utils.options import Options, Positive, Workers
from dept_vl.models.options import BackboneOptions
from dept_vl.tasks.options import DataOptions, Precision


@dataclass(frozen=True)
class ExtractConfig(Options):
    """Configuration of feature extraction: data, image encoder, and storage format."""

    data: DataOptions = field(default_factory=DataOptions)
    also: Annotated[tuple[DataOptions, ...], tyro.conf.Suppress] = ()
    """Further tasks, from a configuration file. Their features are stored in separate folders."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    splits: tuple[str, ...] = ()
    """Splits whose images to encode. Default: the train, dev and test splits."""
    dtype: Precision = "float16"
    """Data type of the stored features; bfloat16 and float32 hold larger numbers."""
    shard_images: Positive = 1024
    """Images per file. A folder that is resumed keeps its number."""
    batch_size: Positive = 64
    """Batch size per process."""
    num_workers: Workers = 0
    """Processes that read and preprocess images; 0 reads them in the main process."""


@dataclass(frozen=True)
class ReportConfig(Options):
    """Configuration of a run's report."""

    run: Path
    """Folder of a finished run."""
    picture: Path | None = None
    """PNG file for a screenshot of the page, which Chromium makes."""
    size: tuple[Positive, Positive] = (1200, 1800)
    """Width and height of the screenshot in pixels."""
    wait: bool = False
    """Wait while another process is using the folder, instead of failing."""
