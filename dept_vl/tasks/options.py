"""Data options of a run. Importing this module does not import PyTorch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from dept_vl._utils.options import Count, Options, Seed
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import AnswerLabels, QuestionCase
from dept_vl.tasks.own.options import OwnOptions

ShotsPer = Literal["class", "all"]
Features = Literal["auto", "cached", "live"]
TrainFeatures = Literal["auto", "cached", "live", "encoded"]
OnBadImage = Literal["raise", "skip"]
"""How to handle an example whose image cannot be read."""
Precision = Literal["float16", "bfloat16", "float32"]
"""Precision of stored visual features."""
Own = Annotated[OwnOptions, tyro.conf.arg(name="")]
OWN_TASK = "vqa"
"""Task for your own data."""


@dataclass(frozen=True)
class DataOptions(Options):
    """Data of a run."""

    task: str = "vqav2"
    """Name of the task."""
    data_dir: Path | None = None
    """Folder with the task's files. Default: data/TASK, or the Hub for a text task without that folder."""
    train_split: str | None = None
    """Training split. Default: that of the task."""
    dev_split: str | None = None
    """Split for choosing the best adapter. Default: that of the task. If empty, or if the task has none,
    images are held out of the training split."""
    holdout_images: Count = 200
    """Number of images to hold out of the training split, with all their questions, if dev_split is empty."""
    dev_limit: Count = 2000
    """Maximum number of dev examples, drawn with the random seed; 0 for all."""
    test_split: str | None = None
    """Split for the final score of the best adapter. Default: that of the task."""
    test_limit: Count = 0
    """Maximum number of test examples, drawn with the random seed; 0 for all."""
    shots: Count = 0
    """Number of training examples for few-shot training; 0 for all."""
    shots_per: ShotsPer = "class"
    """Whether shots is the number per class, or in total over all classes (all, published for DePT)."""
    shots_dev: Literal["shots", "split"] = "shots"
    """Examples for choosing the best adapter with few shots. shots: as many other examples; split: the dev
    split (published for DePT), up to dev_limit."""
    shots_seed: Seed = 0
    """Random seed for drawing the shots."""
    shots_file: Path | None = None
    """File with the shots of another run (its shots.json), instead of drawing."""
    task_batch_size: Count = 0
    """Batch size of this task per process and forward pass; 0 for per_device_batch_size."""
    num_beams: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of beams for generation; 0 for the task's default: 5 for captions, else 1 (greedy)."""
    max_answer_tokens: Count = 0
    """Maximum length of training targets and predictions in tokens, including the end token. 0 is the task's
    limit (10, captions 40), or with --data the longest training answer (at most 256)."""
    answer_labels: AnswerLabels = "all"
    """Training targets of VQAv2. all: the human answers, normalised; published: the human answers as written,
    if they are in the list of 3,129 (LXMERT, VL-T5), or in answer_list.json in data_dir. A question without
    such an answer gets weight 0."""
    question_case: QuestionCase = "lower"
    """Case in which questions are read. lower: lower case; keep: as written (published). With several tasks,
    set it for the first."""
    max_lost_answers: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Maximum share of training answers that may be truncated, or changed by tokenising and decoding; more
    raise an error."""
    candidate_floor: Count = 0
    """If not 0, choose predictions among the answers that are the most frequent one of at least this many
    training questions (9 for VQAv2 in the literature)."""
    meteor: bool = True
    """Also score captions by METEOR, a Java program that takes seconds per evaluation."""
    choose_by: str | None = None
    """Metric on the dev split for choosing the best adapter. Default: that of the task."""
    on_bad_image: OnBadImage | None = None
    """How to handle missing or unreadable images: raise or skip. Default: skip and count them in training,
    raise in evaluation. With several tasks, set it for the first."""
    features: TrainFeatures = "auto"
    """Source of visual features. cached: files made by dept-vl features; live: encode images at every step;
    auto: these files if they fit the encoder and all images, else encode once before training if
    feature_memory is enough, else live. encoded, for method memory: keep the frozen encoder's outputs for all
    texts with images, in feature_memory. With several tasks, set it for the first."""
    features_dir: Path | None = None
    """Folder of the task's visual features. Default: features in its data_dir."""
    feature_memory: Annotated[float, Field(ge=0)] = 4.0
    """Memory in GiB for features that are encoded once before training. With several tasks, set it for the
    first; it covers all images."""
    own: Own = field(default_factory=OwnOptions)

    def __post_init__(self) -> None:
        """Select task vqa if `own.data` is set and no other task is named."""
        if self.own.data is not None and self.task == DataOptions.task:
            object.__setattr__(self, "task", OWN_TASK)

    def splits(self) -> tuple[str, str, str]:
        """Return the training, dev and test split: those set here, else those of the task.

        With an empty dev split, images are held out of the training split; text tasks use their own dev
        split.

        Raises:
            UnknownNameError: If the task is unknown.
        """
        task, dev = TASKS[self.task], self.dev_split
        if dev is None or not (dev or task.image_count):
            dev = task.dev_split
        return self.train_split or task.train_split, dev, self.test_split or task.test_split
