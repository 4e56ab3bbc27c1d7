"""Write the report of a finished run again, from its folder and the data that it was scored on."""

import shutil
import subprocess
from pathlib import Path

from dept_vl._utils.io import read_object
from dept_vl._utils.printable import say
from dept_vl._utils.run_files import CONFIG_FILE, SUMMARY_FILE
from dept_vl._utils.terminal import waiting
from dept_vl.config import read_config
from dept_vl.data.splits import load_split
from dept_vl.tasks.base import limit
from dept_vl.training.identity import note_changes
from dept_vl.training.options import ReportConfig
from dept_vl.training.owner import owning
from dept_vl.training.report.html import Answered, write_run_report
from dept_vl.training.summary import Summary

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def remake(config: ReportConfig) -> Path:
    """Write the report, and a screenshot of it if `config.picture` is set.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: If files of the run or its data are missing, or Chromium is not installed.
        InUseError: If another process is using the folder.
        ValueError: If a file of the run is damaged.
    """
    with owning(config.run, wait=config.wait):
        path = remake_page(config.run)
    if config.picture is not None:
        draw(path, config.picture, config.size)
    return path


@waiting("making the page")
def remake_page(run: Path) -> Path:
    """Write the report of a finished run.

    Raises:
        FileNotFoundError: If files of the run or its data are missing.
        ValueError: If a file of the run is damaged.
    """
    trained = read_config(run / CONFIG_FILE)
    summary = read_object(run / SUMMARY_FILE, Summary)
    answered = []
    for options in (trained.data, *trained.also):
        split = options.splits()[-1]
        task = load_split(options, split).answered()
        task = limit(task, options.test_limit, trained.train.seed)
        changed = note_changes(run, trained, options)
        suffix, start = (f"-{task.name}", f"{task.name}/") if trained.also else ("", "")
        predictions = task.prediction_format.read(run / f"predictions{suffix}{task.prediction_format.suffix}")
        scores = {
            name.removeprefix(start): value
            for name, value in summary["scores"].items()
            if name.startswith(start)
        }
        answered.append(Answered(task, split, predictions, scores, changed))
    path = write_run_report(run, trained, summary, answered)
    say(f"report: {path}")
    return path


def draw(path: Path, picture: Path, size: tuple[int, int]) -> None:
    """Save a screenshot of the top of a page, with Chromium or Chrome."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"a picture needs one of {', '.join(BROWSERS)}; found none installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    where = [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture.absolute()}"]
    subprocess.run([browser, *options, *where, path.absolute().as_uri()], check=True, capture_output=True)
