"""Several tasks in one run: whose batches come when, what decides, and what is written for each."""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from runs import assert_same, files, in_two_processes, log, reset_accelerate, tensors, with_

import dept_vl.tasks.coco
import dept_vl.training.loop
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import DataOptions, RunConfig, read_config
from dept_vl.data.collate import Batch, Collator, Draw
from dept_vl.data.sampling import TrainingBatches
from dept_vl.data.splits import options_together
from dept_vl.inference.evaluate import Evaluation
from dept_vl.tasks import load_task
from dept_vl.tasks.base import Task, limit
from dept_vl.tasks.metrics.caption import REPORTED, Figures
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training.run import run as main
from dept_vl.training.summary import RunResult

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TASKS = ("vqav2", "gqa", "nlvr2", "coco")
PREFIXES = {"vqa": "vqav2", "gqa": "gqa", "nlvr": "nlvr2", "caption": "coco"}
PRIMARY = {"vqav2": "overall", "gqa": "accuracy", "nlvr2": "accuracy", "coco": "CIDEr"}
STEPS = 12
SEED = 5


def quick_scorer(
    references: Mapping[int, Sequence[str]], predictions: Mapping[int, str], *, meteor: bool
) -> Figures:
    """In place of the official one, which takes seconds: something that depends on the captions."""
    assert references.keys() == predictions.keys()
    length = fmean(len(caption) for caption in predictions.values())
    return dict.fromkeys(REPORTED, length) | {"scale": 100, "n": len(predictions)}


@pytest.fixture(autouse=True)
def _quick_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dept_vl.tasks.coco, "score_captions", quick_scorer)


def main_with_quick_captions(config: RunConfig) -> None:
    """For processes of their own."""
    dept_vl.tasks.coco.score_captions = quick_scorer  # type: ignore[assignment]
    main(config)


@dataclass
class Finished:
    """A run that was made once, and the batches that it learnt: their task and the ids of the examples."""

    config: RunConfig
    result: RunResult
    folder: Path
    batches: list[tuple[str, tuple[Any, ...]]]


@pytest.fixture(scope="module")
def config(scenes: Path, make_run: Callable[..., RunConfig]) -> RunConfig:
    splits = {
        "vqav2": DataOptions(dev_split="val", test_split="val", test_limit=5),
        "gqa": DataOptions(dev_split="val", test_split="testdev"),
        "nlvr2": DataOptions(dev_split="dev", test_split="test1", task_batch_size=2),
        "coco": DataOptions(dev_split="val", test_split="test", num_beams=1),
    }
    first, *others = (
        replace(options, task=task, data_dir=scenes / task, dev_limit=4) for task, options in splits.items()
    )
    config = make_run(first, max_steps=STEPS, eval_every=6)
    return replace(config, also=tuple(others))


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    config = replace(config, output_dir=tmp_path_factory.mktemp("runs") / "run")
    batches: list[tuple[str, tuple[Any, ...]]] = []
    collate = Collator.__call__

    def noting(self: Collator, draws: Sequence[Draw]) -> Batch:
        if draws[0].target is not None:
            (task,) = {PREFIXES[draw.example.source_text.split(":")[0]] for draw in draws}
            batches.append((task, tuple(draw.example.example_id for draw in draws)))
        return collate(self, draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collator, "__call__", noting)
        patch.setattr(dept_vl.tasks.coco, "score_captions", quick_scorer)
        reset_accelerate()
        result = main(config)
    assert config.output_dir is not None
    return Finished(config, result, config.output_dir, batches)


def options_of(config: RunConfig) -> list[DataOptions]:
    return [config.data, *config.also]


def split_scored(options: DataOptions) -> Task:
    return limit(load_task(options.task, options.data_dir, options.test_split), options.test_limit, SEED)


def test_every_batch_is_of_one_task_and_every_task_has_its_size(finished: Finished) -> None:
    # `noting` finds one task in each batch, or the run fails.
    assert len(finished.batches) == STEPS
    assert {task for task, _ in finished.batches} == {*TASKS}
    assert {(task, len(ids)) for task, ids in finished.batches} == {
        *[("vqav2", 4), ("gqa", 4), ("nlvr2", 2), ("coco", 4)]
    }


def test_each_task_goes_through_its_examples_as_it_would_alone(finished: Finished) -> None:
    for options in options_of(finished.config):
        train = load_task(options.task, options.data_dir, "train")
        learnt = [ids for task, ids in finished.batches if task == options.task]
        alone = TrainingBatches([len(train)], [options.task_batch_size or 4], seed=SEED)
        assert learnt == [
            tuple(train[number % len(train)].example_id for _, number in batch)
            for batch in islice(alone, len(learnt))
        ]


def test_tasks_come_in_proportion_to_their_batches() -> None:
    counts, sizes = (600, 100, 30), (10, 2, 3)
    drawn = Counter(batch[0][0] for batch in islice(TrainingBatches(counts, sizes, seed=1), 6000))
    # 60, 50 and 10 batches an epoch, of 120.
    for task, share in enumerate((60, 50, 10)):
        assert drawn[task] / 6000 == pytest.approx(share / 120, abs=0.02)


def test_processes_share_batches_of_the_same_tasks() -> None:
    def batches(size: int, process: int, processes: int) -> list[list[tuple[int, int]]]:
        sampler = TrainingBatches([48, 30], [2 * size, size], seed=3, process=process, processes=processes)
        return list(islice(sampler, 40))

    whole, *shares = batches(2, 0, 1), batches(1, 0, 2), batches(1, 1, 2)
    assert [[*first, *second] for first, second in zip(*shares, strict=True)] == whole
    assert {batch[0][0] for batch in whole} == {0, 1}


def test_every_task_is_scored_under_its_name(finished: Finished) -> None:
    expected = {}
    for options in options_of(finished.config):
        task = split_scored(options)
        path = finished.folder / f"predictions-{options.task}{task.prediction_format.suffix}"
        predictions = task.prediction_format.read(path)
        assert predictions.keys() == {*task.example_ids()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dept_vl.tasks.coco, "score_captions", quick_scorer)
            expected |= {f"{options.task}/{name}": value for name, value in task.score(predictions).items()}
    assert finished.result.scores == expected
    assert {f"{task}/{figure}" for task, figure in PRIMARY.items()} <= expected.keys()
    assert json.loads((finished.folder / "summary.json").read_text())["scores"] == expected
    assert Adapter.load(finished.folder / "best").metrics == expected


def test_each_task_is_answered_in_its_own_way(finished: Finished) -> None:
    with (finished.folder / "predictions-nlvr2.csv").open() as file:
        words = [word for _, word in csv.reader(file)]
    # One of two words, never anything else, though the other tasks generate freely.
    assert len(words) == 12
    assert {*words} <= {"true", "false"}
    answers = json.loads((finished.folder / "predictions-gqa.json").read_text())
    assert not {row["prediction"] for row in answers} <= {"true", "false"}
    # Longer than any answer may be.
    captions = json.loads((finished.folder / "predictions-coco.json").read_text())
    assert max(len(row["caption"].split()) for row in captions) > 10


def test_every_task_has_its_files(finished: Finished) -> None:
    names = {
        *(f"{folder}.checksums.json" for folder in ("", "best/", "last/")),
        *(
            "config.json",
            "features.json",
            "identity.json",
            "log.jsonl",
            "summary.json",
            "summary.md",
            "report.html",
        ),
        *(f"{which}/adapter.{kind}" for which in ("best", "last") for kind in ("json", "safetensors")),
        *(f"predictions-{task}.{'csv' if task == 'nlvr2' else 'json'}" for task in TASKS),
        *(f"answers-{task}.png" for task in TASKS),
    }
    assert files(finished.folder).keys() == names
    assert Adapter.load(finished.folder / "best").task == "vqav2+gqa+nlvr2+coco"
    table = (finished.folder / "summary.md").read_text()
    assert f"{5 + 24 + 12 + 6}" in table
    assert all(task in table for task in TASKS)


def test_the_mean_of_the_primary_figures_decides(finished: Finished) -> None:
    training = finished.result.training
    assert training is not None
    lines = {line["step"]: line for line in log(finished.folder) if "dev/vqav2/overall" in line}
    assert [step for step, _ in training.history] == list(lines) == [6, 12]
    for step, score in training.history:
        figures = [lines[step][f"dev/{task}/{figure}"] for task, figure in PRIMARY.items()]
        assert score == pytest.approx(fmean(figures))
        assert len({*figures}) > 1
    best = max(training.history, key=lambda entry: entry[1])
    assert training.best_step == best[0]
    logged = lines[best[0]]
    assert logged.pop("score") == pytest.approx(best[1])
    assert {f"dev/{name}": value for name, value in (training.best_scores or {}).items()} == {
        name: value for name, value in logged.items() if name != "step"
    }


def test_no_task_alone_decides(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first and the last task do best at steps 1 and 3; all together at step 2."""
    pair = replace(config, also=config.also[:1], output_dir=tmp_path / "run")
    given = iter([(60.0, 0.0), (40.0, 50.0), (0.0, 80.0)])
    scores: list[float] = []

    def scripted(model: object, task: Task, *args: object, **options: object) -> Evaluation:
        if not scores:
            scores.extend(next(given))
        return Evaluation({}, {task.primary: scores.pop(0), "other": 99.0}, 0.0)

    monkeypatch.setattr(dept_vl.training.loop, "evaluate", scripted)
    result = main(with_(pair, train={"max_steps": 3, "eval_every": 1}))
    assert result.training is not None
    assert result.training.history == [(1, 30.0), (2, 45.0), (3, 40.0)]
    assert result.training.best_step == 2
    assert result.training.best_scores == {
        **{"vqav2/overall": 40.0, "vqav2/other": 99.0},
        **{"gqa/accuracy": 50.0, "gqa/other": 99.0},
    }
    assert "step 2: dev mean of vqav2 overall, gqa accuracy 45.00" in capsys.readouterr().out


def test_a_configuration_keeps_all_tasks(finished: Finished) -> None:
    again = read_config(finished.folder / "config.json")
    assert replace(again, output_dir=finished.folder) == finished.config.settled()


def test_the_same_task_twice_is_refused_and_nothing_written(config: RunConfig, tmp_path: Path) -> None:
    twice = replace(config, also=(*config.also, config.also[0]), output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"expected different tasks .* found gqa more than once"):
        main(twice)
    assert not (tmp_path / "run").exists()


def test_a_run_has_one_set_of_data_of_ones_own(config: RunConfig) -> None:
    own = [DataOptions(task=task, own=OwnOptions(data="a.jsonl")) for task in ("vqa", "captions")]
    with pytest.raises(ValueError, match=r"found vqa more than once"):
        options_together(replace(config, data=own[0], also=(own[1],)))


def test_what_is_done_with_bad_images_is_said_once(config: RunConfig, tmp_path: Path) -> None:
    gqa = replace(config.also[0], on_bad_image="skip")
    with pytest.raises(ValueError, match=r"one on_bad_image for all tasks, found None in data and 'skip' in"):
        main(replace(config, also=(gqa,), output_dir=tmp_path / "run"))


@pytest.mark.parametrize("feature_memory", [0.0, 1.0])
def test_bad_images_of_every_task_are_skipped(
    config: RunConfig,
    tmp_path: Path,
    feature_memory: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = config.also[0]
    folder = shutil.copytree(options.data_dir, tmp_path / "gqa")
    broken, missing, *_ = load_task("gqa", folder, "testdev").image_files()
    broken.write_bytes(b"no image")
    missing.unlink()
    skipping = with_(
        replace(config, also=(replace(options, data_dir=folder),), output_dir=tmp_path / "run"),
        data={"on_bad_image": "skip", "feature_memory": feature_memory},
        train={"max_steps": 1},
    )
    main(skipping)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["unanswered_examples"] == 8
    assert "8 of 24 examples of gqa have no readable image" in capsys.readouterr().out


def test_two_processes_train_as_one_does(config: RunConfig, tmp_path: Path) -> None:
    """Half the batch each; batches of one and of two images, and texts without a question."""
    one, two = tmp_path / "one", tmp_path / "two"
    also = tuple(replace(options, task_batch_size=0, test_limit=5) for options in config.also)
    config = with_(config, also=also, train={"max_steps": 8, "eval_every": 8, "eval_batch_size": 2})
    expected = main(replace(config, output_dir=one))
    halved = with_(config, train={"per_device_batch_size": 2}, output_dir=two)
    in_two_processes(main_with_quick_captions, halved)
    assert_same(one, two, atol=1e-5)
    assert files(one).keys() == files(two).keys()
    for name in files(one):
        if name.startswith("predictions"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
    assert json.loads((two / "summary.json").read_text())["scores"] == expected.scores
    for mine, other in zip(log(one), log(two), strict=True):
        assert mine["step"] == other["step"]
        assert mine.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), abs=1e-5)
    # Nothing is equal merely because nothing moved.
    assert tensors(two)["prompt.offset_b"].abs().max() > 1e-4
