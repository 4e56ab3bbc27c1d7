"""Whole runs on tiny random models: what they leave behind, whether they repeat, and how they end."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import LANGUAGES
from helpers import write_vqa
from PIL import Image
from runs import assert_same, files, in_two_processes, log, reset_accelerate, tensors, with_
from short_runs import FILES, ROOT, SCRIPT, STEPS, assert_trained, pristine, short_run

import dept_vl.training.loop
import dept_vl.training.run
from dept_vl._utils.errors import UnknownNameError
from dept_vl.adapters.adapter import Adapter
from dept_vl.cli import parse
from dept_vl.config import DataOptions, RunConfig, TrainOptions, to_json
from dept_vl.data.collate import Collator
from dept_vl.data.splits import load_splits
from dept_vl.inference.evaluate import evaluate
from dept_vl.inference.loading import load
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.tasks.vqav2 import VQAv2
from dept_vl.training.optim import steps_of_epochs
from dept_vl.training.run import run as main
from dept_vl.training.summary import RunResult

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
GROUPS = ("prompt", "low_rank", "visual_projection")


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


def test_epochs_are_steps(config: RunConfig, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Nine training questions in batches of four are three batches an epoch.
    epochs = replace(config.train, num_epochs=2, per_device_batch_size=4, max_steps=99)
    training = main(replace(config, train=epochs)).training
    assert training is not None
    assert training.steps == 6
    assert "2 epochs are 6 steps" in capsys.readouterr().out
    captions = load_splits(DataOptions(task="coco", data_dir=scenes / "coco", meteor=False), 0)
    counted = [len(captions.train[place].answers) for place in range(len(captions.train))]
    assert captions.train.draws_per_epoch() == sum(counted) > len(captions.train)
    for size, accumulated, processes in ((5, 2, 2), (20, 1, 1), (1, 10, 2)):
        options = TrainOptions(
            num_epochs=3, per_device_batch_size=size, gradient_accumulation_steps=accumulated
        )
        assert steps_of_epochs(options, [captions], processes) == 3 * -(-sum(counted) // 20)


def test_an_adapter_says_in_which_case_questions_are_read(config: RunConfig) -> None:
    kept = replace(config, data=replace(config.data, question_case="keep"))
    folder = main(kept).output_dir
    assert Adapter.load(folder / "best").question_case == "keep"
    for source in (folder, folder / "best"):
        assert load(source).task.source("Is it NATO?") == "vqa: Is it NATO?"


def test_the_best_adapter_is_chosen_by_the_metric_that_is_named(config: RunConfig, tmp_path: Path) -> None:
    named = replace(config, data=replace(config.data, choose_by="answer_type/other"))
    scored = [record for record in log(main(named).output_dir) if "score" in record]
    assert scored
    assert all(record["score"] == record["dev/answer_type/other"] for record in scored)
    with pytest.raises(UnknownNameError, match="CIDEr"):
        main(with_(config, output_dir=tmp_path / "x", data={"choose_by": "CIDEr"}))


@dataclass
class Finished:
    """A run that was made once, for several tests to look at."""

    config: RunConfig
    result: RunResult
    model: PromptedModel
    folder: Path


@pytest.fixture(scope="module", params=LANGUAGES)
def finished(
    request: pytest.FixtureRequest, configs: dict[str, RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    folder = tmp_path_factory.mktemp("runs") / request.param
    config = replace(configs[request.param], output_dir=folder)
    built: list[PromptedModel] = []

    def keeping(*args: Any) -> PromptedModel:
        built.append(build_model(*args))
        return built[0]

    build_model = dept_vl.training.run.build_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dept_vl.training.run, "build_model", keeping)
        reset_accelerate()
        result = main(config)
    return Finished(config, result, built[0], folder)


def test_a_run_leaves_all_its_files(finished: Finished) -> None:
    assert files(finished.folder).keys() == FILES
    with Image.open(finished.folder / "answers.png") as picture:
        assert picture.format == "PNG"


def test_config_is_written_whole(finished: Finished) -> None:
    assert json.loads((finished.folder / "config.json").read_text()) == to_json(finished.config.settled())


def test_log_has_loss_rates_and_scores(finished: Finished) -> None:
    lines = log(finished.folder)
    losses = {line["step"]: line for line in lines if "loss" in line}
    scores = {line["step"]: line for line in lines if "dev/overall" in line}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert list(scores) == [3, 6]
    for step, line in losses.items():
        assert math.isfinite(line["loss"])
        assert line["samples_per_second"] > 0
        for group, peak in zip(GROUPS, (0.05, 1e-3, 1e-3), strict=True):
            assert line[f"lr/{group}"] == pytest.approx(peak * (STEPS - step + 1) / STEPS)
    # One image is held out, with its three questions.
    assert {name for name in scores[3] if name.startswith("dev/answer_type/")} == {
        "dev/answer_type/other",
        "dev/answer_type/yes/no",
        "dev/answer_type/number",
    }


def test_every_test_question_is_answered(finished: Finished) -> None:
    predictions = json.loads((finished.folder / "predictions.json").read_text())
    task = VQAv2().load(finished.config.data.data_dir, "val")
    assert [row["question_id"] for row in predictions] == task.example_ids()
    assert task.score({row["question_id"]: row["answer"] for row in predictions}) == finished.result.scores


def test_summary_has_scores_parameters_and_lengths(finished: Finished) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["scores"] == finished.result.scores
    assert summary["trainable_parameters"] == finished.result.trainable
    assert summary["trainable_parameters"].keys() == {*GROUPS, "total", "without_projection"}
    assert (summary["steps"], summary["best_step"] in (3, 6)) == (STEPS, True)
    # 16 visual tokens; the reference prompt has 6 vectors, this one 3.
    text = summary["tokens_per_example"] - 16 - 3
    assert 5 < text <= 16
    assert summary["reference_tokens_per_example"] == pytest.approx(text + 16 + 6, abs=0.02)
    table = (finished.folder / "summary.md").read_text()
    for part in (f"{summary['scores']['overall']:.2f}", "vqav2 val: overall (0-100)", "6 steps", "saved"):
        assert part in table
    assert f"{summary['trainable_parameters']['total']:,}" in table


def test_adapter_names_its_task_backbone_and_score(finished: Finished) -> None:
    adapter = Adapter.load(finished.folder / "best")
    assert (adapter.task, adapter.metrics) == ("vqav2", finished.result.scores)
    assert adapter.trainable_parameters == finished.result.trainable
    assert adapter.backbone["fingerprint"] == finished.model.backbone.fingerprint


def test_only_the_adapter_differs_from_the_pristine_backbone(finished: Finished) -> None:
    before = pristine(finished.config).state_dict()
    after = finished.model.backbone.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.split(".")[0] for name in changed} == {"visual_projection"}
    assert_trained(finished.folder, finished.config)
    for name, parameter in finished.model.named_parameters():
        trained = name.startswith(("prompt.", "backbone.visual_projection.")) and "object_order" not in name
        assert parameter.requires_grad == trained
        assert trained or parameter.grad is None


def test_the_best_adapter_on_a_fresh_backbone_answers_as_the_run_did(finished: Finished) -> None:
    config = finished.config
    backbone = Backbone.from_pretrained(vision=config.backbone.vision, language=config.backbone.language)
    model = Adapter.load(finished.folder / "best").build(backbone)
    collator = Collator(
        backbone.tokenizer, max_source_length=16, max_target_length=10, images=backbone.vision
    )
    task = VQAv2().load(config.data.data_dir, "val")
    answered = evaluate(model, task, collator, Accelerator(cpu=True), batch_size=5)
    predictions = json.loads((finished.folder / "predictions.json").read_text())
    assert answered.predictions == {row["question_id"]: row["answer"] for row in predictions}
    assert answered.scores == finished.result.scores


def test_repeating_from_the_written_config_is_bit_identical(finished: Finished, tmp_path: Path) -> None:
    flags = ["--config", str(finished.folder / "config.json"), "--output_dir", str(tmp_path / "again")]
    result = main(parse(RunConfig(), "Train.", flags))
    assert_same(finished.folder, tmp_path / "again")
    assert result.scores == finished.result.scores
    ours, again = files(finished.folder), files(tmp_path / "again")
    for name in ("predictions.json", "answers.png", "best/adapter.json"):
        assert ours[name] == again[name]


def test_dropout_is_repeated_too_and_changes_the_run(config: RunConfig, tmp_path: Path) -> None:
    with_dropout = with_(config, backbone={"backbone_dropout": True}, train={"max_steps": 3})
    main(replace(with_dropout, output_dir=tmp_path / "one"))
    main(replace(with_dropout, output_dir=tmp_path / "two"))
    assert_same(tmp_path / "one", tmp_path / "two")
    main(with_(config, train={"max_steps": 3}))
    lora = "prompt.offset_b"
    assert not torch.allclose(tensors(tmp_path / "one")[lora], tensors(tmp_path / "run")[lora], atol=1e-6)


def test_another_seed_gives_another_run(finished: Finished, tmp_path: Path) -> None:
    main(with_(finished.config, train={"seed": 6, "max_steps": 1}, output_dir=tmp_path / "other"))
    name = "prompt.soft_prompt"
    assert not torch.allclose(tensors(tmp_path / "other")[name], tensors(finished.folder)[name], atol=0.1)


def test_pixels_at_every_step_train_as_the_feature_table_does(finished: Finished, tmp_path: Path) -> None:
    main(with_(finished.config, data={"feature_memory": 0.0}, output_dir=tmp_path / "live"))
    assert_same(finished.folder, tmp_path / "live", atol=1e-5)


def test_accumulated_batches_train_as_one_large_batch(config: RunConfig, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(with_(config, train={"per_device_batch_size": 8}, output_dir=whole))
    main(with_(config, train={"gradient_accumulation_steps": 2}, output_dir=parts))
    assert_same(whole, parts, atol=1e-5)
    for one, other in zip(log(whole), log(parts), strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), abs=1e-5)
    assert_trained(whole, config)


def test_images_read_by_workers_train_the_same(config: RunConfig, tmp_path: Path) -> None:
    config = with_(config, train={"max_steps": 2}, data={"feature_memory": 0.0})
    main(config)
    main(with_(config, train={"num_workers": 1}, output_dir=tmp_path / "workers"))
    assert_same(tmp_path / "run", tmp_path / "workers")


def test_bfloat16_trains(config: RunConfig) -> None:
    result = main(with_(config, mixed_precision="bf16", train={"max_steps": 2}))
    assert result.training is not None
    assert result.training.steps == 2
    assert all(tensor.dtype == torch.float32 for tensor in tensors(result.output_dir).values())


def test_compiled_run_is_the_same(
    config: RunConfig, tmp_path: Path, graphs: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"gradient_checkpointing": True, "max_steps": 4, "eval_every": 2}
    plain = with_(config, mixed_precision="bf16", train=options)
    main(plain)
    assert graphs() == 0
    reset_accelerate()
    main(with_(plain, train={"compile": True}, output_dir=tmp_path / "compiled"))
    # Evaluations came between the steps, and compiled nothing of their own.
    assert 1 <= graphs() <= 8
    assert_same(Path(config.output_dir or ""), tmp_path / "compiled", atol=1e-2)


def test_full_fine_tuning_keeps_the_language_model_in_the_adapter(config: RunConfig) -> None:
    result = main(with_(config, backbone={"train_backbone": True}, train={"max_steps": 2}))
    before = pristine(config).language.state_dict()
    found = tensors(result.output_dir)
    moved = [
        name
        for name, tensor in before.items()
        if f"language.{name}" in found and not torch.equal(tensor, found[f"language.{name}"])
    ]
    assert "shared.weight" in moved
    assert result.trainable["backbone"] == sum(
        parameter.numel() for parameter in pristine(config).language.parameters()
    )


def test_nothing_trained_is_the_bare_backbone(config: RunConfig) -> None:
    result = main(with_(config, prompt={"prompt_length": 0, "rank": 0}, backbone={"train_projection": False}))
    assert result.training is None
    assert result.trainable["total"] == 0
    assert set(files(result.output_dir)) == {name for name in FILES if not name.startswith(("last", "log"))}
    assert json.loads((result.output_dir / "summary.json").read_text())["steps"] == 0
    assert all(name.startswith("visual_projection.") for name in tensors(result.output_dir, "best"))


def test_a_dev_split_can_be_named(config: RunConfig) -> None:
    result = main(with_(config, data={"dev_split": "val"}, train={"max_steps": 3}))
    assert result.training is not None
    # Chosen and scored on the same questions.
    assert result.training.best_scores == result.scores


def test_limits_are_kept(config: RunConfig) -> None:
    result = main(with_(config, data={"dev_limit": 2, "test_limit": 5}, train={"max_steps": 1}))
    assert len(json.loads((result.output_dir / "predictions.json").read_text())) == 5
    splits = load_splits(replace(config.data, dev_limit=2, test_limit=5), seed=0)
    assert (len(splits.dev), len(splits.test)) == (2, 5)


def test_a_test_split_without_answers_is_answered(config: RunConfig) -> None:
    result = main(with_(config, data={"test_split": "test"}, train={"max_steps": 1}))
    assert result.scores == {}
    assert files(result.output_dir).keys() == FILES
    predictions = json.loads((result.output_dir / "predictions.json").read_text())
    assert [row["question_id"] for row in predictions][:3] == [20_000, 20_001, 20_002]


@pytest.mark.parametrize("option", ["train_split", "dev_split"])
def test_a_split_without_answers_is_not_trained_on(config: RunConfig, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=test .*no published answers"):
        main(with_(config, data={option: "test"}))


def launch(config: RunConfig, file: Path) -> None:
    """Train in two processes, as a launcher starts the script."""
    file.write_text(json.dumps(to_json(config)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `accelerate launch --cpu --num_processes 2` starts one process where there is no MPI.
    launch = [
        *[sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
        *["--master_port", str(port), str(SCRIPT)],
    ]
    done = subprocess.run(
        [*launch, "--config", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(config: RunConfig, tmp_path: Path, launched: bool) -> None:
    config = with_(config, train={"max_steps": 4, "eval_every": 2, "eval_batch_size": 5})
    one, two = tmp_path / "one", tmp_path / "two"
    expected = main(with_(config, train={"per_device_batch_size": 8}, output_dir=one))
    both = replace(config, output_dir=two)
    if launched:
        launch(both, tmp_path / "config.json")
    else:
        in_two_processes(main, both)
    assert_same(one, two, atol=1e-5)
    assert_trained(two, config)
    assert json.loads((two / "summary.json").read_text())["scores"] == expected.scores
    assert json.loads((two / "predictions.json").read_text()) == json.loads(
        (one / "predictions.json").read_text()
    )
    assert files(two).keys() == FILES
    for mine, other in zip(log(one), log(two), strict=True):
        assert mine["step"] == other["step"]
        assert mine.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), abs=1e-5)


def test_deterministic_runs_are_the_same_to_the_bit(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # what is set afterwards is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    config = with_(config, train={"deterministic": True, "max_steps": 2}, backbone={"backbone_dropout": True})
    benchmark = torch.backends.cudnn.benchmark
    try:
        main(config)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        reset_accelerate()
        main(replace(config, output_dir=tmp_path / "again"))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.benchmark = benchmark
    assert_same(tmp_path / "run", tmp_path / "again")
    assert_trained(tmp_path / "run", config)
