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

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

from dept_vl._utils.errors import UnknownNameError
from dept_vl._utils.io import read_object, write_atomically
from dept_vl._utils.run_files import SUMMARY_FILE
from dept_vl._utils.stats import interval
from dept_vl.config import OptimOptions, RunConfig, read_config
from dept_vl.data.splits import load_splits
from dept_vl.models.backbone import Backbone
from dept_vl.models.choices import TrainedPart
from dept_vl.prompts.budget import METHODS
from dept_vl.studies.bench.costs import StepCost, measure_steps
from dept_vl.studies.compare_report import Row, report
from dept_vl.tasks.metrics.caption import check_installed
from dept_vl.tasks.text.table import TEXT_TASKS
from dept_vl.training.extract import with_features
from dept_vl.training.folder import existing
from dept_vl.training.log import best_dev
from dept_vl.training.run import run_once
from dept_vl.training.summary import SUMMARY

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
STEPS_FILE = "steps.json"
FEW_SEEDS = 3
"""Of methods that train something else than a prompt alone."""
TRY = 3
"""Part of the steps for which rates are tried."""
UNUSED = 8
"""Examples of a split that decides nothing in a run."""


@dataclass(frozen=True)
class Compared:
    """A way to adapt the backbone.

    Attributes:
        configure: Makes its configuration of the task's.
        rates: The learning rates that are tried; empty if nothing is trained.
        like: Method whose rates it takes instead.
        reads_images: It trains the visual projection, and means nothing for text.
        few_seeds: The first seeds are enough: it is there to compare prompts with. Zero-shot, which is too,
            has all of them: nothing is trained, and test examples differ by seed.
    """

    configure: Callable[[RunConfig], RunConfig]
    rates: tuple[Rates, ...] = ()
    like: str = ""
    reads_images: bool = False
    few_seeds: bool = True


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and where it is kept."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Names of tasks, or configuration files."""
    methods: tuple[str, ...] = ()
    """Names of methods; empty takes them all."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """One run of each method per seed; of what is no prompt alone, for the first three."""
    max_steps: int = 60
    """Steps of every run; of a try a third."""
    batch_size: int = 8
    """Examples of a step."""
    dev_limit: int = 150
    """At most so many dev examples, by which rates are chosen; 0 takes all."""
    test_limit: int = 200
    """At most so many test examples, the same for all methods of a seed; 0 takes all."""
    rounds: int = 9
    """Steps of every method whose processor time is measured."""
    output_dir: Path = Path("runs/compare")
    """Folder of all runs; those finished are not repeated, those stopped go on."""
    smallest: bool = False
    """Two steps of one seed with the first rates, on a handful of examples: to see that it runs."""


def prompted(method: str, *, projection: bool = False) -> Callable[[RunConfig], RunConfig]:
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
    backbone = Backbone.from_pretrained(**config.backbone.loading())
    backbone.add_lora(1)
    each = sum(p.numel() for p in backbone.language.parameters() if p.requires_grad)
    rank = max(1, config.prompt.reference_prompt_length * backbone.d_model // each)
    config = bare(config, language="lora")
    return replace(config, backbone=replace(config.backbone, lora_rank=rank))


def _rates(**options: tuple[float, ...]) -> tuple[Rates, ...]:
    """One set of rates from each place of all options."""
    return tuple(dict(zip(options, values, strict=True)) for values in zip(*options.values(), strict=True))


LONG_RATES = _rates(prompt_lr=(0.15, 0.02, 0.05, 0.3))
BOTH_RATES = _rates(prompt_lr=(0.15, 0.15, 0.05, 0.3), offset_lr=(0.02, 0.005, 0.02, 0.001))
PROJECTION_RATES = _rates(projection_lr=(1e-3, 3e-4, 3e-3, 1e-2))
PART_RATES = _rates(backbone_lr=(3e-3, 1e-3, 1e-2, 3e-2))
WHOLE_RATES = _rates(backbone_lr=(3e-4, 1e-4, 1e-3, 3e-3))
"""Four tries for every method; `offset_lr` trains what of a prompt `prompt_lr` does not. The last of a
prompt's two are the defaults of `OptimOptions`."""


def _prompt(name: str) -> Compared:
    rates = BOTH_RATES if "low_rank" in METHODS[name].groups() else LONG_RATES
    return Compared(prompted(name), rates, few_seeds=False)


def compared() -> dict[str, Compared]:
    """Return every way to adapt, by name. T5 has no biases; BitFit trains the scales of its norms."""
    return {
        "zero-shot": Compared(bare, few_seeds=False),
        "projection only": Compared(lambda c: bare(c, projection=True), PROJECTION_RATES, reads_images=True),
        "BitFit": Compared(lambda c: bare(c, language="biases"), PART_RATES),
        "LoRA": Compared(with_lora, PART_RATES),
        "full fine-tuning": Compared(lambda c: bare(c, language="all"), WHOLE_RATES),
        **{name: _prompt(name) for name in METHODS},
        "pt + projection": Compared(prompted("pt", projection=True), like="pt", reads_images=True),
        "dept + projection": Compared(prompted("dept", projection=True), like="dept", reads_images=True),
    }


def compare(config: CompareConfig) -> list[Row]:
    """Run what is missing, and write the tables after every seed.

    Returns:
        A row for each method on each task, over all seeds.

    Raises:
        FileNotFoundError: If a configuration or data are missing.
        SystemExit: If a signal stopped it.
        ValueError: If a method or a task is unknown.
    """
    for name in config.methods:
        if name not in compared():
            raise UnknownNameError("method", name, compared())
    # One thread: figures do not depend on how many cores there are, and small models gain nothing by more.
    torch.set_num_threads(1)
    bases = {Path(name).stem: task_config(config, name) for name in config.tasks if _can_run(name)}
    bases = {task: _prepared(config, task, base) for task, base in bases.items()}
    usual = {task: majority(base) for task, base in bases.items()}
    pairs = [
        (task, name)
        for task, name in product(bases, config.methods or compared())
        if not (compared()[name].reads_images and bases[task].data.task in TEXT_TASKS)
    ]
    rows: list[Row] = []
    for count, seed in enumerate(config.seeds[:1] if config.smallest else config.seeds, start=1):
        for task, name in pairs:
            if count <= FEW_SEEDS or not compared()[name].few_seeds:
                seeded_run(config, task, bases[task], name, seed)
        costs = {task: step_costs(config, task, base, pairs) for task, base in bases.items()}
        seeds = config.seeds[:count]
        rows = [row_of(config, task, bases[task], name, seeds, costs[task].get(name)) for task, name in pairs]
        settings = asdict(replace(config, seeds=seeds))
        del settings["output_dir"]
        report(settings, usual, rows, config.output_dir)
    return rows


def _can_run(name: str) -> bool:
    """Whether what a task needs is installed: captions are scored by Java programs."""
    if name != "scenes-coco":
        return True
    try:
        check_installed()
    except (FileNotFoundError, ImportError) as error:
        print(f"{name} is left out: {error}")
        return False
    return True


def task_config(config: CompareConfig, name: str) -> RunConfig:
    """What all methods on a task have in common.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS and not Path(name).is_file():
        raise ValueError(f"unknown task {name!r}; expected a configuration file or one of {', '.join(TASKS)}")
    base = read_config(Path(TASKS.get(name, name)))
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
    if base.data.task in TEXT_TASKS:
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
        print(f"\n{output_dir}", flush=True)
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
        kept = read_object(path, {"settings": {str: int}, "costs": {str: {"seconds": [float], "bytes": int}}})
        costs = {name: StepCost(**cost) for name, cost in kept["costs"].items()}
        if kept["settings"] == settings and all(name in costs for name in names if name != "zero-shot"):
            return costs
    seeded = replace(base, train=replace(base.train, seed=config.seeds[0]))
    configs = {name: compared()[name].configure(seeded) for name in names}
    costs = measure_steps(configs, rounds)
    content = {"settings": settings, "costs": {name: asdict(cost) for name, cost in costs.items()}}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
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
    summaries = [read_object(path / SUMMARY_FILE, SUMMARY) for path in runs]
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


def majority(base: RunConfig) -> tuple[str, float] | None:
    """The commonest training answer and what it scores, given to every test question; None for captions."""
    if base.data.task == "coco":
        return None
    splits = load_splits(replace(base.data, test_limit=0), base.train.seed)
    counts = Counter(splits.train[index].answer for index in range(len(splits.train)))
    answer = counts.most_common(1)[0][0]
    scores = splits.test.score(dict.fromkeys(splits.test.example_ids(), answer))
    return answer, next(iter(scores.values()))
