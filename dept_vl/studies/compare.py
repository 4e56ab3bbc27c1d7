"""Methods side by side: several tasks and seeds, one budget, the same search for every method.

    OUTPUT/TASK/features/                                     visual features, encoded once
    OUTPUT/TASK/METHOD/try,prompt_lr=0.15,offset_lr=0.02/     a third of the steps, scored on the dev split
    OUTPUT/TASK/METHOD/seed1,prompt_lr=0.15,offset_lr=0.02/   a whole run, scored on the test split
    OUTPUT/TASK/steps.json                                    time and memory of a step
    OUTPUT/comparison.json, .md                               of the seeds that are finished

Every method trains for the same steps on the same examples in the same order, and is what it is after the
last. It tries each of its rates (as many for one method as for another) for a third of the steps and takes
those of the best dev figure. Test figures decide nothing. Finished runs are kept; all are done with one seed
before the next one is begun, so that a comparison that was stopped is one of fewer seeds.
"""

from collections import Counter
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch

from dept_vl._utils.io import read_json, read_object, write_noted_json
from dept_vl._utils.printable import say
from dept_vl._utils.run_files import SUMMARY_FILE
from dept_vl._utils.stats import interval
from dept_vl._utils.terminal import waiting
from dept_vl.config import DataOptions, OptimOptions, RunConfig, read_config, to_json
from dept_vl.data.splits import load_splits
from dept_vl.studies.bench.costs import StepCost, measure_steps
from dept_vl.studies.compare_methods import Rates, compared
from dept_vl.studies.compare_report import Row, report
from dept_vl.studies.options import COMPARED_TASKS, CompareConfig
from dept_vl.tasks import TASKS
from dept_vl.training.extract import with_features
from dept_vl.training.folder import existing
from dept_vl.training.log import best_dev
from dept_vl.training.run import run_once
from dept_vl.training.summary import Summary

STEPS_FILE = "steps.json"
FEW_SEEDS = 3
"""Of methods that train something else than a prompt alone."""
TRY = 3
"""Part of the steps for which rates are tried."""
UNUSED = 8
"""Examples of a split that decides nothing in a run."""


def compare(config: CompareConfig) -> list[Row]:
    """Run what is missing, and write the tables after every seed.

    Returns:
        A row for each method on each task, over all seeds.

    Raises:
        FileNotFoundError: If a configuration or data are missing.
        SystemExit: If a signal stopped it.
        ValueError: If a method or a task is unknown.
    """
    config.check()
    # One thread: figures do not depend on how many cores there are, and small models gain nothing by more.
    torch.set_num_threads(1)
    own = config.own.data
    names = (
        {Path(name).stem: name for name in config.tasks} if own is None else {Path(own).stem: config.tasks[0]}
    )
    bases = {name: task_config(config, file) for name, file in names.items()}
    bases = {task: _prepared(config, task, base) for task, base in bases.items() if _can_run(task, base)}
    usual = {task: majority(base) for task, base in bases.items()}
    pairs = [
        (task, name)
        for task, name in product(bases, config.methods or compared())
        if not (compared()[name].reads_images and not TASKS[bases[task].data.task].image_count)
    ]
    rows: list[Row] = []
    for count, seed in enumerate(config.seeds[:1] if config.smallest else config.seeds, start=1):
        for task, name in pairs:
            if count <= FEW_SEEDS or not compared()[name].few_seeds:
                seeded_run(config, task, bases[task], name, seed)
        costs = {task: step_costs(config, task, base, pairs) for task, base in bases.items()}
        seeds = config.seeds[:count]
        rows = [row_of(config, task, bases[task], name, seeds, costs[task].get(name)) for task, name in pairs]
        settings = to_json(replace(config, seeds=seeds))
        del settings["output_dir"]
        if own is None:
            del settings["own"]
        report(settings, usual, rows, config.output_dir)
    return rows


def _can_run(name: str, base: RunConfig) -> bool:
    """Whether what the metrics of a task need is installed."""
    try:
        TASKS[base.data.task].check_requirements()
    except (FileNotFoundError, ImportError) as error:
        say(f"{name} is left out: {error}")
        return False
    return True


def task_config(config: CompareConfig, name: str) -> RunConfig:
    """What all methods on a task have in common.

    Raises:
        ValueError: If there is no such task.
    """
    base = read_config(Path(COMPARED_TASKS.get(name, name)))
    if config.own.data is not None:
        base = replace(base, data=DataOptions(own=config.own, max_lost_answers=base.data.max_lost_answers))
    dev, test, size = config.dev_limit, config.test_limit, config.batch_size
    if config.smallest:
        dev, test, size = UNUSED, UNUSED, min(size, 4)
    return with_steps(
        replace(
            base,
            # Greedy, and captions by CIDEr: beams and METEOR cost more than they would show here.
            data=replace(base.data, dev_limit=dev, test_limit=test, num_beams=1, meteor=False),
            train=replace(base.train, per_device_batch_size=size, eval_batch_size=64),
        ),
        2 if config.smallest else config.max_steps,
    )


def with_steps(base: RunConfig, steps: int) -> RunConfig:
    """So many steps, a tenth of them to warm up, and one evaluation behind the last."""
    return replace(
        base,
        train=replace(base.train, max_steps=steps, eval_every=steps, checkpoint_every=0),
        optim=replace(base.optim, warmup_steps=steps // 10),
    )


def _prepared(config: CompareConfig, task: str, base: RunConfig) -> RunConfig:
    """The same, with visual features from files; of thousands of images the smallest reads a handful."""
    if not TASKS[base.data.task].image_count:
        return base
    if config.smallest:
        return replace(base, data=replace(base.data, features="live"))
    return with_features(base, config.output_dir / task / "features")


def seeded_run(config: CompareConfig, task: str, base: RunConfig, name: str, seed: int) -> Path:
    """The folder of a method's run, which is made if it is missing."""
    rates, _ = choose_rates(config, task, base, name)
    configured = compared()[name].configure(base)
    data = replace(configured.data, dev_limit=UNUSED)
    configured = replace(configured, data=data, train=replace(configured.train, seed=seed))
    return _run(configured, rates, config.output_dir / task / _folder(name), f"seed{seed}")


def choose_rates(
    config: CompareConfig, task: str, base: RunConfig, name: str
) -> tuple[Rates, dict[str, float]]:
    """The rates of a method, and the dev figure of all that were tried, with the first seed."""
    method = compared()[name]
    if method.like:
        return choose_rates(config, task, base, method.like)
    grid = method.rates[:1] if config.smallest else method.rates
    if len(grid) < 2:
        return (grid[0] if grid else {}), {}
    short = with_steps(method.configure(base), max(1, base.train.max_steps // TRY))
    data, train = replace(short.data, test_limit=UNUSED), replace(short.train, seed=config.seeds[0])
    short = replace(short, data=data, train=train)
    folder = config.output_dir / task / _folder(name)
    tried = {_label(rates): best_dev(_run(short, rates, folder, "try")) for rates in grid}
    return max(grid, key=lambda rates: tried[_label(rates)]), tried


def _folder(name: str) -> str:
    return name.replace(" ", "_")


def _label(rates: Rates) -> str:
    return ",".join(f"{option}={rate:g}" for option, rate in rates.items())


def _run(configured: RunConfig, rates: Rates, folder: Path, kind: str) -> Path:
    """Run with these rates, unless the run is finished; return its folder."""
    output_dir = existing(folder / ",".join(filter(None, [kind, _label(rates)])))
    optim: OptimOptions = replace(configured.optim, **rates)  # type: ignore[arg-type]  # all are fractions
    if not (output_dir / SUMMARY_FILE).is_file():
        say("", output_dir)
    return run_once(replace(configured, optim=optim, output_dir=output_dir)).output_dir


def step_costs(
    config: CompareConfig, task: str, base: RunConfig, pairs: list[tuple[str, str]]
) -> dict[str, StepCost]:
    """Time and memory of a step of every method, measured in turn, once."""
    names = [name for of_task, name in pairs if of_task == task]
    path = config.output_dir / task / STEPS_FILE
    rounds = 1 if config.smallest else config.rounds
    settings = {"batch_size": base.train.per_device_batch_size, "rounds": rounds}
    if path.is_file():
        kept = read_json(path)  # written below
        costs = {name: StepCost(**cost) for name, cost in kept["costs"].items()}
        if kept["settings"] == settings and all(name in costs for name in names if name != "zero-shot"):
            return costs
    seeded = replace(base, train=replace(base.train, seed=config.seeds[0]))
    configs = {name: compared()[name].configure(seeded) for name in names}
    costs = measure_steps(configs, rounds)
    write_noted_json(
        path, {"settings": settings, "costs": {name: asdict(cost) for name, cost in costs.items()}}
    )
    return costs


def row_of(
    config: CompareConfig,
    task: str,
    base: RunConfig,
    name: str,
    seeds: tuple[int, ...],
    cost: StepCost | None,
) -> Row:
    """What a method came to with some seeds."""
    rates, tried = choose_rates(config, task, base, name)
    seeds = seeds[:FEW_SEEDS] if compared()[name].few_seeds else seeds
    runs = [seeded_run(config, task, base, name, seed) for seed in seeds]
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
    )


@waiting("looking at the data")
def majority(base: RunConfig) -> tuple[str, float] | None:
    """The commonest training answer and what it scores, given to every test question; None for captions."""
    if not TASKS[base.data.task].asks:
        return None
    splits = load_splits(replace(base.data, test_limit=0), base.train.seed)
    if splits.train[0].in_turn:
        return None
    counts = Counter(splits.train[index].answer for index in range(len(splits.train)))
    answer = counts.most_common(1)[0][0]
    scores = splits.test.score(dict.fromkeys(splits.test.example_ids(), answer))
    return answer, next(iter(scores.values()))
