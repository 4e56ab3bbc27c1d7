"""Training steps as CUDA graphs: all kernels of a step are launched at once instead of one after another.

Small batches end before the next kernel is launched, so a step takes as long as its launches whatever the
prompt. A graph is recorded once for every shape of a batch, and replayed for every batch of that shape, the
one that it was recorded for included: a resumed run replays what the undisturbed one replays.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dept_vl._utils.io import one_line
from dept_vl._utils.printable import say
from dept_vl.config import TrainOptions
from dept_vl.models import graphs
from dept_vl.models.graphs import shape_of

Inputs = dict[str, Tensor | None]
Backward = Callable[[Inputs], Tensor]
"""Runs forward and backward, and returns the loss; gradients are in the parameters."""
WARM_UPS = 2
"""Steps before a recording: libraries choose their kernels and take their memory in them."""


def why_not(
    device: torch.device,
    *,
    processes: int = 1,
    accumulation: int = 1,
    checkpointing: bool = False,
    pretrained: bool = False,
    encoded: bool = False,
) -> str:
    """Return why steps cannot be recorded; empty if they can."""
    if encoded:
        return "outputs of the encoder that are kept have no fixed shape"
    if pretrained:
        return "what a pretrained model reads has no fixed shape"
    if device.type != "cuda":
        return f"graphs need a CUDA device, and the run is on {device.type}"
    if processes > 1:
        return f"graphs of one process hold no communication, and there are {processes} processes"
    if accumulation > 1:
        return f"a graph is one batch, and gradient_accumulation_steps is {accumulation}"
    if checkpointing:
        return "gradient checkpointing reads the state of random numbers, which a graph cannot"
    return ""


def can_record(
    accelerator: Accelerator, options: TrainOptions, *, pretrained: bool, encoded: bool = False
) -> bool:
    """Whether steps are recorded; why those that should be are not is printed."""
    if not options.cuda_graphs:
        return False
    reason = why_not(
        accelerator.device,
        processes=accelerator.num_processes,
        accumulation=options.gradient_accumulation_steps,
        checkpointing=options.gradient_checkpointing,
        pretrained=pretrained,
        encoded=encoded,
    )
    if reason:
        say(f"steps are not recorded as CUDA graphs: {reason}")
    return not reason


@dataclass(frozen=True)
class Recorded:
    """A step of one shape.

    Attributes:
        inputs: Tensors that the graph reads; a batch is copied into them.
        loss: What the graph writes.
        gradients: What the graph adds to, by the place of its parameter.
        replay: Launch the graph.
    """

    inputs: dict[str, Tensor]
    loss: Tensor
    gradients: dict[int, Tensor]
    replay: Callable[[], None]


class GraphedStep:
    """A `Backward` that replays graphs, and falls back to the plain one by itself.

    Dropout draws the numbers that the plain step would draw. Batches with another number of rows than usual
    are not recorded, because every one of them may be the only one of its shape.

    The plain step may not wait for the device, nor keep what it computes. Batches of `rows` examples are
    recorded. `report` is called with one line when recording fails; later steps are plain.

    Attributes:
        recorded: Steps by the shapes of their inputs.
        failure: Why recording has failed; empty if it has not.
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
        """Run forward and backward; the gradients that parameters had are overwritten."""
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
        """Take steps that leave no trace; return the places of the parameters that get a gradient."""
        for parameter in self.parameters:
            parameter.grad = None
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), graphs.aside(self.device):
            for _ in range(WARM_UPS):
                self.backward(dict(inputs))
        return [place for place, parameter in enumerate(self.parameters) if parameter.grad is not None]
