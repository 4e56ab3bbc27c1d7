"""Measurement of a step: saved activations, order of rounds, and ratios."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor


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
