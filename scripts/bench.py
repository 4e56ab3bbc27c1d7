"""Step time, generation and memory of DePT, plain prompt tuning, PEFT and the backbone alone.

    python scripts/bench.py --bars --output_dir /tmp/bench
    python scripts/bench.py --models base --shapes vl --methods pt100,dept40 --rounds 20

Every group of methods is measured in rounds, each method once a round and another one first each time, so
that a busy machine disturbs all alike; a ratio is the median of the rounds' ratios. The backbones have T5's
sizes and random weights. Written after every round: bench.json; at the end bench.md and bench.png.
"""

import copy
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import transformers
import tyro

from dept_vl.backbone import Backbone
from dept_vl.bench.measure import Ratio, encoder_flops, in_turn, saved_bytes
from dept_vl.bench.methods import (
    METHODS,
    SHAPES,
    SIZES,
    Runner,
    build_backbone,
    build_runners,
    draw_batch,
    generating,
    has_peft,
    needs_peft,
    seeing,
    write_images,
)
from dept_vl.files import write_atomically
from dept_vl.report import markdown_table
from dept_vl.step import choose_attention, hold_frozen_in_bfloat16

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-clip-t5" / "language"
IMAGES = 16
"""Different image files, of which every batch takes some."""
WORKS = {
    "train": "a training step",
    "generate4": "4 tokens generated",
    "generate20": "20 tokens generated",
    "images": "a training step on image files",
}

PAIR = ("pt100", "dept40")
DEPTHS = ("dept0", "dept20", "dept40", "dept60", "dept80")
PLAN: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("base", "vl", "train"): (
        *("pt100", *DEPTHS, "floor", "constant"),
        *("peft100", "peft100held", "peft40", "lora8"),
    ),
    ("base", "vl", "generate4"): (*PAIR, "floor"),
    ("base", "vl", "generate20"): (*PAIR, "floor"),
    ("base", "vl", "images"): ("cached", "live"),
    ("base", "glue", "train"): (*PAIR, "padded", "peft100", "peft100held", "lora8"),
    ("base", "mrqa", "train"): (*PAIR, "padded"),
    ("small", "vl", "train"): PAIR,
    ("large", "vl", "train"): PAIR,
}
"""What is measured unless the flags say otherwise, in this order: (model, shape, work) and methods."""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how often."""

    output_dir: Path
    """Folder for bench.json, bench.md and bench.png."""
    models: str = "small,base,large"
    """Of small, base and large, widths and depths of T5; tiny is for tests."""
    shapes: str = "vl,glue,mrqa"
    """Of vl (20 text and 49 visual tokens), glue (around 60 of text) and mrqa (around 300)."""
    methods: str = ""
    """Methods of a training step, such as pt100,dept40; left out, those that the bars and tables need."""
    rounds: int = 9
    """Rounds of every group; of the long ones (large, mrqa) a third."""
    batch_size: int = 8
    """Examples of a step; half of them at large."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the computation: auto is bfloat16 where the machine computes in it."""
    device: str = ""
    """Such as cpu or cuda; left out, a GPU if there is one."""
    backbone_dropout: bool = False
    """Dropout in the frozen backbone."""
    compile: bool = False
    """Compile every method's forward pass with torch.compile; takes minutes for each."""
    bars: bool = False
    """Say of each bar which ratio was measured and whether it is met."""
    tiny: bool = False
    """The smallest: a tiny model, one round of every method; the figures mean nothing."""


@dataclass(frozen=True)
class Group:
    """Methods that are measured in the same rounds."""

    model: str
    shape: str
    work: str
    methods: tuple[str, ...]
    batch_size: int
    rounds: int

    @property
    def key(self) -> str:
        """Name in the results."""
        return f"{self.model}/{self.shape}/{self.work}"


def plan(config: BenchConfig) -> list[Group]:
    """The groups, model after model, so that each is built once.

    Raises:
        ValueError: If a name is unknown, or nothing is left to measure.
    """
    models = _names(config.models, SIZES, "models")
    shapes = _names(config.shapes, SHAPES, "shapes")
    methods = _names(config.methods, METHODS, "methods")
    entries = PLAN
    if config.tiny:
        models = ["tiny"]
        entries = {("tiny", *key[1:]): names for key, names in PLAN.items() if key[0] == "base"}
    elif "tiny" in models:
        entries = PLAN | {("tiny", *key[1:]): names for key, names in PLAN.items() if key[0] == "base"}
    if methods:
        entries = {(model, shape, "train"): tuple(methods) for model in models for shape in shapes}
    groups = []
    for (model, shape, work), names in entries.items():
        if model in models and shape in shapes:
            long = model == "large" or shape == "mrqa"
            rounds = max(1, config.rounds // 3) if long else config.rounds
            size = max(1, config.batch_size // 2) if model == "large" else config.batch_size
            groups.append(Group(model, shape, work, _installed(names), size, rounds))
    if not groups:
        raise ValueError(f"nothing to measure for --models {config.models} --shapes {config.shapes}")
    return sorted(groups, key=lambda group: models.index(group.model))


def _names(given: str, known: dict[str, Any], option: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--{option}: expected some of {','.join(known)}; found {','.join(unknown)}")
    return names


def _installed(methods: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in methods if has_peft() or not needs_peft(name))


class Bench:
    """Measures groups and keeps the figures on disk.

    Args:
        config: What is measured.

    Attributes:
        results: As in bench.json.
    """

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        self.bfloat16 = config.dtype == "bf16" or (config.dtype == "auto" and computes_bfloat16(self.device))
        self.results: dict[str, Any] = {
            "machine": describe_machine(self.device),
            "dtype": "bf16" if self.bfloat16 else "fp32",
            "config": json.loads(json.dumps(asdict(config), default=str)),
            "groups": {},
        }
        config.output_dir.mkdir(parents=True, exist_ok=True)

    def measure(self, groups: Sequence[Group]) -> None:
        """All groups; a model is built when its first group comes and given up behind its last."""
        for model in dict.fromkeys(group.model for group in groups):
            mine = [group for group in groups if group.model == model]
            images = any(SHAPES[group.shape].image for group in mine)
            torch.manual_seed(0)
            backbone = build_backbone(SIZES[model], TOKENIZER, vision=images).to(self.device)
            stock = None
            if any(needs_peft(name) for group in mine for name in group.methods):
                stock = copy.deepcopy(backbone.language).train(self.config.backbone_dropout)
            gc.freeze()  # so that collecting before every step takes no time
            with tempfile.TemporaryDirectory() as folder:
                paths = write_images(Path(folder), IMAGES) if images else []
                for group in mine:
                    self._measure_group(group, backbone, stock, paths)
            del backbone, stock
            gc.unfreeze()
            gc.collect()

    def _measure_group(
        self, group: Group, backbone: Backbone, stock: torch.nn.Module | None, paths: list[Path]
    ) -> None:
        shape = SHAPES[group.shape]
        backbone.train(self.config.backbone_dropout)
        backbone.language.set_attn_implementation("sdpa")
        if group.work == "images":
            assert backbone.vision is not None
            runners = seeing(
                build_runners(["dept40"], backbone, stock, shape)["dept40"], backbone.vision, paths
            )
        else:
            runners = build_runners(group.methods, backbone, stock, shape)
        if self.bfloat16:
            hold_frozen_in_bfloat16(backbone.language)
        if group.work.startswith("generate"):
            runners = generating(runners, int(group.work.removeprefix("generate")))
        else:
            choose_attention(backbone.language, self.device, bfloat16=self.bfloat16)
        if self.config.compile:
            for runner in runners.values():
                runner.forward = torch.compile(runner.forward, dynamic=True)
        batches = [
            {
                name: tensor.to(self.device)
                for name, tensor in draw_batch(backbone, shape, group.batch_size, number).items()
            }
            for number in range(group.rounds + 1)
        ]
        record = {**asdict(group), "methods": list(group.methods), "measured": {}}
        self.results["groups"][group.key] = record
        for name, runner in runners.items():  # the warm-up too
            given = runner.prepare(batches[0])
            record["measured"][name] = {
                **self._sizes(group, runner, batches[0], given),
                "memory": self._memory(group, runner, given),
                "seconds": [],
                "cpu_seconds": [],
            }
        for number, order in enumerate(in_turn(list(runners), group.rounds), 1):
            for name in order:
                wall, cpu = self._time(group, runners[name], batches[number])
                record["measured"][name]["seconds"].append(wall)
                record["measured"][name]["cpu_seconds"].append(cpu)
            self.save()
        print(f"{group.key}: {len(runners)} methods, {group.rounds} rounds", flush=True)

    def _sizes(
        self, group: Group, runner: Runner, batch: dict[str, Any], given: dict[str, Any]
    ) -> dict[str, int]:
        """Trained parameters, encoder positions of the first batch, operations of its encoder pass."""
        size = SIZES[group.model]
        text = given.get("input_ids", batch["input_ids"]).shape[1]
        visual = batch["visual_features"].shape[1:3].numel() if "visual_features" in batch else 0
        tokens = runner.prompt_length + text + visual
        return {
            "trained": sum(parameter.numel() for parameter in runner.trained),
            "tokens": tokens,
            "encoder_flops": encoder_flops(
                batch=group.batch_size,
                tokens=tokens,
                d_model=size.d_model,
                d_inner=size.d_inner,
                d_ff=size.d_ff,
                layers=size.layers,
            ),
        }

    def _step(self, group: Group, runner: Runner) -> Callable[[dict[str, Any]], object]:
        return runner.forward if group.work.startswith("generate") else runner.train_step

    def _memory(self, group: Group, runner: Runner, given: dict[str, Any]) -> int | None:
        """Bytes of a step beyond what is there before it: the allocator's peak, on a CPU what is saved."""
        if self.device.type == "cuda":
            self._run(group, runner, given)  # kernels and their workspaces come with the first call
            gc.collect()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._run(group, runner, given)
            return torch.cuda.max_memory_allocated(self.device) - before
        self._run(group, runner, given)
        if group.work.startswith("generate"):
            return None
        known = [tensor for module in runner.modules for tensor in (*module.parameters(), *module.buffers())]
        with self._autocast():
            return saved_bytes(lambda: runner.forward(given), known)

    def _time(self, group: Group, runner: Runner, batch: dict[str, Any]) -> tuple[float, float]:
        """Seconds by the clock, and of all the process's threads."""
        given = runner.prepare(batch)
        gc.collect()
        gc.disable()
        self._synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        self._run(group, runner, given)
        self._synchronize()
        measured = time.perf_counter() - wall, time.process_time() - cpu
        gc.enable()
        return measured

    def _run(self, group: Group, runner: Runner, given: dict[str, Any]) -> None:
        with self._autocast():
            self._step(group, runner)(given)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def save(self) -> None:
        """Write bench.json."""
        content = json.dumps(self.results, indent=1) + "\n"
        write_atomically(self.config.output_dir / "bench.json", content.encode())


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 itself, so that it is faster than full precision."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# -- figures


Measured = dict[str, Any]


def ratio(record: Measured, ours: str, theirs: str, figure: str) -> Ratio | None:
    """Ours over theirs; None if one was not measured."""
    measured = record["measured"]
    if ours not in measured or theirs not in measured:
        return None
    values = [measured[name][figure] for name in (ours, theirs)]
    if not all(values):
        return None
    if figure == "memory":  # the same in every round
        values = [[float(value)] for value in values]
    return Ratio.of(*values)


@dataclass(frozen=True)
class Bar:
    """A ratio that is to be reached, within one group.

    Attributes:
        what: In words.
        group: Where it is measured.
        ours, theirs: Numerator and denominator.
        figure: `seconds` or `memory`.
        limit: At most, or at least.
    """

    what: str
    group: str
    ours: str
    theirs: str
    figure: str
    limit: float
    at_least: bool = False

    def met(self, found: Ratio) -> bool:
        """Whether the median reaches it."""
        return found.median >= self.limit if self.at_least else found.median <= self.limit


VL, GLUE = "base/vl/train", "base/glue/train"
SHORT, LONG, FILES = "base/vl/generate4", "base/vl/generate20", "base/vl/images"
OURS, PLAIN, BARE = "DePT m=40", "PT l=100", "the backbone alone at its length"
TIME, MEMORY = "seconds", "memory"
BARS = (
    Bar(f"{OURS} over {PLAIN}, step time", VL, "dept40", "pt100", TIME, 0.70),
    Bar(f"{OURS} over {PLAIN}, activations", VL, "dept40", "pt100", MEMORY, 0.72),
    Bar(f"{OURS} over {BARE}, step time", VL, "dept40", "constant", TIME, 1.02),
    Bar(f"{OURS} over {BARE}, activations", VL, "dept40", "constant", MEMORY, 1.02),
    Bar(f"{OURS} over the same padded to 256, step time", GLUE, "dept40", "padded", TIME, 0.40),
    Bar(f"our {PLAIN} over PEFT's, text, step time", GLUE, "pt100", "peft100", TIME, 1.0),
    Bar(f"our {PLAIN} over PEFT's, image and text, step time", VL, "pt100", "peft100", TIME, 1.0),
    Bar(f"{PLAIN} over {OURS}, 4 tokens generated", SHORT, "pt100", "dept40", TIME, 1.25, at_least=True),
    Bar(f"{PLAIN} over {OURS}, 20 tokens generated", LONG, "pt100", "dept40", TIME, 1.25, at_least=True),
    Bar("features looked up over images read, step time", FILES, "cached", "live", TIME, 0.75),
)
GROWTH = ("small", "base", "large")
"""The saving is to grow with the model."""


def bar_rows(results: Measured) -> list[tuple[str, str, str, str]]:
    """What each bar asks, what was measured, and whether it is met; for the tiny model too."""
    groups = results["groups"]
    tiny = bool(results["config"]["tiny"])
    rows = []
    for bar in BARS:
        record = groups.get(bar.group.replace("base", "tiny") if tiny else bar.group)
        found = ratio(record, bar.ours, bar.theirs, bar.figure) if record else None
        asked = f"{'>=' if bar.at_least else '<='} {bar.limit:.2f}"
        rows.append((bar.what, asked, str(found or "not measured"), _met(found and bar.met(found))))
    for figure, word in (("seconds", "step time"), ("memory", "activations")):
        found = [
            ratio(groups[key], "dept40", "pt100", figure)
            for key in (f"{model}/vl/train" for model in GROWTH)
            if key in groups
        ]
        whole = [one.median for one in found if one is not None]
        grows = whole == sorted(whole, reverse=True) if len(whole) == len(GROWTH) else None
        shown = ", ".join(f"{value:.3f}" for value in whole) if grows is not None else "not measured"
        rows.append(
            (f"DePT m=40 over PT l=100 at {', '.join(GROWTH)}, {word}", "falling", shown, _met(grows))
        )
    return rows


def _met(met: bool | None) -> str:
    return {True: "met", False: "NOT met", None: ""}[met]


HEADER = ("method", "trained", "tokens", "encoder GFLOPs", "ms", "time ratio", "MiB", "memory ratio")


def tables(results: Measured) -> str:
    """Everything measured, as Markdown."""
    parts = []
    for record in results["groups"].values():
        measured = record["measured"]
        base = (
            "live" if record["work"] == "images" else "pt100" if "pt100" in measured else next(iter(measured))
        )
        rounds = len(measured[base]["seconds"])
        title = (
            f"T5-{record['model']}, {record['shape']}: {WORKS[record['work']]}, "
            f"batch {record['batch_size']}, {rounds} round{'s' if rounds > 1 else ''}"
        )
        rows = [_row(record, name, base) for name in measured]
        parts += [f"**{title}**", markdown_table(HEADER, rows)]
    machine = results["machine"]
    parts.append(
        f"{results['dtype']}, {machine['device']}, {machine['threads']} threads of {machine['processors']} "
        f"processors, torch {machine['torch']}, transformers {machine['transformers']}. Ratios are to plain "
        "prompt tuning's (image files: to reading them), the median over the rounds and the range. MiB "
        "are those that a step adds at its peak; on a CPU, those that its forward pass keeps for the "
        "backward pass."
    )
    return "\n\n".join(parts + share_lines(results))


def _row(record: Measured, name: str, base: str) -> list[str]:
    one = record["measured"][name]
    memory = one["memory"]
    time_ratio, memory_ratio = (ratio(record, name, base, figure) for figure in ("seconds", "memory"))
    return [
        METHODS.get(name, name),
        f"{one['trained']:,}" if one["trained"] else "",
        str(one["tokens"]),
        f"{one['encoder_flops'] / 1e9:.3g}",
        f"{1000 * median(one['seconds']):,.0f}",
        str(time_ratio),
        "" if memory is None else f"{memory / 2**20:,.1f}",
        "" if memory_ratio is None else f"{memory_ratio.median:.3f}",
    ]


def share_lines(results: Measured) -> list[str]:
    """What share of the bare backbone's throughput DePT reaches, a line for each training group."""
    lines = []
    for record in results["groups"].values():
        same, floor = (ratio(record, name, "dept40", "seconds") for name in ("constant", "floor"))
        if record["work"] == "train" and same and floor:
            lines.append(
                f"T5-{record['model']}, {record['shape']}: DePT (m=40) trains at {same.median:.1%} of the "
                f"throughput of the backbone alone at the same length, and at {floor.median:.1%} of its "
                "throughput without the 40 positions."
            )
    return lines


def draw(results: Measured, path: Path) -> None:
    """Time and memory of the first group of training steps, next to plain prompt tuning's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    record = next(
        (r for r in results["groups"].values() if "pt100" in r["measured"] and r["work"] == "train"), None
    )
    if record is None:
        return
    names = [name for name in METHODS if name in record["measured"]][::-1]
    figure, panes = pyplot.subplots(1, 2, figsize=(10, 1.5 + 0.35 * len(names)), sharey=True)
    for pane, name_of_figure, title in zip(
        panes, ("seconds", "memory"), ("step time", "activations"), strict=True
    ):
        ratios = [ratio(record, name, "pt100", name_of_figure) for name in names]
        shown = [(place, one) for place, one in enumerate(ratios) if one is not None]
        pane.barh(
            [place for place, _ in shown],
            [one.median for _, one in shown],
            xerr=[[one.median - one.low for _, one in shown], [one.high - one.median for _, one in shown]],
            color=[
                "tab:blue" if names[place].startswith(("dept", "pt")) else "tab:gray" for place, _ in shown
            ],
        )
        pane.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        pane.set_xlabel(f"{title}, PT (l=100) = 1")
    panes[0].set_yticks(range(len(names)), [METHODS[name] for name in names])
    figure.suptitle(
        f"T5-{record['model']}, {record['shape']}, batch {record['batch_size']}, {results['dtype']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(config: BenchConfig) -> Measured:
    """Measure, write, print; returns what bench.json holds."""
    if config.tiny:
        config = replace(config, rounds=1, batch_size=min(config.batch_size, 2))
    groups = plan(config)
    if not has_peft():
        print('PEFT is not installed: its methods are left out (pip install -e ".[bench]")')
    bench = Bench(config)
    bench.measure(groups)
    results = bench.results
    results["bars"] = [
        dict(zip(("what", "asked", "measured", "met"), row, strict=True)) for row in bar_rows(results)
    ]
    bench.save()
    text = tables(results)
    if config.bars:
        text += "\n\n" + markdown_table(["bar", "asked", "measured", ""], bar_rows(results))
    (config.output_dir / "bench.md").write_text(text + "\n")
    print(text)
    try:
        draw(results, config.output_dir / "bench.png")
    except ImportError:
        print('matplotlib is not installed: no plot (pip install -e ".[bench]")')
    return results


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__, use_underscores=True))
