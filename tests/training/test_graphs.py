"""Steps as graphs: what is recorded, with a recorder that runs on any device, and when nothing is."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from helpers import write_vqa
from runs import assert_same, with_
from torch import Tensor, nn

from dept_vl.config import DataOptions, RunConfig, TrainOptions
from dept_vl.models import graphs
from dept_vl.models.graphs import SHAPES, TILE, padding_multiple
from dept_vl.training import run as training_run
from dept_vl.training.graphs import GraphedStep, why_not
from dept_vl.training.run import run

CPU = torch.device("cpu")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Recorded steps that are computed again at every replay; a number for each recording."""
    made: list[int] = []

    def record(step: Callable[[], Tensor], pool: object, device: torch.device) -> tuple[Any, Tensor]:
        loss = torch.full((), torch.nan)
        made.append(len(made))
        return lambda: loss.copy_(step()), loss

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(graphs, "aside", lambda device: nullcontext())
    return made


def step_of(model: nn.Module) -> Callable[[dict[str, Tensor | None]], Tensor]:
    def backward(inputs: dict[str, Tensor | None]) -> Tensor:
        loss: Tensor = model(inputs["x"]).square().mean()
        loss.backward()
        return loss.detach()

    return backward


@pytest.mark.parametrize(
    ("device", "options", "word"),
    [
        ("cpu", {}, "cpu"),
        ("cuda", {"num_processes": 2}, "2 processes"),
        ("cuda", {"gradient_accumulation_steps": 3}, "3"),
        ("cuda", {"gradient_checkpointing": True}, "checkpointing"),
        ("cuda", {"pretrained": True}, "pretrained"),
        ("cuda", {"encoded": True}, "encoder"),
        ("cuda", {}, ""),
    ],
)
def test_reasons(device: str, options: dict[str, Any], word: str) -> None:
    options = dict(options)
    kinds = {name: options.pop(name, False) for name in ("pretrained", "encoded")}
    processes = options.pop("num_processes", 1)
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.device, accelerator.num_processes = torch.device(device), processes
    reason = why_not(accelerator, TrainOptions(**options), **kinds)
    assert bool(reason) == bool(word)
    assert word in reason


@pytest.mark.parametrize("longest", [1, 20, 128, 129, 512])
def test_few_lengths(longest: int) -> None:
    multiple = padding_multiple(longest)
    assert multiple % TILE == 0
    assert -(-longest // multiple) <= SHAPES
    assert multiple == TILE or longest > TILE * SHAPES


def test_gradients_of_any_order_of_shapes(recordings: list[int]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    unused = nn.Parameter(torch.ones(2))
    trained = [*model.parameters(), unused]
    graphed = GraphedStep(step_of(model), trained, [2, 5], CPU, pytest.fail)
    batches = [torch.randn(rows, 3) for rows in (2, 5, 2, 3, 5, 2)]
    for number, batch in enumerate(batches):
        found = []
        for backward in (graphed, step_of(model)):
            torch.manual_seed(number)
            loss = backward({"x": batch, "missing": None})
            found.append((loss, [p.grad if p.grad is None else p.grad.clone() for p in trained]))
            for parameter in trained:
                parameter.grad = None
        (loss, gradients), (expected, theirs) = found
        assert torch.equal(loss, expected)
        # What takes no part gets no gradient, or the optimizer would move it.
        assert gradients[-1] is None
        assert all(torch.equal(a, b) for a, b in zip(gradients[:-1], theirs[:-1], strict=True))
    assert len(recordings) == 2  # three rows are not recorded


def test_a_loss_outlives_the_next_step(recordings: list[int]) -> None:
    model = nn.Linear(3, 4)
    graphed = GraphedStep(step_of(model), list(model.parameters()), [2], CPU, pytest.fail)
    first, second = (graphed({"x": torch.full((2, 3), value)}) for value in (1.0, 5.0))
    assert first != second


def test_falls_back_and_says_why(recordings: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "record", broken)
    model = nn.Linear(3, 4)
    reports: list[str] = []
    graphed = GraphedStep(step_of(model), list(model.parameters()), [2], CPU, reports.append)
    batch = torch.randn(2, 3)
    for _ in range(2):
        loss = graphed({"x": batch})
    gradient = model.weight.grad.clone()
    model.zero_grad()
    assert torch.equal(step_of(model)({"x": batch}), loss)
    assert torch.equal(gradient, model.weight.grad)
    assert len(reports) == 1
    assert "operation not permitted when stream is capturing" in reports[0]


@pytest.fixture
def config(make_run: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa", images=5), holdout_images=1)
    plain = make_run(data, dropout=True, max_steps=4, per_device_batch_size=3)
    return with_(plain, output_dir=tmp_path / "plain")


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_on_graphs_is_the_same(
    config: RunConfig, recordings: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training_run, "padding_multiple", lambda longest: 1)  # as the plain run pads
    monkeypatch.setattr(training_run, "why_not", lambda *given, **options: "")
    run(config, more_to_come=True)
    assert not recordings
    run(with_(config, train={"cuda_graphs": True}, output_dir=tmp_path / "graphs"), more_to_come=True)
    assert recordings
    assert_same(tmp_path / "plain", tmp_path / "graphs")


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_without_a_gpu_says_so(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(with_(config, train={"cuda_graphs": True, "max_steps": 1}))
    assert capsys.readouterr().out.count("not recorded as CUDA graphs") == 1
