"""Options of the commands that ask an adapter; this module imports no engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from dept_vl._utils.options import Options, Positive, Rate, Workers
from dept_vl.tasks.options import Features, OnBadImage, Own
from dept_vl.tasks.own.options import OwnOptions


@dataclass(frozen=True)
class PredictConfig(Options):
    """What to predict, with which adapter."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE... QUESTION...")]
    """Image files, then questions; none with --data."""
    adapter: str
    """Folder of a run or of an adapter, or an adapter's name on the Hub."""
    backbone: Path | None = None
    """What the adapter was trained on, if it is not where the adapter says: a folder, or VISION+LANGUAGE."""
    revision: str | None = None
    """Branch, tag or commit of an adapter on the Hub."""
    task: str | None = None
    """How the questions are asked; left out, as the adapter was trained."""
    device: str | None = None
    """Such as cpu or cuda; left out, a GPU if there is one."""
    own: Own = field(default_factory=OwnOptions)
    output: Path | None = None
    """With --data: file for the answers, JSON Lines in the order of the table. After a stop the same
    command continues it, on any number of processes."""
    split: str = "all"
    """With --data: rows to answer; all, or those of the split train, validation or test."""
    batch_size: Positive = 128
    """With --data: rows answered at a time, per process."""
    num_workers: Workers = 0
    """With --data: processes that read images; 0 reads them in the answering process."""
    features: Features = "auto"
    """With --data: as for dept-vl evaluate."""
    features_dir: Path | None = None
    """With --data: folder of those files; left out, features in the folder of the data."""
    on_bad_image: OnBadImage = "raise"
    """With --data: raise, or skip: give the answer null, count it and continue."""


@dataclass(frozen=True)
class DemoConfig(Options):
    """What is shown where."""

    adapters: tuple[str, ...]
    """Folders of runs or adapters, or names on the Hub, all of one backbone."""
    backbone: Path | None = None
    """What they were trained on, if it is not where the first says: a folder, or VISION+LANGUAGE."""
    host: str = "127.0.0.1"
    """Address to listen at; whoever reaches another than the default has to know a password."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """Port to listen at."""
    password: str | None = None
    """That visitors have to know, with any user name. Others on this machine can read it in the list of
    processes: rather set DEPT_VL_PASSWORD in the environment. Left out, one is made up where it is needed."""
    device: str | None = None
    """Such as cpu or cuda; left out, a GPU if there is one."""


@dataclass(frozen=True)
class ServeConfig(Options):
    """What is served where, and what requests may be."""

    adapters: tuple[str, ...]
    """Folders of runs or adapters, or names on the Hub, all of one backbone."""
    backbone: Path | None = None
    """What they were trained on, if it is not where the first says: a folder, or VISION+LANGUAGE."""
    host: str = "127.0.0.1"
    """Address to listen at; whoever reaches another than the default has to know a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0 takes a free one."""
    token_file: Path | None = None
    """File with the token that requests have to bear; left out, DEPT_VL_TOKEN in the environment."""
    allow_adapter_changes: bool = False
    """Let requests add adapters (POST /v1/adapters) and remove them (DELETE /v1/adapters/NAME)."""
    allow_urls: bool = False
    """Fetch images from public http and https addresses, besides data URLs."""
    device: str | None = None
    """cpu, cuda or mps; left out, all NVIDIA GPUs if there are any. CUDA_VISIBLE_DEVICES picks among them."""
    copies: Positive = 1
    """Of the model on each device, each in a process of its own."""
    max_batch_size: Positive = 32
    """Questions answered together, whichever adapters they are for."""
    max_wait_ms: Rate = 5.0
    """Milliseconds that a question waits for others to be answered with."""
    max_requests: Positive = 1024
    """Requests at a time, those that wait included; further ones are rejected."""
    max_request_mb: Positive = 32
    """Megabytes of a request."""
    max_question: Positive = 1000
    """Characters of a question."""
    timeout: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """Seconds for a request to come, and again for its answer."""
