"""`adapter.json`: what it may say, read as if anybody could have written it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from dept_vl._utils.io import difference, read_json
from dept_vl.models.choices import VisualPositionBias
from dept_vl.prompts.budget import LARGEST_SIZE, Method, Shapes, sized

FORMAT_VERSION = 2
"""Version 1 names A and B `lora_a` and `lora_b`."""
READABLE_VERSIONS = (1, FORMAT_VERSION)
LARGEST_SEED = 2**32 - 1

SIZES = {
    "method": str,
    "prompt_length": int,
    "rank": int,
    "max_source_length": int,
    "d_model": int,
    "alpha": float,
    "scale": float,
    "seed": int,
}
VISION = {"layer": int, "class_token": bool, "pooled_grid": int}
"""What is read of the image encoder; None where there is none, or in files that do not say."""
BEFORE_VISION = {"vision": None}
"""What is left out where a backbone was described before that was kept."""
BEFORE_METHODS = {"method": "dept", "seed": 0}
"""What is left out where a prompt was described before there was more than one method."""
DESCRIPTION = {
    "prompt": (None, SIZES),
    "backbone": {
        "name": str,
        "fingerprint": {str: str},
        "visual_position_bias": get_args(VisualPositionBias),
        "vision": (None, VISION),
    },
    "task": str,
    "metrics": {str: float},
    "trainable_parameters": {str: int},
    "format_version": int,
}
"""Fields of `adapter.json`, as `files.difference` has them."""
AUTHORS_BACKBONE = {
    "name": str,
    "fingerprint": None,
    "visual_position_bias": None,
    "vision": None,
    "official_config": dict,
}
"""Fields of `backbone` where the adapter was read from the authors' files (`Adapter.from_authors`)."""


def read_description(path: Path) -> dict[str, Any]:
    """The fields of an `adapter.json`; what was left out before there were more methods is filled in.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or of another format version.
    """
    description = read_json(path)
    version = description.get("format_version") if isinstance(description, dict) else FORMAT_VERSION
    if version not in READABLE_VERSIONS:
        raise ValueError(
            f"the adapter at {path.parent} has format version {version!r:.60}; this dept_vl reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}: use the dept_vl that wrote it"
        )
    backbone = description.get("backbone") if isinstance(description, dict) else None
    of_authors = isinstance(backbone, dict) and "official_config" in backbone
    if isinstance(description, dict) and isinstance(backbone, dict):
        description["backbone"] = backbone | {k: backbone.get(k) for k in BEFORE_VISION}
    like = DESCRIPTION | {"backbone": AUTHORS_BACKBONE} if of_authors else DESCRIPTION
    if isinstance(description, dict) and isinstance(description.get("prompt"), dict):
        # Last, so that a file that says them is written again as it was.
        for name, value in BEFORE_METHODS.items():
            description["prompt"].setdefault(name, value)
    problem = difference(description, like)
    if not problem and isinstance(description["prompt"], dict):
        problem = _wrong_size(description["prompt"])
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    fields: dict[str, Any] = description
    return fields


def _wrong_size(prompt: Mapping[str, Any]) -> str:
    """What is wrong with the sizes of a prompt; empty if nothing is."""
    for name, least in (("prompt_length", 0), ("rank", 0), ("max_source_length", 1), ("d_model", 1)):
        if not least <= prompt[name] <= LARGEST_SIZE:
            return f"expected prompt.{name} to be {least} to {LARGEST_SIZE:,}, found {prompt[name]!s:.60}"
    if not 0 <= prompt["seed"] <= LARGEST_SEED:
        return f"expected prompt.seed to be 0 to {LARGEST_SEED:,}, found {prompt['seed']!s:.60}"
    try:
        scale = described_method(prompt).scale
    except ValueError as error:
        return str(error)
    if not math.isclose(prompt["scale"], scale, rel_tol=1e-6):
        return f"expected prompt.scale to be {scale}, found {prompt['scale']!s:.60}"
    return ""


def described_method(prompt: Mapping[str, Any]) -> Method:
    """Return the method at the sizes that a description has.

    Raises:
        UnknownNameError: If there is no method of this name.
        ValueError: If the method cannot be built with these sizes.
    """
    sizes = {**BEFORE_METHODS, **prompt}
    del sizes["scale"]  # follows from the others
    return sized(**sizes)


def tensor_shapes(prompt: Mapping[str, Any]) -> dict[str, Shapes]:
    """Return the shapes of the tensors of a prompt, by its description: by group, by name in the file."""
    groups = described_method(prompt).trained()
    return {group: {f"prompt.{k}": v for k, v in named.items()} for group, named in groups.items()}
