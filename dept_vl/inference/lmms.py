"""Adapters as a model of lmms-eval: `lmms-eval --model dept_vl --model_args adapter=runs/vqa ...`.

Found by its entry point (`lmms_eval.models`) where both packages are installed.
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval has to know of the model before it is loaded."""
    return ModelManifest(model_id="dept_vl", simple_class_path=f"{__name__}.Adapted")


class Adapted(lmms):  # type: ignore[misc]
    """An adapter on its backbone, asked and decoded as its task does.

    What a benchmark says of decoding does not count.

    Args:
        adapter: See `dept_vl.load`, as for the next ones.
        backbone: See `find_backbone`.
        revision: Of an adapter on the Hub.
        task: How questions are asked.
        device: Such as cuda.
        batch_size: Questions answered at a time.
        whole_text: Read instructions below the question too, such as to answer in a single word, which an
            adapter has not seen in its training.
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

        # Options of lmms-eval's own for every model, which are left at what they are.
        unknown = sorted(set(others) - {"max_batch_size"})
        if unknown:
            raise ValueError(f"unknown options of dept_vl: {', '.join(unknown)}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        shared = device if self._world_size == 1 else str(self.accelerator.device)
        self.predictor = load(adapter, backbone=backbone, revision=revision, task=task, device=shared)
        self.batch_size, self.whole_text = int(batch_size), whole_text

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer a process's share of the questions."""
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
        """Refuse: the package generates answers and computes no likelihoods for lmms-eval.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("dept_vl generates answers; take a task of the type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: the package answers each question by itself.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("dept_vl answers single questions; take a task of the type generate_until")
