"""Peak memory of a call, and operations of T5's encoder."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

MEMORY = "[memory]"
"""Name of memory events in torch's profiler."""


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
