"""What tests on a GPU share: where they run, and how near two devices are."""

import os

import pytest
import torch
from torch import Tensor

REHEARSAL = os.environ.get("DEPT_VL_REHEARSE_GPU_TESTS") == "1"
"""Run them on the CPU, against itself, to see that they run."""
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu" and not REHEARSAL, reason="there is no CUDA device"),
    pytest.mark.usefixtures("full_precision"),
]
GRAPHED = pytest.mark.skipif(DEVICE.type == "cpu", reason="a graph is recorded by a CUDA device")
NEAR = 1e-4
"""Distance of what two devices compute in full precision."""


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = (tensor.detach().double().cpu() for tensor in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def check_near(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = NEAR) -> None:
    """Every tensor is as near as that."""
    assert found.keys() == expected.keys()
    far = {name: distance(found[name], expected[name]) for name in expected}
    assert max(far.values()) < limit, far


def check_as_near(found: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Together about as near to what is exact as the CPU's tensors of the same precision are."""
    errors = [sum(distance(one[name], exact[name]) for name in exact) for one in (found, theirs)]
    assert errors[0] < 3 * errors[1] + NEAR, errors
