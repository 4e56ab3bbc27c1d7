"""The folder of a run: claimed by a new run, or resumed with the same options."""

import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dept_vl._utils.io import read_object, write_json
from dept_vl._utils.run_files import BEST, CONFIG_FILE, FEATURES_FILE, LOG_FILE
from dept_vl.config import RENAMED, RunConfig, differences, to_json
from dept_vl.training.checkpoint import newest, steps_of
from dept_vl.training.errors import explained


@dataclass(frozen=True)
class FeaturesFile:
    """The fields of `features.json`."""

    dtype: str


def open_folder(config: RunConfig, accelerator: Accelerator) -> tuple[Path, Path | None]:
    """Return the run's folder, claimed or resumed, and the checkpoint to resume from."""
    if config.resume not in ("", "auto"):
        output_dir = Path(config.resume)
        if not _holds_run(output_dir):
            raise FileNotFoundError(f"--resume {output_dir}: expected the folder of a run, found none there")
        return output_dir, _resume(config, output_dir, accelerator)
    if config.resume == "auto" and config.output_dir is None:
        raise ValueError("--resume auto needs --output_dir, the folder to look for a run in")
    if config.resume == "auto" and _holds_run(Path(config.output_dir or "")):
        return Path(config.output_dir or ""), _resume(config, Path(config.output_dir or ""), accelerator)
    return _claim_output_dir(config, accelerator), None


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG_FILE, LOG_FILE, BEST))


def _resume(config: RunConfig, output_dir: Path, accelerator: Accelerator) -> Path | None:
    """Return the newest whole checkpoint of a run that was started with the same options."""
    check_unchanged(output_dir, config)
    checkpoint, damaged = newest(output_dir)
    for problem in damaged:
        accelerator.print(f"warning: {problem}; the one before is taken")
    # Every process looks before one writes again.
    accelerator.wait_for_everyone()
    where = f"step {steps_of(checkpoint):,}" if checkpoint else "the beginning: it has no checkpoint"
    accelerator.print(f"going on with {output_dir} from {where}")
    return checkpoint


def check_unchanged(folder: Path, config: RunConfig) -> None:
    """Check that a run was started with these options.

    Raises:
        ValueError: If options differ on which the result depends; the message lists them.
    """
    changed = differences(read_object(folder / CONFIG_FILE, dict), to_json(config))
    if changed:
        raise ValueError(
            f"{folder} was started with other options ({'; '.join(changed)}); resume it with its own, by "
            f"--config {folder / CONFIG_FILE}, or start a new run in another --output_dir"
        )


def _claim_output_dir(config: RunConfig, accelerator: Accelerator) -> Path:
    """Create the run's folder and write its configuration there."""
    chosen = [str(config.output_dir or "")]
    if config.output_dir is None and accelerator.is_main_process:
        chosen = [str(_new_folder(config.data.task))]
    output_dir = Path(broadcast_object_list(chosen)[0])
    holds_run = _holds_run(output_dir)
    # Every process looks before one writes, so that all of them raise together.
    accelerator.wait_for_everyone()
    if holds_run:
        raise FileExistsError(
            f"{output_dir} already holds a run; nothing was changed there. Go on with it by --resume "
            f"{output_dir}, choose another --output_dir, or leave it out for a new folder under runs/"
        )
    if accelerator.is_main_process:
        with explained(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(output_dir / CONFIG_FILE, to_json(config), indent=2)
    accelerator.wait_for_everyone()
    return output_dir


def _new_folder(task: str) -> Path:
    """A folder under runs/ that nobody else has, even if another run starts in the same second."""
    name = time.strftime(f"{task}-%Y%m%d-%H%M%S")
    for number in count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with explained(folder), suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def existing(folder: Path) -> Path:
    """Return the folder of a run named after its options, by their older names if it was begun with those."""
    name = folder.name
    for old, new in RENAMED.items():
        name = name.replace(new, old)
    older = folder.with_name(name)
    return older if older.is_dir() else folder


def release(output_dir: Path, accelerator: Accelerator) -> None:
    """Remove the config of a run that failed validation, so that the corrected command can use the folder.

    Args:
        output_dir: Folder of the run.
        accelerator: Accelerator of the run.
    """
    if accelerator.is_main_process and not (output_dir / LOG_FILE).exists():
        for name in (CONFIG_FILE, FEATURES_FILE):
            with suppress(OSError):  # the error that failed the run is the one to report
                (output_dir / name).unlink()


def keep_precision(output_dir: Path, precision: str, accelerator: Accelerator) -> None:
    """Note in what the visual features of a run are stored; features in another would give another result.

    Raises:
        ValueError: If the run began with features in another.
    """
    path = output_dir / FEATURES_FILE
    if accelerator.is_main_process and not path.is_file():
        write_json(path, {"dtype": precision})
    accelerator.wait_for_everyone()
    began = read_object(path, FeaturesFile)["dtype"]
    if began != precision:
        raise ValueError(
            f"{output_dir} began with visual features in {began} and would go on with {precision}, to "
            "another result; say --features cached with the --features_dir that it began with, or --features "
            "live if it began without (float32)"
        )
