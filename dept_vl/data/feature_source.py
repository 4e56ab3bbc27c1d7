"""Source of a run's visual features: files, memory, or the encoder at every step."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from dept_vl._utils.errors import UsageError
from dept_vl._utils.printable import say
from dept_vl.config import DataOptions, Features
from dept_vl.data.feature_index import INDEX_FILE
from dept_vl.data.feature_store import open_features
from dept_vl.data.features import FeatureTable, table_bytes
from dept_vl.data.splits import Splits, image_root
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.base import Task, data_folder
from dept_vl.tasks.io.rows import cache_folder

GIB = 2**30


def read_features(
    backbone: FrozenBackbone, splits: list[Splits], *, num_workers: int, accelerator: Accelerator
) -> FeatureTable | VisionEncoder | None:
    """Return the features of all images, from files or computed into memory, or the encoder for live use.

    The options of the first task decide for all tasks.
    """
    wanted = []
    for part in splits:
        files = (path for task in (part.train, part.dev, part.test) for path in task.image_files())
        wanted.append((part.options, list(dict.fromkeys(files))))
    first = splits[0].options
    choice: Features = "auto" if first.features == "encoded" else first.features
    vision = encoder_of(backbone, choice) if any(paths for _, paths in wanted) else None
    if vision is None:
        return backbone.vision
    table = mapped_features(vision, wanted, choice)
    if table is None:
        paths = list(dict.fromkeys(path for _, paths in wanted for path in paths))
        if choice == "live" or table_bytes(vision, len(paths)) > first.feature_memory * GIB:
            say("visual features: encoded at every step")
            return backbone.vision
        main = accelerator.is_main_process
        table = FeatureTable.encode(vision, paths, num_workers=num_workers, progress=main)
        say("visual features: encoded once, in memory")
    # Checked here, before training reaches these images.
    for split in splits if table.errors else ():
        for task, default in ((split.train, "skip"), (split.dev, "raise"), (split.test, "raise")):
            if (split.options.on_bad_image or default) == "raise":
                check_readable(table, task)
    return table


def encoder_of(
    backbone: FrozenBackbone, choice: Features, stored: DataOptions | None = None
) -> VisionEncoder | None:
    """Return the vision encoder if its features can be cached; None if they are not to be.

    `choice` cached raises UsageError if it is impossible; auto also requires stored features for the task of
    `stored`, if these data options are given.
    """
    if backbone.processor is None:
        return backbone.vision
    there = stored is None or (features_folder(stored) / INDEX_FILE).is_file()
    if choice == "live" or not (there or choice == "cached"):
        return None
    try:
        return backbone.image_features()
    except UsageError as error:
        if choice == "cached":
            raise
        say(f"visual features: encoded at every step; {error}")
        return None


def mapped_features(
    vision: VisionEncoder,
    wanted: list[tuple[DataOptions, list[Path]]],
    choice: Features,
) -> FeatureTable | None:
    """Map the features that `dept-vl features` stored for these images; None if they are not to be used.

    If stored features cannot be used, raise an error with `choice` cached; with auto, print a note instead.
    """
    folders = [features_folder(options) for options, paths in wanted if paths]
    complete = all((folder / INDEX_FILE).is_file() for folder in folders)
    if not folders or choice == "live" or (choice == "auto" and not complete):
        return None
    memory = wanted[0][0].feature_memory * GIB
    renewable = int(memory // table_bytes(vision, 1)) if choice == "auto" else 0
    problem: Exception | None = None
    try:
        table = FeatureTable.joined(
            [
                open_features(
                    vision, image_root(options), paths, features_folder(options), renewable=renewable
                )
                for options, paths in wanted
                if paths
            ]
        )
    except (FileNotFoundError, ValueError) as error:
        problem = error
    # All processes use the files, or none does.
    problems = [text for text in gather_object([str(problem or "")]) if text]
    if problems and choice == "cached":
        raise problem or ValueError(problems[0])
    if problems:
        say(f"warning: {problems[0]}. The images are encoded again")
        return None
    say(f"visual features: {table.dtype} from {', '.join(dict.fromkeys(map(str, folders)))}")
    return table


def features_folder(options: DataOptions) -> Path:
    """Return the folder of a task's visual features."""
    own = options.own
    if own.data is not None and own.folder() is None and options.features_dir is None:
        return cache_folder() / "features" / own.data.replace("/", "--")
    folder = own.folder() or data_folder(options.task, options.data_dir)
    return options.features_dir or folder / "features"


def check_readable(table: FeatureTable, task: Task) -> None:
    """Raise ValueError if an image of a split could not be encoded."""
    for path in task.image_files():
        if path in table.errors:
            raise ValueError(f"{table.errors[path]}. To leave it out, pass --on_bad_image skip")
