"""Few-shot transfer: how much a prompt trained on one task helps with a few examples of another.

    OUTPUT/source-TASK/           a source that was trained here
    OUTPUT/k4/seed1/scratch/      one run for each k, seed and start
    OUTPUT/k4/seed1/prompt/
    OUTPUT/k4/seed1/pick.json     loss of each of several sources; the lowest is used
    OUTPUT/transfer.json, .md, .png

Sources, starts and k are those of ATTEMPT (Asai et al. 2022) and DePT (Shi & Lipani 2024). The shots differ
by default: k of each class, and as many others as a dev set, so that only the shots are used (as in LM-BFF,
Gao et al. 2021). With `preset` paper they are DePT's: k in total, and the whole dev split.
"""

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from dept_vl._utils.io import is_there, read_json, write_atomically, write_json, write_noted_json
from dept_vl._utils.printable import say
from dept_vl._utils.processes import main_first, on_main
from dept_vl._utils.run_files import CONFIG_FILE
from dept_vl._utils.stats import Interval, interval
from dept_vl._utils.tables import markdown_table
from dept_vl._utils.terminal import waiting
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import DataOptions, PromptOptions, RunConfig, read_config
from dept_vl.data.answers import fit_answers
from dept_vl.data.collate import Collator, Draw
from dept_vl.data.splits import load_splits
from dept_vl.studies.options import Start, TransferConfig
from dept_vl.tasks import TASKS
from dept_vl.training.build import build_model
from dept_vl.training.identity import contents, forget_contents
from dept_vl.training.report.plots import score_plot
from dept_vl.training.run import run_once

PICK_FILE = "pick.json"
PAPER_SHOTS: dict[str, Any] = {"shots_per": "all", "shots_dev": "split", "dev_limit": 0}
"""Data options of DePT's few-shot protocol."""


def transfer(config: TransferConfig, *, more_to_come: bool = False) -> None:
    """Run everything that is not finished, and write the table; see `run_once`.

    With `more_to_come` another transfer follows in this program, so the process group stays open.
    """
    config.check()
    forget_contents()
    processes = PartialState(cpu=not torch.accelerator.is_available())
    base = target_config(config)
    sources = []
    for name in config.source:
        if name in TASKS and not Path(name).is_dir():
            sources.append(run_once(source_config(config, name)).output_dir)
        else:
            Adapter.from_pretrained(Path(name))  # fails before the runs from scratch
            sources.append(Path(name))
    check_fit(config, base, sources)
    scores: dict[tuple[Start, int], list[float]] = {}
    for k, seed, start in product(config.k, range(1, config.seeds + 1), config.starts):
        result = run_once(cell_config(config, base, sources, k, seed, start))
        primary = next(iter(result.scores.values()))
        scores.setdefault((start, k), []).append(primary)
    on_main(processes, lambda: write_table(config, scores))
    if not more_to_come:
        processes.destroy_process_group()


@waiting("looking whether the sources fit")
def check_fit(config: TransferConfig, base: RunConfig, sources: list[Path]) -> None:
    """Raise ValueError before the runs if there are too few examples, or a source does not fit."""
    splits = load_splits(replace(base.data, shots=max(config.k), shots_seed=1), base.train.seed)
    if not splits.test[0].targets:
        raise ValueError(
            f"the split {splits.options.test_split} of {config.target} has no published answers to score on; "
            "name another test_split in --config"
        )
    for source, start in product(sources, config.starts):
        if start != "scratch":
            prompt = replace(base.prompt, init_from=(source,), init_parts=start)
            build_model(replace(base, prompt=prompt))


def target_config(config: TransferConfig) -> RunConfig:
    """Return the configuration that all runs on the target share.

    It has neither shots nor an initial prompt of its own: those are chosen for each run.
    """
    base = given_config(config)
    data = data_of(config.target, base)
    if config.own.data is not None:
        data = DataOptions(task=config.target, own=config.own, max_lost_answers=data.max_lost_answers)
    train = base.train
    if config.max_steps:
        train = replace(train, max_steps=config.max_steps, num_epochs=0)
    return replace(
        base,
        data=replace(
            data,
            data_dir=config.data_dir or data.data_dir,
            test_limit=config.test_limit or data.test_limit,
            shots_file=None,
            **(PAPER_SHOTS if config.preset == "paper" else {}),
        ),
        train=train,
        also=(),
    )


def source_config(config: TransferConfig, task: str) -> RunConfig:
    """Return the configuration of the run that trains a source."""
    names = [name for name in config.source if name in TASKS and not Path(name).is_dir()]
    given = config.source_config
    if given and len(given) != len(names):
        raise ValueError(f"expected a source_config for each of {names}, found {len(given)}")
    if given:
        run = read_config(given[names.index(task)])
    else:
        base = given_config(config)
        run = replace(base, data=data_of(task, base), also=())
    return replace(run, output_dir=config.output_dir / f"source-{task}")


def given_config(config: TransferConfig) -> RunConfig:
    """Return the configuration that the target's runs, and the sources', are made from."""
    path = config.config or Path(config.source[0]) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no configuration at {path}, and {config.source[0]!r} is not a run to take one from: give "
            "--config, such as data/configs/scenes-vqav2.json"
        )
    base = read_config(path)
    return replace(
        base,
        prompt=replace(base.prompt, init_from=(), init_parts=PromptOptions.init_parts),
        train=replace(base.train, pause_at=0),
    )


def data_of(task: str, base: RunConfig) -> DataOptions:
    """Return the data options of a task: the configuration's if it is one of its tasks, else the defaults."""
    known = (one for one in (base.data, *base.also) if one.task == task)
    return next(known, DataOptions(task=task))


def cell_config(
    config: TransferConfig, base: RunConfig, sources: list[Path], k: int, seed: int, start: Start
) -> RunConfig:
    """Return the configuration of one run: shots, random seed, and how its prompt is initialised."""
    folder = config.output_dir / f"k{k}" / f"seed{seed}"
    cell = replace(
        base,
        data=replace(base.data, shots=k, shots_seed=seed),
        train=replace(base.train, seed=seed),
        output_dir=folder / start,
    )
    if start == "scratch":
        return cell
    if len(sources) > 1 and config.several == "pick":
        sources = [pick(cell, sources, folder / PICK_FILE)]
    return replace(cell, prompt=replace(cell.prompt, init_from=tuple(sources), init_parts=start))


def pick(cell: RunConfig, sources: list[Path], path: Path) -> Path:
    """Return the source whose P has the lowest loss on the dev shots without training; store the losses."""
    processes = PartialState()
    all_sources = replace(cell, prompt=replace(cell.prompt, init_from=tuple(sources), init_parts="prompt"))
    now = on_main(processes, lambda: contents(all_sources, processes.num_processes))
    losses = on_main(processes, lambda: _kept_losses(path, now))
    if not losses:
        for source in sources:
            prompt = replace(cell.prompt, init_from=(source,), init_parts="prompt")
            losses[str(source)] = dev_loss(replace(cell, prompt=prompt), processes)
        on_main(processes, lambda: _keep_losses(path, losses, now))
    return min(sources, key=lambda source: losses[str(source)])


def _kept_losses(path: Path, now: dict[str, str]) -> dict[str, float]:
    """Return the stored losses; empty if they are of other data, models or sources."""
    kept = read_json(path) if is_there(path) else {"losses": {}}  # written below
    if kept.get("contents", now) != now:  # older files do not say
        say(f"note: {path} is of other data, models or sources; the sources are tried again")
        return {}
    losses: dict[str, float] = kept["losses"]
    return losses


def _keep_losses(path: Path, losses: dict[str, float], now: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_noted_json(path, {"losses": losses, "contents": now})


@torch.no_grad()
@waiting("trying a source")
def dev_loss(config: RunConfig, processes: PartialState) -> float:
    """Return the mean loss on the dev examples without training, each with its best answer."""
    with main_first(processes):
        splits = load_splits(config.data, config.train.seed)
    model = build_model(config).to(processes.device).eval()
    splits, _ = fit_answers(splits, model.backbone.tokenizer)
    collate = Collator.for_model(
        model,
        splits.decoding.max_new_tokens,
        max_source_length=config.prompt.max_source_length + model.backbone.frame,
        images=model.backbone.vision,
    )
    examples = [splits.dev[index] for index in range(len(splits.dev))]
    draws = [Draw(one, max(one.targets, key=lambda pair: pair[1])[0]) for one in examples]
    total, size = 0.0, config.train.eval_batch_size
    for start in range(0, len(draws), size):
        part = draws[start : start + size]
        batch = collate(part).to(processes.device)
        total += model(**batch.training_inputs()).loss.item() * len(part)
    return total / len(draws)


NAMES: dict[Start, str] = {"scratch": "from scratch", "prompt": "from P", "all": "from P and offset"}


def write_table(config: TransferConfig, scores: dict[tuple[Start, int], list[float]]) -> None:
    """Write the table as JSON and Markdown, and a plot if matplotlib is installed."""
    folder = config.output_dir
    intervals: dict[tuple[Start, int], Interval] = {key: interval(values) for key, values in scores.items()}
    rows = [
        [
            f"{k}",
            NAMES[start],
            f"{one.mean:.2f}",
            "" if one.deviation is None else f"{one.deviation:.2f}",
            "" if one.half_width is None else f"± {one.half_width:.2f}",
            one.count,
        ]
        for (start, k), one in intervals.items()
    ]
    table = markdown_table(["k", "start", config.target, "deviation", "95% interval", "seeds"], rows)
    records = [
        {"k": k, "start": start, **asdict(one), "scores": scores[start, k]}
        for (start, k), one in intervals.items()
    ]
    content = {"source": config.source, "target": config.target, "cells": records}
    write_json(folder / "transfer.json", content)
    write_atomically(folder / "transfer.md", (table + "\n").encode())
    lines = {
        NAMES[start]: {k: intervals[start, k] for k in config.k if (start, k) in intervals}
        for start in config.starts
    }
    drawn = score_plot(lines, folder / "transfer.png", x="shots (k)", y=config.target)
    say("", *table.split("\n"), "", f"table{' and plot' if drawn else ''}: {folder}")
