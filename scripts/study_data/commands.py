"""Commands of `scripts/prepare_data.py` that make the data of the studies.

Each imports what it needs, so that help stays fast.
"""

from collections.abc import Callable
from pathlib import Path

from dept_vl._utils.printable import say


def easy_vqa(output_dir: Path = Path("data/easy-vqa")) -> None:
    """Convert the package easy-vqa to VQAv2 files and COCO image names.

    Args:
        output_dir: Folder to write; must not exist, or hold a finished conversion.
    """
    from study_data.easy_vqa import convert

    counts = convert(output_dir)
    say(f"{output_dir} holds:")
    for kind, count in counts.items():
        say(f"  {kind:<22}{count:>7,}")


def scenes(output_dir: Path = Path("data/scenes"), train: int = 800, val: int = 150, test: int = 150) -> None:
    """Make small replacements for all four tasks, in their official format, from generated scenes.

    Args:
        output_dir: Folder to create, with vqav2, gqa, nlvr2 and coco in it.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
    """
    from study_data.official import write_tasks

    write_tasks(output_dir, train=train, val=val, test=test)
    say(f"{output_dir} holds vqav2, gqa, nlvr2 and coco")


def concepts(output_dir: Path = Path("data/concepts"), train: int = 1200, val: int = 400) -> None:
    """Make two data sets in VQAv2's format with concepts that the small backbone was not trained on.

    Args:
        output_dir: Folder to create, with relabelled and many-or-few in it.
        train: Number of training images.
        val: Number of validation images.
    """
    from study_data.official import write_concepts

    write_concepts(output_dir, train=train, val=val)
    say(f"{output_dir} holds relabelled and many-or-few")


def snippets(output_dir: Path = Path("data/snippets"), archive: Path | None = None) -> None:
    """Write the rated movie-review snippets of the package vaderSentiment as a task like SST-2.

    Args:
        output_dir: Folder to write.
        archive: Source distribution of vaderSentiment. Default: download it with pip.
    """
    from study_data.snippets import write

    for split, count in write(output_dir, archive).items():
        say(f"{split:<11}{count:>7,} snippets")


COMMANDS: dict[str, Callable[..., None]] = {
    "easy-vqa": easy_vqa,
    "scenes": scenes,
    "concepts": concepts,
    "snippets": snippets,
}
"""Commands by name; their arguments are flags."""
