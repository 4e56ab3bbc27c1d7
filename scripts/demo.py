r"""A page on this machine to upload images, ask questions and pick among adapters of one backbone.

python scripts/demo.py --adapters runs/vqa runs/nlvr2 user/captions
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dept_vl.inference.demo import launch, names_of
from dept_vl.inference.mixed import load_many


@dataclass(frozen=True)
class DemoConfig:
    """What is shown where."""

    adapters: tuple[str, ...]
    """Folders of runs or adapters, or names on the Hub, all of one backbone."""
    backbone: Path | None = None
    """What they were trained on, if it is not where the first says: a folder, or VISION+LANGUAGE."""
    host: str = "127.0.0.1"
    """Address to listen at; anyone who reaches it can ask."""
    port: int = 7860
    """Port to listen at."""
    device: str | None = None
    """Such as cpu or cuda; left out, a GPU if there is one."""


def main(config: DemoConfig) -> str:
    """Load the adapters and serve until interrupted."""
    many = load_many(names_of(config.adapters), backbone=config.backbone, device=config.device)
    return launch(many, host=config.host, port=config.port)


if __name__ == "__main__":
    disable_progress_bar()
    set_verbosity_error()
    try:
        main(tyro.cli(DemoConfig, description=__doc__, use_underscores=True))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))
