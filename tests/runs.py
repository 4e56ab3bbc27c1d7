"""Whole runs on tiny random models: how tests make them, and look at what they leave behind."""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from dept_vl.adapters.adapter import Adapter
from dept_vl.config import BackboneOptions, DataOptions, OptimOptions, PromptOptions, RunConfig, TrainOptions
from dept_vl.inference.mixed import ManyAdapters, load_many
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT


def tiny_run(
    data: DataOptions, *, vision: Path, language: Path, dropout: bool = False, **train: Any
) -> RunConfig:
    """A run of a few steps."""
    steps: dict[str, Any] = {
        "max_steps": 2,
        "per_device_batch_size": 4,
        "eval_every": 2,
        "eval_batch_size": 64,
        "log_every": 1,
        "seed": 5,
    }
    return RunConfig(
        data=data,
        backbone=BackboneOptions(vision=str(vision), language=str(language), backbone_dropout=dropout),
        prompt=PromptOptions(prompt_length=3, rank=2, reference_prompt_length=6, max_source_length=16),
        train=TrainOptions(**(steps | train)),
        optim=OptimOptions(prompt_lr=0.05, warmup_steps=0),
    )


def with_(config: RunConfig, **parts: Any) -> RunConfig:
    """The configuration with options changed: `with_(config, train={"max_steps": 3})`."""
    changed = {
        name: replace(getattr(config, name), **part) if isinstance(part, dict) else part
        for name, part in parts.items()
    }
    return replace(config, **changed)


def reset_accelerate() -> None:
    """Accelerate keeps its state for the life of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@cache
def forking() -> ForkServerContext:
    """Return what starts processes, forked from one that has imported what tests do and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["early", "dept_vl.training.score_run", "dept_vl.api", "pyarrow.parquet", "conftest"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server has no other way to find tests
        forkserver.ensure_running()
    return context


def alone(function: Callable[..., object], *arguments: object) -> int | None:
    """Call a function of a module in a process of its own; its exit code, None if it hangs."""
    process = forking().Process(target=function, args=arguments)
    process.start()
    process.join(timeout=180)
    code = process.exitcode
    process.kill()
    return code


def run_code(code: str, folder: Path, module: str) -> None:
    """Run code in a folder, before which nothing has imported a module."""
    assert module not in sys.modules
    os.chdir(folder)
    exec(code, {})


def in_two_processes(function: Callable[..., object], *arguments: object) -> None:
    """Call a function of a module in two processes that know of each other, as a launcher starts them."""
    assert start_two_processes(function, *arguments) == [0, 0]


def start_two_processes(function: Callable[..., object], *arguments: object) -> list[int | None]:
    """The same; the exit code of each, None of one that hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        forking().Process(target=_one_of_two, args=(rank, port, function, arguments)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=180)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _one_of_two(rank: int, port: int, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"},
    }
    torch.set_num_threads(1)
    function(*arguments)


def forget_checksums(folder: Path) -> None:
    """Leave a run as an older version, or somebody who edits its files, leaves it."""
    for path in folder.rglob(".checksums.json"):
        path.unlink()


def damage(path: Path, others: list[Path], random: Random) -> None:
    """A flipped bit, a cut, a block of zeros, another file's content, no file, or bytes at the end."""
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content))
    match random.randrange(6):
        case 0:
            content[place] ^= 1 << random.randrange(8)
        case 1:
            content = content[:place]
        case 2:
            content[place : place + 64] = bytes(len(content[place : place + 64]))
        case 3:
            content = bytearray(random.choice(others).read_bytes())
        case 4:
            path.unlink()
            return
        case _:
            content += random.randbytes(random.randrange(1, 64))
    path.write_bytes(content)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but the checkpoints."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items() if not name.startswith("checkpoints")}


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tensors(folder: Path, which: str = "last") -> dict[str, Tensor]:
    return Adapter.load(folder / which).tensors


def assert_same(ours: Path, theirs: Path, *, atol: float = 0.0) -> None:
    """Both adapters of two runs are equal, but for so much."""
    for which in ("best", "last"):
        mine, other = tensors(ours, which), tensors(theirs, which)
        assert mine.keys() == other.keys()
        for name in mine:
            difference = (mine[name] - other[name]).abs().max().item()
            assert difference <= atol, (which, name)


def two_adapters(folder: Path, root: Path) -> tuple[dict[str, str], ManyAdapters]:
    """Save two random adapters of a pretrained model, and load them together.

    Returns:
        Folder of each by name, and both on the model.
    """
    backbone = open_backbone(model=folder).eval()
    sources = {name: str(root / name) for name in ("short", "long")}
    torch.manual_seed(0)
    for length, source in enumerate(sources.values(), 2):
        prompt = DePT(backbone.d_model, prompt_length=length, rank=2, max_source_length=64)
        for parameter in prompt.parameters():
            torch.nn.init.normal_(parameter)
        Adapter.of(PromptedModel(backbone, prompt), task="vqav2", metrics={}).save(source)
    return sources, load_many(sources, backbone=backbone)
