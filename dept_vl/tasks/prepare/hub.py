"""Parquet copies of the data sets, as on the Hub, written as the official files that the tasks read.

So each task has one reader, and official scorers work on what was fetched. `copies` lists the copies.
"""

from pathlib import Path

from dept_vl._utils.errors import UnknownNameError
from dept_vl._utils.printable import markdown_text, say
from dept_vl.tasks import TASKS
from dept_vl.tasks.prepare.copies import COPIES, Copy
from dept_vl.tasks.prepare.parquet import open_source
from dept_vl.tasks.prepare.staging import Output, publish, refuse_existing, staging_for


def fetch(task: str, source: str | Path, output_dir: Path, *, split: str) -> dict[str, int]:
    """Write one split of a copy as official files and images; whole or not at all.

    A folder that holds other splits gains this one. Images that it has under their official names are kept.

    Args:
        task: Name of a task that has a copy.
        source: A name on the Hub, or a folder that holds the copy; empty for the usual one.
        output_dir: Folder to write, or to add to.
        split: As the task calls it; `all` for coco, whose one file holds every split.

    Returns:
        The number of examples, and for tasks with images: `images` that belong to the split, those
            `images_kept` from before, and those `images_reencoded` as JPEG because of their official names.

    Raises:
        ValueError: If the task or split is unknown, columns are missing, or a row is damaged.
        FileNotFoundError: If the source is no folder and no name on the Hub, or lacks the split.
        FileExistsError: If the split is there already.
        OSError: If the copy cannot be read, for want of a network for example.
    """
    copy = find_copy(task)
    name = copy.short.get(split, split)
    if name not in copy.parts:
        known = ", ".join((*copy.short, *copy.parts))
        raise ValueError(
            f"{copy.hub} has the splits {known}; got {split!r}. The official files of others are published "
            f"at {copy.official}"
        )
    opened = open_source(source or copy.hub, copy.hub, copy.official)
    output_dir = output_dir.resolve()  # a link's own neighbours may lie on another disk
    note = f"SOURCE-{name}.md"
    files = (*copy.files(name), note)
    refuse_existing(output_dir, files)

    with staging_for(output_dir) as staging:
        output = Output(staging, output_dir)
        copy.write(opened, output, name, copy.parts[name])
        examples = output.examples
        counts = {copy.examples: examples, **output.counts()}
        published = TASKS[task].published.get(name)
        lines = [copy.note] if copy.note else []
        if published is not None and examples != published.examples:
            lines.append(
                f"{examples:,} {copy.examples} of the {published.examples:,} published: figures on them are "
                "not those of papers."
            )
        for line in lines:
            say(f"{task}, {name}: {line}", error=True)
        text = [
            f"# {task}, {name}",
            f"Written from the parquet copy {markdown_text(opened.place)}. Official: {copy.official}",
        ]
        listed = "\n".join(f"- {kind}: {count:,}" for kind, count in counts.items())
        (staging / note).write_text("\n\n".join([*text, *lines, listed]) + "\n", encoding="utf-8")
        publish(staging, output_dir, files)
    return counts


def find_copy(task: str) -> Copy:
    """Return the copy of a task; raise UnknownNameError without one."""
    if task not in COPIES:
        raise UnknownNameError("task", task, COPIES)
    return COPIES[task]
