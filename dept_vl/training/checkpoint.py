"""Checkpoints of a run, from which a run that was killed resumes with the same results.

    checkpoints/step-00001200/
        tensors.safetensors   trained parameters and the optimizer's state, by name
        state.json            schedule, learning rates, counters, scores and the optimizer's keys
        rng-0.safetensors     random states of process 0; one such file for each process
        manifest.json         size and SHA-256 of each file, written last; noted in the run's folder

A checkpoint is written to a temporary folder, flushed to the disk and renamed. Older checkpoints are removed
only after that. A damaged checkpoint is reported, and the one before it is used. The adapter
(`adapters/adapter.py`) is a different, smaller format that is made for sharing.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn

from dept_vl._utils.errors import NotFiniteError
from dept_vl._utils.io import check_noted, note, noted, one_line, read_json, write_flushed
from dept_vl._utils.options import check as check_fields
from dept_vl._utils.processes import on_main
from dept_vl._utils.run_files import CHECKPOINTS, LOG_FILE
from dept_vl._utils.tensors import copies, read_tensors
from dept_vl.prompts.dept import current_name
from dept_vl.training.progress import Progress

KEPT = 2
"""Number of checkpoints to keep: if the newest is damaged, the one before it is used."""
MANIFEST = "manifest.json"
STATE_VERSION = 2
"""Version of `state.json`. In version 1 the parameters of the offset are named `lora_a` and `lora_b`."""
READABLE_VERSIONS = (1, STATE_VERSION)


@dataclass
class State:
    """Fields of `state.json`."""

    version: Literal[1, 2]
    processes: int
    progress: Progress
    optimizer: dict[str, list[str]]
    rates: list[Any]
    schedule: dict[str, Any]


class TrainingState:
    """Writes and loads the checkpoints of a run."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        accelerator: Accelerator,
    ) -> None:
        self.folder = folder / CHECKPOINTS
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer, self.schedule, self.accelerator = optimizer, schedule, accelerator
        self.fused = bool(optimizer.param_groups[0].get("fused"))

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint. Every process must call this, since each has its own random generators.

        If this fails, or a trained parameter is not finite, earlier checkpoints are not changed.
        """
        place = self.folder / f"step-{progress.steps:08d}"
        partial = self.folder / f".{place.name}.partial"
        accelerator = self.accelerator
        try:
            # Only the main process writes: the tensors are the same on all.
            on_main(accelerator, lambda: self._write(partial, progress))
            rank = accelerator.process_index
            write_flushed(partial / f"rng-{rank}.safetensors", save(_random_state(accelerator.device)))
            accelerator.wait_for_everyone()
            on_main(accelerator, lambda: self._complete(place, partial))
        except OSError:
            # A partial checkpoint would fill the disk.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return place

    def _write(self, partial: Path, progress: Progress) -> None:
        tensors = self._tensors()
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise NotFiniteError(
                f"after step {progress.steps} {broken[0]} is not finite; lower the learning rates or train "
                f"in full precision, in a new run. The checkpoints in {self.folder} are of steps before"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_flushed(partial / "tensors.safetensors", save(tensors))
        write_flushed(partial / "state.json", json.dumps(self._description(progress), indent=1).encode())

    def _complete(self, place: Path, partial: Path) -> None:
        write_flushed(partial / MANIFEST, json.dumps(_manifest(partial), indent=1).encode())
        _sync(partial)
        self._note(place, partial)
        shutil.rmtree(place, ignore_errors=True)  # left by a run that was resumed from an earlier step
        partial.rename(place)
        _sync(self.folder)
        for old in self._old(place):
            shutil.rmtree(old, ignore_errors=True)

    def _note(self, place: Path, partial: Path) -> None:
        """Note in the run's folder which checkpoints belong to it, and the state of its log."""
        run = self.folder.parent
        files = dict.fromkeys(map(_noted_as, self._old(place)))
        log = {LOG_FILE: noted(run / LOG_FILE)} if (run / LOG_FILE).is_file() else {}
        note(run, {**files, **log, _noted_as(place): noted(partial / MANIFEST)})

    def _old(self, place: Path) -> list[Path]:
        """Return the checkpoints to remove after a new one: all but the last before it."""
        others = [one for one in checkpoints(self.folder.parent) if one != place]
        kept = [one for one in others if one < place][-KEPT + 1 :]
        # Later ones are damaged, or the run would have resumed from them.
        return [one for one in others if one not in kept]

    def load(self, place: Path) -> Progress:
        """Load model, optimizer and schedule from a checkpoint, and return the progress.

        Learning rates are restored from the checkpoint. If the options have a different peak learning rate,
        the rate is that peak's at the same place in the schedule. Raise ValueError if the checkpoint is of
        another model; use `check` to find damage.
        """
        state: State = check_fields(read_json(place / "state.json"), State)
        tensors = read_tensors(place / "tensors.safetensors")
        if state.version != STATE_VERSION:
            tensors = {current_name(name): tensor for name, tensor in tensors.items()}
            state.optimizer = {current_name(name): keys for name, keys in state.optimizer.items()}
        self._check_model(tensors, place)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.optimizer.state[parameter] = {
                    # The count of steps is on the CPU unless the optimizer is fused.
                    key: value.to(parameter.device) if key != "step" or self.fused else value
                    for key in state.optimizer[name]
                    for value in [tensors[f"optimizer.{name}.{key}"]]
                }
        peaks = [group["initial_lr"] for group in self.optimizer.param_groups]
        for group, rates in zip(self.optimizer.param_groups, state.rates, strict=True):
            group.update(rates)
        self.schedule.load_state_dict(state.schedule)
        for number, (group, peak) in enumerate(zip(self.optimizer.param_groups, peaks, strict=True)):
            if group["initial_lr"] != peak:
                now = self.schedule.lr_lambdas[number](self.schedule.last_epoch) * peak
                self.schedule.base_lrs[number] = peak
                group.update({"lr": now, "initial_lr": peak})
        return state.progress

    def load_random_state(self, place: Path) -> None:
        """Restore the random generators of this process.

        Call it last, since creating a data loader draws random numbers. A process that has no file in the
        checkpoint uses that of process 0.
        """
        path = place / f"rng-{self.accelerator.process_index}.safetensors"
        tensors = read_tensors(path if path.is_file() else place / "rng-0.safetensors")
        _restore_random_state(tensors, self.accelerator.device)

    def _check_model(self, tensors: Mapping[str, Tensor], place: Path) -> None:
        expected = {(f"model.{name}", tuple(p.shape)) for name, p in self.trained.items()}
        stored = {(name, tuple(t.shape)) for name, t in tensors.items() if name.startswith("model.")}
        if expected != stored:
            raise ValueError(
                f"{place} is of another model: missing {sorted(expected - stored)[:3]}, "
                f"unknown {sorted(stored - expected)[:3]}"
            )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.trained.items():
            tensors[f"model.{name}"] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return copies(tensors.items())

    def _description(self, progress: Progress) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "processes": self.accelerator.num_processes,
            "progress": asdict(progress),
            "optimizer": {name: sorted(self.optimizer.state[p]) for name, p in self.trained.items()},
            "rates": [{key: g[key] for key in ("lr", "initial_lr")} for g in self.optimizer.param_groups],
            "schedule": self.schedule.state_dict(),
        }


def _noted_as(place: Path) -> str:
    """Return the name under which a checkpoint is noted in the folder of its run."""
    return f"{CHECKPOINTS}/{place.name}/{MANIFEST}"


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. They may be damaged."""
    return sorted(path for path in (run / CHECKPOINTS).glob("step-*") if path.name[5:].isdecimal())


def steps_of(checkpoint: Path) -> int:
    """Return the optimizer step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, if any, and a message for each newer one that is damaged."""
    damaged: list[str] = []
    for place in reversed(checkpoints(run)):
        problem = check(place)
        if not problem:
            return place, damaged
        damaged.append(problem)
    return None, damaged


def check(place: Path) -> str:
    """Return a description of a checkpoint's damage, or an empty string if it is undamaged."""
    try:
        manifest = read_json(place / MANIFEST)
        check_noted(place / MANIFEST, folder=place.parents[1])
        if manifest != _manifest(place):
            return f"{place} is damaged: its files are not those of its {MANIFEST}"
        version = read_json(place / "state.json")["version"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{place} is damaged: {one_line(error)}"
    if version not in READABLE_VERSIONS:
        return f"{place} has format version {version!r:.60}; this dept_vl reads {READABLE_VERSIONS}"
    return ""


def _manifest(folder: Path) -> dict[str, list[Any]]:
    manifest = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest[path.name] = [path.stat().st_size, digest]
    return manifest


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the random states of Python, NumPy and torch as tensors, which need no unpickling."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = float(state["numpy_gauss"][0])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
