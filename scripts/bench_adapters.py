"""Throughput of a batch whose rows use different adapters, relative to a batch with a single adapter.

    python scripts/bench_adapters.py

A T5 and a CLIP with random weights answer questions about images with stored features. The two ways take
turns, starting with a different one each round. Figures are the median of the rounds' ratios, with the lowest
and the highest. Every adapter has its own visual projection.

A second table is of adapters after the encoder (`memory`) that get the same question about one image and
share its encoder pass.
"""

import copy
import gc
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dept_vl._utils.options import Options, Positive
from dept_vl._utils.tables import markdown_table
from dept_vl.cli import entry, parse_options

if TYPE_CHECKING:
    from benchmarks.backbones import Inputs, Shape
    from benchmarks.measure import Ratio
    from dept_vl.inference.mixed import ManyAdapters
    from dept_vl.models.backbone import Backbone
    from dept_vl.models.prompted import PromptedModel

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-clip-t5" / "language"
BAR = 0.9
"""Minimum throughput of rows with equally long prompts, relative to a single adapter."""


@dataclass(frozen=True)
class BenchConfig(Options):
    """Configuration of the benchmark."""

    model: str = "base"
    """Size of T5: small, base or large; tiny is for tests."""
    prompt_length: Positive = 40
    """Prompt length (m) of the adapters of equal length."""
    unequal: tuple[Positive, ...] = (10, 20, 40, 60)
    """Prompt lengths of the adapters of unequal length. They are compared with the longest alone."""
    batch_size: Positive = 8
    """Batch size; adapters alternate within a batch."""
    new_tokens: Positive = 4
    """Number of tokens of every answer."""
    rounds: Positive = 11
    """Number of rounds."""
    threads: Positive = 1
    """Number of CPU threads."""
    device: str = "cpu"
    """Device, such as cpu or cuda."""
    json_out: Path | None = None
    """JSON file for the results."""


@dataclass(frozen=True)
class Figures:
    """Throughput of rows with different adapters, relative to a single adapter.

    Attributes:
        clock: Ratio by wall-clock time.
        processor: Ratio by processor time, which other programs affect less.
        milliseconds: Median wall-clock time of a batch with a single adapter.
    """

    clock: "Ratio"
    processor: "Ratio"
    milliseconds: float


def questions_shape() -> "Shape":
    """Return the shape of questions, with different lengths so that every batch has padding."""
    from benchmarks.backbones import SHAPES

    return replace(SHAPES["vl"], spread=4.0)


def adapters_of(backbone: "Backbone", models: "list[PromptedModel]", longest: int) -> "ManyAdapters":
    """Serve these models together, with their numbers as names."""
    from dept_vl.adapters.adapter import Adapter
    from dept_vl.inference.mixed import ManyAdapters
    from dept_vl.inference.predictor import Predictor
    from dept_vl.tasks import TASKS

    task, predictors = TASKS["vqav2"], {}
    for number, model in enumerate(models):
        adapter = Adapter.of(model, task=task.name, metrics={})
        predictors[f"{number}"] = Predictor(model, adapter, task, task.decoding, longest)
    return ManyAdapters(backbone, predictors)


def prompted(backbone: "Backbone", length: int) -> "PromptedModel":
    """Return a model with a prompt of this length, the parameters of 100 vectors, and its own projection."""
    import torch

    from benchmarks.methods import build_prompt
    from dept_vl.models.prompted import PromptedModel

    own = backbone.with_projection(copy.deepcopy(backbone.visual_projection))
    prompt = build_prompt(backbone.d_model, questions_shape(), length).to(backbone.device)
    torch.nn.init.normal_(prompt.offset_b)  # as after training
    return PromptedModel(own, prompt).eval()


def measure(config: BenchConfig, backbone: "Backbone", lengths: tuple[int, ...]) -> Figures:
    """Compare a batch whose rows alternate adapters with a batch that uses the longest one."""
    import torch

    from benchmarks.backbones import draw_batch
    from benchmarks.measure import Ratio, in_turn

    many = adapters_of(backbone, [prompted(backbone, n) for n in lengths], questions_shape().longest)
    names = [name for name in many.predictors if name is not None]
    rows = [names[row % len(names)] for row in range(config.batch_size)]
    single = many.predictor(names[lengths.index(max(lengths))]).model
    options = {"max_new_tokens": config.new_tokens, "min_new_tokens": config.new_tokens, "do_sample": False}

    def answer(way: str, batch: "Inputs") -> None:
        model = single if way == "single" else many.model(rows)
        model.generate(**batch, **options)

    measured: dict[str, list[tuple[float, float]]] = {"single": [], "mixed": []}
    for number, order in enumerate(in_turn(list(measured), config.rounds + 1)):
        batch = draw_batch(backbone, questions_shape(), config.batch_size, number)
        del batch["labels"]
        batch = {name: tensor.to(config.device) for name, tensor in batch.items()}
        for way in order:
            gc.collect()
            started = time.perf_counter(), time.process_time()
            answer(way, batch)
            if config.device != "cpu":
                torch.accelerator.synchronize()
            measured[way].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    # The first round warms up.
    clock, processor = (
        {way: [t[kind] for t in times[1:]] for way, times in measured.items()} for kind in (0, 1)
    )
    return Figures(
        Ratio.of(clock["single"], clock["mixed"]),
        Ratio.of(processor["single"], processor["mixed"]),
        1000 * sorted(clock["single"])[len(clock["single"]) // 2],
    )


def measure_same(config: BenchConfig, backbone: "Backbone") -> dict[str, float]:
    """Return processor milliseconds of one question to `memory` adapters: one, together, and one by one."""
    import torch

    from benchmarks.backbones import draw_batch
    from benchmarks.measure import in_turn
    from dept_vl.models.prompted import PromptedModel
    from dept_vl.prompts.base import sized
    from dept_vl.prompts.methods import build

    sizes = {"d_model": backbone.d_model, "prompt_length": 0, "rank": 49, "max_source_length": 64}
    prompts = [build(sized("memory", **sizes)).to(backbone.device) for _ in range(config.batch_size)]
    many = adapters_of(backbone, [PromptedModel(backbone, prompt).eval() for prompt in prompts], 64)
    names = [name for name in many.predictors if name is not None]
    ways = {"one": [names[:1]], "together": [names], "one after the other": [[name] for name in names]}
    options = {"max_new_tokens": config.new_tokens, "min_new_tokens": config.new_tokens, "do_sample": False}
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for number, order in enumerate(in_turn(list(ways), config.rounds + 1)):
        question = draw_batch(backbone, questions_shape(), 1, number)
        del question["labels"]
        for way in order:
            started = time.process_time()
            for rows in ways[way]:
                batch = {
                    name: tensor.repeat(len(rows), *[1] * (tensor.dim() - 1)).to(config.device)
                    for name, tensor in question.items()
                }
                many.model(rows).generate(**batch, **options)
            if config.device != "cpu":
                torch.accelerator.synchronize()
            measured[way].append(1000 * (time.process_time() - started))
    return {way: median(times[1:]) for way, times in measured.items()}


def main(config: BenchConfig) -> dict[str, Figures]:
    """Measure and print adapters of equal and of unequal prompt length."""
    import torch

    from benchmarks.backbones import SIZES, build_backbone

    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    backbone = build_backbone(SIZES[config.model], TOKENIZER, vision=True).to(config.device).eval()
    equal = (config.prompt_length,) * len(config.unequal)
    figures = {str(lengths): measure(config, backbone, lengths) for lengths in (equal, config.unequal)}
    rows = [
        (f"m = {', '.join(map(str, lengths))}", str(f.clock), str(f.processor), f"{f.milliseconds:.0f}")
        for lengths, f in zip((equal, config.unequal), figures.values(), strict=True)
    ]
    title = f"{len(equal)} adapters in a batch of {config.batch_size}, T5-{config.model}, {config.device}"
    print(markdown_table([title, "by the clock", "by processor time", "ms, the longest alone"], rows))
    same = measure_same(config, backbone)
    rows = [(way, f"{ms:.0f}", f"{ms / same['one']:.2f}") for way, ms in same.items()]
    title = f"{config.batch_size} `memory` adapters, one question"
    print("\n" + markdown_table([title, "ms of the processor", "relative to one"], rows))
    met = figures[str(equal)].processor.median >= BAR
    print(f"\n{'met' if met else 'NOT met'}: {BAR} of a single adapter's throughput, prompts equally long")
    if config.json_out is not None:
        content: dict[str, Any] = {lengths: asdict(found) for lengths, found in figures.items()}
        content["same"] = same
        config.json_out.write_text(json.dumps(content, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(BenchConfig, arguments, "bench_adapters.py", __doc__)))
