"""Comparison of methods on several tasks and seeds, with one budget and the same search for every method.

    OUTPUT/TASK/features/                                      visual features, encoded once
    OUTPUT/TASK/steps.json                                     time and memory of a step
    OUTPUT/60-steps/TASK/METHOD/seed1,prompt_lr=0.15,.../      a run
    OUTPUT/60-steps/comparison.json, .md, .png, curves.png     results of the finished seeds
    OUTPUT/lengths.md, lengths.png                             results of all lengths

Every method is trained for the same steps on the same examples in the same order, and its best checkpoint on
the dev split is scored. The learning rates of a method are searched with the first seed, with the same number
of tries for each method, and again for each length. The other seeds use the rates with the best dev score;
test scores decide nothing. All runs of a seed are finished before the next seed, so that a stopped comparison
is one of fewer seeds. The same command resumes it. Several processes with the same command share the runs.

Time on one core: a run of 60 steps takes 2 (`memory`) to 9 seconds (`pt`) for its steps, 2 for its
evaluations, and half a second for everything else. Features are extracted once. Eleven methods, eight tasks,
five seeds and three tries take about an hour.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.compare_methods import Rates, compared
from benchmarks.compare_report import Row, over_lengths, report
from benchmarks.costs import StepCost, measure_steps
from benchmarks.features import with_features
from benchmarks.options import COMPARED_TASKS, CompareConfig, shipped
from dept_vl._utils.errors import InUseError, UsageError
from dept_vl._utils.io import read_json, read_object, write_noted_json
from dept_vl._utils.printable import say
from dept_vl._utils.run_files import LOG_FILE, SUMMARY_FILE
from dept_vl._utils.stats import interval
from dept_vl._utils.terminal import waiting
from dept_vl.config import (
    RENAMED,
    BackboneOptions,
    DataOptions,
    OptimOptions,
    RunConfig,
    read_config,
    to_json,
)
from dept_vl.data.splits import load_splits
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.tasks import TASKS
from dept_vl.training.build import build_prompt
from dept_vl.training.identity import contents, forget_contents
from dept_vl.training.log import read_log
from dept_vl.training.owner import owning
from dept_vl.training.run import run_once
from dept_vl.training.summary import Summary

STEPS_FILE = "steps.json"
EVALUATED, MOST = 20, 10
"""Steps between evaluations, and the maximum number of evaluations of a run."""
UNUSED = 8
"""Examples of a split in the smallest comparison."""


def compare(config: CompareConfig) -> list[Row]:
    """Run everything that is not finished, and write the tables after every seed.

    Returns:
        One row for each method on each task, over all seeds, for the last number of steps.

    Raises:
        DifferentError: If a finished run has other options, data or models.
        FileNotFoundError: If a configuration or data are missing.
        UsageError: If a backbone supports none of the methods.
        SystemExit: If a signal stopped a run.
        ValueError: If a method or a task is unknown.
    """
    config.check()
    forget_contents()
    # One thread: small models gain nothing from more, and figures do not depend on the number of cores.
    torch.set_num_threads(1)
    if config.smallest:
        config = replace(config, max_steps=(2,), seeds=config.seeds[:1])
    rows: list[Row] = []
    for steps in config.max_steps:
        rows = _Comparison(config, steps).run()
    over_lengths(config.output_dir, config.max_steps[-1])
    return rows


class _Comparison:
    """Comparison for one number of steps."""

    def __init__(self, config: CompareConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.folder = config.output_dir / f"{steps}-steps"
        own = config.own.data
        named = {Path(name).stem: name for name in config.tasks}
        names = named if own is None else {Path(own).stem: config.tasks[0]}
        bases = {task: task_config(config, name, steps) for task, name in names.items()}
        self.bases = {
            task: _prepared(config, task, base) for task, base in bases.items() if _can_run(task, base)
        }
        named_methods = config.methods or tuple(compared())
        pairs = [
            (task, name)
            for task, name in product(self.bases, named_methods)
            if not (compared()[name].reads_images and not TASKS[self.bases[task].data.task].image_count)
        ]
        self.fingerprints, self.left_out = _left_out(self.bases, pairs)
        self.pairs = [pair for pair in pairs if pair not in self.left_out]
        if self.left_out and not self.pairs:
            raise UsageError("; ".join(dict.fromkeys(self.left_out.values())))

    def run(self) -> list[Row]:
        """Run everything that is not finished, and write the tables after every seed."""
        config = self.config
        usual = {task: majority(base) for task, base in self.bases.items()}
        rows: list[Row] = []
        for count, seed in enumerate(config.seeds, start=1):
            others = [pair for pair in self.pairs if not self._try(*pair, seed)]
            for task, name in others:  # wait for the runs of other processes
                self.seeded_run(task, name, seed, wait=True)
            try:
                costs = {
                    task: step_costs(config, task, base, self._methods(task), wait=count == len(config.seeds))
                    for task, base in self.bases.items()
                }
            except InUseError:  # the process that measures also writes the tables of this seed
                continue
            seeds = config.seeds[:count]
            rows = [self.row(task, name, seeds, costs[task].get(name)) for task, name in self.pairs]
            settings = to_json(replace(config, seeds=seeds, max_steps=(self.steps,)))
            del settings["output_dir"]
            if config.own.data is None:
                del settings["own"]
            if config.model is None:
                del settings["model"]
            settings["backbones"] = self.fingerprints
            settings["contents"] = {
                task: contents(with_seed(base, seeds[0])) for task, base in self.bases.items()
            }
            with owning(self.folder, wait=True):  # one process writes at a time
                report(settings, usual, rows, self.folder, list(dict.fromkeys(self.left_out.values())))
        return rows

    def _methods(self, task: str) -> list[str]:
        return [name for of_task, name in self.pairs if of_task == task]

    def _try(self, task: str, name: str, seed: int) -> bool:
        """Run a method with a seed, including its search; return False if another process holds a run."""
        try:
            self.seeded_run(task, name, seed)
        except InUseError:
            return False
        return True

    def seeded_run(self, task: str, name: str, seed: int, *, wait: bool = False) -> Path:
        """Run a method with a seed unless this is finished; return the folder of the run."""
        rates, _ = self.choose_rates(task, name, wait=wait)
        return self._run(task, name, seed, rates, wait=wait)

    def choose_rates(self, task: str, name: str, *, wait: bool = False) -> tuple[Rates, dict[str, float]]:
        """Return the learning rates of a method, and the dev score of each try with the first seed."""
        method, seed = compared()[name], self.config.seeds[0]
        if method.like:
            return self.choose_rates(task, method.like, wait=wait)
        grid = method.rates[:1] if self.config.smallest else method.rates
        if len(grid) < 2:
            return (grid[0] if grid else {}), {}
        tried, busy = dict[str, float](), None
        for rates in grid:
            try:
                tried[_label(rates)] = best_dev(self._run(task, name, seed, rates, wait=wait))
            except InUseError as error:  # the next one may be free
                busy = error
        if busy is not None:
            raise busy
        return max(grid, key=lambda rates: tried[_label(rates)]), tried

    def _run(self, task: str, name: str, seed: int, rates: Rates, *, wait: bool) -> Path:
        """Run with these learning rates unless this is finished; return the folder of the run."""
        folder = self.folder / task / name.replace(" ", "_")
        label = older = ",".join(filter(None, [f"seed{seed}", _label(rates)]))
        for old, new in RENAMED.items():
            older = older.replace(new, old)
        output_dir = folder / (older if (folder / older).is_dir() else label)
        if not (output_dir / SUMMARY_FILE).is_file():
            say("", output_dir)
        configured = compared()[name].configure(self.bases[task])
        optim: OptimOptions = replace(configured.optim, **rates)  # type: ignore[arg-type]  # all are fractions
        train = replace(configured.train, seed=seed)
        return run_once(
            replace(configured, optim=optim, train=train, output_dir=output_dir, wait=wait)
        ).output_dir

    def row(self, task: str, name: str, seeds: tuple[int, ...], cost: StepCost | None) -> Row:
        """Return the row of a method over some seeds."""
        rates, tried = self.choose_rates(task, name)
        runs = [self.seeded_run(task, name, seed) for seed in seeds]
        summaries = [read_object(path / SUMMARY_FILE, Summary) for path in runs]
        figure = next(iter(summaries[0]["scores"]))
        scores = [summary["scores"][figure] for summary in summaries]
        return Row(
            task=task,
            method=name,
            figure=figure,
            score=interval(scores),
            scores=scores,
            rates=rates,
            tried=tried,
            parameters=summaries[0]["trainable_parameters"]["total"],
            tokens=summaries[0]["tokens_per_example"],
            cost=cost,
            curve=dict(_curve(runs)),
        )


def best_dev(run: Path) -> float:
    """Return the best dev score of a run (the mean over tasks if there are several)."""
    return max(float(record["score"]) for record in read_log(run / LOG_FILE) if "score" in record)


def _curve(runs: list[Path]) -> Iterator[tuple[int, list[float]]]:
    """Yield each evaluated step with the dev scores of all runs."""
    logs = [read_log(path / LOG_FILE) if (path / LOG_FILE).is_file() else [] for path in runs]
    scores = [{line["step"]: float(line["score"]) for line in log if "score" in line} for log in logs]
    for step in scores[0]:
        yield step, [of_run[step] for of_run in scores]


def _left_out(
    bases: Mapping[str, RunConfig], pairs: Sequence[tuple[str, str]]
) -> tuple[dict[str, dict[str, str]], dict[tuple[str, str], str]]:
    """Load each backbone once; return its fingerprint by name, and why it does not support a pair."""
    loaded = {str(base.backbone.loading()): base.backbone for base in bases.values()}
    found, reasons = dict[str, dict[str, str]](), dict[tuple[str, str], str]()
    for key, options in loaded.items():
        backbone = open_backbone(**options.loading())
        found[backbone.name] = backbone.fingerprint
        mine = [pair for pair in pairs if str(bases[pair[0]].backbone.loading()) == key]
        reasons |= {(task, name): why for task, name in mine if (why := _why(name, bases[task], backbone))}
    for why in dict.fromkeys(reasons.values()):
        say(why)
    return found, reasons


def _why(name: str, base: RunConfig, backbone: FrozenBackbone) -> str:
    """Return why a method is left out on a backbone, or an empty string."""
    if compared()[name].reads_images and backbone.visual_projection is None:
        return (
            f"{name} is left out: it trains the visual projection of a composed backbone, and that of "
            f"{backbone.name} stays frozen; take the same without it"
        )
    options = compared()[name].configure(base).prompt
    # With a budget that is large enough for every part of a method.
    options = replace(options, reference_prompt_length=max(100, options.reference_prompt_length))
    prompt = build_prompt(options, backbone, base.train.seed)
    try:
        if prompt is not None:
            backbone.check_prompt(prompt)
    except ValueError as error:
        return f"{name} is left out: {error}"
    return ""


def _can_run(name: str, base: RunConfig) -> bool:
    """Return whether the packages and files that a task's metrics need are installed."""
    try:
        TASKS[base.data.task].check_requirements()
    except (FileNotFoundError, ImportError) as error:
        say(f"{name} is left out: {error}")
        return False
    return True


def task_config(config: CompareConfig, name: str, steps: int) -> RunConfig:
    """Return the configuration that all methods on a task share.

    Raises:
        ValueError: If the task is unknown.
    """
    base = read_config(shipped(COMPARED_TASKS.get(name, name)))
    if config.own.data is not None:
        base = replace(base, data=DataOptions(own=config.own, max_lost_answers=base.data.max_lost_answers))
    dev, test, size = config.dev_limit, config.test_limit, config.batch_size
    if config.smallest:
        dev, test, size = UNUSED, UNUSED, min(size, 4)
    backbone = base.backbone
    if config.backbone is not None:
        backbone = replace(backbone, backbone=config.backbone)
    if config.model is not None:
        backbone = BackboneOptions(
            model=config.model, exif=backbone.exif, backbone_dropout=backbone.backbone_dropout
        )
    return with_steps(
        replace(
            base,
            backbone=backbone,
            # Greedy search, and captions scored by CIDEr: beams and METEOR would cost too much.
            data=replace(base.data, dev_limit=dev, test_limit=test, num_beams=1, meteor=False),
            train=replace(base.train, per_device_batch_size=size, eval_batch_size=64),
        ),
        steps,
    )


def with_steps(base: RunConfig, steps: int) -> RunConfig:
    """Set the number of steps, with a tenth of them as warm-up, and evaluations at equal intervals."""
    evaluations = min(MOST, max(1, steps // EVALUATED))
    return replace(
        base,
        train=replace(base.train, max_steps=steps, eval_every=-(-steps // evaluations), checkpoint_every=0),
        optim=replace(base.optim, warmup_steps=steps // 10),
    )


def _prepared(config: CompareConfig, task: str, base: RunConfig) -> RunConfig:
    """Extract the visual features and use them, except in the smallest comparison."""
    if not TASKS[base.data.task].image_count:
        return base
    if config.smallest:
        return replace(base, data=replace(base.data, features="live"))
    return with_features(base, config.output_dir / task / "features")


def _label(rates: Rates) -> str:
    return ",".join(f"{option}={rate:g}" for option, rate in rates.items())


def step_costs(
    config: CompareConfig, task: str, base: RunConfig, names: list[str], *, wait: bool
) -> dict[str, StepCost]:
    """Measure time and memory of a step of every method, or read them if they are measured."""
    folder = config.output_dir / task
    rounds = 1 if config.smallest else config.rounds
    seeded = with_seed(base, config.seeds[0])
    settings = {
        "batch_size": base.train.per_device_batch_size,
        "rounds": rounds,
        "options": to_json(with_steps(replace(seeded, output_dir=None), EVALUATED)),
        "contents": contents(seeded),
    }
    with owning(folder, wait=wait):  # a second process finds what the first one measured
        if (folder / STEPS_FILE).is_file():
            kept = read_json(folder / STEPS_FILE)  # written below
            costs = {name: StepCost(**cost) for name, cost in kept["costs"].items()}
            missing = [name for name in names if name != "zero-shot" and name not in costs]
            # Older files have fewer settings.
            changed = [name for name, value in kept["settings"].items() if settings.get(name) != value]
            if not missing and not changed:
                return costs
            if changed:
                others = " and ".join(changed)
                say(f"note: {folder / STEPS_FILE} is of other {others}; steps are measured again")
        costs = measure_steps({name: compared()[name].configure(seeded) for name in names}, rounds)
        content = {name: asdict(cost) for name, cost in costs.items()}
        write_noted_json(folder / STEPS_FILE, {"settings": settings, "costs": content})
    return costs


def with_seed(base: RunConfig, seed: int) -> RunConfig:
    """Return the configuration with another random seed."""
    return replace(base, train=replace(base.train, seed=seed))


@waiting("looking at the data")
def majority(base: RunConfig) -> tuple[str, float] | None:
    """Return the most frequent training answer and its test score; None for captions."""
    if not TASKS[base.data.task].asks:
        return None
    splits = load_splits(replace(base.data, test_limit=0), base.train.seed)
    if splits.train[0].in_turn:
        return None
    counts = Counter(splits.train[index].answer for index in range(len(splits.train)))
    answer = counts.most_common(1)[0][0]
    scores = splits.test.score(dict.fromkeys(splits.test.example_ids(), answer))
    return answer, next(iter(scores.values()))
