"""Folder of a run: created for a new run, or checked and resumed."""

import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from accelerate import Accelerator

from dept_vl._utils.io import is_there, read_json, remove_noted, write_noted_json
from dept_vl._utils.printable import say
from dept_vl._utils.processes import on_main
from dept_vl._utils.run_files import (
    BEST,
    CONFIG_FILE,
    FEATURES_FILE,
    IDENTITY_FILE,
    LOG_FILE,
    REPORT_FILE,
    SCORES_FILE,
    SUMMARY_FILE,
)
from dept_vl.config import RunConfig, to_json
from dept_vl.training.checkpoint import newest, steps_of
from dept_vl.training.errors import explained
from dept_vl.training.identity import check_kept, forget_contents


@dataclass(frozen=True)
class Opened:
    """Folder of a run, as this process found it."""

    path: Path
    checkpoint: Path | None  # checkpoint to resume from; None starts from the beginning
    claimed: bool  # whether this process created the run


WRITTEN = (REPORT_FILE, SCORES_FILE, "summary.md", "predictions.json", "answers.png")
"""Files that a run writes, or that belong to the answers of another model."""


def choose_folder(config: RunConfig) -> Path:
    """Return the folder of the run to start or to resume.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is not set, or is inside another run's folder.
        FileNotFoundError: If the folder to resume holds no run.
        ValueError: If `resume` is auto and `output_dir` is not set.
    """
    if config.resume not in ("", "auto"):
        output_dir = Path(config.resume)
        if not _holds_run(output_dir):
            raise FileNotFoundError(f"--resume {output_dir}: expected the folder of a run, found none there")
        return output_dir
    if config.resume == "auto" and config.output_dir is None:
        raise ValueError("--resume auto needs --output_dir, the folder to look for a run in")
    output_dir = config.output_dir or _new_folder(config.data.task)
    if _holds_run(output_dir):
        if not config.resume:
            raise _taken(output_dir)
    elif there := [name for name in WRITTEN if (output_dir / name).exists()]:
        raise FileExistsError(
            f"{output_dir} holds {', '.join(there)} but no run; a run would replace them, and nothing was "
            "changed there. Choose another --output_dir"
        )
    elif output_dir == Path() and any(output_dir.iterdir()):
        raise FileExistsError(
            "--output_dir is the current folder, which holds other files; nothing was changed. Is a shell "
            "variable empty? Choose a folder of the run's own"
        )
    elif outer := next(filter(_has_started, output_dir.resolve().parents), None):
        raise FileExistsError(
            f"--output_dir {output_dir} is inside the folder of the run {outer}; nothing was changed there. "
            "Choose a folder beside it"
        )
    return output_dir


def is_complete(output_dir: Path) -> bool:
    """Return whether a run has finished and written its summary and report."""
    return all((output_dir / name).is_file() for name in (SUMMARY_FILE, REPORT_FILE))


def open_folder(config: RunConfig, output_dir: Path) -> Opened:
    """Write the configuration of a new run, or find the newest undamaged checkpoint of the run to resume.

    Raise FileExistsError if the folder holds a run and `resume` is not set, and DifferentError if that has
    finished, with other options or data.
    """
    if not _holds_run(output_dir):
        with explained(output_dir):
            write_noted_json(output_dir / CONFIG_FILE, to_json(config), indent=2)
        return Opened(output_dir, None, claimed=True)
    if not config.resume:
        raise _taken(output_dir)
    if (output_dir / SUMMARY_FILE).is_file():
        forget_contents()
        check_kept(output_dir, config)
        return Opened(output_dir, None, claimed=False)
    return Opened(output_dir, _newest(output_dir), claimed=False)


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG_FILE, LOG_FILE, BEST))


def _has_started(folder: Path) -> bool:
    """Return whether a folder certainly is a run's. Models, too, have a config.json."""
    return all((folder / name).is_file() for name in (CONFIG_FILE, LOG_FILE))


def _taken(output_dir: Path) -> FileExistsError:
    return FileExistsError(
        f"{output_dir} already holds a run; nothing was changed there. Go on with it by --resume "
        f"{output_dir}, choose another --output_dir, or leave it out for a new folder under runs/"
    )


def _newest(output_dir: Path) -> Path | None:
    checkpoint, damaged = newest(output_dir)
    for problem in damaged:
        say(f"warning: {problem}; the one before is taken")
    where = f"step {steps_of(checkpoint):,}" if checkpoint else "the beginning: it has no checkpoint"
    say(f"resuming {output_dir} from {where}")
    return checkpoint


def _new_folder(task: str) -> Path:
    """Create a new folder under runs/. Its name is unique even if two runs start in the same second."""
    name = time.strftime(f"{task}-%Y%m%d-%H%M%S")
    for number in count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with explained(folder), suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def release(opened: Opened, accelerator: Accelerator) -> None:
    """Remove the files of a run that failed validation, so that the corrected command can use the folder."""
    if opened.claimed and accelerator.is_main_process and not (opened.path / LOG_FILE).exists():
        remove_noted(opened.path, CONFIG_FILE, FEATURES_FILE, IDENTITY_FILE)


def keep_precision(output_dir: Path, precision: str, accelerator: Accelerator) -> None:
    """Store the data type of a run's visual features; ValueError if a run resumes with another one."""
    path = output_dir / FEATURES_FILE

    def keep() -> str:
        if not is_there(path):
            write_noted_json(path, {"dtype": precision})
        return str(read_json(path)["dtype"])

    began = on_main(accelerator, keep)
    if began != precision:
        raise ValueError(
            f"{output_dir} began with visual features in {began} and would continue with {precision}, to "
            "another result; say --features cached with the --features_dir that it began with, or --features "
            "live if it began without (float32)"
        )
