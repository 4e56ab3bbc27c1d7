"""Parts of the official files that the data of the studies share."""

import json
from pathlib import Path
from typing import Any

from dept_vl.tasks.vqav2 import ANSWERS


def dump(path: Path, content: object) -> None:
    """Write JSON on one line, and create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def unanimous(answer: str) -> dict[str, Any]:
    """Return the part of a VQAv2 annotation in which all ten annotators give the same answer."""
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number in range(1, ANSWERS + 1)
    ]
    return {"multiple_choice_answer": answer, "answers": answers}
