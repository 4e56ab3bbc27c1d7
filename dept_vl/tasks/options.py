"""Options of the data of a run; this module imports no engine."""

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
"""What is done with an example whose image cannot be read."""
Precision = Literal["float16", "bfloat16", "float32"]
"""What visual features are stored in."""
Own = Annotated[OwnOptions, tyro.conf.arg(name="")]
OWN_TASK = "vqa"
"""Task that reads data of your own."""


@dataclass(frozen=True)
class DataOptions(Options):
    """What is read."""

    task: str = "vqav2"
    """Name of the task."""
    data_dir: Path | None = None
    """Folder with the task's files; left out, data/TASK, and for a text task without it the Hub."""
    train_split: str | None = None
    """Split to train on; left out, the task's own."""
    dev_split: str | None = None
    """Split to choose the best adapter on; left out, the task's own, and where it has none, as where this is
    empty, images are held out of the training split."""
    holdout_images: Count = 200
    """Images held out of the training split, with all their questions, where dev_split is empty."""
    dev_limit: Count = 2000
    """At most so many examples of the dev split, drawn with the seed; 0 takes all."""
    test_split: str | None = None
    """Split that the best adapter is scored on at the end; left out, the task's own."""
    test_limit: Count = 0
    """At most so many examples of it, drawn with the seed; 0 takes all."""
    shots: Count = 0
    """Learn from so many examples of the training split alone; 0 takes all."""
    shots_per: ShotsPer = "class"
    """class: so many of each class; all: so many in all, spread over the classes (published for DePT)."""
    shots_dev: Literal["shots", "split"] = "shots"
    """shots: choose the best adapter on as many other examples; split: on the dev split (published for DePT),
    up to dev_limit."""
    shots_seed: Seed = 0
    """Of the draw of the shots."""
    shots_file: Path | None = None
    """Shots of another run (its shots.json) instead of a draw."""
    task_batch_size: Count = 0
    """Examples of this task per process and forward pass; 0 takes per_device_batch_size."""
    num_beams: Annotated[int, Field(ge=0, le=1000)] = 0
    """Beams of the search for an answer; 0 takes the task's own: 5 for captions, else 1 (greedy)."""
    max_answer_tokens: Count = 0
    """Truncate training targets and generated answers to this many tokens, end token included; 0 takes the
    task's limit (10, captions 40), or for --data the longest training answer (at most 256)."""
    answer_labels: AnswerLabels = "all"
    """Answers to learn of VQAv2. all: the human ones, normalised; published: as they are written, within the
    list of 3,129 (LXMERT, VL-T5), or answer_list.json in data_dir; a question without one weighs nothing."""
    question_case: QuestionCase = "lower"
    """lower: questions are read in lower case; keep: as they are written (published). Of several tasks the
    first says it for all."""
    max_lost_answers: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Raise an error if more than this share of the training answers is truncated, or is another text after
    tokenising and decoding."""
    candidate_floor: Count = 0
    """Choose among the answers that are the usual one of at least so many training questions (VQAv2:
    9 in the literature); 0 generates freely."""
    meteor: bool = True
    """Score captions by METEOR too, a Java program that takes seconds for every evaluation."""
    choose_by: str | None = None
    """Metric of the dev split by which the best adapter is chosen; left out, the task's own."""
    on_bad_image: OnBadImage | None = None
    """raise or skip where an image is missing or cannot be read; left out, examples are skipped and
    counted in training, and evaluation stops. Of several tasks the first says it for all."""
    features: TrainFeatures = "auto"
    """Where visual features come from. cached: from the files that dept-vl features made; live:
    every image is read and encoded at every step; auto: from those files if they are there for this encoder
    and all images, else encoded once before training if feature_memory is enough, else live. encoded, for
    method memory: what the frozen encoder makes of every text with its images is kept, in feature_memory.
    Of several tasks the first says it for all."""
    features_dir: Path | None = None
    """Folder of the files with the task's visual features; left out, features in its data_dir."""
    feature_memory: Annotated[float, Field(ge=0)] = 4.0
    """GiB of memory for features that are encoded once before training. Of several tasks the first
    says it for all images together."""
    own: Own = field(default_factory=OwnOptions)

    def __post_init__(self) -> None:
        """Data of your own are read by task vqa, unless another task is named."""
        if self.own.data is not None and self.task == DataOptions.task:
            object.__setattr__(self, "task", OWN_TASK)

    def splits(self) -> tuple[str, str, str]:
        """Return the training, dev and test split: the given ones, else the task's own.

        An empty dev split holds images out of the training split; a text task, which has none, uses its own.

        Raises:
            UnknownNameError: If there is no such task.
        """
        task, dev = TASKS[self.task], self.dev_split
        if dev is None or not (dev or task.image_count):
            dev = task.dev_split
        return self.train_split or task.train_split, dev, self.test_split or task.test_split
