"""Ask a trained adapter on the command line: what `dept-vl predict` does."""

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dept_vl._utils.errors import UsageError
from dept_vl.config import PredictConfig
from dept_vl.inference.loading import load


def predict(config: PredictConfig) -> list[str]:
    """Ask, print the answers and return them.

    Raises:
        FileNotFoundError: If the adapter, its backbone or an image is missing.
        UsageError: If there are fewer images or questions than the task needs.
    """
    disable_progress_bar()
    set_verbosity_error()
    predictor = load(
        config.adapter,
        backbone=config.backbone,
        revision=config.revision,
        task=config.task,
        device=config.device,
    )
    task = predictor.task
    images, questions = config.inputs[: task.image_count], config.inputs[task.image_count :]
    if len(images) < task.image_count or (task.asks and not questions):
        needed = [*["IMAGE"] * task.image_count, *['"QUESTION"'] * task.asks]
        raise UsageError(f"{task.name} needs {' '.join(needed)}; got {' '.join(map(repr, config.inputs))}")
    answers = predictor.answer([images] if images else None, questions or [""])
    print(*answers, sep="\n")
    return list(answers)
