"""A search of the learning rates and of the split of the budget, by successive halving.

    OUTPUT/study.db          Optuna's study: what was tried, and what came of it
    OUTPUT/trial-007/        a run; one that is promoted goes on from its checkpoint
    OUTPUT/tuning.json, .md  what was tried

All trials train for a quarter of the steps; the best third goes on to a half, and of these the better half
to the end. Twenty trials so cost 8 whole runs, as much as the grid that the authors of DePT published
(`GRID`). Optuna proposes, from what the first quarters scored, and the first trial is the configuration
as it is. The dev split decides; the best trial is scored on the test split, as any run.
"""

from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import read_object, write_atomically, write_json, write_noted_json
from dept_vl._utils.printable import say
from dept_vl._utils.processes import on_main
from dept_vl._utils.run_files import CONFIG_FILE
from dept_vl._utils.tables import markdown_table
from dept_vl.config import RunConfig, current_options, differences, to_json, validate
from dept_vl.prompts.base import METHODS
from dept_vl.tasks import TASKS
from dept_vl.training.folder import existing
from dept_vl.training.identity import changed_contents, forget_contents
from dept_vl.training.log import best_dev
from dept_vl.training.run import run, run_once
from dept_vl.training.summary import RunResult

Space = dict[str, tuple[float, float] | list[int]]
"""The range of each rate, and the lengths of the prompt."""
STUDY_FILE = "study.db"
STUDY = "dept_vl"
GRID = tuple(product((0.3, 0.4), (1e-4, 5e-4, 1e-3, 5e-3)))
"""`prompt_lr` and `offset_lr` that won one of the authors' 17 released runs: the published grid."""
QUARTERS = (1, 2, 4)
"""Quarters of the steps, after which trials are compared; the last is the end."""
GO_ON = (3, 2)
"""One trial in so many goes on, after the first comparison and after the second."""
RANGES = {
    "prompt_lr": (0.02, 1.0),
    "offset_lr": (1e-4, 0.05),
    "projection_lr": (1e-4, 1e-2),
    "backbone_lr": (1e-5, 1e-2),
}
"""Searched on a logarithmic scale; wider where the configuration's own rate lies outside."""
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of the budget, spent on the vectors of the prompt; the rest on its rank."""


@dataclass
class Trial:
    """What was tried.

    Attributes:
        number: From 0.
        values: Rates, and the prompt's length where it is searched.
        scores: Best dev figure so far, by steps.
    """

    number: int
    values: dict[str, Any]
    scores: dict[int, float]


def launch(config: RunConfig) -> RunResult:
    """Run, or with `--tune` search and run."""
    return tune(config) if config.tune else run(config)


def tune(config: RunConfig) -> RunResult:
    """Search, and return the best trial's run.

    Raises:
        FileExistsError: If the folder holds a study, finished or not, that is not to go on.
        FileNotFoundError: If there is no study to go on with.
        ImportError: If Optuna is not installed.
        ValueError: If a study was begun with other options or data, or there is nothing to search.
    """
    validate(config)
    if config.train.num_epochs:
        raise UsageError("a search compares runs of so many steps: give --max_steps, and --num_epochs 0")
    search = _space(config)
    if not search:
        raise ValueError("there is nothing to search: neither a prompt nor anything else is trained")
    processes = PartialState(cpu=not torch.accelerator.is_available())
    folder = _folder(config)
    opened: list[_Study] = []
    forget_contents()
    on_main(processes, lambda: opened.append(_open(config, folder, search, processes.num_processes)))
    study = opened[0] if opened else None
    steps = rungs(config.train.max_steps)
    trials: list[Trial] = []
    while len(trials) < config.tune:
        trial = Trial(*on_main(processes, lambda: _main(study).propose(len(trials))))
        trials.append(trial)
        stopped = _train(config, folder, trial, steps[0], study, processes)
        if stopped is not None:
            return stopped
    alive = trials
    for (done, step), kept in zip(pairwise(steps), GO_ON, strict=False):
        ranked = sorted(alive, key=lambda trial: trial.scores[done], reverse=True)
        alive = ranked[: max(1, len(ranked) // kept)]
        for trial in alive:
            stopped = _train(config, folder, trial, step, study, processes)
            if stopped is not None:
                return stopped
    best = max(alive, key=lambda trial: trial.scores[steps[-1]])
    on_main(processes, lambda: _report(config, folder, trials, best))
    return run(trial_config(config, folder, best))


def rungs(max_steps: int) -> list[int]:
    """Steps after which trials are compared; the last is the end."""
    return sorted({max(1, max_steps * quarters // QUARTERS[-1]) for quarters in QUARTERS})


def cost(trials: int, max_steps: int) -> int:
    """Steps of a whole search."""
    steps = rungs(max_steps)
    alive, total = trials, trials * steps[0]
    for (done, step), kept in zip(pairwise(steps), GO_ON, strict=False):
        alive = max(1, alive // kept)
        total += alive * (step - done)
    return total


def trial_config(config: RunConfig, folder: Path, trial: Trial) -> RunConfig:
    """The run of a trial."""
    rates = {name: value for name, value in trial.values.items() if name != "prompt_length"}
    length = trial.values.get("prompt_length", config.prompt.prompt_length)
    return replace(
        config,
        tune=0,
        prompt=replace(config.prompt, prompt_length=length),
        optim=replace(config.optim, **rates),
        output_dir=folder / f"trial-{trial.number:03d}",
        resume="auto",
    )


def _space(config: RunConfig) -> Space:
    """What is searched: a range for each rate that trains something, and the prompt's lengths."""
    prompt, backbone = config.prompt, config.backbone
    method = METHODS[prompt.method]
    has_prompt = method.keeps_length or (method.has_prompt and prompt.prompt_length > 0)
    bare = not has_prompt and prompt.rank == 0
    images = any(TASKS[options.task].image_count for options in (config.data, *config.also))
    used = {
        "prompt_lr": has_prompt,
        "offset_lr": not bare and "low_rank" in method.groups() and (prompt.rank != 0 or not method.has_rank),
        "projection_lr": images and backbone.train_projection,
        "backbone_lr": backbone.train_backbone,
    }
    space: Space = {}
    for name, (low, high) in RANGES.items():
        own = getattr(config.optim, name)
        if used[name]:
            space[name] = (min(low, own or low), max(high, own))
    if used["prompt_lr"] and used["offset_lr"] and prompt.rank is None and not method.keeps_length:
        lengths = {round(share * prompt.reference_prompt_length) for share in SHARES}
        space["prompt_length"] = sorted({*lengths, prompt.prompt_length} - {0})
    return space


def _folder(config: RunConfig) -> Path:
    if config.resume not in ("", "auto"):
        return Path(config.resume)
    if config.output_dir is None:
        raise ValueError("--tune needs --output_dir, the folder of its study and trials")
    return config.output_dir


class _Study:
    """Optuna's study, on the main process: proposals, and scores by trial and step.

    Proposals are drawn in a study in memory, which is told again at every start what the stored one knows: a
    search that goes on proposes what it would have, and not the first ones once more.
    """

    def __init__(self, folder: Path, config: RunConfig, space: Space) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            storage=f"sqlite:///{folder / STUDY_FILE}",
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
        )
        self.distributions = {
            name: optuna.distributions.CategoricalDistribution(values)
            if isinstance(values, list)
            else optuna.distributions.FloatDistribution(*values, log=True)
            for name, values in space.items()
        }
        rates = {
            name: getattr(config.optim, name) or low for name, (low, *_) in space.items() if name in RANGES
        }
        own = rates | {"prompt_length": config.prompt.prompt_length}
        self.drawn = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.train.seed)
        )
        self.drawn.enqueue_trial({name: own[name] for name in space})
        for trial in self.study.get_trials(deepcopy=False):
            again = self.drawn.ask(self.distributions)
            params = current_options(trial.params)
            if again.params != params:
                raise ValueError(
                    f"trial {trial.number} of the study in {folder} has {params}, and would be drawn "
                    f"as {again.params} by this Optuna ({optuna.__version__}); go on with the version that "
                    "the study was begun with, or begin a new one in another --output_dir"
                )
            if trial.value is not None:
                self.drawn.tell(again, trial.value)

    def propose(self, number: int) -> tuple[int, dict[str, Any], dict[int, float]]:
        """A trial that is there already, with its scores, or a new one."""
        import optuna

        known = self.study.get_trials(deepcopy=False)
        if number < len(known):
            prefix = f"{number}/"
            scores = {
                int(key.removeprefix(prefix)): value
                for key, value in self.study.user_attrs.items()
                if key.startswith(prefix)
            }
            return number, current_options(known[number].params), scores
        trial = self.drawn.ask(self.distributions)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=trial.params,
                distributions=self.distributions,
            )
        )
        return trial.number, dict(trial.params), {}

    def record(self, number: int, step: int, score: float, *, first: bool) -> None:
        """Keep a score; the first one is what proposals are made from."""
        if first:  # before the score, which says that the trial need not come back
            for study in (self.study, self.drawn):
                study.tell(number, score, skip_if_finished=True)
        self.study.set_user_attr(f"{number}/{step}", score)


def _main(study: "_Study | None") -> "_Study":
    """The study, which the main process alone has."""
    assert study is not None
    return study


def _open(config: RunConfig, folder: Path, space: Space, processes: int) -> "_Study":
    """The study, begun or gone on with."""
    try:
        import optuna  # noqa: F401  # now, rather than when the first trial is to be proposed
    except ImportError:
        raise ImportError('--tune needs Optuna: pip install -e ".[tune]"') from None
    exists = (folder / STUDY_FILE).is_file()
    if config.resume not in ("", "auto") and not exists:
        raise FileNotFoundError(f"--resume {folder}: expected a study ({STUDY_FILE}), found none there")
    if exists:
        started = read_object(folder / CONFIG_FILE, dict)
        if not config.resume:
            done = len(list(folder.glob("trial-*/log.jsonl")))
            finished = (folder / "tuning.json").is_file()
            state = "a finished" if finished else f"an unfinished ({done} of {started['tune']} trials begun)"
            raise FileExistsError(
                f"{folder} holds {state} study; nothing was changed there. Go on with it by --resume "
                f"{folder}, or choose another --output_dir"
            )
        changed = differences(started, to_json(config))
        # Scores of trials are kept in the study, so that what these were made of is compared here.
        first = next(iter(sorted(folder.glob("trial-*/config.json"))), None)
        if first is not None and not changed:
            changed = changed_contents(first.parent, replace(config, tune=0), processes)
        if changed:
            raise ValueError(
                f"the study in {folder} was begun with other options or data ({'; '.join(changed)}); go on "
                f"with its own, by --config {folder / CONFIG_FILE}, or begin a new one"
            )
    elif (folder / CONFIG_FILE).exists():
        raise FileExistsError(f"{folder} holds a run; choose another --output_dir for the search")
    folder.mkdir(parents=True, exist_ok=True)
    write_noted_json(folder / CONFIG_FILE, to_json(config), indent=2)
    return _Study(folder, config, space)


def _train(
    config: RunConfig, folder: Path, trial: Trial, step: int, study: _Study | None, processes: PartialState
) -> RunResult | None:
    """Take a trial to a step, unless it is there; the run if a signal stopped it."""
    if step in trial.scores:
        return None
    whole = trial_config(config, folder, trial)
    pause = 0 if step == config.train.max_steps else step
    result = run(replace(whole, train=replace(whole.train, pause_at=pause)), more_to_come=True)
    if result.exit_status:
        if study:
            say(f"the search goes on by --resume {folder}")
        return result

    def record() -> float:
        score = best_dev(result.output_dir, step)
        _main(study).record(trial.number, step, score, first=not trial.scores)
        return score

    trial.scores[step] = on_main(processes, record)
    return None


def _report(config: RunConfig, folder: Path, trials: list[Trial], best: Trial) -> None:
    """What was tried and what it cost, best first."""
    names = list(trials[0].values)
    reached = rungs(config.train.max_steps)
    ranked = sorted(trials, key=lambda trial: max(trial.scores.items()), reverse=True)
    rows = [
        [
            f"{trial.number}{' (taken)' if trial is best else ''}",
            *(f"{trial.values[name]:.3g}" for name in names),
            *(f"{trial.scores[step]:.2f}" if step in trial.scores else "" for step in reached),
        ]
        for trial in ranked
    ]
    steps = sum(max(trial.scores) for trial in trials)
    grid = len(GRID) * config.train.max_steps
    effort = f"{steps:,} steps in all; the published grid of {len(GRID)} runs would take {grid:,}."
    table = markdown_table(["trial", *names, *(f"dev at {step}" for step in reached)], rows)
    content = {
        "best": best.number,
        "steps": steps,
        "trials": [
            {"number": trial.number, "values": trial.values, "scores": trial.scores} for trial in trials
        ],
    }
    write_json(folder / "tuning.json", content)
    write_atomically(folder / "tuning.md", f"{table}\n\n{effort}\n".encode())
    say("", *table.split("\n"), "", effort)


def grid(config: RunConfig, folder: Path) -> list[RunResult]:
    """Run the published grid, at the configuration's own split: what a search has to beat.

    Args:
        config: Without `tune`.
        folder: Folder of the runs; see `run_once`.

    Raises:
        SystemExit: If a signal stopped a run.
    """
    return [
        run_once(
            replace(
                config,
                tune=0,
                optim=replace(config.optim, prompt_lr=prompt_lr, offset_lr=offset_lr),
                output_dir=existing(folder / f"prompt_lr={prompt_lr:g},offset_lr={offset_lr:g}"),
            )
        )
        for prompt_lr, offset_lr in GRID
    ]
