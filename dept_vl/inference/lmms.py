"""Model class for lmms-eval: `lmms-eval --model dept_vl --model_args adapter=runs/vqa ...`.

lmms-eval finds it by the entry point `lmms_eval.models` of this package.
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return the entry of this model for the registry of lmms-eval."""
    return ModelManifest(model_id="dept_vl", simple_class_path=f"{__name__}.Adapted")


class Adapted(lmms):  # type: ignore[misc]
    """An adapter as a model of lmms-eval.

    Prompting and decoding follow the adapter's task; decoding settings of the benchmark are ignored.

    Args:
        adapter: Folder or name of the adapter, see `dept_vl.load`.
        backbone: Backbone to load, see `find_backbone`.
        revision: Branch, tag or commit of an adapter on the Hub.
        task: Task that determines how questions are asked.
        device: Device, such as cuda. Ignored with several processes.
        batch_size: Batch size.
        whole_text: Whether to keep everything after the first line of a question. These are usually
            instructions ("Answer in a single word") that the adapter has not seen in training.
    """

    def __init__(
        self,
        adapter: str,
        backbone: str | None = None,
        revision: str | None = None,
        task: str | None = None,
        device: str | None = None,
        batch_size: int | str = 32,
        whole_text: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        from dept_vl.inference.loading import load

        # lmms-eval passes this option to every model.
        unknown = sorted(set(others) - {"max_batch_size"})
        if unknown:
            raise ValueError(f"unknown options of dept_vl: {', '.join(unknown)}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        shared = device if self._world_size == 1 else str(self.accelerator.device)
        self.predictor = load(adapter, backbone=backbone, revision=revision, task=task, device=shared)
        self.batch_size, self.whole_text = int(batch_size), whole_text

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers to the requests of this process."""
        if not requests:
            return []
        task = self.predictor.task
        images, questions = [], []
        for request in requests:
            text, _, visuals, number, name, split = request.args
            text = text.replace("<image>", "").strip()
            questions.append(text if self.whole_text else text.partition("\n")[0])
            images.append(tuple(visuals(self.task_dict[name][split][number])) if task.image_count else None)
        answers = self.predictor.answer(images, questions, batch_size=self.batch_size)
        return list(answers)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise NotImplementedError, because dept_vl does not compute likelihoods."""
        raise NotImplementedError("dept_vl generates answers; take a task of the type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise NotImplementedError, because dept_vl has no conversations."""
        raise NotImplementedError("dept_vl answers single questions; take a task of the type generate_until")
