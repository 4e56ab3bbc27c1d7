"""Measuring a step: saved activations, encoder operations, rounds taken in turn, ratios within a round."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MEMORY = "[memory]"
"""Name of torch's events of memory."""


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass: each storage once, parameters not.

    The peak of a step's activations on any device, without what an allocator adds.

    Args:
        forward: The pass.
        parameters: What lies in memory with or without it.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, or its address would be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
        total: int = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the processor's memory that a call adds at its peak, those that it frees again included.

    Args:
        run: Called once; what it leaves is counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == MEMORY]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


def encoder_flops(*, batch: int, tokens: int, d_model: int, d_inner: int, d_ff: int, layers: int) -> int:
    """Operations of a forward pass of T5's encoder: two for each multiplication in a matrix product.

    Per token and layer four projections of d_model x d_inner and two of d_model x d_ff; per pair of tokens
    two products of d_inner. Norms, softmax and the backward pass (about once more, as weights are frozen)
    are not counted.

    Args:
        batch: Examples.
        tokens: Positions of each: prompt, text and visual.
        d_model: Width.
        d_inner: Heads x width of a head.
        d_ff: Inner width of the feed-forward layer.
        layers: Of the encoder.
    """
    token = 2 * (4 * d_model * d_inner + 2 * d_model * d_ff)
    pair = 2 * 2 * d_inner
    return batch * layers * tokens * (token + tokens * pair)


def in_turn(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of each round: all names, and another one first each time.

    What disturbs a machine for a while then disturbs all alike, and no one always comes behind the same.
    """
    if not names:
        return [[] for _ in range(rounds)]
    starts = [number % len(names) for number in range(rounds)]
    return [[*names[start:], *names[:start]] for start in starts]


@dataclass(frozen=True)
class Ratio:
    """Of two measured in the same rounds: the median of the rounds' ratios, the least and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        """Round by round.

        Raises:
            ValueError: If they are not of the same rounds, or there is none.
        """
        if len(ours) != len(theirs) or not ours:
            raise ValueError(f"expected as many rounds of both, found {len(ours)} and {len(theirs)}")
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"
