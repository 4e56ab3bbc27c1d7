r"""Ask a trained adapter about an image.

python scripts/predict.py street.jpg "what colour is the car?" --adapter runs/vqa
python scripts/predict.py left.jpg right.jpg "both show a dog" "one is asleep" --adapter runs/nlvr2
python scripts/predict.py beach.jpg --adapter user/captions
python scripts/predict.py "a fine film" --adapter runs/sst2

Images come first, as many as a question of the adapter's task is about; every question gets a line.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dept_vl.inference.loading import load


@dataclass(frozen=True)
class PredictConfig:
    """Whom to ask what."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE... QUESTION...")]
    """Image files, then questions."""
    adapter: str
    """Folder of a run or of an adapter, or an adapter's name on the Hub."""
    backbone: Path | None = None
    """What the adapter was trained on, if it is not where the adapter says: a folder, or VISION+LANGUAGE."""
    revision: str | None = None
    """Of an adapter on the Hub."""
    task: str | None = None
    """How the questions are asked; left out, as the adapter was trained."""
    device: str | None = None
    """Such as cpu or cuda; left out, a GPU if there is one."""


def main(config: PredictConfig) -> list[str]:
    """Ask, and print the answers."""
    predictor = load(
        config.adapter,
        backbone=config.backbone,
        revision=config.revision,
        task=config.task,
        device=config.device,
    )
    task = predictor.task
    images, questions = config.inputs[: task.image_count], config.inputs[task.image_count :]
    if len(images) < task.image_count or (task.asks and not questions):
        needed = [*["IMAGE"] * task.image_count, *['"QUESTION"'] * task.asks]
        raise ValueError(f"{task.name} needs {' '.join(needed)}; got {' '.join(map(repr, config.inputs))}")
    answers = predictor.answer([images] if images else None, questions or [""])
    print(*answers, sep="\n")
    return list(answers)


if __name__ == "__main__":
    disable_progress_bar()
    set_verbosity_error()
    try:
        main(tyro.cli(PredictConfig, description=__doc__, use_underscores=True))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
