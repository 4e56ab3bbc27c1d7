"""Tensors in files and modules: reading, checking, loading and fingerprints."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.io import check_noted, one_line

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that trained parameters may be stored in."""
SAMPLES = 4096


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raise FileNotFoundError or DamagedFileError if that fails."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a safetensors file at {path}, found none")
    check_noted(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    # Others than SafetensorError come from dtypes and sizes that torch does not support.
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {one_line(error)}") from None
    return tensors


def check_parameters(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError with the name of the tensor if one is not floating point or not finite."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{path}: tensor {name!r:.80} has dtype {tensor.dtype}; expected one of "
                f"{', '.join(map(str, FLOATS))}"
            )
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise ValueError(
                f"{path} is damaged, or its training had failed: expected finite values in {name!r:.80}, "
                f"found {wrong:,} of {tensor.numel():,} that are not"
            )


def copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU, for saving."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, by name without the prefix."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str, prefix: str = "") -> None:
    """Copy tensors into all parameters of a module.

    In error messages, `what` names the owner of the tensors, and `prefix` precedes their names. Raises
    ValueError if tensors are missing, unknown, or of another shape.
    """
    parameters = dict(module.named_parameters())
    missing, extra = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    reshaped = [
        f"{prefix}{name}: expected {tuple(parameters[name].shape)}, found {tuple(state[name].shape)}"
        for name in sorted(parameters.keys() & state.keys())
        if parameters[name].shape != state[name].shape
    ]
    if missing or extra or reshaped:
        raise ValueError(
            f"{what} tensors are not those of the model: missing {missing}, extra {extra}, "
            f"other shapes {reshaped}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hexadecimal digits that identify weights, equal in full precision and in bfloat16.

    They depend on the name, shape and at most `SAMPLES` evenly spaced values of each tensor, rounded to
    bfloat16. This is fast at any size, and differs between checkpoints.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        values = tensor.detach().flatten()
        values = values[:: max(1, math.ceil(len(values) / SAMPLES))]
        digest.update(values.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def exact_fingerprint(tensors: Mapping[str, Tensor], settings: Any = None) -> str:
    """Return 16 hexadecimal digits that identify every bit of a few weights, and their settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
