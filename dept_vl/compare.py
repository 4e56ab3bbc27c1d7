"""Methods side by side: several tasks and seeds, one budget, the same search for every method.

    OUTPUT/TASK/METHOD/seed1,prompt_lr=0.15,lora_lr=0.02/    a run, kept once it is finished
    OUTPUT/comparison.json, .md

Every method trains for the same steps on the same examples in the same order, and is what it is after the
last. With the first seed it tries each of its rates (as many for one method as for another) and takes those
of the best dev figure; the other seeds run with these. Test figures decide nothing. Each run is a process
of its own, whose peak memory is its own.
"""

import json
import multiprocessing
import resource
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dept_vl.backbone import TrainedPart
from dept_vl.cli import read_config
from dept_vl.config import RunConfig
from dept_vl.family import METHODS, Method
from dept_vl.files import read_object, write_atomically
from dept_vl.intervals import Interval, interval
from dept_vl.log import best_dev
from dept_vl.optim import OptimOptions
from dept_vl.report import markdown_table
from dept_vl.run import SUMMARY, SUMMARY_FILE, load_backbone, run
from dept_vl.splits import load_splits
from dept_vl.tasks.nlp_table import TEXT_TASKS

TASKS = {
    "easy-vqa": "data/configs/easy-vqa.json",
    "scenes-vqav2": "data/configs/scenes-vqav2.json",
    "scenes-gqa": "data/configs/scenes-gqa.json",
    "scenes-nlvr2": "data/configs/scenes-nlvr2.json",
    "scenes-coco": "data/configs/scenes-coco.json",
    "relabelled": "data/configs/concept-relabelled.json",
    "many-or-few": "data/configs/concept-many-or-few.json",
    "snippets": "data/configs/snippets.json",
}
"""Real questions on rendered images; the four forms on scenes and questions that pretraining kept out; a new
labelling and a new judgement; text."""

Rates = dict[str, float]
"""Learning rates, by their options."""
PEAK_FILE = "peak.json"
MIB = 2**20


@dataclass(frozen=True)
class Compared:
    """A way to adapt the backbone.

    Attributes:
        configure: Makes its configuration of the task's.
        rates: The learning rates that are tried; empty if nothing is trained.
        reads_images: It trains the visual projection, and means nothing for text.
    """

    configure: Callable[[RunConfig], RunConfig]
    rates: tuple[Rates, ...] = ()
    reads_images: bool = False


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and where it is kept."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Names of tasks, or configuration files."""
    methods: tuple[str, ...] = ()
    """Names of methods; empty takes them all."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each method per seed; the first one's dev split chooses the rates."""
    max_steps: int = 100
    """Steps of every run."""
    test_limit: int = 1000
    """At most so many test examples, the same for all methods of a seed; 0 takes all."""
    output_dir: Path = Path("runs/compare")
    """Folder of all runs; those finished are not repeated, those stopped go on."""
    smallest: bool = False
    """Two steps of one seed with the first rates, on a handful of examples: to see that it runs."""


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        task: Name.
        method: Name.
        score: The task's primary figure over the seeds.
        scores: Of each seed.
        figure: What the figure is called.
        rates: Chosen ones.
        tried: Dev figure of all rates that were tried, with the first seed.
        parameters: Trained.
        train_seconds: Median over the seeds.
        step_milliseconds: Likewise.
        peak_mib: Most memory of a run: of the GPU where there is one, else of its process.
        tokens: The encoder's, per example.
    """

    task: str
    method: str
    score: Interval
    scores: list[float]
    figure: str
    rates: Rates
    tried: dict[str, float]
    parameters: int
    train_seconds: float
    step_milliseconds: float
    peak_mib: float
    tokens: float


def prompted(method: Method, *, projection: bool = False) -> Callable[[RunConfig], RunConfig]:
    """A prompt of the family at the configuration's budget."""

    def configure(config: RunConfig) -> RunConfig:
        prompt = replace(config.prompt, method=method, rank=None)
        return replace(bare(config, projection=projection), prompt=prompt)

    return configure


def bare(config: RunConfig, *, projection: bool = False, language: TrainedPart | None = None) -> RunConfig:
    """No prompt; of the backbone nothing is trained but what is said."""
    return replace(
        config,
        prompt=replace(config.prompt, method="dept", prompt_length=0, rank=0),
        backbone=replace(
            config.backbone,
            train_projection=projection,
            train_backbone=language is not None,
            train_only=language or "all",
        ),
    )


def with_lora(config: RunConfig) -> RunConfig:
    """LoRA of the largest rank within the budget of the prompts, or of 1."""
    backbone = load_backbone(config.backbone)
    backbone.add_lora(1)
    each = sum(p.numel() for p in backbone.language.parameters() if p.requires_grad)
    rank = max(1, config.prompt.reference_prompt_length * backbone.d_model // each)
    config = bare(config, language="lora")
    return replace(config, backbone=replace(config.backbone, lora_rank=rank))


def _rates(**options: tuple[float, ...]) -> tuple[Rates, ...]:
    """One set of rates from each place of all options."""
    return tuple(dict(zip(options, values, strict=True)) for values in zip(*options.values(), strict=True))


LONG_RATES = _rates(prompt_lr=(0.15, 0.02, 0.05, 0.4))
BOTH_RATES = _rates(prompt_lr=(0.15, 0.15, 0.05, 0.05), lora_lr=(0.02, 0.005, 0.02, 0.005))
PROJECTION_RATES = _rates(projection_lr=(1e-3, 3e-4, 3e-3, 1e-2))
PART_RATES = _rates(backbone_lr=(3e-3, 1e-3, 1e-2, 3e-2))
WHOLE_RATES = _rates(backbone_lr=(3e-4, 1e-4, 1e-3, 3e-3))
"""Four tries for every method; `lora_lr` trains what of a prompt is not `prompt_lr`'s."""

COMPARED: dict[str, Compared] = {
    "zero-shot": Compared(bare),
    "projection only": Compared(lambda c: bare(c, projection=True), PROJECTION_RATES, reads_images=True),
    "BitFit": Compared(lambda c: bare(c, language="biases"), PART_RATES),
    "LoRA": Compared(with_lora, PART_RATES),
    "full fine-tuning": Compared(lambda c: bare(c, language="all"), WHOLE_RATES),
    **{name: Compared(prompted(name), LONG_RATES if name == "pt" else BOTH_RATES) for name in METHODS},
    "pt + projection": Compared(prompted("pt", projection=True), LONG_RATES, reads_images=True),
    "dept + projection": Compared(prompted("dept", projection=True), BOTH_RATES, reads_images=True),
}
"""By name. T5 has no biases; BitFit trains the scales of its norms."""


def compare(config: CompareConfig) -> list[Row]:
    """Run what is missing, then write and return the table.

    Raises:
        FileNotFoundError: If a configuration or data are missing.
        ValueError: If a method or a task is unknown.
    """
    unknown = set(config.methods) - set(COMPARED)
    if unknown:
        raise ValueError(f"unknown methods {sorted(unknown)}; there are: {', '.join(COMPARED)}")
    bases = {Path(name).stem: task_config(config, name) for name in config.tasks}
    chosen = {name: COMPARED[name] for name in config.methods or COMPARED}
    rows = [
        compare_one(config, task, base, name, method)
        for task, base in bases.items()
        for name, method in chosen.items()
        if not (method.reads_images and base.data.task in TEXT_TASKS)
    ]
    write(config, bases, rows)
    return rows


def task_config(config: CompareConfig, name: str) -> RunConfig:
    """What all methods on a task have in common.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS and not Path(name).is_file():
        raise ValueError(f"unknown task {name!r}; expected a configuration file or one of {', '.join(TASKS)}")
    base = read_config(Path(TASKS.get(name, name)))
    steps = 2 if config.smallest else config.max_steps
    base = replace(
        base,
        # Greedy: beams cost captions more than they would show here.
        data=replace(base.data, test_limit=config.test_limit, num_beams=1),
        train=replace(base.train, max_steps=steps, eval_every=steps),
        optim=replace(base.optim, warmup_steps=steps // 10),
    )
    if not config.smallest:
        return base
    return replace(
        base,
        # Images as they come: of thousands a handful is read.
        data=replace(base.data, dev_limit=8, test_limit=8, feature_memory=0.0),
        train=replace(base.train, per_device_batch_size=4),
    )


def compare_one(config: CompareConfig, task: str, base: RunConfig, name: str, method: Compared) -> Row:
    """Choose a method's rates with the first seed, and run it with the others."""
    folder = config.output_dir / task / name.replace(" ", "_")
    configured = method.configure(base)

    def finished(seed: int, rates: Rates) -> Path:
        label = ",".join([f"seed{seed}", *(f"{option}={rate:g}" for option, rate in rates.items())])
        seeded = replace(configured, train=replace(configured.train, seed=seed))
        optim: OptimOptions = replace(seeded.optim, **rates)  # type: ignore[arg-type]  # all are fractions
        run_apart(replace(seeded, optim=optim, output_dir=folder / label))
        return folder / label

    seeds = config.seeds[:1] if config.smallest else config.seeds
    grid = method.rates[:1] if config.smallest else method.rates
    first = [(rates, finished(seeds[0], rates)) for rates in grid or ({},)]
    tried = {path.name: best_dev(path) for _, path in first} if grid else {}
    rates, path = max(first, key=lambda pair: tried.get(pair[1].name, 0.0))
    runs = [path, *(finished(seed, rates) for seed in seeds[1:])]
    summaries = [read_object(path / SUMMARY_FILE, SUMMARY) for path in runs]
    scores = [next(iter(summary["scores"].values())) for summary in summaries]
    seconds = [summary["train_seconds"] for summary in summaries]
    return Row(
        task=task,
        method=name,
        score=interval(scores),
        scores=scores,
        figure=next(iter(summaries[0]["scores"])),
        rates=rates,
        tried=tried,
        parameters=summaries[0]["trainable_parameters"]["total"],
        train_seconds=statistics.median(seconds),
        step_milliseconds=1000 * statistics.median(seconds) / max(1, summaries[0]["steps"]),
        peak_mib=max(read_object(path / PEAK_FILE, {"mib": float})["mib"] for path in runs),
        tokens=statistics.mean(summary["tokens_per_example"] for summary in summaries),
    )


def run_apart(config: RunConfig) -> None:
    """Run in a process of its own; a run that is finished is left alone, one that was stopped goes on.

    Raises:
        SystemExit: If the run was stopped or failed; it has said why.
    """
    assert config.output_dir is not None
    if (config.output_dir / SUMMARY_FILE).is_file() and (config.output_dir / PEAK_FILE).is_file():
        return
    print(f"\n{config.output_dir}", flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dept_vl.run"])  # imported once for all
    process = context.Process(target=_run_and_measure, args=(replace(config, resume="auto"),))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()  # it has got the signal too, and ends after the step at hand
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _run_and_measure(config: RunConfig) -> None:
    assert config.output_dir is not None
    result = run(config)
    if result.exit_status:
        raise SystemExit(result.exit_status)
    write_atomically(config.output_dir / PEAK_FILE, json.dumps({"mib": peak_memory() / MIB}).encode())


def peak_memory() -> float:
    """Bytes that this process took at most: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    # In KiB, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def majority(base: RunConfig) -> tuple[str, float] | None:
    """The commonest training answer and what it scores, given to every test question; None for captions."""
    if base.data.task == "coco":
        return None
    splits = load_splits(base.data, base.train.seed)
    counts = Counter(splits.train[index].answer for index in range(len(splits.train)))
    answer = counts.most_common(1)[0][0]
    scores = splits.test.score(dict.fromkeys(splits.test.example_ids(), answer))
    return answer, next(iter(scores.values()))


HEADER = ["method", "score", "trained", "rates", "ms per step", "s of training", "MiB at most", "tokens"]


def write(config: CompareConfig, bases: Mapping[str, RunConfig], rows: list[Row]) -> None:
    """The tables as JSON and Markdown: all methods on all tasks, then each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    names = list(dict.fromkeys(row.method for row in rows))
    scores = {(row.task, row.method): str(row.score) for row in rows}
    usual = {task: majority(bases[task]) for task in tasks}
    parts = [
        markdown_table(
            ["method", *tasks],
            [
                ["majority answer", *(f"{found[1]:.2f}" if (found := usual[task]) else "" for task in tasks)],
                *([name, *(scores.get((task, name), "") for task in tasks)] for name in names),
            ],
        )
    ]
    for task in tasks:
        of_task = [row for row in rows if row.task == task]
        found = usual[task]
        first = [[f"majority answer ({found[0]})", f"{found[1]:.2f}", "0", *[""] * 5]] if found else []
        table = markdown_table(HEADER, [*first, *map(_cells, of_task)])
        parts.append(f"### {task}: {of_task[0].figure}\n\n{table}")
    report = "\n\n".join(parts)
    content = {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "majority": usual,
        "rows": [asdict(row) for row in rows],
    }
    write_atomically(config.output_dir / "comparison.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(config.output_dir / "comparison.md", (report + "\n").encode())
    print(f"\n{report}\n\nwritten to {config.output_dir / 'comparison.md'}")


def _cells(row: Row) -> list[str]:
    return [
        row.method,
        str(row.score),
        f"{row.parameters:,}",
        " / ".join(f"{rate:g}" for rate in row.rates.values()),
        f"{row.step_milliseconds:.0f}" if row.parameters else "",
        f"{row.train_seconds:.1f}" if row.parameters else "",
        f"{row.peak_mib:,.0f}",
        f"{row.tokens:.1f}",
    ]
