"""Names of what is stored in the folder of a run, and paths of its options found again."""

import os
from pathlib import Path

from dept_vl._utils.io import read_json

CONFIG_FILE = "config.json"
"""The options of the run."""
LOG_FILE = "log.jsonl"
SUMMARY_FILE = "summary.json"
"""Scores and costs, written when the run has ended."""
SCORES_FILE = "scores.json"
"""Scores of an evaluation after the run, in its own folder."""
CANDIDATES_FILE = "candidates.json"
"""The answers that were chosen among."""
TASK_FILE = "task.json"
"""What adapters say themselves now: longest answer, labels."""
SHOTS_FILE = "shots.json"
"""The few examples that were trained on."""
FEATURES_FILE = "features.json"
"""The precision of the visual features that were trained on."""
IDENTITY_FILE = "identity.json"
"""What the run is made of: its data and models in a few digits, and where and on what it was begun."""
LOCK_FILE = ".lock"
"""Held by the process that writes there."""
OWNER_FILE = ".owner.json"
"""Who that is."""
REPORT_FILE = "report.html"
CHECKPOINTS = "checkpoints"
"""Folder of the resumable states."""
BEST = "best"
"""Folder of the adapter with the best dev score."""
LAST = "last"
"""Folder of the adapter after the last step."""

NEAR = 6
"""Folders, the run's own and those above it, in which a relative path is looked for."""


def find_again(name: str, folder: Path) -> str:
    """Return the path of an option as it is found now; a name of the Hub, or what is nowhere, as it is.

    A relative path is looked for from here, then from where the run was started, then beside the run.

    Args:
        name: As it was typed.
        folder: Of the run, the adapter or the configuration that it is of.
    """
    if not name or os.path.isabs(name) or os.path.exists(name):
        return name
    folder = folder.absolute()
    places = [folder, *folder.parents][:NEAR]
    for place in [*_started_in(folder), *(place for place in places if place != place.parent)]:
        found = os.path.join(place, name)
        if os.path.exists(found):
            return os.path.normpath(found)
    return name


def is_hub_name(name: str) -> bool:
    """Return whether a name may be one of the Hub, `user/model` or `model`; it is a path otherwise."""
    return name.count("/") <= 1 and not name.startswith((".", "~")) and not os.path.isabs(name)


def _started_in(folder: Path) -> list[Path]:
    try:
        return [Path(read_json(folder / IDENTITY_FILE)["started_in"])]
    except (OSError, LookupError, TypeError):
        return []
