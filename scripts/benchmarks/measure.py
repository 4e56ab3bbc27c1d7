"""Measurement of a step: saved activations, peak memory, operations, order of rounds, and ratios."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MEMORY = "[memory]"
"""Name of memory events in torch's profiler."""


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, counting each storage once.

    This is the peak of a step's activations on any device, without the allocator's overhead.

    Args:
        forward: Forward pass.
        parameters: Tensors that do not count, such as weights and buffers.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
        total: int = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the bytes that a call adds at its peak to the memory of a CPU.

    Args:
        run: Function to call once. Memory that it frees or returns is included.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == MEMORY]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


def encoder_flops(*, batch: int, tokens: int, d_model: int, d_inner: int, d_ff: int, layers: int) -> int:
    """Return the operations of a forward pass of T5's encoder, two for each multiplication in a product.

    Each token and layer has four projections of d_model x d_inner and two of d_model x d_ff; each pair of
    tokens has two products of d_inner. Norms, softmax and the backward pass (about the same number, as
    weights are frozen) are not counted.

    Args:
        batch: Batch size.
        tokens: Sequence length: prompt, text and visual tokens.
        d_model: Hidden size.
        d_inner: Number of heads times their width.
        d_ff: Inner width of the feed-forward layer.
        layers: Number of encoder layers.
    """
    token = 2 * (4 * d_model * d_inner + 2 * d_model * d_ff)
    pair = 2 * 2 * d_inner
    return batch * layers * tokens * (token + tokens * pair)


def in_turn(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Return the order of names for each round, starting with a different name each time.

    Temporary load on the machine then affects all equally, and the same name does not always come second.
    """
    if not names:
        return [[] for _ in range(rounds)]
    starts = [number % len(names) for number in range(rounds)]
    return [[*names[start:], *names[:start]] for start in starts]


@dataclass(frozen=True)
class Ratio:
    """Ratio of two measurements: median, lowest and highest of the ratios in each round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        """Compute the ratio round by round.

        Raises:
            ValueError: If the numbers of rounds differ or are 0.
        """
        if len(ours) != len(theirs) or not ours:
            raise ValueError(f"expected as many rounds of both, found {len(ours)} and {len(theirs)}")
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"
