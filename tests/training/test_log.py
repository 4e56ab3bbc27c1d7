"""What a run writes down: its figures, counted from the batches themselves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import IMAGE_SIZE, random_features, random_text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dept_vl.data.collate import Batch
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from dept_vl.training.log import Log, memory_gib
from dept_vl.training.loop import encoder_tokens
from dept_vl.training.progress import Progress

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("prompt_length", [0, 3])
def test_tokens_are_those_that_the_encoder_reads(
    make_backbone: Callable[..., Backbone], images: int, prompt_length: int
) -> None:
    backbone = make_backbone("t5", "clip" if images else None)
    prompt = DePT(backbone.d_model, prompt_length=prompt_length, rank=2, max_source_length=16)
    model = PromptedModel(backbone, prompt)
    features = random_features(backbone, images=images) if images else None
    batch = Batch(("a", "b", "c"), **random_text(backbone), visual_features=features)
    _, read = model.encode(**{name: value for name, value in batch.inputs().items() if value is not None})
    expected = (7 + 4 + 5) + 3 * (prompt_length + 16 * images)
    assert encoder_tokens(model, batch) == int(read.sum()) == expected
    if images:  # pixels have as many tokens as the features that they become
        pixels = torch.zeros(3, images, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert encoder_tokens(model, replace(batch, visual_features=None, pixel_values=pixels)) == expected


def test_no_tokens_of_a_batch_without_examples(t5: Backbone) -> None:
    none = torch.empty(0, 0, dtype=torch.long)
    assert encoder_tokens(PromptedModel(t5), Batch((), none, none, skipped=("a",))) == 0


def test_figures_are_of_the_time_since_the_figures_before(tmp_path: Path) -> None:
    progress = Progress(history=[(0, 1.0)], eval_seconds=7.0)
    log = Log(Accelerator(cpu=True), tmp_path / "log.jsonl", progress, max_steps=10, eval_every=4)
    one = torch.ones(2, 3, dtype=torch.long)
    for seconds, count in ((1.0, 2), (4.0, 1)):
        for _ in range(2):
            log.note(Batch(("a",) * count, one, one), 5 * count, torch.tensor(0.5))
            progress.steps += 1
        progress.train_seconds += seconds
        assert log.look(torch.tensor(0.5)) == (0.5, 2 * count, 0)
        log.loss(0.5, {"prompt": 0.3})
    log.close()
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["samples_per_second"], first["tokens_per_second"]) == (4.0, 20.0)
    assert (second["samples_per_second"], second["tokens_per_second"]) == (0.5, 2.5)
    # Eight steps as long as the two before, and two of the three evaluations.
    assert first["seconds_left"] == 8 * 0.5 + 2 * 7.0
    assert second["seconds_left"] == 6 * 1.25 + 2 * 7.0
    assert second["lr/prompt"] == 0.3
    assert progress.examples == 0  # the log reads progress; the loop updates it


class SinglePrecision(TorchDispatchMode):
    """A device without float64, as Apple's MPS is: making such a tensor raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result


def test_the_log_needs_no_float64(tmp_path: Path) -> None:
    log = Log(Accelerator(cpu=True), tmp_path / "log.jsonl", Progress(), max_steps=10, eval_every=4)
    one = torch.ones(2, 3, dtype=torch.long)
    with SinglePrecision():
        with pytest.raises(TypeError, match="no float64"):
            torch.tensor(0.1).double()
        log.note(Batch(("a", "b"), one, one, skipped=("c",)), 5, torch.tensor(0.1))
        counted = log.look(torch.tensor(0.1))
    log.close()
    assert counted == (torch.tensor(0.1).item(), 2, 1)


def test_memory_of_a_process_without_gpu_is_what_it_holds() -> None:
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(2**26)  # a quarter of a GiB
    after = memory_gib(torch.device("cpu"))
    assert 0.01 < before < 100
    assert after - before == pytest.approx(0.25, abs=0.05)
    del held
