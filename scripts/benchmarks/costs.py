"""Processor time and memory of a training step, for several configurations of one task."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median

from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW

from benchmarks.measure import in_turn, saved_bytes
from dept_vl._utils.terminal import waiting
from dept_vl.config import RunConfig
from dept_vl.data.collate import Batch, Collator, Draw
from dept_vl.data.encoded import encode_sources
from dept_vl.data.feature_source import read_features
from dept_vl.data.sampling import TrainingBatches, TrainingDraws
from dept_vl.data.splits import load_splits
from dept_vl.models.prompted import PromptedModel
from dept_vl.training.build import build_model
from dept_vl.training.optim import build_optimizer

TRAINED_BYTES = 12
"""Bytes for each trainable parameter in full precision: gradient and AdamW's two moments."""


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step.

    Attributes:
        seconds: Processor time of each round, summed over threads.
        bytes: Bytes that the forward pass keeps for the backward pass, gradients, and AdamW's moments. The
            weights, which are the same for every method, are not included.
    """

    seconds: list[float]
    bytes: int

    @property
    def milliseconds(self) -> float:
        """Median processor time over the rounds."""
        return 1000 * median(self.seconds)

    @property
    def mib(self) -> float:
        """Memory in MiB."""
        return self.bytes / 2**20


@waiting("measuring steps")
def measure_steps(configs: Mapping[str, RunConfig], rounds: int) -> dict[str, StepCost]:
    """Measure training steps of several configurations on the same batches, on a CPU.

    Every configuration takes one step per round, and a different one is first each time, so that other load
    affects all equally. Processor time is measured, which excludes other programs.

    Args:
        configs: Configurations by name, of one task with one seed. Those that train nothing are left out.
        rounds: Number of measured steps of each configuration, after one warm-up step.
    """
    accelerator = Accelerator(cpu=True)
    first = next(iter(configs.values()))
    splits = load_splits(first.data, first.train.seed)
    models = {name: build_model(config).train() for name, config in configs.items()}
    model = next(iter(models.values()))
    collate = Collator.for_model(
        model,
        splits.decoding.max_new_tokens,
        max_source_length=first.prompt.max_source_length + model.backbone.frame,
        images=read_features(model.backbone, [splits], num_workers=0, accelerator=accelerator),
    )
    draws = TrainingDraws([splits.train], first.train.seed)
    order = TrainingBatches(
        [len(splits.train)], [first.train.per_device_batch_size], seed=first.train.seed
    )  # fmt: skip
    drawn = [[draws[place] for place in places] for places in islice(order, rounds + 1)]
    batches = {
        name: list(map(_collator(collate, drawn, model, configs[name], accelerator), drawn))
        for name, model in models.items()
    }
    optimizers = {
        name: build_optimizer(groups, configs[name].optim)
        for name, model in models.items()
        if (groups := model.parameter_groups())
    }
    costs = {
        name: StepCost([], _memory(models[name], optimizer, batches[name][0]))
        for name, optimizer in optimizers.items()
    }
    for name, optimizer in optimizers.items():  # the first step creates AdamW's moments
        _step(models[name], optimizer, batches[name][0], configs[name])
    for number, names in enumerate(in_turn(list(costs), rounds), start=1):
        for name in names:
            seconds = _step(models[name], optimizers[name], batches[name][number], configs[name])
            costs[name].seconds.append(seconds)
    return costs


def _collator(
    collate: Collator,
    drawn: Sequence[Sequence[Draw]],
    model: PromptedModel,
    config: RunConfig,
    accelerator: Accelerator,
) -> Collator:
    """Return the collator of a configuration, with stored encoder outputs if it uses them."""
    if config.data.features != "encoded":
        return collate
    examples = [draw.example for draws in drawn for draw in draws]
    return replace(collate, encoded=encode_sources(model, examples, collate.of_examples, accelerator))


def _memory(model: PromptedModel, optimizer: AdamW, batch: Batch) -> int:
    known = [*model.parameters(), *model.buffers()]
    kept = saved_bytes(lambda: model(**batch.training_inputs()).loss, known)
    return kept + TRAINED_BYTES * sum(parameter.numel() for parameter in _trained(optimizer))


def _trained(optimizer: AdamW) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _step(model: PromptedModel, optimizer: AdamW, batch: Batch, config: RunConfig) -> float:
    started = time.process_time()
    model(**batch.training_inputs()).loss.backward()
    nn.utils.clip_grad_norm_(_trained(optimizer), config.train.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - started
