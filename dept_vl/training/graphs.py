"""Training steps as CUDA graphs, which launch all kernels of a step at once.

With small batches, kernels finish before the next one is launched, so launches determine the time of a step.
One graph is recorded for each shape of a batch. It is replayed for every batch of that shape, including the
batch it was recorded with, so that a resumed run computes the same as an uninterrupted one.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dept_vl._utils.io import one_line
from dept_vl.config import TrainOptions
from dept_vl.models import graphs
from dept_vl.models.graphs import shape_of

Inputs = dict[str, Tensor | None]
Backward = Callable[[Inputs], Tensor]
"""Function that runs forward and backward, leaves gradients in the parameters and returns the loss."""
WARM_UPS = 2
"""Steps before a recording, in which libraries choose kernels and allocate memory."""


def why_not(accelerator: Accelerator, options: TrainOptions, *, pretrained: bool, encoded: bool) -> str:
    """Return why steps cannot be recorded, or an empty string if they can."""
    device, processes = accelerator.device.type, accelerator.num_processes
    if encoded:
        return "outputs of the encoder that are kept have no fixed shape"
    if pretrained:
        return "what a pretrained model reads has no fixed shape"
    if device != "cuda":
        return f"graphs need a CUDA device, and the run is on {device}"
    if processes > 1:
        return f"graphs of one process hold no communication, and there are {processes} processes"
    if options.gradient_accumulation_steps > 1:
        return (
            f"a graph is one batch, and gradient_accumulation_steps is {options.gradient_accumulation_steps}"
        )
    if options.gradient_checkpointing:
        return "gradient checkpointing reads the state of random numbers, which a graph cannot"
    return ""


@dataclass(frozen=True)
class Recorded:
    """Recorded training step for one shape of inputs."""

    inputs: dict[str, Tensor]
    loss: Tensor
    gradients: dict[int, Tensor]  # by index of the parameter
    replay: Callable[[], None]


class GraphedStep:
    """A `Backward` that replays CUDA graphs, and runs the plain step where it cannot.

    Dropout draws the same random numbers as in the plain step. `backward` is the plain step, which must not
    wait for the device or keep its results. Batches of `rows` examples are recorded; others may be the only
    ones of their shape. If recording fails, `report` is called with one line and later steps run plain.

    Attributes:
        recorded: Recorded steps by the shapes of their inputs.
        failure: Why recording failed; empty if it has not.
    """

    def __init__(
        self,
        backward: Backward,
        parameters: Sequence[nn.Parameter],
        rows: Collection[int],
        device: torch.device,
        report: Callable[[str], object],
    ) -> None:
        self.backward, self.parameters, self.rows = backward, list(parameters), set(rows)
        self.device, self.report = device, report
        self.recorded: dict[tuple[Any, ...], Recorded] = {}
        self.failure = ""
        # Shared by all shapes, which also use one another's memory: only one of them is replayed at a time.
        self._gradients: dict[int, Tensor] = {}
        self._pool: Any = None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run forward and backward and return the loss. Earlier gradients are overwritten."""
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if self.failure or len(next(iter(given.values()))) not in self.rows:
            return self._plain(inputs)
        key = shape_of(given)
        if key not in self.recorded:
            try:
                self.recorded[key] = self._record(given)
            except RuntimeError as error:  # out of memory, or an operation that cannot be recorded
                self.failure = one_line(error)
                self.report(f"steps are not recorded as CUDA graphs: {self.failure}")
                return self._plain(inputs)
        step = self.recorded[key]
        for name, tensor in given.items():
            step.inputs[name].copy_(tensor, non_blocking=True)
        for place, parameter in enumerate(self.parameters):
            parameter.grad = step.gradients.get(place)
        torch._foreach_zero_(list(step.gradients.values()))
        step.replay()
        return step.loss.clone()  # the next replay writes there

    def _plain(self, inputs: Inputs) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        return self.backward(inputs)

    def _record(self, given: dict[str, Tensor]) -> Recorded:
        inputs = {name: tensor.clone() for name, tensor in given.items()}
        used = self._warm_up(inputs)
        for place in used:
            gradient = self.parameters[place].grad
            assert gradient is not None
            self._gradients.setdefault(place, gradient)
        gradients = {place: self._gradients[place] for place in used}
        for place, parameter in enumerate(self.parameters):
            parameter.grad = gradients.get(place)
        if self._pool is None:
            self._pool = graphs.new_pool()
        replay, loss = graphs.record(lambda: self.backward(dict(inputs)), self._pool, self.device)
        return Recorded(inputs, loss, gradients, replay)

    def _warm_up(self, inputs: dict[str, Tensor]) -> list[int]:
        """Run some steps without side effects; return the indices of the parameters that get a gradient."""
        for parameter in self.parameters:
            parameter.grad = None
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), graphs.aside(self.device):
            for _ in range(WARM_UPS):
                self.backward(dict(inputs))
        return [place for place, parameter in enumerate(self.parameters) if parameter.grad is not None]
