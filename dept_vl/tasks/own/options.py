"""Options for your own data. Importing this module does not import PyTorch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dept_vl._utils.errors import UnknownNameError, UsageError
from dept_vl._utils.options import Options, Seed
from dept_vl._utils.run_files import is_hub_name

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""File extensions of tables."""

Turns = Literal["first", "all"]
OwnMetric = Literal["auto", "vqa_accuracy", "exact_match", "f1", "anls", "accuracy"]


@dataclass(frozen=True)
class OwnOptions(Options):
    """Options for your own images and questions."""

    data: str | None = None
    """Your own data: a file (JSON, JSON Lines, CSV, TSV, Parquet, Arrow), a folder of such files, or the name
    of a data set on the Hub. Implies task vqa; captions and labels are recognised by the columns."""
    images: Path | None = None
    """Folder of the images named in the data. Default: the folder of the data."""
    columns: tuple[str, ...] = ()
    """Columns without a usual name: image=photo question=ask answer=truth; also choices, id, split, type."""
    turns: Turns = "first"
    """Questions to use from a conversation: the first, or all, each as a separate example."""
    metric: OwnMetric = "auto"
    """Metric for choosing the best adapter. auto: VQA accuracy if questions have several answers, exact match
    if they have one, accuracy for choices and labels. anls is only computed if selected here."""
    holdout_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the training images to hold out for validation, and for test, if the data lack that split."""
    split_seed: Seed = 0
    """Random seed for drawing the held-out images."""

    @classmethod
    def of(cls, **given: Any) -> "OwnOptions":
        """Return options from keyword arguments: paths may be strings, columns any sequence. Ignores None."""
        kinds = {"data": str, "images": Path, "columns": tuple}
        return cls(**{k: kinds.get(k, lambda v: v)(v) for k, v in given.items() if v is not None})

    @classmethod
    def check_names(cls, given: Iterable[str], function: Callable[..., Any]) -> None:
        """Raise UnknownNameError for a keyword that is neither a field nor an argument of a function."""
        arguments = [
            name for name, one in signature(function).parameters.items() if one.kind != one.VAR_KEYWORD
        ]
        known = dict.fromkeys([*arguments, *(f.name for f in fields(cls))])
        for name in given:
            if name not in known:
                raise UnknownNameError("option", name, known)

    def _changed(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        usual = OwnOptions()
        return {name: value for name, value in vars(self).items() if value != getattr(usual, name)}

    def given(self) -> list[str]:
        """Return the flags of the options that differ from their defaults."""
        return [f"--{name}" for name in self._changed()]

    def check_used(self) -> None:
        """Raise UsageError for options that have no effect, because `data` is not set."""
        if self.data is None and (given := self.given()):
            raise UsageError(f"{', '.join(given)}: only for your own data; give --data, or leave it out")

    def over(self, run: "OwnOptions") -> "OwnOptions":
        """Return a run's options, overridden by those set here. With `data`, `images` is not inherited."""
        images = run.images if self.data is None else None
        return replace(run, **{"images": images, **self._changed()})

    def kept_from(self, run: "OwnOptions") -> str:
        """Format the run's options that `over` keeps, except data and images."""
        set_here = {"data", "images", *self._changed()}
        return ", ".join(
            f"--{name} {value}" for name, value in run._changed().items() if name not in set_here
        )

    def folder(self) -> Path | None:
        """Return the folder of the data; None if the data are on the Hub or not set."""
        if self.data is None or not Path(self.data).exists():
            return None
        return Path(self.data) if Path(self.data).is_dir() else Path(self.data).parent


def is_data_set(name: str) -> bool:
    """Return whether a name that is not a local file can be a data set on the Hub."""
    return "/" in name and is_hub_name(name) and Path(name).suffix.lower() not in TABLES
