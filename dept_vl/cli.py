"""The `dept-vl` command. It reads flags and checks names and folders before it imports torch."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import tyro

from dept_vl._utils.errors import UnknownNameError, UsageError, exit_status
from dept_vl._utils.flags import Command, FirstFlags, call, choose, flags_of, note_lone_process, parse_options
from dept_vl._utils.printable import say
from dept_vl._utils.run_files import CONFIG_FILE, SUMMARY_FILE, is_hub_name
from dept_vl.config import RENAMED, DataOptions, EvaluateConfig, Own, RunConfig, read_config, validate
from dept_vl.inference.options import DemoConfig, PredictConfig, ServeConfig
from dept_vl.presets import PRESETS, with_preset
from dept_vl.tasks import TASKS
from dept_vl.tasks.own.options import OwnOptions, is_data_set
from dept_vl.training.options import ExtractConfig, ReportConfig

ABOUT = "Adapt a vision-language model with a decomposed prompt, evaluate it and use it."
NO_OWN = OwnOptions()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dept-vl`, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    note_lone_process()
    return exit_status(partial(choose, COMMANDS, "dept-vl", ABOUT), arguments)


def entry(command: Command) -> NoReturn:
    """Run one command, then exit with its status; used by the scripts."""
    note_lone_process()
    raise SystemExit(exit_status(command, sys.argv[1:]))


# Commands


def train(
    arguments: list[str], defaults: RunConfig | None = None, tasks: Collection[str] | None = None
) -> int:
    """Train a prompt, and score it.

    `defaults` apply unless flags or a file set the option; `tasks` are the tasks that a script can train.
    """
    config = parse(defaults or RunConfig(), "Train a prompt, and score it.", arguments)
    if tasks is not None and config.data.task not in tasks:
        raise UsageError(
            f"this script does not train {config.data.task!r}, only {', '.join(tasks)}; use dept-vl train"
        )
    check_run(config)
    from dept_vl.training.run import run

    return run(config).exit_status


def evaluate(arguments: list[str]) -> None:
    """Score a run on any split, and write the submission file of a split without published answers."""
    config = parse_options(EvaluateConfig, arguments, "dept-vl evaluate", evaluate.__doc__)
    _check_task(config.task)
    _check_exists("--run", config.run / CONFIG_FILE)
    for name in ("adapter", "data_dir", "candidates"):
        _check_exists(f"--{name}", getattr(config, name))
    check_own_data(config.own)
    from dept_vl.training.score_run import score_run

    score_run(config)


def predict(arguments: list[str]) -> None:
    """Answer questions about images or texts, or all rows of a table, with a trained adapter."""
    config = parse_options(PredictConfig, arguments, "dept-vl predict", predict.__doc__)
    _check_task(config.task)
    check_own_data(config.own)
    _check_source("--adapter", config.adapter)
    from dept_vl.inference.predict import predict as ask

    ask(config)


def features(arguments: list[str]) -> None:
    """Encode all images of a data set once, and save the features for later runs."""
    config = parse_extraction(features.__doc__ or "", arguments)
    check_run(config)
    from dept_vl.training.extract import extract

    extract(config)


def data(
    arguments: list[str],
    program: str = "dept-vl data",
    further: Mapping[str, Callable[..., object]] = MappingProxyType({}),
) -> int:
    """Convert data to the files that the tasks read, and check such files."""
    from dept_vl.tasks.prepare.commands import COMMANDS

    commands: dict[str, Callable[..., object]] = {**COMMANDS, "check": check_data, **further}
    return 1 if call(commands, program, data.__doc__, arguments) is False else 0


def check_data(
    task: str = "",
    root: Path | None = None,
    sample: int = 200,
    report: Path | None = None,
    own: Own = NO_OWN,
    backbone: Path | None = None,
    language: str | None = None,
    sheet: Path | None = None,
) -> bool:
    """Check the files of a task, or your own data (--data): counts, images, ids, texts, splits.

    Args:
        task: vqav2, gqa, nlvr2 or coco; not with --data.
        root: Folder with the task's official files.
        sample: Number of images to open in each split; 0 opens all.
        report: File to write the complete report to, with one finding per line.
        own: Your own data.
        backbone: Folder of a saved backbone. With --data, its tokenizer is used to measure texts.
        language: Name or folder of a language model whose tokenizer to use instead.
        sheet: PNG file to draw 16 examples of --data into.
    """
    from dept_vl.tasks.prepare.check import check
    from dept_vl.tasks.prepare.commands import print_findings

    if own.data is None:
        if not task or root is None:
            raise UsageError("give --task and --root, or --data FILE")
        own.check_used()
        for name, value in (("backbone", backbone), ("language", language), ("sheet", sheet)):
            if value is not None:
                raise UsageError(f"--{name}: only for your own data; give --data, or leave it out")
        good = print_findings(check(task, root, sample=sample), report)
        say("everything is there" if good else f"not everything of {task} is in {root}")
        return good
    if task or root is not None:
        raise UsageError("--task and --root are of official files; leave them out, or --data")
    check_own_data(own)
    _check_exists("--backbone", backbone)
    from dept_vl.data.check_own import check_own
    from dept_vl.models.checks import load_tokenizer

    named = backbone / "language" if backbone else language
    tokenizer = None if named is None else load_tokenizer(named)
    good = print_findings(check_own(own, sample=sample, tokenizer=tokenizer, sheet=sheet), report)
    say("nothing is wrong" if good else f"some of {own.data} wants a look")
    return good


def score(arguments: list[str]) -> None:
    """Score a file of predictions like the official evaluation servers; no model is needed."""
    from dept_vl.tasks.score import CHECKS, COMMANDS

    commands = COMMANDS | {f"check-{name}": check for name, check in CHECKS.items()}
    call(commands, "dept-vl score", score.__doc__, arguments)


def check_submission(arguments: list[str]) -> None:
    """Check a submission file before you upload it to an evaluation server."""
    from dept_vl.tasks.score import CHECKS

    call(CHECKS, "check_submission.py", check_submission.__doc__, arguments)


def transfer(arguments: list[str]) -> None:
    """Transfer a trained prompt to a task with a few examples."""
    from dept_vl.studies.options import TransferConfig

    config = parse_options(TransferConfig, arguments, "dept-vl transfer", transfer.__doc__)
    config.check()
    _check_exists("--config", config.config, *config.source_config, config.data_dir)
    check_own_data(config.own)
    from dept_vl.studies.transfer import transfer as run

    run(config)


def report(arguments: list[str]) -> None:
    """Rebuild the HTML report of a finished run from its folder and its data."""
    config = parse_options(ReportConfig, arguments, "dept-vl report", report.__doc__)
    _check_exists("--run", config.run / CONFIG_FILE, config.run / SUMMARY_FILE)
    from dept_vl.training.report.remake import remake

    remake(config)


def demo(arguments: list[str]) -> None:
    """Serve a web page on which to upload images, choose an adapter and ask questions."""
    config = parse_options(DemoConfig, arguments, "dept-vl demo", demo.__doc__)
    for source in config.adapters:
        _check_source("--adapters", source)
    try:
        from dept_vl.inference.demo import serve
    except ModuleNotFoundError as error:
        raise ImportError(f'the demo needs {error.name}: pip install -e ".[demo]"') from None

    serve(config)


def serve(arguments: list[str]) -> None:
    """Serve any number of adapters with an API like OpenAI's chat completions."""
    config = parse_options(ServeConfig, arguments, "dept-vl serve", serve.__doc__)
    for source in config.adapters:
        _check_source("--adapters", source)
    _check_exists("--token_file", config.token_file)
    try:
        from dept_vl.inference.server import serve as run
    except ModuleNotFoundError as error:
        raise ImportError(f'the server needs {error.name}: pip install -e ".[serve]"') from None

    run(config)


COMMANDS: dict[str, Command] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "features": features,
    "data": data,
    "score": score,
    "transfer": transfer,
    "report": report,
    "demo": demo,
    "serve": serve,
}
"""The sub-commands of `dept-vl`."""


# Flags


def parse(defaults: RunConfig, description: str, argv: Sequence[str] | None = None) -> RunConfig:
    """Return the configuration that a command line describes.

    Flags take precedence over a configuration file (`--config`), which takes precedence over a preset
    (`--preset`). A script's `defaults` come last, and are not used with a file. The default of
    `max_source_length` is the task's.
    """
    argv = _current_flags(sys.argv[1:] if argv is None else argv)
    parser = FirstFlags(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--preset")
    parser.add_argument("--resume")
    known, rest = parser.parse_known_args(argv)
    if known.preset not in (None, *PRESETS):
        raise UnknownNameError("preset", known.preset, PRESETS)
    own = known.config is None and known.resume not in (None, "auto")
    if own:  # A run resumes with its own options, except for flags that are given and for its `pause_at`.
        known.config = Path(known.resume) / CONFIG_FILE

    def over(base: RunConfig) -> RunConfig:
        config = base if known.config is None else read_config(known.config, base)
        if own:
            config = replace(config, train=replace(config.train, pause_at=0))
        return config if known.resume is None else replace(config, resume=known.resume)

    def flags(base: RunConfig) -> RunConfig:
        return flags_of(
            RunConfig,
            rest,
            default=base,
            prog="dept-vl train",
            description=(
                f"{description} --config FILE starts from the config.json of another run, and --preset "
                f"{'|'.join(PRESETS)} from the task's published hyper-parameters. A file overrides a preset, "
                "and flags override both."
            ),
            config=(tyro.conf.OmitArgPrefixes,),
        )

    base = defaults if known.config is None else RunConfig()
    if any(flag.partition("=")[0] in ("--model", "--backbone") for flag in rest):
        # A whole model takes the place of the script's own.
        base = replace(base, backbone=replace(base.backbone, language=None))
    config = flags(over(base))
    for data in (config.data, *config.also):
        _check_names(data)
    longest = max(TASKS[data.task].max_source_length for data in (config.data, *config.also))
    if known.preset is None and longest == base.prompt.max_source_length:
        return config
    # The task is itself an option, so the flags have to be read twice.
    base = replace(base, prompt=replace(base.prompt, max_source_length=longest))
    if known.preset is not None:
        base = with_preset(base, known.preset, config.data.task, config.backbone)
    return flags(over(base))


def _current_flags(argv: Sequence[str]) -> list[str]:
    """Replace old names of flags by the current ones, and print a note about each."""
    flags = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in RENAMED:
            argument = f"--{RENAMED[name]}{equals}{value}"
            say(f"note: {flag} is now --{RENAMED[name]}; the old name still works", error=True)
        flags.append(argument)
    return flags


def parse_extraction(description: str, argv: Sequence[str] | None = None) -> ExtractConfig:
    """Read the options of `dept-vl features`; flags take precedence over a file (`--config`)."""
    parser = FirstFlags(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    of_run = RunConfig() if known.config is None else read_config(known.config)
    config: ExtractConfig = flags_of(
        ExtractConfig,
        rest,
        prog="dept-vl features",
        default=ExtractConfig(data=of_run.data, also=of_run.also, backbone=of_run.backbone),
        description=f"{description} --config FILE uses the data and the backbone of a run's config.json.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    validate(config)
    return config


# Checks that do not need torch


def check_run(config: RunConfig | ExtractConfig) -> None:
    """Check that options are in range, and that the tasks, data and models that they name exist."""
    from dept_vl.tasks.base import data_folder

    validate(config)
    for options in (config.data, *config.also):
        _check_names(options)
        if options.own.data is None and options.data_dir is None and TASKS[options.task].image_count:
            _check_folder(data_folder(options.task, None), options.task)
        _check_exists("--shots_file", options.shots_file)
    _check_exists("--backbone", config.backbone.backbone)
    _check_source("--model", config.backbone.model)
    _check_source("--vision", config.backbone.vision)
    _check_source("--language", config.backbone.language)
    if isinstance(config, RunConfig):
        _check_exists("--init_from", *config.prompt.init_from)


def _check_names(options: DataOptions) -> None:
    """Check the names of a task and of its data, without an import of the task."""
    _check_task(options.task)
    if options.own.data is not None:
        check_own_data(options.own)
    elif options.data_dir is not None:
        _check_folder(options.data_dir, options.task)


def _check_folder(folder: Path, task: str) -> None:
    if not folder.exists():
        raise FileNotFoundError(
            f"no folder {folder} with the data of {task}; give --data_dir (see dept-vl data), or --data FILE "
            "for your own data"
        )


def _check_task(name: str | None) -> None:
    if name and name not in TASKS:
        raise UnknownNameError("task", name, TASKS)


def _check_exists(option: str, *paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option}: no such file or folder: {path}")


def check_own_data(own: OwnOptions) -> None:
    """Check that your own data exist locally, unless they are named like a data set on the Hub."""
    if own.data is not None and not Path(own.data).exists() and not is_data_set(own.data):
        raise FileNotFoundError(f"--data: no such file or folder: {own.data}")
    _check_exists("--images", own.images)


def _check_source(option: str, name: str | None) -> None:
    """Check that a folder exists, unless it is named like a model on the Hub."""
    if name and not is_hub_name(name):
        _check_exists(option, Path(name))
