"""Results of the benchmark: ratios, bars, tables and a plot."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import pretrained
from benchmarks.measure import Ratio
from benchmarks.methods import METHODS as OF_T5
from dept_vl._utils.tables import markdown_table
from dept_vl.training.report.plots import colour_of, drawn

WORKS = {
    "train": "a training step",
    "generate4": "4 tokens generated",
    "generate20": "20 tokens generated",
    "images": "a training step on image files",
    "cached": "a training step with features of images kept",
    "labels": "a training step, the loss the model's own",
    "generate10": "10 tokens generated",
}

METHODS = OF_T5 | pretrained.METHODS
FIGURES = {"seconds": "step time", "memory": "activations"}

Measured = dict[str, Any]


def ratio(record: Measured | None, ours: str, theirs: str, figure: str) -> Ratio | None:
    """Return the ratio of two methods, or None if one was not measured."""
    measured = record["measured"] if record else {}
    values = [measured[name][figure] for name in (ours, theirs) if name in measured]
    if len(values) < 2 or not all(values):
        return None
    # Memory is the same in every round.
    return Ratio.of(*([float(value)] if figure == "memory" else value for value in values))


@dataclass(frozen=True)
class Bar:
    """Limit for the ratio of two methods in one group.

    Attributes:
        what: Description.
        group: Key of the group.
        ours, theirs: Methods in the numerator and the denominator.
        figure: `seconds` or `memory`.
        limit: Largest ratio, or smallest if `at_least`.
    """

    what: str
    group: str
    ours: str
    theirs: str
    figure: str
    limit: float
    at_least: bool = False

    def met(self, found: Ratio) -> bool:
        """Return whether the median ratio is within the limit."""
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
SAME_LENGTH = 1.02
"""Largest ratio of the model with prompt and offset to the bare model at equal length."""
PRETRAINED_BARS = tuple(
    Bar(
        f"{model}, {WORKS[work]}: {METHODS[ours]} over the model alone at its length, {word}",
        f"{model}/vl/{work}",
        ours,
        "bare40",
        figure,
        SAME_LENGTH,
    )
    for model in pretrained.MODELS
    for (_, work), methods in pretrained.of_pretrained(model).items()
    for ours in ("dept40", "attached40")
    if ours in methods
    for figure, word in ((TIME, "time"), (MEMORY, "peak memory"))
)
MET = {True: "met", False: "NOT met", None: ""}
GROWTH = ("small", "base", "large")
"""Models in order of size. The saving should grow with it."""


def bar_rows(results: Measured) -> list[tuple[str, str, str, str]]:
    """Return each bar with its limit, the measured ratio, and whether it is met."""
    groups = results["groups"]
    tiny = bool(results["config"]["tiny"])
    rows = []
    # Bars of models that were not measured are left out.
    of_t5 = not groups or any(key.partition("/")[0] not in pretrained.MODELS for key in groups)
    bars = [bar for bar in PRETRAINED_BARS if bar.group in groups]
    for bar in (*(BARS if of_t5 else ()), *bars):
        record = groups.get(bar.group.replace("base", "tiny") if tiny else bar.group)
        found = ratio(record, bar.ours, bar.theirs, bar.figure)
        met = None if found is None else bar.met(found)
        asked = f"{'>=' if bar.at_least else '<='} {bar.limit:.2f}"
        rows.append((bar.what, asked, str(found or "not measured"), MET[met]))
    for figure, word in FIGURES.items() if of_t5 else ():
        of_models = [ratio(groups.get(f"{model}/vl/train"), "dept40", "pt100", figure) for model in GROWTH]
        whole = [one.median for one in of_models if one is not None]
        grows = whole == sorted(whole, reverse=True) if len(whole) == len(GROWTH) else None
        shown = ", ".join(f"{value:.3f}" for value in whole) if grows is not None else "not measured"
        rows.append((f"{OURS} over {PLAIN} at {', '.join(GROWTH)}, {word}", "falling", shown, MET[grows]))
    return rows


HEADER = ("method", "trained", "tokens", "encoder GFLOPs", "ms", "time ratio", "MiB", "memory ratio")


def tables(results: Measured) -> str:
    """Return all results as Markdown."""
    parts = []
    for record in results["groups"].values():
        measured = record["measured"]
        bases = ("live" if record["work"] == "images" else "bare40", "pt100", *measured)
        base = next(name for name in bases if name in measured)
        rounds = len(measured[base]["seconds"])
        of_t5 = record["model"] not in pretrained.MODELS
        model = f"T5-{record['model']}, {record['shape']}" if of_t5 else record["model"]
        title = (
            f"{model}: {WORKS[record['work']]}, "
            f"batch {record['batch_size']}, {rounds} round{'s' if rounds > 1 else ''}"
        )
        rows = [_row(record, name, base) for name in measured]
        parts += [f"**{title}**", markdown_table(HEADER, rows)]
    machine = results["machine"]
    parts.append(
        f"{results['dtype']}, {machine['device']}, {machine['threads']} threads of {machine['processors']} "
        f"processors, torch {machine['torch']}, transformers {machine['transformers']}. Ratios are to plain "
        "prompt tuning's (image files: to reading them; pretrained models: to the model alone with 40 words "
        "more), the median over the rounds and the range. On a "
        "CPU times are those that the process's threads computed, whatever else the machine did. MiB "
        "are those that a step adds at its peak; of T5 on a CPU, those that its forward pass keeps for the "
        "backward pass."
    )
    return "\n\n".join(parts + share_lines(results))


def _row(record: Measured, name: str, base: str) -> list[str]:
    one = record["measured"][name]
    memory = one["memory"]
    time_ratio, memory_ratio = (ratio(record, name, base, figure) for figure in FIGURES)
    return [
        METHODS.get(name, name),
        f"{one['trained']:,}" if one["trained"] else "",
        str(one["tokens"]),
        f"{one['encoder_flops'] / 1e9:.3g}" if one["encoder_flops"] else "",
        f"{1000 * median(one['seconds']):,.0f}",
        str(time_ratio),
        "" if memory is None else f"{memory / 2**20:,.1f}",
        "" if memory_ratio is None else f"{memory_ratio.median:.3f}",
    ]


def share_lines(results: Measured) -> list[str]:
    """Return DePT's throughput relative to the bare backbone's, one line for each training group."""
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
    """Plot time and memory of the largest group of training steps, relative to plain prompt tuning."""
    groups = [r for r in results["groups"].values() if "pt100" in r["measured"] and r["work"] == "train"]
    if not groups:
        return
    record = max(groups, key=lambda group: len(group["measured"]))
    names = [name for name in METHODS if name in record["measured"]][::-1]
    size = (10, 1.5 + 0.35 * len(names))
    title = f"{record['model']}, {record['shape']}, batch {record['batch_size']}, {results['dtype']}"
    with drawn(path, len(FIGURES), figsize=size, dpi=120, layout="tight") as panes:
        for pane, (figure, word) in zip(panes, FIGURES.items(), strict=True):
            ratios = {
                place: one
                for place, name in enumerate(names)
                if (one := ratio(record, name, "pt100", figure)) is not None
            }
            pane.barh(
                list(ratios),
                [one.median for one in ratios.values()],
                xerr=np.transpose([(one.median - one.low, one.high - one.median) for one in ratios.values()]),
                color=[colour_of(names[place].removeprefix("peft")) for place in ratios],
            )
            pane.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
            pane.set_xlabel(f"{word}, PT (l=100) = 1")
        panes[0].set_yticks(range(len(names)), [METHODS[name] for name in names])
        panes[0].figure.suptitle(title)
