"""Loading of a task's training, dev and test splits, with a check of their images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dept_vl._utils.errors import UnknownNameError, UsageError
from dept_vl._utils.io import is_there, read_json
from dept_vl._utils.printable import say
from dept_vl._utils.run_files import CANDIDATES_FILE, TASK_FILE
from dept_vl.config import OWN_TASK, DataOptions, EvaluateConfig, OnBadImage, RunConfig
from dept_vl.data.shots import Shots, choose_shots
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Decoding, Task, data_folder, hold_out_images, limit
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.tasks.vqav2 import read_answer_list

LOOKED_AT = 50
"""Number of examples scored to find out which metrics a task has."""


@dataclass(frozen=True)
class Splits:
    """Training, dev and test split of a task, for a run.

    `decoding` holds the generation settings, `options` the options of the splits, and `shots` the few-shot
    selection, if any.
    """

    train: Task
    dev: Task
    test: Task
    decoding: Decoding
    options: DataOptions
    shots: Shots | None = None

    @property
    def chosen_by(self) -> str:
        """Metric for choosing the best adapter."""
        return self.options.choose_by or self.dev.primary


def options_together(config: RunConfig) -> list[DataOptions]:
    """Return the data options of all tasks; ValueError if a task is repeated or `on_bad_image` differs."""
    together = (config.data, *config.also)
    names = [TASKS[options.task].loaded_as for options in together]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"expected different tasks to train on together, found {', '.join(repeated)} more than once; "
            f"your own questions, captions and labels are all read as {OWN_TASK}, of which a run has one"
        )
    on_bad_image = config.data.on_bad_image
    for place, options in enumerate(config.also):
        if options.on_bad_image not in (None, on_bad_image):
            raise ValueError(
                f"expected one on_bad_image for all tasks, found {on_bad_image!r} in data and "
                f"{options.on_bad_image!r} in also[{place}]; leave it out there"
            )
    case = config.data.question_case
    return [replace(one, on_bad_image=on_bad_image, question_case=case) for one in together]


def load_splits(options: DataOptions, seed: int) -> Splits:
    """Read the splits of a task and check that their images exist, and that train and dev have answers."""
    train_split, dev_split, test_split = options.splits()
    options = replace(options, train_split=train_split, dev_split=dev_split, test_split=test_split)
    train = _load(options, train_split)
    _check_answered(train, "train_split", train_split)
    decoding = choose_decoding(train, options, training_candidates(options, train))
    train.check_requirements()  # early, instead of at the first evaluation
    shots = choose_shots(options, train)
    train, dev = _train_and_dev(options, train, shots, dev_split, seed)
    if options.choose_by:
        _check_metric(limit(dev, LOOKED_AT, seed), options.choose_by)
    test = _load(options, test_split)
    if options.own.data is not None:  # ids of other tasks may be the same in all splits
        _note_shared(train, dev, test)
    evaluated = options.on_bad_image or "raise"
    return Splits(
        train=train,
        dev=check_images(limit(dev, options.dev_limit, seed), evaluated),
        test=check_images(limit(test, options.test_limit, seed), evaluated),
        decoding=decoding,
        options=options,
        shots=shots,
    )


def _note_shared(train: Task, dev: Task, test: Task) -> None:
    """Print how many rows of the dev and test splits are trained on, too."""
    learnt = set(train.example_ids())
    for name, part in (("dev", dev), ("test", test)):
        shared = sum(identity in learnt for identity in part.example_ids())
        if shared:
            say(f"note: {shared:,} of {len(part):,} rows of the {name} split are trained on, too")


def _train_and_dev(
    options: DataOptions, train: Task, shots: Shots | None, dev_split: str, seed: int
) -> tuple[Task, Task]:
    if shots is None:
        # Before images are held out, so that none of those in the dev split are missing.
        train = without_missing_images(train, options.on_bad_image or "skip")
    elif options.shots_dev == "shots":
        # With few shots, missing images are an error and never skipped.
        learnt, dev = (check_images(train.subset(side), "raise") for side in (shots.train, shots.dev))
        return learnt, dev
    else:
        train = check_images(train.subset(shots.train), "raise")
        if not dev_split:
            raise UsageError(f"shots_dev=split chooses on a dev split of {train.name}: name it, dev_split")
    if not dev_split:
        return hold_out_images(train, options.holdout_images, seed)
    dev = _load(options, dev_split)
    _check_answered(dev, "dev_split", dev_split)
    return train, dev


def parts_of(options: DataOptions, split: str, seed: int) -> Iterator[tuple[str, Task]]:
    """Yield the parts of a run (train, dev, test) that are made of a split, as the run reads them."""
    train_split, dev_split, test_split = options.splits()
    if split == test_split:
        yield "test", limit(_load(options, split), options.test_limit, seed)
    if split == dev_split:
        yield "dev", limit(_load(options, split), options.dev_limit, seed)
    if split == train_split:
        whole = _load(options, split)
        train, dev = _train_and_dev(options, whole, choose_shots(options, whole), dev_split, seed)
        yield "train", train
        if not dev_split:
            yield "dev", limit(dev, options.dev_limit, seed)


def load_split(options: DataOptions, split: str) -> Task:
    """Read a split of the task in the options."""
    blank = TASKS[options.task]
    if options.own != OwnOptions():
        blank = blank.with_options(options.own)
    task = blank.load(options.data_dir, split).reading(options.question_case)
    if options.answer_labels == "published":
        task = task.with_published_labels(data_folder(options.task, options.data_dir))
    return task


def image_root(options: DataOptions) -> Path:
    """Return the folder that image names are relative to."""
    own = options.own.images or options.own.folder()
    if own is None and options.own.data is not None:
        from dept_vl.tasks.own.find import fetch

        return fetch(options.own.data)
    return own or data_folder(options.task, options.data_dir)


def answering_of(splits: Sequence[Splits]) -> dict[str, Any]:
    """Return the facts about your own data that inference needs, to save with an adapter."""
    return {
        one.train.loaded_as: {"max_new_tokens": one.decoding.max_new_tokens, "facts": one.train.facts()}
        for one in splits
        if one.train.fits_answers
    }


def informed(task: Task, answering: Mapping[str, Any], run: Path | None) -> tuple[Task, int]:
    """Return a blank task with the facts of its training data, and the maximum prediction length or 0.

    They come from the adapter's `answering`, or for older adapters from a file in the run's folder.
    """
    if not answering and run is not None and is_there(run / TASK_FILE):
        answering = read_json(run / TASK_FILE)
    known = answering.get(task.loaded_as, {})
    return task.with_facts(known.get("facts", {})), int(known.get("max_new_tokens", 0))


def _load(options: DataOptions, split: str) -> Task:
    task = load_split(options, split).answered()
    if not len(task):
        raise ValueError(f"the split {split} of {task.name} has no examples; choose another")
    return task if options.meteor else task.without_slow_metrics()


def _check_answered(task: Task, option: str, split: str) -> None:
    if not task[0].targets:
        raise ValueError(f"{option}={split} of {task.name} has no published answers; choose another")


def _check_metric(dev: Task, metric: str) -> None:
    """Raise UnknownNameError if scoring a split does not give a metric."""
    answers = {example.example_id: example.answer for example in map(dev.__getitem__, range(len(dev)))}
    metrics = dev.score(answers)
    if metric not in metrics:
        raise UnknownNameError("choose_by", metric, metrics)


def choose_decoding(
    task: Task, options: DataOptions, candidates: Sequence[str] | None = None, longest: int = 0
) -> Decoding:
    """Return the task's generation settings, overridden by the options.

    `candidates` are the only predictions allowed (None for the task's own). `longest` is the maximum
    prediction length in tokens if the options set none (0 for the task's own).
    """
    default = task.decoding
    return Decoding(
        options.max_answer_tokens or longest or default.max_new_tokens,
        options.num_beams or default.num_beams,
        default.candidates if candidates is None else tuple(candidates),
    )


def training_candidates(options: DataOptions, train: Task) -> tuple[str, ...] | None:
    """Return the usual answers if `candidate_floor` is set, else None; UsageError if there are none."""
    if not options.candidate_floor:
        return None
    if not train.has_usual_answers:
        raise UsageError(
            f"candidate_floor={options.candidate_floor} chooses among the usual answers of a training split; "
            f"{options.task} has no such list: leave it 0"
        )
    return train.usual_answers(options.candidate_floor)


def run_decoding(
    config: EvaluateConfig, options: DataOptions, task: Task, learnt: Task, longest: int
) -> Decoding:
    """Return the generation settings for a run. Candidates come from `--candidates`, else from the run.

    `learnt` and `longest` are the values returned by `informed`: labels come from the training data, not from
    the evaluated data.
    """
    path = config.candidates
    if path is None and TASKS[options.task].has_usual_answers and is_there(config.run / CANDIDATES_FILE):
        path = config.run / CANDIDATES_FILE
    candidates = read_candidates(path) if path else learnt.decoding.candidates or None
    return choose_decoding(task, options, candidates, longest)


def check_images(task: Task, on_bad_image: OnBadImage) -> Task:
    """Return the task; raise FileNotFoundError if images are missing and must not be skipped."""
    missing = task.missing_images()
    if missing and on_bad_image == "raise":
        names = ", ".join(f"{path.name:.100}" for path in missing[:3])
        raise FileNotFoundError(
            f"{len(missing):,} of {len(task.image_files()):,} images of {task.name} are missing from "
            f"{missing[0].parent} (first: {names}); dept-vl data check says what belongs there. "
            "To leave them out, pass --on_bad_image skip"
        )
    return task


def without_missing_images(task: Task, on_bad_image: OnBadImage) -> Task:
    """Return the task without examples with missing images; raise FileNotFoundError if no example is left."""
    if on_bad_image == "raise":
        return check_images(task, on_bad_image)
    missing = set(task.missing_images())
    if not missing:
        return task
    kept = [index for index in range(len(task)) if missing.isdisjoint(task.images(index))]
    if not kept:
        raise FileNotFoundError(
            f"none of the images of {task.name} are there (first: {next(iter(missing))!s:.200}); "
            "dept-vl data check says what belongs there"
        )
    say(
        f"warning: {len(missing):,} images of {task.name} are missing; "
        f"{len(task) - len(kept):,} of {len(task):,} training examples are left out"
    )
    return task.subset(kept)


def data_options(config: EvaluateConfig, trained: RunConfig) -> DataOptions:
    """Return a run's options for a task, as changed by an evaluation.

    Raises ValueError if the task is new to the run and `data_dir` or `split` is missing.
    """
    known = {TASKS[options.task].loaded_as: options for options in (trained.data, *trained.also)}
    given = config.own.data is not None
    asked = config.task or (OWN_TASK if given else trained.data.task)
    # With own.data, DataOptions turns the default task into vqa.
    name = TASKS[DataOptions(task=asked, own=config.own).task].loaded_as
    if name not in known and TASKS[name].image_count and not (given or (config.data_dir and config.split)):
        raise ValueError(f"{config.run} knows nothing of {name!r}; say --data_dir and --split too")
    options = known.get(name, DataOptions(task=name))
    options = replace(options, own=config.own.over(options.own), question_case=trained.data.question_case)
    if given:
        options = replace(options, features_dir=None, test_split=TASKS[name].other_split)
    return replace(
        options,
        data_dir=config.data_dir or options.data_dir,
        # The run's features belong to the images of its own folder.
        features_dir=config.features_dir or (None if config.data_dir or given else options.features_dir),
        test_split=config.split or options.splits()[-1],
        num_beams=config.num_beams or options.num_beams,
    )


def read_candidates(path: Path) -> tuple[str, ...]:
    """Read a list of candidate answers; raise FileNotFoundError or ValueError if there is no valid list."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a JSON list of candidate answers at {path}, found no such file")
    try:
        answers = read_answer_list(path)
    except ValueError as error:
        raise ValueError(f"{error}; expected a JSON list of answers") from None
    if not answers:
        raise ValueError(f"{path}: expected a JSON list of answers, found an empty one")
    return tuple(answers)
