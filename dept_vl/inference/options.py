"""Options of the commands predict, demo and serve. This module does not import torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from dept_vl._utils.options import Options, Positive, Rate, Workers
from dept_vl.tasks.options import Features, OnBadImage, Own
from dept_vl.tasks.own.options import OwnOptions


@dataclass(frozen=True)
class PredictConfig(Options):
    """Options of `dept-vl predict`."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE... QUESTION...")]
    """Image files, followed by questions. Leave them out with --data."""
    adapter: str
    """Folder of a run or an adapter, or name of an adapter on the Hub."""
    backbone: Path | None = None
    """Backbone that the adapter was trained on: a folder, or VISION+LANGUAGE. If not given, it is looked up
    where the adapter says."""
    revision: str | None = None
    """Branch, tag or commit of an adapter on the Hub."""
    task: str | None = None
    """Task that determines how questions are asked. If not given, the adapter's task."""
    device: str | None = None
    """Device, such as cpu or cuda. If not given, a GPU if there is one."""
    own: Own = field(default_factory=OwnOptions)
    output: Path | None = None
    """With --data: JSON Lines file for the answers, in the order of the table. If the command is stopped, run
    it again to continue, with any number of processes."""
    split: str = "all"
    """With --data: split whose rows to answer (train, validation or test), or all."""
    batch_size: Positive = 128
    """With --data: batch size per process."""
    num_workers: Workers = 0
    """With --data: number of worker processes that read images; 0 reads them in the main process."""
    features: Features = "auto"
    """With --data: source of visual features, which is files written by dept-vl features (cached), the images
    (live), or those files if they match the backbone and cover all images, otherwise the images (auto)."""
    features_dir: Path | None = None
    """With --data: folder of those files. If not given, features in the folder of the data."""
    on_bad_image: OnBadImage = "raise"
    """With --data: stop at an image that cannot be read (raise), or write null as its answer (skip)."""

    def of_tables(self) -> list[str]:
        """Return the flags of options that differ from their defaults and only concern tables."""
        names = ("output", "split", "batch_size", "num_workers", "features", "features_dir", "on_bad_image")
        given = [name for name in names if getattr(self, name) != getattr(PredictConfig, name)]
        return [*self.own.given(), *(f"--{name}" for name in given)]


@dataclass(frozen=True)
class DemoConfig(Options):
    """Options of `dept-vl demo`."""

    adapters: tuple[str, ...]
    """Folders of runs or adapters, or names of adapters on the Hub, all trained on the same backbone."""
    backbone: Path | None = None
    """Backbone of the adapters: a folder, or VISION+LANGUAGE. If not given, the one of the first adapter."""
    host: str = "127.0.0.1"
    """Address to listen on. A password is required if other machines can reach it."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """Port to listen on."""
    password: str | None = None
    """Password for visitors; the user name is ignored. Other users of this machine can see it in the process
    list, so prefer the environment variable DEPT_VL_PASSWORD. If needed but not given, one is generated."""
    device: str | None = None
    """Device, such as cpu or cuda. If not given, a GPU if there is one."""


@dataclass(frozen=True)
class ServeConfig(Options):
    """Options of `dept-vl serve`."""

    adapters: tuple[str, ...]
    """Folders of runs or adapters, or names of adapters on the Hub, all trained on the same backbone."""
    backbone: Path | None = None
    """Backbone of the adapters: a folder, or VISION+LANGUAGE. If not given, the one of the first adapter."""
    host: str = "127.0.0.1"
    """Address to listen on. A token is required if other machines can reach it."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 uses a free port."""
    token_file: Path | None = None
    """File with the token that requests must send. If not given, the environment variable DEPT_VL_TOKEN."""
    allow_adapter_changes: bool = False
    """Allow requests to add adapters (POST /v1/adapters) and remove them (DELETE /v1/adapters/NAME)."""
    allow_urls: bool = False
    """Accept public http and https URLs of images, not only data URLs."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """cpu, cuda or mps. If not given, all NVIDIA GPUs (see CUDA_VISIBLE_DEVICES), or the CPU without any."""
    copies: Positive = 1
    """Number of processes per device, each with a copy of the model."""
    max_batch_size: Positive = 32
    """Maximum batch size. A batch may hold questions for different adapters."""
    max_wait_ms: Rate = 5.0
    """Maximum time in milliseconds that a question waits for a batch to fill up."""
    max_requests: Positive = 1024
    """Maximum number of open requests, including those that wait; further ones are rejected."""
    max_request_mb: Positive = 32
    """Maximum size of a request in MiB."""
    max_question: Positive = 1000
    """Maximum number of characters of a question."""
    timeout: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """Maximum time in seconds for receiving a request, and again for answering it."""
