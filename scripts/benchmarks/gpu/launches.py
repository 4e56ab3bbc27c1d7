"""Steps bound by kernel launches: eager, as CUDA graphs, and with compiled layers, at several batch sizes."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.backbones import SHAPES, SIZES, Inputs, build_backbone, draw_batch
from benchmarks.gpu.results import TOKENIZER, Entry, Measuring
from benchmarks.methods import COMPILED, Runner, build_runners, has_peft, ours
from dept_vl.inference.graphed import GraphedAnswers
from dept_vl.models.backbone import Backbone
from dept_vl.models.precision import choose_attention, hold_frozen_in_bfloat16, prepare_step
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import METHODS as PROMPT_METHODS
from dept_vl.prompts.base import sized
from dept_vl.prompts.dept import DePT
from dept_vl.training.graphs import GraphedStep

BATCHES = (64, 256, 16)
METHODS = ("dept40", "pt100", "constant", "floor", "lora8")
OWN_METHODS = ("memory",)
"""Methods in addition to the benchmark's. Steps of all other methods are like one of these."""
TOKENS = 4
"""Number of tokens of an answer."""


def measure(measuring: Measuring, root: Path) -> None:
    """Measure steps for each batch size, method and way, and short answers."""
    device, shape = measuring.device, SHAPES["vl"]
    backbone = _backbone(measuring, root)
    names = [name for name in METHODS if has_peft() or name != "lora8"]
    stock = copy.deepcopy(backbone.language) if has_peft() else None
    runners = build_runners(names, backbone, shape, stock=stock)
    runners |= {name: ours(backbone, _prompt(name, backbone)) for name in OWN_METHODS}
    bfloat16 = device.type == "cuda"
    if bfloat16:
        hold_frozen_in_bfloat16(backbone.language)
    choose_attention(backbone.language, device, bfloat16=bfloat16)
    for number, batch in _batches(measuring, backbone).items():
        _steps(measuring, runners, number, batch)
        measuring.entry(f"answers of {number}", _answers, measuring, backbone, batch)


def _steps(measuring: Measuring, runners: dict[str, Runner], number: int, batch: Inputs) -> None:
    """Measure a step of each method, eager and as CUDA graphs."""
    for way, measure_way in (("eager", _eager), ("graphs", _graphs)):
        for name, runner in runners.items():
            measuring.entry(f"{number}/{name}/{way}", measure_way, measuring, runner, batch)


def _backbone(measuring: Measuring, root: Path) -> Backbone:
    torch.manual_seed(0)
    size = SIZES["tiny" if measuring.small else "base"]
    return build_backbone(size, root / TOKENIZER, vision=True).to(measuring.device).train(False)


def _batches(measuring: Measuring, backbone: Backbone) -> dict[int, Inputs]:
    def moved(size: int) -> Inputs:
        drawn = draw_batch(backbone, SHAPES["vl"], size, 0, multiple=8)
        return {name: tensor.to(measuring.device) for name, tensor in drawn.items()}

    return {size: moved(size) for size in ((2,) if measuring.small else BATCHES)}


def _prompt(name: str, backbone: Backbone) -> DePT:
    width, longest = backbone.d_model, SHAPES["vl"].longest
    length, rank = PROMPT_METHODS[name].solve(
        reference_prompt_length=100, prompt_length=40, d_model=width, max_source_length=longest
    )
    prompt: DePT = sized(
        name, prompt_length=length, rank=rank, d_model=width, max_source_length=longest
    ).build()
    return prompt.to(backbone.device)


def _forward(measuring: Measuring, runner: Runner, given: Inputs) -> Tensor:
    cuda = measuring.device.type == "cuda"
    with torch.autocast(measuring.device.type, torch.bfloat16, enabled=cuda):
        return runner.forward(given)


def _finish(runner: Runner) -> None:
    if runner.optimizer is not None:
        nn.utils.clip_grad_norm_(runner.trained, 1.0)
        runner.optimizer.step()
        runner.optimizer.zero_grad()


def _eager(measuring: Measuring, runner: Runner, batch: Inputs) -> Entry:
    given = runner.prepare(batch)

    def step() -> None:
        _forward(measuring, runner, given).backward()  # type: ignore[no-untyped-call]
        _finish(runner)

    return measuring.milliseconds(step) | {"peak_mib": measuring.peak_mib(step)}


def _graphs(measuring: Measuring, runner: Runner, batch: Inputs) -> Entry:
    if measuring.device.type != "cuda":
        return {"skipped": "graphs need a CUDA device"}
    given = runner.prepare(batch)
    # For the bare backbone, the embeddings get the gradient instead of a prompt.
    leaf = given.get("embeddings")
    parameters: list[Any] = runner.trained or [leaf]
    inputs = {name: x for name, x in given.items() if isinstance(x, Tensor) and x is not leaf}

    def backward(seen: dict[str, Tensor | None]) -> Tensor:
        loss = _forward(measuring, runner, given | seen)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    graphed = GraphedStep(backward, parameters, [len(given["labels"])], measuring.device, print)
    gap = _gap(backward, graphed, parameters, dict(inputs))
    if graphed.failure:
        return {"error": graphed.failure}

    def step() -> None:
        graphed(dict(inputs))
        _finish(runner)

    return measuring.milliseconds(step) | {"peak_mib": measuring.peak_mib(step), "gradient_distance": gap}


def _answers(measuring: Measuring, backbone: Backbone, batch: Inputs) -> Entry:
    """Compare answers of `TOKENS` tokens with DePT, by `generate` and by graphs."""
    model = PromptedModel(backbone, _prompt("dept", backbone)).eval()
    graphed = GraphedAnswers(model, len(batch["labels"]), print)
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def answer(generate: Callable[..., Tensor]) -> Tensor:
        cuda = measuring.device.type == "cuda"
        with torch.autocast(measuring.device.type, torch.bfloat16, enabled=cuda):
            return generate(**given, max_new_tokens=TOKENS)

    same = answer(graphed) == answer(model.generate)
    return {
        "plain_ms": measuring.milliseconds(lambda: answer(model.generate))["ms"],
        "graphs_ms": measuring.milliseconds(lambda: answer(graphed))["ms"],
        "recorded": len(graphed.recorded),
        "same_tokens": float(same.float().mean()),
    }


def _gap(
    plain: Callable[[dict[str, Tensor | None]], Tensor],
    graphed: GraphedStep,
    parameters: list[nn.Parameter],
    inputs: dict[str, Tensor | None],
) -> float:
    """Return the largest relative distance between the gradients of the graph and of the plain step."""
    for parameter in parameters:
        parameter.grad = None
    plain(inputs)
    expected = [parameter.grad for parameter in parameters]
    graphed(inputs)
    gaps = []
    for parameter, wanted in zip(parameters, expected, strict=True):
        if wanted is not None:
            assert parameter.grad is not None
            gap = (parameter.grad.double() - wanted.double()).norm()
            gaps.append(float(gap / wanted.double().norm().clamp(min=1e-30)))
    for parameter in parameters:
        parameter.grad = None
    return max(gaps)


def measure_compiled(measuring: Measuring, root: Path) -> None:
    """Measure steps with compiled layers, eager and as CUDA graphs."""
    if measuring.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        why = "tests compile on a CPU" if measuring.device.type != "cuda" else "Triton is not installed"
        measuring.entry("compiled", lambda: {"skipped": why})
        return
    backbone = _backbone(measuring, root)
    prepare_step(backbone.language, measuring.device, bfloat16=True, compiled=True)
    names = [name + COMPILED for name in ("dept40", "pt100", "floor")]
    runners = build_runners(names, backbone, SHAPES["vl"], compiled=backbone)
    for number, batch in _batches(measuring, backbone).items():
        _steps(measuring, runners, number, batch)
