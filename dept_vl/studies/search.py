"""Search for learning rates and the split of the budget, with Optuna's sampler and pruner.

    OUTPUT/study.db          Optuna's study: the trials and their scores
    OUTPUT/trial-007/        a run, which pauses at each comparison and resumes from its checkpoint
    OUTPUT/tuning.json, .md  the trials

Trials are trained one after the other for an eighth of the steps. Asynchronous successive halving (Li et al.
2020) then decides: a trial whose dev score is in the best third so far continues to three eighths, and again
the best third of these to the end. Twenty trials cost about 7 whole runs; the grid that DePT's authors
published (`GRID`) costs 8. The first trial uses the configuration's own values. The best trial is scored on
the test split like any run.
"""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from dept_vl._utils.errors import NotFiniteError, UsageError
from dept_vl._utils.io import read_object, write_atomically, write_json, write_noted_json
from dept_vl._utils.printable import say
from dept_vl._utils.processes import on_main
from dept_vl._utils.run_files import CONFIG_FILE
from dept_vl._utils.tables import markdown_table
from dept_vl.config import RunConfig, differences, to_json, validate
from dept_vl.prompts.base import METHODS
from dept_vl.tasks import TASKS
from dept_vl.training.identity import changed_contents, forget_contents
from dept_vl.training.log import best_dev
from dept_vl.training.run import run
from dept_vl.training.summary import RunResult

Space = dict[str, tuple[float, float] | list[int]]
"""Range of each learning rate, and the candidate lengths of the prompt."""
STUDY_FILE = "study.db"
STUDY = "dept_vl"
GRID = tuple(product((0.3, 0.4), (1e-4, 5e-4, 1e-3, 5e-3)))
"""The published grid: `prompt_lr` and `offset_lr` that won in the 17 runs that DePT's authors released."""
FIRST, KEPT = 8, 3
"""Trials are first compared after 1 / FIRST of the steps; one in KEPT continues, for KEPT times the steps."""
RANGES = {
    "prompt_lr": (0.02, 1.0),
    "offset_lr": (1e-4, 0.05),
    "projection_lr": (1e-4, 1e-2),
    "backbone_lr": (1e-5, 1e-2),
}
"""Search ranges, on a logarithmic scale. They are extended to include the configuration's own learning
rate."""
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Shares of the budget spent on the vectors of the prompt; the rest is spent on the rank."""


def launch(config: RunConfig) -> RunResult:
    """Run the configuration, after a search if `tune` is set."""
    return tune(config) if config.tune else run(config)


def tune(config: RunConfig) -> RunResult:
    """Run a search and return the result of the best trial.

    Raises:
        FileExistsError: If the folder holds a study and `resume` is not set, or it holds a run.
        FileNotFoundError: If there is no study to resume.
        ImportError: If Optuna is not installed.
        ValueError: If a study was started with other options or data, or there is nothing to search.
    """
    validate(config)
    config = config.settled()
    if config.train.num_epochs:
        raise UsageError("a search compares runs of equal length: give --max_steps, and --num_epochs 0")
    if not search_space(config):
        raise ValueError("there is nothing to search: neither a prompt nor anything else is trained")
    processes = PartialState(cpu=not torch.accelerator.is_available())
    folder = _folder(config)
    opened: list[Any] = []
    forget_contents()
    on_main(processes, lambda: opened.append(_open(config, folder, processes.num_processes)))
    study = opened[0] if opened else None  # only on the main process
    for number in range(config.tune):
        values, steps = on_main(processes, partial(_propose, study, config, number))
        trial = trial_config(config, folder, number, values)
        for step in steps:
            pause = 0 if step == config.train.max_steps else step
            try:
                result = run(replace(trial, train=replace(trial.train, pause_at=pause)), more_to_come=True)
            except NotFiniteError as error:
                if processes.num_processes > 1:  # the others do not know of it
                    raise
                say(f"trial {number} has failed: {error}")
                _fail(study, number)
                break
            if result.exit_status:
                if processes.is_main_process:
                    say(f"stopped; --resume {folder} continues the search")
                return result
            if on_main(processes, partial(_ends, study, config, number, step, result.output_dir)):
                break
    number, values = on_main(processes, lambda: _report(study, config, folder))
    return run(trial_config(config, folder, number, values))


def rungs(max_steps: int) -> list[int]:
    """Return the steps after which trials are compared; the last one is the end of a run."""
    first = -(-max_steps // FIRST)
    return sorted({first, min(KEPT * first, max_steps), max_steps})


def trial_config(config: RunConfig, folder: Path, number: int, values: dict[str, Any]) -> RunConfig:
    """Return the configuration of a trial's run."""
    rates = {name: value for name, value in values.items() if name in RANGES}
    length = values.get("prompt_length", config.prompt.prompt_length)
    return replace(
        config,
        tune=0,
        prompt=replace(config.prompt, prompt_length=length),
        optim=replace(config.optim, **rates),
        output_dir=folder / f"trial-{number:03d}",
        resume="auto",
    )


def search_space(config: RunConfig) -> Space:
    """Return a range for each learning rate that is used, and the candidate lengths of the prompt."""
    prompt, backbone, optim = config.prompt, config.backbone, config.settled().optim
    method = METHODS[prompt.method]
    bare = not prompt.has_vectors and prompt.rank == 0
    images = any(TASKS[options.task].image_count for options in (config.data, *config.also))
    used = {
        "prompt_lr": prompt.has_vectors,
        "offset_lr": not bare and "low_rank" in method.groups() and (prompt.rank != 0 or not method.has_rank),
        "projection_lr": images and backbone.train_projection,
        "backbone_lr": backbone.train_backbone,
    }
    space: Space = {}
    for name, (low, high) in RANGES.items():
        own = getattr(optim, name)
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


def _open(config: RunConfig, folder: Path, processes: int) -> Any:
    """Create Optuna's study in the folder, or open the existing one."""
    try:
        import optuna
    except ImportError:
        raise ImportError('--tune needs Optuna: pip install -e ".[tune]"') from None
    if (folder / STUDY_FILE).is_file():
        _check_resumable(config, folder, processes)
    elif config.resume not in ("", "auto"):
        raise FileNotFoundError(f"--resume {folder}: expected a study ({STUDY_FILE}), found none there")
    elif (folder / CONFIG_FILE).exists():
        raise FileExistsError(f"{folder} holds a run; choose another --output_dir for the search")
    folder.mkdir(parents=True, exist_ok=True)
    write_noted_json(folder / CONFIG_FILE, to_json(config), indent=2)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / STUDY_FILE}",
        study_name=STUDY,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.SuccessiveHalvingPruner(rungs(config.train.max_steps)[0], KEPT),
    )
    if study.user_attrs:  # where earlier versions kept the scores
        raise UsageError(f"the study in {folder} is of an earlier version; begin one in another --output_dir")
    return study


def _check_resumable(config: RunConfig, folder: Path, processes: int) -> None:
    """Check that resuming was asked for, and that options and data are those of the study."""
    started = read_object(folder / CONFIG_FILE, dict)
    if not config.resume:
        done = len(list(folder.glob("trial-*/log.jsonl")))
        finished = (folder / "tuning.json").is_file()
        state = (
            "a finished study"
            if finished
            else f"an unfinished study ({done} of {started['tune']} trials begun)"
        )
        raise FileExistsError(
            f"{folder} holds {state}; nothing was changed there. Resume it with --resume {folder}, or "
            "choose another --output_dir"
        )
    changed = differences(started, to_json(config))
    # The study keeps the scores of trials, so the data they were computed on are compared here.
    first = next(iter(sorted(folder.glob("trial-*/config.json"))), None)
    if first is not None and not changed:
        changed = changed_contents(first.parent, replace(config, tune=0), processes)
    if changed:
        raise ValueError(
            f"the study in {folder} was started with other options or data ({'; '.join(changed)}); resume it "
            f"with its own options (--config {folder / CONFIG_FILE}), or start a new one"
        )


def _propose(study: Any, config: RunConfig, number: int) -> tuple[dict[str, Any], list[int]]:
    """Return the values of a new or interrupted trial, and the steps at which to compare it."""
    import optuna

    space, known = search_space(config), study.get_trials(deepcopy=False)
    if number < len(known) and known[number].state.is_finished():
        return known[number].params, []
    # A seed for each trial, so that a resumed search proposes the same as an uninterrupted one.
    seed = np.random.SeedSequence([config.train.seed, number]).generate_state(1).item()
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    if not known:
        rates = {
            name: getattr(config.optim, name) or low for name, (low, *_) in space.items() if name in RANGES
        }
        study.enqueue_trial(rates | {"prompt_length": config.prompt.prompt_length})
    if number >= len(known) or known[number].state == optuna.trial.TrialState.WAITING:
        study.ask()
    trial = _trial(study, number)
    for name, values in space.items():
        if isinstance(values, list):
            trial.suggest_categorical(name, values)
        else:
            trial.suggest_float(name, *values, log=True)
    begun = study.get_trials(deepcopy=False)[number].last_step or 0
    if begun and _ends(study, config, number, begun):  # stopped before this was decided
        return trial.params, []
    return trial.params, [step for step in rungs(config.train.max_steps) if step > begun]


def _ends(study: Any, config: RunConfig, number: int, step: int, run: Path | None = None) -> bool:
    """Report the dev score of a run to the study, and return whether the trial ends here."""
    import optuna

    trial = _trial(study, number)
    if run is not None:
        trial.report(best_dev(run, step), step)
    if step == config.train.max_steps:
        study.tell(trial, study.get_trials(deepcopy=False)[number].intermediate_values[step])
    elif trial.should_prune():
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        return False
    return True


def _fail(study: Any, number: int) -> None:
    """Mark a diverged trial as failed, so that resuming the search does not repeat it."""
    import optuna

    study.tell(_trial(study, number), state=optuna.trial.TrialState.FAIL)


def _trial(study: Any, number: int) -> Any:
    """Return a trial to report to. Optuna has no public API to reopen one from an earlier program."""
    import optuna

    return optuna.trial.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


def _report(study: Any, config: RunConfig, folder: Path) -> tuple[int, dict[str, Any]]:
    """Write all trials and their cost, best first; return number and values of the best trial.

    Raises:
        ValueError: If no trial was completed.
    """
    import optuna

    trials = study.get_trials(deepcopy=False)
    if all(trial.state != optuna.trial.TrialState.COMPLETE for trial in trials):
        raise ValueError(
            f"no trial of {folder} is complete: every trial diverged or was stopped early; start a search "
            "with lower learning rates in another --output_dir"
        )
    best = study.best_trial
    names, steps = list(trials[0].params), rungs(config.train.max_steps)
    ends = {best.number: " (taken)"}
    ends |= {trial.number: " (failed)" for trial in trials if trial.state == optuna.trial.TrialState.FAIL}
    ranked = sorted(
        trials, key=lambda trial: max(trial.intermediate_values.items(), default=(0, 0.0)), reverse=True
    )
    rows = [
        [
            f"{trial.number}{ends.get(trial.number, '')}",
            *(f"{trial.params[name]:.3g}" for name in names),
            *(
                f"{trial.intermediate_values[step]:.2f}" if step in trial.intermediate_values else ""
                for step in steps
            ),
        ]
        for trial in ranked
    ]
    total, grid = sum(trial.last_step or 0 for trial in trials), len(GRID) * config.train.max_steps
    effort = f"{total:,} steps in all; the published grid of {len(GRID)} runs would take {grid:,}."
    table = markdown_table(["trial", *names, *(f"dev at {step}" for step in steps)], rows)
    tried = [
        {"number": trial.number, "values": trial.params, "scores": trial.intermediate_values}
        for trial in trials
    ]
    write_json(folder / "tuning.json", {"best": best.number, "steps": total, "trials": tried})
    write_atomically(folder / "tuning.md", f"{table}\n\n{effort}\n".encode())
    say("", *table.split("\n"), "", effort)
    return best.number, best.params
