"""What may be said of your own data; imports no engine."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dept_vl._utils.options import Options, Seed
from dept_vl._utils.run_files import is_hub_name

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of tables."""

Turns = Literal["first", "all"]
OwnMetric = Literal["auto", "vqa_accuracy", "exact_match", "f1", "anls", "accuracy"]


@dataclass(frozen=True)
class OwnOptions(Options):
    """Your own images and questions."""

    data: str | None = None
    """Your own data: a file (JSON, JSON Lines, CSV, TSV, Parquet, Arrow), a folder of them, or a data set's
    name on the Hub. Takes task vqa; captions and labels follow from the columns."""
    images: Path | None = None
    """Folder of the images that the data name; left out, the folder of the data."""
    columns: tuple[str, ...] = ()
    """Columns of other names than the usual ones: image=photo question=ask answer=truth; also choices, id
    and split."""
    turns: Turns = "first"
    """Of a conversation, take the first question with its answer, or all, each as an example of its own."""
    metric: OwnMetric = "auto"
    """Metric that decides; auto: VQA accuracy of several answers to a question, exact match of one, accuracy
    of choices and labels. anls is added to the report only where it is asked for."""
    holdout_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the training images held out for each of validation and test that the data do not have."""
    split_seed: Seed = 0
    """Of the draw of the held-out images."""

    @classmethod
    def of(cls, **given: Any) -> "OwnOptions":
        """Return options from what callers have: paths as text or not, columns in any sequence."""
        kinds = {"data": str, "images": Path, "columns": tuple}
        return cls(**{k: kinds.get(k, lambda v: v)(v) for k, v in given.items() if v is not None})

    def over(self, run: "OwnOptions") -> "OwnOptions":
        """Return a run's options with those given here in their place; other data have their own images."""
        usual = OwnOptions()
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: value for name, value in given.items() if value != getattr(usual, name)}
        if self.data is not None:
            changed["images"] = self.images
        return replace(run, **changed)

    def folder(self) -> Path | None:
        """Return the folder of the data; None if they are on the Hub, or not given."""
        if self.data is None or not Path(self.data).exists():
            return None
        return Path(self.data) if Path(self.data).is_dir() else Path(self.data).parent


def is_data_set(name: str) -> bool:
    """Return whether a name that is no file here may be of a data set on the Hub."""
    return "/" in name and is_hub_name(name) and Path(name).suffix.lower() not in TABLES
