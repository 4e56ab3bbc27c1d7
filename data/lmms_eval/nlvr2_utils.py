"""Images of NLVR2's official files, for the task beside it."""

import os
from pathlib import Path
from typing import Any

from PIL import Image


def images(row: dict[str, Any]) -> list[Image.Image]:
    """The left and the right image of a sentence."""
    pair, _, _ = row["identifier"].rpartition("-")
    folder = Path(os.environ["NLVR2_IMAGES"])
    return [Image.open(folder / f"{pair}-img{side}.png").convert("RGB") for side in (0, 1)]
