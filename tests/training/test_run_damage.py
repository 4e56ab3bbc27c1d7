"""Random damages to the files of runs: the same results, or one clear error."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers import write_vqa
from runs import damage, reset_accelerate, tensors

from dept_vl._utils.errors import exit_status
from dept_vl.cli import parse
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig
from dept_vl.training.options import ReportConfig
from dept_vl.training.report.remake import remake
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

UNREAD = ("summary.md", "answers.png")
"""What a run leaves for people alone."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., RunConfig]) -> dict[str, Path]:
    """Of two seeds a run that is paused, and the same after it has gone on to its end."""
    folder = tmp_path_factory.mktemp("runs")
    data = DataOptions(data_dir=write_vqa(folder / "vqa"), holdout_images=1, candidate_floor=1)
    config = make_run(data, dropout=True, max_steps=3, eval_every=1, checkpoint_every=1)
    for seed in (5, 6):
        place = folder / f"paused-{seed}" / "run"
        reset_accelerate()
        run(replace(config, output_dir=place, train=replace(config.train, seed=seed, pause_at=2)))
        shutil.copytree(place, folder / f"finished-{seed}" / "run")
        reset_accelerate()
        resume(folder / f"finished-{seed}" / "run")
    reset_accelerate()
    return {name: folder / name / "run" for name in ("paused-5", "paused-6", "finished-5", "finished-6")}


def resume(folder: Path) -> dict[str, Any]:
    run(parse(RunConfig(), "", ["--resume", str(folder)]))
    return {
        "adapters": {(w, k): t.tolist() for w in ("best", "last") for k, t in tensors(folder, w).items()},
        "predictions": (folder / "predictions.json").read_bytes(),
        "scores": json.loads((folder / "summary.json").read_text())["scores"],
        "steps": [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()],
    }


def look(folder: Path) -> dict[str, Any]:
    """What a finished run is asked for."""
    found = run(parse(RunConfig(), "", ["--resume", str(folder)]))
    return {"scores": found.scores, "page": remake(ReportConfig(folder)).read_bytes()}


def evaluate(folder: Path) -> dict[str, Any]:
    reset_accelerate()
    found = score_run(EvaluateConfig(folder, split="train"), write=False)
    return {"scores": found.scores, "predictions": found.predictions}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNREAD)


def outcome(use: Callable[[Path], dict[str, Any]], folder: Path) -> tuple[int, dict[str, Any]]:
    found: dict[str, Any] = {}
    reset_accelerate()
    return exit_status(lambda _: found.update(use(folder)), []), found


@pytest.mark.parametrize("count", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_no_damage_gives_another_result(
    runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], count: int
) -> None:
    uses = {"paused-5": (resume,), "finished-5": (look, evaluate)}
    expected = {}
    for name, several in uses.items():
        for use in several:
            copy = shutil.copytree(runs[name], tmp_path / f"whole-{use.__name__}" / "run")
            status, expected[use] = outcome(use, copy)
            assert status == 0
    refused = same = 0
    for number in range(count):
        random = Random(number)
        name = random.choice(list(uses))
        copy = shutil.copytree(runs[name], tmp_path / str(number) / "run")
        path = random.choice(files_of(copy))
        others = [place for place in files_of(copy) if place != path]
        swapped = runs[name.replace("5", "6")] / path.relative_to(copy)
        damage(path, [swapped] * 3 + others if swapped.is_file() else others, random)
        for use in uses[name]:
            capfd.readouterr()
            status, found = outcome(use, copy)
            said = capfd.readouterr()
            if status == 0:
                same += 1
                if found != expected[use]:
                    # The lines of a log that is gone cannot be had again, which is said.
                    assert "log.jsonl is gone" in said.out, (number, path, use)
                    found["steps"] = expected[use]["steps"]
                assert found == expected[use], (number, path, use)
            else:
                refused += 1
                lines = [line for line in said.err.splitlines() if line.startswith("dept-vl: error")]
                assert len(lines) == 1, (number, path, use)
                assert str(copy) in lines[0], (number, path, use)
        shutil.rmtree(copy.parent)
    print(f"{count} damages: {refused} refused, {same} the same", file=sys.stderr)
    assert refused > 0.2 * count
    assert same > 0.1 * count
