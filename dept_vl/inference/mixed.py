"""Several adapters on one backbone, a different one for every row of a batch if needed.

Rows with different adapters go through the model together (see `models.row_prompts`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dept_vl.adapters.adapter import Adapter
from dept_vl.inference.given import as_images
from dept_vl.inference.loading import LONGEST_TEXT, find_backbone, load, run_of
from dept_vl.inference.predictor import Ask, Images, Predictor, answer_all, line_up
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.row_prompts import PromptTable, RowProjections, RowPrompts
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task

Names = Sequence[str | None]
"""Adapter of each row; None is the backbone alone."""


class ManyAdapters:
    """Adapters by name, on one backbone.

    Args:
        backbone: As it was before any of them.
        predictors: Loaded on it (`load(..., backbone=backbone)`).
        base_task: How rows without adapter are asked; None takes the first adapter's task. With it there
            may be no adapter.

    Attributes:
        predictors: By adapter's name; None is the backbone alone.

    Raises:
        ValueError: If there is no adapter, or one is on another backbone or has trained the language model
            itself.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        predictors: Mapping[str, Predictor],
        *,
        base_task: str | Task | None = None,
    ) -> None:
        if not predictors and base_task is None:
            raise ValueError("expected one adapter or more, found none")
        self.predictors: dict[str | None, Predictor] = {}
        for name, predictor in predictors.items():
            self.predictors[name] = predictor
            if predictor.model.backbone.language is not backbone.language:
                raise ValueError(
                    f"the adapter {name!r} is on a language model of its own: load it on the backbone of the "
                    "others (load(..., backbone=backbone)); one that has trained the language model itself "
                    "cannot share it"
                )
        self.backbone = backbone.eval()
        if base_task is None:
            base_task = next(iter(predictors.values())).task
        task = TASKS[base_task] if isinstance(base_task, str) else base_task
        self.predictors[None] = Predictor(PromptedModel(backbone), None, task, task.decoding, LONGEST_TEXT)
        self._places = {name: place for place, name in enumerate(self.predictors)}
        adapters = [predictor.adapter for predictor in self.predictors.values()]
        language_model = backbone.language_model
        words = language_model.word_embeddings.weight
        prompts = [None if a is None or a.prompt is None else a.build_prompt() for a in adapters]
        with torch.no_grad():
            self._prompts = PromptTable(
                [None if prompt is None else prompt.to(words.device).eval() for prompt in prompts],
                words,
                padding_first=language_model.counts_text,
            )

    def answer(
        self,
        image: Images = None,
        question: str | Sequence[str] = "",
        *,
        adapters: str | Names | None,
        batch_size: int = 32,
        max_time: float | None = None,
    ) -> str | list[str]:
        """Answer a question, or several, each with its adapter.

        As `Predictor.answer`; one image, question or adapter goes with every one of several others. Rows of
        one batch may be of different tasks; those whose answers are decoded differently, or that have
        another number of images, go through the model apart.

        Args:
            image: See `Predictor.answer`; in a list each row's: an image, a pair for NLVR2, or None.
            question: See `Predictor.answer`.
            adapters: Name of each row's, or one for all; None is the backbone alone.
            batch_size: Questions answered at a time.
            max_time: Seconds of decoding after which a batch's answers are cut; None for no limit.

        Raises:
            FileNotFoundError: If there is no such image.
            ValueError: As `Predictor.answer`; or if there is no such adapter.
        """
        single = adapters is None or isinstance(adapters, str)
        names: list[str | None] = (
            [adapters] if adapters is None or isinstance(adapters, str) else list(adapters)
        )
        predictors = [self.predictor(name) for name in names]
        pairs = all(predictor.task.image_count > 1 for predictor in predictors)
        (images, questions, predictors), alone = line_up(
            images=as_images(image, pairs=pairs),
            questions=([question], True) if isinstance(question, str) else (list(question), False),
            adapters=(predictors, single),
        )
        rows = zip(predictors, questions, images, strict=True)
        name_of = {id(predictor): name for name, predictor in self.predictors.items()}
        replies = answer_all(
            [Ask(*row) for row in rows],
            lambda asks: self.model([name_of[id(ask.predictor)] for ask in asks]),
            batch_size,
            max_time,
        )
        answers = [reply.text for reply in replies]
        return answers[0] if alone else answers

    def model(self, adapters: Names) -> PromptedModel:
        """Return the model for a batch whose rows have these adapters, for inference.

        It shares the backbone, and is as quick to make as a few small tensors.

        Raises:
            ValueError: If there is no such adapter.
        """
        predictors = {name: self.predictor(name) for name in adapters}
        device = self.backbone.device
        rows = torch.tensor([self._places[name] for name in adapters], device=device)
        backbone = self.backbone
        if backbone.visual_projection is not None:
            rows_of = {name: (rows == self._places[name]).nonzero().squeeze(1) for name in predictors}
            parts: dict[nn.Module | None, list[torch.Tensor]] = {}
            # Adapters without a projection share the backbone's.
            for name, predictor in predictors.items():
                parts.setdefault(predictor.model.backbone.visual_projection, []).append(rows_of[name])
            projections = [(part, torch.cat(of_part).sort().values) for part, of_part in parts.items()]
            backbone = backbone.with_projection(RowProjections(projections))
        return PromptedModel(backbone, RowPrompts(self._prompts, rows))

    def predictor(self, name: str | None) -> Predictor:
        """Return the predictor of an adapter; None is the backbone alone.

        Raises:
            ValueError: If there is no such adapter.
        """
        if name not in self.predictors:
            known = ", ".join(repr(known) for known in self.predictors)
            raise ValueError(f"there is no adapter {name!r}; there are {known}")
        return self.predictors[name]


def load_many(
    sources: Mapping[str, str | Path],
    *,
    backbone: FrozenBackbone | str | Path | None = None,
    device: str | torch.device | None = None,
    base_task: str | None = None,
) -> ManyAdapters:
    """Load several adapters on one backbone.

    Args:
        sources: As `load` takes them, by the name that each is to have.
        backbone: See `find_backbone`; None takes that of the first.
        device: See `find_backbone`.
        base_task: See `ManyAdapters`.

    Raises:
        FileNotFoundError: If there is no such adapter, or no backbone.
        ValueError: As `load` and `ManyAdapters`.

    Example:
        >>> import dept_vl
        >>> many = dept_vl.load_many({"vqa": "runs/vqa", "again": "runs/vqa/last"})
        >>> answers = many.answer("street.jpg", "what colour is the car?", adapters=["vqa", "again"])
        >>> len(answers)
        2
    """
    if not sources:
        raise ValueError("expected one adapter or more, found none")
    first = next(iter(sources.values()))
    shared = find_backbone(Adapter.from_pretrained(first), run_of(Path(first)), backbone, device, Path(first))
    predictors = {name: load(source, backbone=shared) for name, source in sources.items()}
    return ManyAdapters(shared, predictors, base_task=base_task)
