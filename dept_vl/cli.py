"""Flags from dataclasses; the only reader of the command line."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from dept_vl._utils.run_files import CONFIG_FILE
from dept_vl.config import RENAMED, ExtractConfig, RunConfig, read_config, validate
from dept_vl.presets import PRESETS, with_preset


def parse(defaults: RunConfig, description: str, argv: Sequence[str] | None = None) -> RunConfig:
    """Flags over a configuration file (`--config`) over a preset (`--preset`) over a script's defaults.

    A file stands for the script's defaults: what it leaves out is as in no script.

    Args:
        defaults: Of the script.
        description: Shown by `--help`.
        argv: Without the program's name; None reads the command line.
    """
    argv = _current_flags(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--preset", choices=list(PRESETS))
    parser.add_argument("--resume")
    known, rest = parser.parse_known_args(argv)
    own = known.config is None and known.resume not in (None, "auto")
    if own:  # A run goes on with its own options unless others are given, and past its pause.
        known.config = Path(known.resume) / CONFIG_FILE

    def over(base: RunConfig) -> RunConfig:
        config = base if known.config is None else read_config(known.config, base)
        if own:
            config = replace(config, train=replace(config.train, pause_at=0))
        return config if known.resume is None else replace(config, resume=known.resume)

    def flags(base: RunConfig) -> RunConfig:
        return tyro.cli(
            RunConfig,
            args=rest,
            default=base,
            description=(
                f"{description} --config FILE starts from the config.json of another run, --preset "
                f"{'|'.join(PRESETS)} from the task's published hyper-parameters; flags go before both, and "
                "a file before a preset."
            ),
            config=(tyro.conf.OmitArgPrefixes,),
            use_underscores=True,
        )

    base = defaults if known.config is None else RunConfig()
    config = flags(over(base))
    if known.preset is None:
        return config
    # Which task is a question of flags too, so they are read twice.
    return flags(over(with_preset(base, known.preset, config.data.task)))


def _current_flags(argv: Sequence[str]) -> list[str]:
    """Give flags that were renamed their names of today, and print a note of each."""
    flags = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in RENAMED:
            argument = f"--{RENAMED[name]}{equals}{value}"
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"note: {flag} is now --{RENAMED[name]}; the old name still works", file=sys.stderr)
        flags.append(argument)
    return flags


def parse_extraction(description: str, argv: Sequence[str] | None = None) -> ExtractConfig:
    """Flags over the data and the backbone of a run's configuration file (`--config`).

    Args:
        description: Shown by `--help`.
        argv: Without the program's name; None reads the command line.

    Raises:
        ValueError: If an option is out of range.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    of_run = RunConfig() if known.config is None else read_config(known.config)
    config: ExtractConfig = tyro.cli(
        ExtractConfig,
        args=rest,
        default=ExtractConfig(data=of_run.data, also=of_run.also, backbone=of_run.backbone),
        description=f"{description} --config FILE takes the data and the backbone of a run's config.json.",
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )
    validate(config)
    return config
