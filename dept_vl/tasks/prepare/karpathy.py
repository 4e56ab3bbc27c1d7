"""VQAv2's Karpathy splits as files of their own, for tools that read nothing but the official form.

Our own loader needs none of them: it puts `karpathy-train` and the others together from the official
files and `dataset_coco.json`.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dept_vl.tasks.coco import KARPATHY_FILE, KARPATHY_SOURCE, karpathy_split
from dept_vl.tasks.io.published import find
from dept_vl.tasks.io.records import field, read_list
from dept_vl.tasks.prepare.staging import json_list
from dept_vl.tasks.vqav2 import ANSWERED, SOURCE, annotation_names, question_names

SPLITS = ("train", "val", "test")
HEADER = {"info": {"description": "VQA v2.0, Karpathy split"}}


def write_splits(root: Path, output_dir: Path) -> dict[str, int]:
    """Rebuild the three splits from the records of train2014 and val2014, each kept as it is.

    Args:
        root: Folder with VQAv2's official files and `dataset_coco.json`.
        output_dir: Folder for `v2_OpenEnded_mscoco_karpathy-test_questions.json` and so on.

    Returns:
        Questions of each split.

    Raises:
        FileExistsError: If one of the files is there already.
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged.
    """
    karpathy = find(root, (KARPATHY_FILE,), "Karpathy's splits of COCO", KARPATHY_SOURCE)
    split_of = {image_id: split for split in SPLITS for image_id in karpathy_split(karpathy, split)}
    sources = {
        "questions": [find(root, question_names(subtype), "VQAv2", SOURCE) for subtype in ANSWERED],
        "annotations": [find(root, annotation_names(subtype), "VQAv2", SOURCE) for subtype in ANSWERED],
    }
    names = {
        (key, split): output_dir / names(f"karpathy-{split}")[0]
        for key, names in (("questions", question_names), ("annotations", annotation_names))
        for split in SPLITS
    }
    for path in names.values():
        if path.exists():
            raise FileExistsError(f"{path} is there already; choose another --output_dir, or remove it")
    output_dir.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(SPLITS, 0)
    # A sibling, so that the renames stay within one file system and nothing half-written is left.
    with TemporaryDirectory(dir=output_dir, prefix=".karpathy.") as temporary:
        for key, files in sources.items():
            with ExitStack() as stack:
                writers = {
                    split: stack.enter_context(json_list(Path(temporary) / f"{key}-{split}", HEADER, key))
                    for split in SPLITS
                }
                for image_id, record in _records(files, key):
                    if image_id in split_of:
                        split = split_of[image_id]
                        writers[split](record)
                        counts[split] += key == "questions"
        for (key, split), path in names.items():
            (Path(temporary) / f"{key}-{split}").replace(path)
    return counts


def _records(files: list[Path], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for file in files:
        for number, record in enumerate(read_list(file, key, SOURCE)):
            yield field(record, "image_id", int, f"{file}, {key}[{number}]"), record
