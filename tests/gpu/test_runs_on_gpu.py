"""Whole runs on a GPU: resumed to the bit, on features from files, and with steps as CUDA graphs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_features, random_labels, random_text
from helpers import write_vqa
from on_gpu import DEVICE, GRAPHED, MARKS, NEAR, distance
from runs import assert_same, reset_accelerate, tensors, with_
from torch import Tensor

from benchmarks.features import with_features
from dept_vl.config import DataOptions, OptimOptions, RunConfig
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from dept_vl.training.graphs import GraphedStep
from dept_vl.training.optim import build_optimizer
from dept_vl.training.run import run

pytestmark = [*MARKS, pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture
def config(make_run: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa", images=5), holdout_images=1)
    return make_run(data, dropout=True, max_steps=6, per_device_batch_size=3, eval_every=3)


def trained(config: RunConfig, folder: Path) -> Path:
    """Run to the end, as far as it is not done yet."""
    reset_accelerate()
    run(with_(config, output_dir=folder, resume="auto"), more_to_come=True)
    return folder


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("cuda_graphs", [False, pytest.param(True, marks=GRAPHED)])
def test_resumed_to_the_bit(config: RunConfig, tmp_path: Path, cuda_graphs: bool, precision: str) -> None:
    options = {"deterministic": True, "cuda_graphs": cuda_graphs}
    config = with_(config, mixed_precision=precision, train=options)
    try:
        whole = trained(config, tmp_path / "whole")
        trained(with_(config, train={"pause_at": 3}), tmp_path / "resumed")
        resumed = trained(config, tmp_path / "resumed")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(whole, resumed)


@GRAPHED
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_on_graphs_is_the_same(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    config = with_(config, mixed_precision=precision)
    plain = trained(config, tmp_path / "plain")
    graphs = trained(with_(config, train={"cuda_graphs": True}), tmp_path / "graphs")
    assert "not recorded" not in capsys.readouterr().out
    expected = tensors(plain, "last")
    for name, tensor in tensors(graphs, "last").items():
        assert distance(tensor, expected[name]) < (1e-3 if precision == "no" else 0.05), name


def test_features_from_files_train_the_same(config: RunConfig, tmp_path: Path) -> None:
    live = trained(with_(config, data={"features": "live"}), tmp_path / "live")
    reset_accelerate()
    cached = trained(with_features(config, tmp_path / "features"), tmp_path / "cached")
    expected = tensors(live, "last")
    for name, tensor in tensors(cached, "last").items():
        assert distance(tensor, expected[name]) < 1e-2, name


def step_of(model: PromptedModel, *, waits: bool = False) -> Callable[[dict[str, Tensor | None]], Tensor]:
    def backward(inputs: dict[str, Tensor | None]) -> Tensor:
        loss = model(**inputs).loss
        if waits:
            loss.item()
        loss.backward()
        return loss.detach()

    return backward


def model_of(backbone: Backbone, *, dropout: bool) -> PromptedModel:
    torch.manual_seed(2)
    prompt = DePT(backbone.d_model, prompt_length=3, rank=2, max_source_length=12)
    return PromptedModel(backbone, prompt, backbone_dropout=dropout).to(DEVICE).train()


def batches_of(backbone: Backbone) -> list[dict[str, Tensor | None]]:
    made = []
    for seed, lengths in enumerate([(9, 4, 5), (7, 7, 7), (9, 9, 2), (7, 3, 1), (4, 2)]):
        labels = random_labels((4, 2, 3)[: len(lengths)], seed=seed)
        features = random_features(backbone, len(lengths), seed=seed)
        batch = random_text(backbone, lengths, seed=seed) | {"labels": labels, "visual_features": features}
        made.append({name: tensor.to(DEVICE) for name, tensor in batch.items()})
    return made


@GRAPHED
@pytest.mark.parametrize("dropout", [False, True])
def test_graphs_take_the_steps_of_the_plain_ones(t5: Backbone, dropout: bool) -> None:
    model = model_of(t5, dropout=dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    graphed = GraphedStep(step_of(model), parameters, [3], DEVICE, pytest.fail)
    optimizer = build_optimizer(model.parameter_groups(), OptimOptions())
    for _ in range(2):
        for batch in batches_of(t5):
            torch.manual_seed(4)
            expected = step_of(model)(batch)
            theirs = [p.grad for p in parameters]
            ahead = torch.rand(1, device=DEVICE)
            optimizer.zero_grad()
            torch.manual_seed(4)
            assert distance(graphed(batch), expected) < 1e-5
            assert torch.equal(torch.rand(1, device=DEVICE), ahead)  # as many numbers were drawn
            assert max(map(distance, [p.grad for p in parameters], theirs)) < NEAR
            optimizer.step()
            optimizer.zero_grad()
    assert len(graphed.recorded) == 2


@GRAPHED
def test_a_step_that_waits_is_taken_plainly(t5: Backbone) -> None:
    model = model_of(t5, dropout=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    reports: list[str] = []
    graphed = GraphedStep(step_of(model, waits=True), parameters, [3], DEVICE, reports.append)
    for batch in batches_of(t5):
        torch.manual_seed(4)
        expected = step_of(model)(batch)
        model.zero_grad()
        torch.manual_seed(4)
        assert distance(graphed(batch), expected) < 1e-5
    assert len(reports) == 1
