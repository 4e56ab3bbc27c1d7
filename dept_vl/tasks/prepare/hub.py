"""Conversion of parquet copies of the data sets (see `copies`) to official files.

Each task then needs only one reader, and official scorers can read the files.
"""

from pathlib import Path

from dept_vl._utils.errors import UnknownNameError
from dept_vl._utils.printable import markdown_text, say
from dept_vl.tasks import TASKS
from dept_vl.tasks.prepare.copies import COPIES
from dept_vl.tasks.prepare.parquet import open_source
from dept_vl.tasks.prepare.staging import Output, publish, refuse_existing, staging_for


def fetch(task: str, source: str | Path, output_dir: Path, *, split: str) -> dict[str, int]:
    """Write one split of a copy as official files and images, atomically.

    A folder with other splits gains this one; FileExistsError if it has this split already. Images that it
    already has under their official names are kept. An empty `source` is the usual copy on the Hub.

    Returns:
        Number of examples, and for tasks with images the number of `images` of the split, of `images_kept`
        from before, and of `images_reencoded` as JPEG because of their official names.
    """
    if task not in COPIES:
        raise UnknownNameError("task", task, COPIES)
    copy = COPIES[task]
    name = copy.short.get(split, split)
    if name not in copy.parts:
        known = ", ".join((*copy.short, *copy.parts))
        raise ValueError(
            f"{copy.hub} has the splits {known}; got {split!r}. The official files of others are published "
            f"at {copy.official}"
        )
    opened = open_source(source or copy.hub, copy.hub, copy.official)
    output_dir = output_dir.resolve()  # the neighbours of a symbolic link may be on another disk
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
