"""Whole runs on tiny random models: the adapter that is kept, refusals, ends, and broken images."""

import json
import runpy
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import LANGUAGES
from helpers import write_vqa
from runs import assert_same, files, log, reset_accelerate, tensors, with_
from short_runs import FILES, SCRIPT, assert_trained, pristine, short_run

import dept_vl.training.loop
import dept_vl.training.run
from dept_vl.adapters.adapter import Adapter
from dept_vl.cli import parse
from dept_vl.config import DataOptions, RunConfig, to_json
from dept_vl.data.collate import Batch, Collator, Draw
from dept_vl.inference.evaluate import Evaluation
from dept_vl.tasks import coco, load_task
from dept_vl.tasks.metrics.caption import REPORTED, Figures
from dept_vl.tasks.vqav2 import VQAv2
from dept_vl.training.run import run as main
from scripts import train_caption, train_gqa, train_nlvr2

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vqa(tmp_path_factory.mktemp("data") / "vqa", subtypes=("train2014", "val2014", "test2015"))


@pytest.fixture(scope="module")
def configs(
    data_dir: Path, language_folders: dict[str, Path], vision_folders: dict[str, Path]
) -> dict[str, RunConfig]:
    """A short run on each language model."""
    return {
        language: short_run(language, data_dir, language_folders, vision_folders) for language in LANGUAGES
    }


@pytest.fixture
def config(configs: dict[str, RunConfig], tmp_path: Path) -> RunConfig:
    """With T5."""
    return replace(configs["t5"], output_dir=tmp_path / "run")


def scripted(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    """Evaluations during training give these scores, one after the other."""
    given = iter(scores)

    def score(*args: Any, **options: Any) -> Evaluation:
        return Evaluation({}, {"overall": next(given)}, 0.0)

    monkeypatch.setattr(dept_vl.training.loop, "evaluate", score)


def test_the_best_adapter_is_kept_and_scored(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [10.0, 30.0, 30.0, 20.0])
    saved: dict[str, Adapter] = {}
    save = Adapter.save

    def noting(self: Adapter, folder: Path) -> None:
        saved.setdefault(f"{folder.name} {self.metrics['overall']}", self)
        save(self, folder)

    monkeypatch.setattr(Adapter, "save", noting)
    result = main(with_(config, train={"eval_every": 1, "max_steps": 4}))
    assert result.training is not None
    assert result.training.history == [(1, 10.0), (2, 30.0), (3, 30.0), (4, 20.0)]
    assert (result.training.best_step, result.training.best_scores) == (2, {"overall": 30.0})
    final = tensors(result.output_dir, "best")
    assert all(torch.equal(final[name], tensor) for name, tensor in saved["best 30.0"].tensors.items())
    last = tensors(result.output_dir, "last")
    assert not any(torch.equal(final[name], last[name]) for name in ("prompt.soft_prompt", "prompt.offset_b"))


def test_patience_ends_a_run_that_gets_no_better(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [10.0, 5.0, 20.0, 20.0, 19.0])
    result = main(with_(config, train={"eval_every": 1, "patience": 2, "max_steps": 9}))
    assert result.training is not None
    assert (result.training.steps, result.training.best_step) == (5, 3)
    assert result.training.stopped_by == 0
    assert files(result.output_dir).keys() == FILES


@pytest.mark.parametrize("held", ["config.json", "log.jsonl", "best/adapter.json"])
def test_a_folder_that_holds_a_run_is_refused_and_untouched(config: RunConfig, held: str) -> None:
    assert config.output_dir is not None
    path = config.output_dir / held
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="already holds a run; nothing was changed") as error:
        main(config)
    assert str(config.output_dir) in str(error.value)
    assert files(config.output_dir) == {held: b"mine"}


@pytest.mark.parametrize("held", ["report.html", "predictions.json", "scores.json"])
def test_a_folder_with_other_results_is_refused_and_untouched(config: RunConfig, held: str) -> None:
    assert config.output_dir is not None
    config.output_dir.mkdir(parents=True)
    (config.output_dir / held).write_text("mine")
    with pytest.raises(FileExistsError) as error:
        main(config)
    assert held in str(error.value)
    assert files(config.output_dir) == {held: b"mine"}


def test_an_empty_name_is_no_folder_for_a_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(FileExistsError, match="--output_dir"):
        main(replace(config, output_dir=Path("")))
    assert files(tmp_path / "work") == {"mine.txt": b"mine"}


def test_max_source_length_has_to_leave_room_for_the_question(config: RunConfig) -> None:
    with pytest.raises(ValueError, match="max_source_length is 3 tokens, but the task prefix") as error:
        main(with_(config, prompt={"max_source_length": 3}))
    assert "raise max_source_length" in str(error.value)


def test_cut_texts_are_counted(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    main(with_(config, prompt={"max_source_length": 8}, train={"max_steps": 1}))
    assert "max_source_length=8 cuts 9 of the first 9 texts" in capsys.readouterr().out


def test_a_prompt_too_long_for_the_positions_of_bart_is_refused(
    configs: dict[str, RunConfig], tmp_path: Path
) -> None:
    config = replace(configs["bart"], output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"64 positions and the input needs 72: 40 prompt \+ 16 text \+ 16"):
        main(with_(config, prompt={"prompt_length": 40}))


def test_rank_is_solved_from_the_budget(config: RunConfig) -> None:
    result = main(with_(config, prompt={"rank": None, "reference_prompt_length": 20}, train={"max_steps": 1}))
    # (20 - 3) * 32 parameters are left, and a rank costs 16 + 32.
    assert result.trainable["low_rank"] == 11 * 48
    assert result.trainable["without_projection"] <= 20 * 32


def test_a_small_prompt_rate_is_remarked_on(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    main(with_(config, optim={"prompt_lr": 1e-4}, train={"max_steps": 1}))
    assert "warning: prompt_lr=0.0001 is small" in capsys.readouterr().out


def test_a_loss_that_is_no_number_ends_the_run(config: RunConfig) -> None:
    with pytest.raises(ValueError, match="the loss is nan at step 2") as error:
        main(with_(config, optim={"prompt_lr": 1e300}))
    for part in ("lower the learning rates", "ids", str(config.output_dir)):
        assert part in str(error.value)
    assert config.output_dir is not None
    assert not (config.output_dir / "summary.json").exists()


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Arranges for Ctrl-C while the n-th training batch is made, so many times over."""

    def arrange(step: int, times: int = 1) -> None:
        made: list[int] = []
        collate = Collator.__call__

        def interrupted(self: Collator, draws: Sequence[Draw]) -> Any:
            if draws[0].target is not None:
                made.append(1)
                if len(made) == step:
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)
            return collate(self, draws)

        monkeypatch.setattr(Collator, "__call__", interrupted)

    return arrange


@pytest.mark.parametrize(("step", "best_step"), [(2, 2), (5, 3)], ids=["before", "after"])
def test_ctrl_c_ends_the_run_after_the_step_and_saves_the_adapter(
    config: RunConfig,
    interrupt: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    step: int,
    best_step: int,
) -> None:
    """Before the first evaluation, which is then made, and after it."""
    before = signal.getsignal(signal.SIGINT)
    interrupt(step)
    result = main(config)
    assert signal.getsignal(signal.SIGINT) is before
    assert result.training is not None
    assert result.training.stopped_by == signal.SIGINT
    assert (result.training.steps, result.training.best_step) == (step, best_step)
    assert result.scores == {}
    left = files(result.output_dir).keys()
    assert left == {
        name
        for name in FILES
        if name.startswith(("best", "last", "log", "config", "features", "identity", ".checksums"))
    }
    assert f"stopped at step {step}" in capsys.readouterr().out
    Adapter.load(result.output_dir / "best").build(pristine(config))
    assert_trained(result.output_dir, config)


def test_an_echo_of_ctrl_c_is_no_second_one(config: RunConfig, interrupt: Callable[..., None]) -> None:
    interrupt(2, times=3)
    result = main(config)
    assert result.training is not None
    assert (result.training.stopped_by, result.training.steps) == (signal.SIGINT, 2)


def test_a_second_ctrl_c_ends_the_run_at_once(
    config: RunConfig, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dept_vl.training.loop, "ECHO_SECONDS", -1.0)
    before = signal.getsignal(signal.SIGINT)
    interrupt(2, times=2)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_script_reads_flags_and_reports_ctrl_c(
    configs: dict[str, RunConfig],
    interrupt: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(configs["t5"])))
    argv = [str(SCRIPT), "--config", str(file), "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert files(tmp_path / "run").keys() == FILES
    interrupt(1)
    monkeypatch.setattr(sys, "argv", [*argv[:4], str(tmp_path / "stopped"), *argv[5:]])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 130
    assert (tmp_path / "stopped" / "best" / "adapter.safetensors").is_file()


def test_tensorboard_is_logged_to(config: RunConfig) -> None:
    pytest.importorskip("tensorboard")
    result = main(with_(config, log_with="tensorboard", train={"max_steps": 2}))
    events = [path for path in result.output_dir.rglob("events.out.tfevents.*") if path.stat().st_size]
    assert events
    assert any(b"dev/overall" in path.read_bytes() for path in events)


def test_a_run_names_a_new_folder_where_none_is_given(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = main(with_(config, output_dir=None, train={"max_steps": 1}))
    assert result.output_dir.parent == Path("runs")
    assert result.output_dir.name.startswith("vqav2-2")
    assert (tmp_path / result.output_dir / "summary.json").is_file()


def test_runs_of_one_second_have_a_folder_each(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: form.partition("%")[0] + "now")
    folders = []
    for seed in (1, 2, 3):
        result = main(with_(config, output_dir=None, train={"max_steps": 1, "seed": seed}))
        folders.append(result.output_dir)
        assert json.loads((result.output_dir / "config.json").read_text())["train"]["seed"] == seed
        reset_accelerate()
    assert folders == [Path("runs", name) for name in ("vqav2-now", "vqav2-now-2", "vqav2-now-3")]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"data": {"train_split": "elsewhere"}}, ValueError),
        ({"data": {"data_dir": Path("nowhere")}}, FileNotFoundError),
        ({"data": {"features": "cached"}}, FileNotFoundError),
        ({"backbone": {"train_only": "lora"}}, ValueError),
    ],
)
def test_a_run_that_is_refused_may_be_put_right(
    config: RunConfig, wrong: dict[str, Any], error: type[Exception]
) -> None:
    assert config.output_dir is not None
    short = with_(config, train={"max_steps": 1})
    with pytest.raises(error):
        main(with_(short, **wrong))
    assert not (config.output_dir / "config.json").exists()
    reset_accelerate()
    assert (main(short).output_dir / "summary.json").is_file()


@pytest.fixture
def damaged(config: RunConfig, tmp_path: Path) -> RunConfig:
    """On a copy of the data, to be damaged; each image is trained on several times."""
    data_dir = shutil.copytree(config.data.data_dir, tmp_path / "data")
    return with_(config, data={"data_dir": data_dir, "dev_split": "val"}, train={"max_steps": 6})


def image_of(config: RunConfig, split: str, place: int) -> Path:
    return VQAv2().load(config.data.data_dir, split).image_files()[place]


def skipped(folder: Path) -> tuple[int, int]:
    """Examples skipped in training, and those without an answer."""
    summary = json.loads((folder / "summary.json").read_text())
    return summary["skipped_examples"], summary["unanswered_examples"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_training_images_are_skipped_and_counted(
    damaged: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    image_of(damaged, "train", 1).write_bytes(b"no image")
    learnt: list[int] = []
    inputs = Batch.training_inputs

    def noting(batch: Batch) -> dict[str, Any]:
        learnt.extend(int(key) for key in batch.ids)
        return inputs(batch)

    monkeypatch.setattr(Batch, "training_inputs", noting)
    table, live = tmp_path / "table", tmp_path / "live"
    main(replace(damaged, output_dir=table))
    of_the_table, learnt[:] = learnt.copy(), []
    config = with_(damaged, data={"feature_memory": 0.0}, train={"num_workers": num_workers})
    main(replace(config, output_dir=live))
    assert learnt == of_the_table
    # Two epochs of four images with three questions each.
    assert Counter(learnt) == {key: 2 for image in (0, 2, 3) for key in range(10 * image, 10 * image + 3)}
    for folder in (table, live):
        assert skipped(folder) == (6, 0)
        assert log(folder)[-2]["skipped_examples"] == 6
        assert "training examples skipped, image not readable" in (folder / "summary.md").read_text()
    assert_same(table, live, atol=1e-5)


def test_missing_training_images_are_left_out_from_the_start(
    damaged: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    image_of(damaged, "train", 1).unlink()
    result = main(damaged)
    assert skipped(result.output_dir) == (0, 0)
    assert "1 images of vqav2 are missing; 3 of 12 training examples" in capsys.readouterr().out
    assert not any("skipped_examples" in line for line in log(result.output_dir))


@pytest.mark.parametrize("feature_memory", [0.0, 1.0])
def test_bad_training_images_stop_a_run_that_is_told_so(
    damaged: RunConfig, tmp_path: Path, feature_memory: float
) -> None:
    path = image_of(damaged, "train", 1)
    path.write_bytes(b"no image")
    data = {"on_bad_image": "raise", "feature_memory": feature_memory}
    with pytest.raises(ValueError, match="is not a readable image") as error:
        main(with_(damaged, data=data))
    assert str(path) in str(error.value)
    assert "--on_bad_image skip" in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 images of vqav2 are missing"):
        main(with_(damaged, data=data, output_dir=tmp_path / "again"))


def test_a_batch_without_a_readable_image_ends_the_run(damaged: RunConfig) -> None:
    for path in VQAv2().load(damaged.data.data_dir, "train").image_files():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image of the batch at step 1 could be read \(ids \["):
        main(damaged)


@pytest.mark.parametrize("feature_memory", [0.0, 1.0])
def test_evaluation_stops_at_a_broken_image_unless_told_to_skip(
    damaged: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], feature_memory: float
) -> None:
    path = image_of(damaged, "val", 2)
    path.write_bytes(path.read_bytes()[:100])
    config = with_(damaged, data={"feature_memory": feature_memory}, train={"max_steps": 1})
    with pytest.raises(ValueError, match="is not a readable image") as error:
        main(replace(config, output_dir=tmp_path / "stopped"))
    assert str(path) in str(error.value)
    result = main(with_(config, data={"on_bad_image": "skip"}))
    assert skipped(result.output_dir) == (0, 3)
    predictions = json.loads((result.output_dir / "predictions.json").read_text())
    assert [row["question_id"] for row in predictions if not row["answer"]] == [10_020, 10_021, 10_022]
    assert len(predictions) == 12
    assert "3 of 12 examples of vqav2 have no readable image" in capsys.readouterr().out


@pytest.fixture
def flags(language_folders: dict[str, Path], vision_folders: dict[str, Path], tmp_path: Path) -> list[str]:
    """A short run on the command line, of any of the scripts."""
    options = {
        **{"vision": vision_folders["clip"], "language": language_folders["t5"]},
        **{"prompt_length": 3, "rank": 2, "reference_prompt_length": 6},
        **{"max_steps": 2, "per_device_batch_size": 4, "output_dir": tmp_path / "run"},
    }
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("script", "task", "test_split", "figures"),
    [
        (train_gqa, "gqa", "testdev", {"accuracy", "binary", "open", "validity", "plausibility"}),
        (train_nlvr2, "nlvr2", "test1", {"accuracy", "consistency"}),
        (train_caption, "coco", "test", {"CIDEr", "Bleu_4", "METEOR", "ROUGE_L"}),
    ],
)
def test_each_task_has_its_script(
    script: ModuleType,
    task: str,
    test_split: str,
    figures: set[str],
    scenes: Path,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored: list[dict[int, str]] = []

    def scorer(references: Any, predictions: dict[int, str], *, meteor: bool) -> Figures:
        scored.append(predictions)
        return {name: float(n) for n, name in enumerate(REPORTED)} | {"scale": 100, "n": len(references)}

    monkeypatch.setattr(coco, "score_captions", scorer)
    result = main(parse(script.DEFAULTS, "Train.", [*flags, "--data_dir", str(scenes / task)]))
    tested = load_task(task, scenes / task, test_split)
    kind = tested.prediction_format.suffix
    assert files(result.output_dir).keys() == FILES - {"predictions.json"} | {f"predictions{kind}"}
    predictions = tested.prediction_format.read(result.output_dir / f"predictions{kind}")
    assert predictions.keys() == {*tested.example_ids()}
    assert tested.score(predictions) == result.scores
    assert figures <= result.scores.keys()
    assert result.training is not None
    assert result.training.best_scores is not None
    assert result.training.best_scores.keys() == result.scores.keys()
    assert tensors(result.output_dir)["prompt.offset_b"].abs().max() > 0
    # On the dev split, then on the test split, each image with one caption.
    assert [len(captions) for captions in scored[:2]] == ([6, 6] if task == "coco" else [])


def test_both_images_of_an_example_count_among_the_positions_of_bart(
    configs: dict[str, RunConfig], scenes: Path, tmp_path: Path
) -> None:
    data = DataOptions(
        task="nlvr2", data_dir=scenes / "nlvr2", train_split="train", dev_split="dev", test_split="test1"
    )
    config = replace(configs["bart"], data=data, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"64 positions .* needs 68: 20 prompt \+ 16 text \+ 32 visual"):
        main(with_(config, prompt={"prompt_length": 20}))
