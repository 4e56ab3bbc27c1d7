"""Flags from dataclasses; the only reader of the command line."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from dept_vl.config import ExtractConfig, RunConfig, validate
from dept_vl.files import read_json
from dept_vl.presets import PRESETS, with_preset
from dept_vl.state import CONFIG_FILE


def parse(defaults: RunConfig, description: str, argv: Sequence[str] | None = None) -> RunConfig:
    """Flags over a configuration file (`--config`) over a preset (`--preset`) over a script's defaults.

    A file stands for the script's defaults: what it leaves out is as in no script.

    Args:
        defaults: Of the script.
        description: Shown by `--help`.
        argv: Without the program's name; None reads the command line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
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


def read_config(path: Path, base: RunConfig | None = None) -> RunConfig:
    """Read the config.json of a run. Its output folder is left out: a repeated run gets its own.

    Args:
        path: The file.
        base: Gives what the file leaves out; None as everywhere.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, has a key that no option has, or a value of another type or out of
            range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}; give the config.json of a run")
    content = read_json(path)
    if isinstance(content, dict):
        content.pop("output_dir", None)
        content.pop("resume", None)
    config: RunConfig = _build(base or RunConfig(), content, str(path))
    try:
        validate(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _build(base: Any, content: Any, where: str) -> Any:
    """A dataclass from what JSON holds of it; options left out are the base's."""
    kind = type(base)
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object with the options of {kind.__name__}")
    hints = get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    unknown = sorted(content.keys() - names)
    if unknown:
        raise ValueError(f"{where}: unknown options {unknown[:5]!s:.300}; there are {sorted(names)}")
    values = {}
    for name, value in content.items():
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            value = _build(getattr(base, name), value, f"{where}: {name}")
        elif is_dataclass(_element(hint)):
            if not isinstance(value, list):
                raise ValueError(f"{where}: {name} is {value!r:.60}; expected a list of objects")
            value = tuple(
                _build(_element(hint)(), part, f"{where}: {name}[{place}]")
                for place, part in enumerate(value)
            )
        elif _element(hint) is Path and isinstance(value, list) and all(_fits(v, Path) for v in value):
            value = tuple(map(Path, value))
        elif not _fits(value, hint):
            expected = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"{where}: {name} is {value!r:.60}; expected {expected}")
        elif value is not None and (hint is Path or Path in get_args(hint)):
            value = Path(value)
        elif hint is float:
            value = float(value)
        values[name] = value
    return replace(base, **values)


def _element(hint: Any) -> Any:
    """The type of the elements of a tuple of any length; None for other types."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON can stand for this type; a whole number can for a fraction."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    # `Literal[...] | None` is the older kind of union.
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float and type(value) is int:
        return abs(value) <= sys.float_info.max  # JSON's integers may have more digits
    return type(value) in {Path: (str,), float: (float,)}.get(hint, (hint,))
