"""Adapters as a model of lmms-eval, by its own runner, on tasks that it reads from disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import many_of

from dept_vl.models.backbone import Backbone

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

DATA = Path(__file__).parents[2] / "data"
TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: colours.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function colours_utils.images
doc_to_text: "{{question}}\\nAnswer the question using a single word or phrase."
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""
UTILS = """\
from PIL import Image

def images(row):
    return [Image.open(row["image"]).convert("RGB")]
"""


def score(folder: Path, adapter: Path, task: str, tasks: Path) -> float:
    """The accuracy that lmms-eval reports."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "dept_vl", "--tasks", task, "--batch_size", "4"]
    arguments = f"adapter={adapter},backbone={DATA / 'tiny-clip-t5'},device=cpu"
    subprocess.run(
        [
            *command,
            "--model_args",
            arguments,
            "--include_path",
            str(tasks),
            "--output_path",
            str(folder / task),
        ],
        check=True,
        cwd=folder,
        env=os.environ | {"HF_HOME": str(folder / "cache"), "NLVR2_IMAGES": str(folder / "images")},
    )
    (results,) = (folder / task).rglob("*results.json")
    found = json.loads(results.read_text())["results"][task]
    return float(found["exact_match,none"])


def test_a_task_on_disk_is_scored(tmp_path: Path) -> None:
    many = many_of(Backbone.from_pretrained(DATA / "tiny-clip-t5").eval(), tmp_path / "adapters")
    rows = [json.loads(line) for line in (DATA / "samples" / "questions.jsonl").read_text().splitlines()]
    paths = [str(DATA / "samples" / row["image"]) for row in rows]
    answers = many.predictor("colours").answer(paths, [row["question"] for row in rows])
    # Seven answers of ten are right.
    truth = [answer if place < 7 else f"no {answer}" for place, answer in enumerate(answers)]
    asked = [
        {"question": row["question"], "image": path, "answer": answer}
        for row, path, answer in zip(rows, paths, truth, strict=True)
    ]
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK)
    (tmp_path / "tasks" / "colours_utils.py").write_text(UTILS)
    assert score(tmp_path, tmp_path / "adapters" / "colours", "colours", tmp_path / "tasks") == pytest.approx(
        0.7
    )


def test_nlvr2_is_scored_from_its_official_files(scenes: Path, tmp_path: Path) -> None:
    many = many_of(Backbone.from_pretrained(DATA / "tiny-clip-t5").eval(), tmp_path / "adapters")
    (file,) = (scenes / "nlvr2").rglob("test1.json")
    shutil.copy(file, tmp_path)
    (tmp_path / "images").mkdir()
    for image in (scenes / "nlvr2").rglob("test1*.png"):
        shutil.copy(image, tmp_path / "images")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    pairs = [
        tuple(
            str(tmp_path / "images" / f"{row['identifier'].rpartition('-')[0]}-img{side}.png")
            for side in (0, 1)
        )
        for row in rows
    ]
    answers = many.predictor("pairs").answer(pairs, [row["sentence"] for row in rows])
    right = sum(a.lower() == row["label"].lower() for a, row in zip(answers, rows, strict=True))
    found = score(tmp_path, tmp_path / "adapters" / "pairs", "nlvr2_test", DATA / "lmms_eval")
    assert found == pytest.approx(right / len(rows))
