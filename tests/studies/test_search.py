"""The search: what it tries, what it costs, how it goes on."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import write_vqa
from runs import assert_same, in_two_processes, log, reset_accelerate, with_

import dept_vl.studies.search
from dept_vl._utils.errors import NotFiniteError, UsageError
from dept_vl.cli import parse
from dept_vl.config import DataOptions, RunConfig, to_json
from dept_vl.studies.search import GRID, launch, rungs, search_space, tune
from dept_vl.training.log import best_dev
from dept_vl.training.run import run
from dept_vl.training.summary import RunResult
from scripts import tune_against_grid

optuna = pytest.importorskip("optuna")
STEPS, TRIALS = 8, 6


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    make_run: Callable[..., RunConfig],
) -> RunConfig:
    return make_run(
        DataOptions(data_dir=write_vqa(tmp_path_factory.mktemp("data") / "vqa"), holdout_images=1),
        max_steps=STEPS,
        eval_every=STEPS,
    )


@pytest.fixture
def config(base: RunConfig, tmp_path: Path) -> RunConfig:
    """A search of a few trials, the rank solved so that the split is searched too."""
    return with_(base, tune=TRIALS, output_dir=tmp_path / "search", prompt={"rank": None})


@pytest.fixture(scope="module")
def searched(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunResult]:
    """A search that nothing disturbed, and its result."""
    reset_accelerate()
    folder = tmp_path_factory.mktemp("searched") / "search"
    config = with_(base, tune=TRIALS, output_dir=folder, prompt={"rank": None})
    return config, launch(config)


def report(config: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((config.output_dir / "tuning.json").read_text())
    return content


def pretend(monkeypatch: pytest.MonkeyPatch, *, killed_every: int = 0) -> list[Path]:
    """Take no step and score each trial by its number; return the folders of the runs, in their order."""
    calls: list[Path] = []

    def pretended(config: RunConfig, **options: Any) -> RunResult:
        calls.append(config.output_dir)
        if killed_every and len(calls) % killed_every == 0:
            raise KeyboardInterrupt
        return RunResult(config.output_dir, {}, {})

    def score(run: Path, step: int) -> float:
        return math.sin(5 * int(run.name.removeprefix("trial-"))) + step / 1000

    monkeypatch.setattr(dept_vl.studies.search, "run", pretended)
    monkeypatch.setattr(dept_vl.studies.search, "best_dev", score)
    return calls


def test_twenty_trials_cost_no_more_than_the_published_grid(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rungs(400) == [50, 150, 400]
    assert rungs(1) == [1]
    assert rungs(2) == [1, 2]
    assert set(GRID) == {(p, a) for p in (0.3, 0.4) for a in (1e-4, 5e-4, 1e-3, 5e-3)}
    pretend(monkeypatch)
    tune(with_(config, tune=20, train={"max_steps": 400}))
    assert report(config)["steps"] <= len(GRID) * 400
    assert len(report(config)["trials"]) == 20


def test_a_trial_that_diverges_does_not_end_the_search(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pretend(monkeypatch)
    train = dept_vl.studies.search.run

    def diverging(config: RunConfig, **options: Any) -> RunResult:
        if config.output_dir.name in diverged:
            raise NotFiniteError
        return train(config, **options)

    diverged = {"trial-001"}
    monkeypatch.setattr(dept_vl.studies.search, "run", diverging)
    tune(config)
    assert report(config)["trials"][1]["scores"] == {}
    assert report(config)["best"] != 1
    assert "1 (failed)" in (config.output_dir / "tuning.md").read_text()
    # It is not begun again, since it would diverge again.
    before = len(calls)
    tune(replace(config, resume="auto"))
    assert len(calls) == before + 1
    diverged = {f"trial-{number:03d}" for number in range(TRIALS)}
    with pytest.raises(ValueError, match="no trial of"):
        tune(replace(config, output_dir=config.output_dir / "none"))


def test_a_pause_changes_nothing(base: RunConfig, tmp_path: Path) -> None:
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    run(replace(base, output_dir=straight))
    for step in (2, 5, 5, 2, 0):
        reset_accelerate()
        result = run(with_(base, output_dir=paused, resume="auto", train={"pause_at": step}))
        assert (not result.scores) == (step > 0)
        if step:
            assert (paused / "checkpoints" / f"step-{step:08d}").is_dir()
    ours, theirs = (
        [record for record in log(folder) if "loss" in record and record["step"] == STEPS]
        for folder in (straight, paused)
    )
    assert ours[0]["loss"] == theirs[0]["loss"]
    # A pause evaluates, and so may choose another step; the last one is the same.
    steps = [record["step"] for record in log(paused) if "score" in record]
    assert steps == [2, 5, STEPS]
    (straight / "best").rename(straight / "was best")
    (paused / "best").rename(paused / "was best")
    for folder in (straight, paused):
        (folder / "best").symlink_to(folder / "last")
    assert_same(straight, paused)


def test_the_best_continue_and_the_best_is_returned(searched: tuple[RunConfig, RunResult]) -> None:
    config, result = searched
    found = report(config)
    trials = {trial["number"]: trial["scores"] for trial in found["trials"]}
    assert sorted(trials) == list(range(TRIALS))
    reached = [max(map(int, scores)) for scores in trials.values()]
    assert set(reached) <= set(rungs(STEPS)) == {1, 3, 8}
    assert reached[0] == STEPS  # the first has nothing to be compared with
    assert found["steps"] == sum(reached)
    for step, following in pairwise(map(str, rungs(STEPS))):
        so_far: list[float] = []
        for scores in trials.values():
            if step in scores:
                so_far.append(scores[step])
                best = sorted(so_far, reverse=True)[: max(1, len(so_far) // 3)]
                assert (following in scores) == (scores[step] >= best[-1])
    folder = config.output_dir / f"trial-{found['best']:03d}"
    assert result.output_dir == folder
    assert result.scores == json.loads((folder / "summary.json").read_text())["scores"]
    ended = {number: scores["8"] for number, scores in trials.items() if "8" in scores}
    assert best_dev(folder) == ended[found["best"]] == max(ended.values())
    table = (config.output_dir / "tuning.md").read_text()
    assert "(taken)" in table
    assert f"8 runs would take {8 * STEPS}" in table


def test_the_first_trial_is_the_configuration_and_the_others_differ(
    searched: tuple[RunConfig, RunResult],
) -> None:
    config, _ = searched
    tried = {trial["number"]: trial["values"] for trial in report(config)["trials"]}
    assert tried[0] == pytest.approx(
        {"prompt_lr": 0.05, "offset_lr": 1e-3, "projection_lr": 1e-3, "prompt_length": 3}
    )
    assert len({values["prompt_lr"] for values in tried.values()}) == TRIALS
    for number, values in tried.items():
        written = json.loads((config.output_dir / f"trial-{number:03d}" / "config.json").read_text())
        assert written["optim"]["prompt_lr"] == values["prompt_lr"]
        assert written["prompt"]["prompt_length"] == values["prompt_length"]
        assert written["tune"] == 0


def test_a_search_that_was_stopped_continues_where_it_was(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def failing(one: RunConfig, **options: Any) -> RunResult:
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(one.output_dir)
        return run(one, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dept_vl.studies.search, "run", failing)
        with pytest.raises(KeyboardInterrupt):
            tune(config)
    reset_accelerate()
    before = study_of(config)
    assert sum(len(trial.intermediate_values) for trial in before) == 7
    with pytest.raises(
        FileExistsError, match=rf"an unfinished study \({len(set(calls))} of 6 trials begun\)"
    ):
        tune(config)
    with pytest.raises(ValueError, match=r"started with other options .*max_steps=8 -> 9"):
        tune(with_(config, resume="auto", train={"max_steps": 9}))
    more: list[Path] = []
    monkeypatch.setattr(
        dept_vl.studies.search,
        "run",
        lambda one, **options: more.append(one.output_dir) or run(one, **options),
    )
    again = parse(RunConfig(), "", ["--resume", str(config.output_dir)])
    tune(again)
    after = study_of(config)
    for old, new in zip(before, after, strict=False):
        assert old.params == new.params
        assert old.intermediate_values.items() <= new.intermediate_values.items()
    # Nothing is run twice but the best, to read it.
    scores = sum(len(trial.intermediate_values) for trial in after)
    assert len(more) == scores - 7 + 1
    assert report(config)["steps"] == sum(trial.last_step for trial in after)
    # Finished, it only reports what it found.
    more.clear()
    reset_accelerate()
    tune(again)
    assert len(more) == 1
    with pytest.raises(FileExistsError, match="a finished study"):
        tune(config)


def test_scores_of_other_data_are_no_trials(base: RunConfig, tmp_path: Path) -> None:
    data = Path(shutil.copytree(base.data.data_dir or "", tmp_path / "data"))
    config = with_(base, tune=1, output_dir=tmp_path / "search", data={"data_dir": data})
    tune(config)
    path = next(data.glob("*annotations*.json"))
    path.write_text(path.read_text().replace('"answer": "red"', '"answer": "rad"'))
    before = (config.output_dir / "study.db").read_bytes()
    reset_accelerate()
    with pytest.raises(ValueError, match=r"other options or data \(vqav2\."):
        tune(replace(config, resume="auto"))
    assert (config.output_dir / "study.db").read_bytes() == before


def study_of(config: RunConfig) -> list[Any]:
    storage = f"sqlite:///{config.output_dir / 'study.db'}"
    trials: list[Any] = optuna.load_study(study_name="dept_vl", storage=storage).trials
    return trials


def test_a_search_stopped_at_every_run_proposes_what_an_undisturbed_one_does(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = with_(config, tune=12)  # past the ten that are drawn at random
    found = []
    for name, killed_every in (("undisturbed", 0), ("stopped", 3)):
        one = with_(longer, output_dir=tmp_path / name, resume="auto")
        with monkeypatch.context() as patch:
            pretend(patch, killed_every=killed_every)
            stops = 0
            while not (one.output_dir / "tuning.json").exists():
                try:
                    tune(one)
                except KeyboardInterrupt:
                    stops += 1
        assert stops > 5 if killed_every else stops == 0
        found.append(report(one))
    assert found[0] == found[1]
    assert len({trial["values"]["prompt_lr"] for trial in found[0]["trials"]}) == 12


def test_a_study_of_an_earlier_version_is_rejected(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    tune(config)
    storage = f"sqlite:///{config.output_dir / 'study.db'}"
    optuna.load_study(study_name="dept_vl", storage=storage).set_user_attr("0/2", 50.0)
    with pytest.raises(UsageError, match="earlier version"):
        tune(with_(config, resume="auto"))


@pytest.mark.parametrize(
    ("options", "searched"),
    [
        ({"prompt": {"rank": 2}}, {"prompt_lr", "offset_lr", "projection_lr"}),
        ({"prompt": {"method": "pt", "rank": None}}, {"prompt_lr", "projection_lr"}),
        ({"prompt": {"method": "ulpt", "rank": None}}, {"prompt_lr", "offset_lr", "projection_lr"}),
        ({"backbone": {"train_projection": False}}, {"prompt_lr", "offset_lr", "prompt_length"}),
        ({"prompt": {"prompt_length": 0, "rank": 0}}, {"projection_lr"}),
        ({"data": {"task": "rte"}}, {"prompt_lr", "offset_lr", "prompt_length"}),
    ],
)
def test_only_what_trains_something_is_searched(
    config: RunConfig, options: dict[str, Any], searched: set[str]
) -> None:
    assert search_space(with_(config, **options)).keys() == searched


def test_what_cannot_be_searched_is_refused(config: RunConfig) -> None:
    nothing = with_(config, prompt={"prompt_length": 0, "rank": 0}, backbone={"train_projection": False})
    with pytest.raises(ValueError, match="nothing to search"):
        tune(nothing)
    with pytest.raises(ValueError, match="--tune needs --output_dir"):
        tune(replace(config, output_dir=None))
    with pytest.raises(ValueError, match="tune is -1; expected 0 or more"):
        launch(replace(config, tune=-1))
    with pytest.raises(FileNotFoundError, match=r"expected a study \(study.db\)"):
        tune(replace(config, resume=str(config.output_dir)))
    config.output_dir.mkdir()
    (config.output_dir / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a run"):
        tune(config)


def test_two_processes_search_together(config: RunConfig) -> None:
    small = with_(config, tune=2, train={"max_steps": 2})
    in_two_processes(tune, small)
    trials = report(small)["trials"]
    assert "2" in trials[0]["scores"]
    assert report(small)["steps"] == sum(max(map(int, trial["scores"])) for trial in trials)


def test_search_and_grid_are_put_side_by_side(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dept_vl.studies.search, "GRID", GRID[:2])
    (tmp_path / "base.json").write_text(json.dumps(to_json(base)))
    options = tune_against_grid.TuningConfig(
        config=tmp_path / "base.json",
        trials=2,
        seeds=(1, 2),
        max_steps=2,
        batch_size=4,
        output_dir=tmp_path / "both",
    )
    table = tune_against_grid.main(options)
    assert "--tune 2" in table
    content = json.loads((tmp_path / "both" / "tuning.json").read_text())
    assert content["grid_steps"] == 4
    for one in content["seeds"]:
        folder = tmp_path / "both" / f"seed{one['seed']}"
        runs = {path.name: best_dev(path) for path in (folder / "grid").iterdir()}
        assert len(runs) == 2
        assert one["grid"]["dev"] == runs[one["grid"]["run"]] == max(runs.values())
        trials = json.loads((folder / "search" / "tuning.json").read_text())["trials"]
        # The defaults of the package come first, a place of the published grid.
        assert (trials[0]["values"]["prompt_lr"], trials[0]["values"]["offset_lr"]) == pytest.approx(
            (0.3, 1e-3)
        )
        assert one["tune"]["dev"] == max(trial["scores"]["2"] for trial in trials if "2" in trial["scores"])
        assert one["tune"]["steps"] == sum(max(map(int, trial["scores"])) for trial in trials) <= 4
