"""Recording of CUDA graphs, which launch all kernels of a function at once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor | None]
SHAPES = 16
"""Maximum number of different text lengths, and so of graphs; longer texts are padded to larger multiples."""
TILE = 8
"""Smallest multiple that texts are padded to on a GPU."""


def padding_multiple(max_source_length: int) -> int:
    """Return the multiple that text lengths are padded to, so that there are at most `SHAPES` lengths."""
    return TILE * -(-max_source_length // (TILE * SHAPES))


def shape_of(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Return the names, shapes and data types of inputs, which identify a graph."""
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items()))


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run a `with` statement in a separate CUDA stream, for warm-up before a recording."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def new_pool() -> Any:
    """Return a memory pool that graphs can share."""
    return torch.cuda.graph_pool_handle()


def record(step: Callable[[], Tensor], pool: Any, device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record a CUDA graph of a step, without computing anything.

    Returns:
        Function that launches the graph, and the tensor that it writes the result to.

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
        # After a failed recording, the generator and the allocator are still in recording mode.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph.replay, result
