"""Visual features of the runs of a benchmark, extracted once for all of them."""

from dataclasses import replace
from pathlib import Path

from dept_vl.config import RunConfig
from dept_vl.training.extract import extract
from dept_vl.training.options import ExtractConfig


def with_features(config: RunConfig, folder: Path) -> RunConfig:
    """Extract the visual features of a run into a folder, and return the configuration that reads them."""
    if config.backbone.model is not None:  # a pretrained model's features are kept in memory by each run
        return config
    data = replace(config.data, features_dir=folder)
    extract(ExtractConfig(data=data, backbone=config.backbone, dtype="float32"))
    return replace(config, data=replace(data, features="cached"))
