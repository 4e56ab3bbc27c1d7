"""Transfer between several tasks: sources, cells and one table."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import write_vqa
from runs import reset_accelerate

import benchmarks.options
import benchmarks.transfer_suite
from benchmarks.options import TARGETS, SuiteConfig
from benchmarks.transfer_suite import gain, table, transfer_suite, wins
from dept_vl._utils.errors import UsageError
from dept_vl._utils.stats import interval
from dept_vl.config import DataOptions, RunConfig, to_json

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def _two_tasks(
    tmp_path: Path,
    make_run: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two tiny tasks in place of the shipped ones, the first of which is a source too."""
    configs = {}
    for name in ("first", "second"):
        data = DataOptions(data_dir=write_vqa(tmp_path / name, images=12), holdout_images=1)
        config = make_run(data)
        (tmp_path / f"{name}.json").write_text(json.dumps(to_json(config)))
        configs[name] = str(tmp_path / f"{name}.json")
    monkeypatch.setattr(benchmarks.transfer_suite, "TARGETS", configs)
    monkeypatch.setattr(benchmarks.options, "TARGETS", configs)
    monkeypatch.setattr(benchmarks.transfer_suite, "SOURCES", configs)


@pytest.mark.slow
@pytest.mark.usefixtures("_two_tasks")
def test_every_target_learns_from_the_others_and_one_table_shows_it(tmp_path: Path) -> None:
    config = SuiteConfig(
        targets=("first", "second"),
        k=(2,),
        seeds=2,
        source_steps=2,
        max_steps=1,
        batch_size=2,
        test_limit=8,
        output_dir=tmp_path / "out",
    )
    transfer_suite(config)
    cells = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert cells.keys() == {"first", "second"}
    for name, other in (("first", "second"), ("second", "first")):
        assert len(cells[name]) == 3
        for cell in cells[name]:
            found = tmp_path / "out" / name / f"k{cell['k']}"
            runs = [found / f"seed{seed}" / cell["start"] for seed in (1, 2)]
            scores = [json.loads((run / "summary.json").read_text())["scores"]["overall"] for run in runs]
            assert cell["scores"] == scores
            written = json.loads((runs[0] / "config.json").read_text())
            sources = [str(tmp_path / "out" / f"source-{other}")] if cell["start"] != "scratch" else []
            assert written["prompt"]["init_from"] == sources
            # The prompt alone is trained.
            assert not written["backbone"]["train_projection"]
    text = (tmp_path / "out" / "transfer.md").read_text()
    assert "k=2, from P and offset: better than from scratch on" in text
    # Again: nothing is run.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    assert len(times) == 2 + 2 * 2 * 3
    reset_accelerate()
    transfer_suite(config)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (tmp_path / "out" / "transfer.md").read_text() == text


def test_gains_are_of_the_same_seed() -> None:
    cells = [
        {"k": 4, "start": "scratch", "scores": [10.0, 50.0]},
        {"k": 4, "start": "prompt", "scores": [12.0, 53.0]},
        {"k": 4, "start": "all", "scores": [9.0, 50.0]},
    ]
    assert gain(cells, 4, "prompt") == interval([2.0, 3.0])
    found = {"one": cells, "other": [replace_scores(cell, [1.0, 1.0]) for cell in cells]}
    assert f"| {interval([2.0, 3.0])} |" in " ".join(table(found).split())
    said = wins(found, (4,))
    # A half width of 6.35 for two seeds: better, but not surely.
    assert "k=4, from P: better than from scratch on 1 of 2 targets (one), on 0 by" in said
    assert "k=4, from P and offset: better than from scratch on 0 of 2 targets (none)" in said


def replace_scores(cell: dict[str, object], scores: list[float]) -> dict[str, object]:
    return cell | {"scores": scores}


def test_shipped_targets_have_configurations_and_others_are_refused() -> None:
    root = Path(__file__).parents[2]
    assert all((root / path).is_file() for path in TARGETS.values())
    with pytest.raises(ValueError, match="unknown target 'magic'; there are: scenes-vqav2, "):
        transfer_suite(replace(SuiteConfig(), targets=("magic",)))
    with pytest.raises(UsageError, match="more than once"):
        transfer_suite(replace(SuiteConfig(), k=(4, 4)))
