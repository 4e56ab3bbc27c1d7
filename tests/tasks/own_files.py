"""Files of own data, for the tests of how they are read and what becomes of them."""

import json
from pathlib import Path
from typing import Any

from dept_vl.tasks import load_task

OWN = Path(__file__).parents[1] / "fixtures" / "own"
PHOTOS = OWN / "photos"
QUESTION = {"image": "IMG_0001.JPG", "question": "what color is it?", "answer": "blue"}


def own(file: Path | str, split: str = "all", **options: Any) -> Any:
    return load_task("vqa", split=split, **{"data": file, "images": PHOTOS, **options})


def written(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
