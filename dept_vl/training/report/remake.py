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
from dept_vl.training.identity import note_changes
from dept_vl.training.options import ReportConfig
from dept_vl.training.owner import owning
from dept_vl.training.report.html import Answered, write_run_report
from dept_vl.training.summary import Summary

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LONGEST_SAID = 500


def remake(config: ReportConfig) -> Path:
    """Write the report and return its path; draw a screenshot of it if `config.picture` is set.

    Raises:
        FileNotFoundError: If files of the run or its data are missing, or Chromium is not installed.
        InUseError: If another process is using the folder.
    """
    with owning(config.run, wait=config.wait):
        path = remake_page(config.run)
    if config.picture is not None:
        draw(path, config.picture, config.size)
    return path


@waiting("making the page")
def remake_page(run: Path) -> Path:
    """Write the report of a finished run."""
    trained = read_config(run / CONFIG_FILE)
    summary = read_object(run / SUMMARY_FILE, Summary)
    answered = []
    for options in (trained.data, *trained.also):
        split = options.splits()[-1]
        task = load_split(options, split).answered()
        changed = note_changes(run, trained, options)
        suffix, start = (f"-{task.name}", f"{task.name}/") if trained.also else ("", "")
        predictions = task.prediction_format.read(run / f"predictions{suffix}{task.prediction_format.suffix}")
        # Rows that came later, and those left out by `test_limit`, have no predictions.
        task = task.subset([place for place, key in enumerate(task.example_ids()) if key in predictions])
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
    """Save a screenshot of the top of a page, with Chromium or Chrome; RuntimeError if the browser fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"a picture needs one of {', '.join(BROWSERS)}; found none installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    where = [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture.absolute()}"]
    command = [browser, *options, *where, path.absolute().as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if ended.returncode or not picture.is_file():
        said = ended.stderr.strip()[-LONGEST_SAID:] or "nothing"
        raise RuntimeError(
            f"{browser} wrote no picture {picture}: it ended with status {ended.returncode} and said: {said}"
        )
