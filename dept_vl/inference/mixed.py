"""Several adapters on one backbone. The rows of a batch may use different ones, see `models.row_prompts`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dept_vl.adapters.adapter import Adapter
from dept_vl.inference.given import as_images
from dept_vl.inference.loading import LONGEST_TEXT, find_backbone, load, run_of
from dept_vl.inference.predictor import Ask, Images, Predictor, answer_all, as_questions, line_up
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.row_prompts import PromptTable, RowProjections, RowPrompts
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task
from dept_vl.tasks.io.records import brief

Names = Sequence[str | None]
"""Name of the adapter of each row; None is the backbone alone."""


class ManyAdapters:
    """Named adapters on one backbone.

    Args:
        backbone: Backbone without adapter.
        predictors: Predictors by adapter name, loaded with `load(..., backbone=backbone)`.
        base_task: Task that determines how questions are asked without an adapter. Defaults to the first
            adapter's task; required if `predictors` is empty.

    Attributes:
        predictors: Predictors by adapter name; None is the backbone alone.

    Raises:
        ValueError: If there are neither adapters nor a `base_task`, or if an adapter is on another backbone
            or contains weights of the language model.
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
            if not isinstance(name, str):
                raise ValueError(f"expected the name of an adapter as text, found {name!r:.60}")
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
        """Answer one or several questions, all with one adapter or each with its own.

        A single image, question or adapter is used for all rows. Rows may have different tasks; those that
        differ in decoding settings or in the number of images are put in different batches.

        Args:
            image: Image or images, see `Predictor.answer`. A list holds an image, a pair of images (NLVR2)
                or None for each row.
            question: Question or questions, see `Predictor.answer`.
            adapters: Name of the adapter, or of each row's adapter; None is the backbone alone.
            batch_size: Batch size.
            max_time: Number of seconds after which the decoding of a batch is cut; None for no limit.

        Raises:
            FileNotFoundError: If an image does not exist.
            ValueError: If `Predictor.answer` raises it, or an adapter is unknown.
        """
        single = adapters is None or isinstance(adapters, str)
        names: list[str | None] = (
            [adapters] if adapters is None or isinstance(adapters, str) else list(adapters)
        )
        predictors = [self.predictor(name) for name in names]
        pairs = all(predictor.task.image_count > 1 for predictor in predictors)
        (images, questions, predictors), alone = line_up(
            images=as_images(image, pairs=pairs),
            questions=as_questions(question),
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
        """Return a model for a batch whose rows use these adapters. It shares the backbone: this is fast."""
        predictors = {name: self.predictor(name) for name in adapters}
        device = self.backbone.device
        rows = torch.tensor([self._places[name] for name in adapters], device=device)
        backbone = self.backbone
        if backbone.visual_projection is not None:
            rows_of = {name: (rows == self._places[name]).nonzero().squeeze(1) for name in predictors}
            parts: dict[nn.Module | None, list[torch.Tensor]] = {}
            # Adapters without a visual projection share the backbone's.
            for name, predictor in predictors.items():
                parts.setdefault(predictor.model.backbone.visual_projection, []).append(rows_of[name])
            projections = [(part, torch.cat(of_part).sort().values) for part, of_part in parts.items()]
            backbone = backbone.with_projection(RowProjections(projections))
        return PromptedModel(backbone, RowPrompts(self._prompts, rows))

    def predictor(self, name: str | None) -> Predictor:
        """Return the predictor of an adapter, or raise ValueError; None is the backbone alone."""
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
        sources: Sources of the adapters (see `load`) by the names to give to them.
        backbone: Backbone or where to load it from, see `find_backbone`. Defaults to the first adapter's.
        device: Device to load the backbone on, see `find_backbone`.
        base_task: Task of questions without an adapter, see `ManyAdapters`.

    Raises:
        FileNotFoundError: If an adapter or the backbone is not found.
        ValueError: If there is no adapter, or `load` or `ManyAdapters` raises it.

    Example:
        >>> import dept_vl
        >>> many = dept_vl.load_many({"vqa": "runs/vqa", "again": "runs/vqa/last"})
        >>> answers = many.answer("street.jpg", "what colour is the car?", adapters=["vqa", "again"])
        >>> len(answers)
        2
    """
    if not isinstance(sources, Mapping):
        raise ValueError(f'expected adapters by name, such as {{"vqa": "runs/vqa"}}, found {brief(sources)}')
    if not sources:
        raise ValueError("expected one adapter or more, found none")
    first = next(iter(sources.values()))
    shared = find_backbone(Adapter.from_pretrained(first), run_of(Path(first)), backbone, device, Path(first))
    predictors = {name: load(source, backbone=shared) for name, source in sources.items()}
    return ManyAdapters(shared, predictors, base_task=base_task)
