"""Names of the files in a run's folder, and search for the paths in its options."""

import os
import re
from contextlib import suppress
from pathlib import Path

from dept_vl._utils.io import read_json

CONFIG_FILE = "config.json"
"""Options of the run."""
LOG_FILE = "log.jsonl"
SUMMARY_FILE = "summary.json"
"""Scores and costs, written at the end of the run."""
SCORES_FILE = "scores.json"
"""Scores of a later evaluation, in its own folder."""
CANDIDATES_FILE = "candidates.json"
"""Candidate answers of the run."""
TASK_FILE = "task.json"
"""Maximum prediction length and labels, in older runs; adapters now contain them."""
SHOTS_FILE = "shots.json"
"""Few-shot selection of the run."""
FEATURES_FILE = "features.json"
"""Precision of the visual features that the run was trained on."""
IDENTITY_FILE = "identity.json"
"""Hashes of the run's data and models, and the folder and hardware of its start."""
LOCK_FILE = ".lock"
"""Lock held by the process that writes to the folder."""
OWNER_FILE = ".owner.json"
"""Description of the process that holds the lock."""
REPORT_FILE = "report.html"
CHECKPOINTS = "checkpoints"
"""Folder of the resumable checkpoints."""
BEST = "best"
"""Folder of the adapter with the best dev score."""
LAST = "last"
"""Folder of the adapter after the last step."""

NEAR = 6
"""Number of folders, the run's own and its parents, in which a relative path is searched."""


def find_again(name: str, folder: Path) -> str:
    """Return the current location of a path in the options; names on the Hub and unknown paths are unchanged.

    `folder` is that of the run, adapter or configuration. A relative path is searched from the directory
    where the run was started, the working directory, and the folder of the run. So another project's files
    of the same names are not mistaken for those of the run.
    """
    if not name or os.path.isabs(name):
        return name
    folder, here = folder.absolute(), Path.cwd()
    near = [place for place in [folder, *folder.parents][:NEAR] if place != place.parent]
    for place in [*_started_in(near[:2]), here, *near]:
        found = os.path.join(place, name)
        if os.path.exists(found):
            return name if place == here else os.path.normpath(found)
    return name


HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)


def is_hub_name(name: str) -> bool:
    """Return whether a name can be one on the Hub, `user/model` or `model`; otherwise it is a path."""
    return HUB_NAME.fullmatch(name) is not None


def _started_in(folders: list[Path]) -> list[Path]:
    """Return where a run was started; the folders are those of an adapter and of its run."""
    for folder in folders:
        with suppress(OSError, LookupError, TypeError):
            return [Path(read_json(folder / IDENTITY_FILE)["started_in"])]
    return []
