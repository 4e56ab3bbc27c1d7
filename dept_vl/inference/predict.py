"""Implementation of `dept-vl predict`."""

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dept_vl._utils.errors import UsageError
from dept_vl._utils.printable import say
from dept_vl._utils.terminal import waiting
from dept_vl.inference.bulk import answer_table
from dept_vl.inference.loading import load
from dept_vl.inference.options import PredictConfig
from dept_vl.tasks.own.images import names_image


def predict(config: PredictConfig) -> list[str]:
    """Print and return the answers to `config.inputs`; with `config.own.data`, write them to a file instead.

    Raises:
        FileNotFoundError: If the adapter, its backbone or an image is missing.
        UsageError: If options are incompatible, or images or questions are missing.
    """
    disable_progress_bar()
    set_verbosity_error()
    of_table = config.own.data is not None
    if of_table and config.inputs:
        raise UsageError(f"--data names the images and questions; leave out {' '.join(config.inputs)!r:.200}")
    if not of_table and (given := config.of_tables()):
        raise UsageError(f"{', '.join(given)}: only for tables; give --data, or leave it out")
    accelerator = None
    if of_table:  # gives each process its device
        on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=on_cpu)
    with waiting("loading the adapter"):
        predictor = load(
            config.adapter,
            backbone=config.backbone,
            revision=config.revision,
            task=config.task,
            device=config.device,
        )
    if accelerator is not None:
        answer_table(predictor, config, accelerator)
        accelerator.end_training()
        return []
    task = predictor.task
    images, questions = config.inputs[: task.image_count], config.inputs[task.image_count :]
    if len(images) < task.image_count or (task.asks and not questions):
        needed = [*["IMAGE"] * task.image_count, *['"QUESTION"'] * task.asks]
        raise UsageError(f"{task.name} needs {' '.join(needed)}; got {' '.join(map(repr, config.inputs))}")
    if more := [text for text in questions if names_image(text)]:
        raise UsageError(
            f"{task.name} takes {task.image_count or 'no'} image{'s' * (task.image_count > 1)}, got "
            f"{len(images) + len(more)} ({', '.join(map(repr, [*images, *more]))}); ask about further images "
            "with another command, or with --data"
        )
    answers = predictor.answer([images] if images else None, questions or [""])
    say(*answers)
    return list(answers)
