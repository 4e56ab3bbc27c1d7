"""CUDA graphs: what a function launches is recorded once, and launched together from then on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor | None]
SHAPES = 16
"""Text lengths at most, so that graphs stay few; longer texts are padded to coarser multiples."""
TILE = 8
"""What a GPU pads to."""


def padding_multiple(max_source_length: int) -> int:
    """Return what lengths are rounded up to, so that there are at most `SHAPES` of texts."""
    return TILE * -(-max_source_length // (TILE * SHAPES))


def shape_of(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Return what a graph is recorded for: names, sizes and types of its inputs."""
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items()))


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """A stream of its own, for what comes before a recording."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def new_pool() -> Any:
    """Memory that graphs share."""
    return torch.cuda.graph_pool_handle()


def record(step: Callable[[], Tensor], pool: Any, device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record what a step launches; nothing is computed.

    Returns:
        What launches it, and the tensor that it writes its result to.

    Raises:
        RuntimeError: If the step cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = step()
    except RuntimeError:
        # A recording that failed leaves the generator and the allocator in recording mode.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph.replay, result
