"""Experiment trackers beside a run's own log: TensorBoard, W&B, trackio, and others of accelerate's."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from dept_vl._utils.io import is_there, read_json, write_noted_json
from dept_vl._utils.processes import on_main
from dept_vl.config import RunConfig, flat, to_json

PROJECT = "dept_vl"
TRACKER_FILE = "tracker.json"
"""File with the id of the run in W&B and trackio, so that a resumed run continues there."""
EXTRAS = ("tensorboard", "trackio", "wandb")
"""Trackers that are extras of this package."""


def check_tracker(name: str | None) -> None:
    """Raise ValueError if a tracker is unknown, and ImportError if it is not installed.

    Accelerate itself would only leave it out.
    """
    known = sorted(tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL)
    if name is not None and name not in known:
        raise ValueError(f"log_with is {name!r:.60}; expected one of {', '.join(known)}")
    if name is not None and name not in map(str, get_available_trackers()):
        install = f'pip install -e ".[{name}]"' if name in EXTRAS else f"pip install {name}"
        raise ImportError(
            f"--log_with {name} needs the package {name}, which is not installed: {install}, or leave "
            "--log_with out; log.jsonl holds the same figures"
        )


def start_tracker(
    accelerator: Accelerator, config: RunConfig, output_dir: Path, facts: Mapping[str, int | str], steps: int
) -> None:
    """Start the tracker on the main process, or continue it if the run resumes.

    The files of TensorBoard and W&B are written to the run's folder. Steps after `steps` are logged again:
    TensorBoard hides the first record, W&B keeps it, and trackio has both.
    """
    # The name of the folder was not known before.
    accelerator.project_configuration.logging_dir = str(output_dir)
    options: dict[str, dict[str, Any]] = {}
    board = output_dir / PROJECT
    begun = config.log_with == "tensorboard" and board.is_dir() and any(board.rglob("events.*"))
    if begun:
        options["tensorboard"] = {"purge_step": steps + 1}
    if config.log_with in ("wandb", "trackio"):
        key = on_main(accelerator, lambda: _key(output_dir / TRACKER_FILE))
        options["wandb"] = {"id": key, "name": output_dir.name, "dir": str(output_dir), "resume": "allow"}
        options["trackio"] = {"name": f"{output_dir.name}-{key}", "resume": "allow"}
    chosen = {name: option for name, option in options.items() if name == config.log_with}
    # TensorBoard would show them again, as another run.
    values = None if begun else hyper_parameters(config) | dict(facts)
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=chosen)


def hyper_parameters(config: RunConfig) -> dict[str, Any]:
    """Return the options by dotted name, in types that every tracker shows, without those that are None."""
    options = to_json(config)
    options |= {f"also.{place}": task for place, task in enumerate(options.pop("also"))}
    shown = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in flat(options).items()
    }
    return {name: value for name, value in shown.items() if value is not None}


def _key(path: Path) -> str:
    if not is_there(path):
        # Not from a generator whose state the run depends on.
        write_noted_json(path, {"id": secrets.token_hex(4)})
    return str(read_json(path)["id"])
