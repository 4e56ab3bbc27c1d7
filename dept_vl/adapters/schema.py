"""Schemas of `adapter.json` and of PEFT's configurations, which are checked when files are read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dept_vl._utils.io import read_json
from dept_vl._utils.options import Seed, check
from dept_vl.models.backbone import BackboneFile
from dept_vl.models.options import BEFORE_ORDER, LoadIn
from dept_vl.prompts.base import LARGEST_SIZE, Method, sized
from dept_vl.prompts.options import PositiveSize, Size
from dept_vl.tasks.base import QuestionCase

FORMAT_VERSION = 2
"""Current format version. In version 1, A and B are named `lora_a` and `lora_b`."""
READABLE_VERSIONS = (1, FORMAT_VERSION)
BEFORE_VISION: dict[str, Any] = {"vision": None, "exif": None}
"""Defaults for descriptions of backbones in older files, which lack these fields."""
BEFORE_METHODS = {"method": "dept", "seed": 0, "visual_offset": False}
"""Defaults for descriptions of prompts in older files, which lack these fields."""


@dataclass(frozen=True)
class Sizes:
    """Fields of `prompt` in `adapter.json`; see `Method.describe`."""

    method: str
    prompt_length: Size
    rank: Size
    max_source_length: PositiveSize
    d_model: PositiveSize
    alpha: float
    scale: float
    seed: Seed
    visual_offset: bool


@dataclass(frozen=True)
class BackboneFields(BackboneFile):
    """Fields of `backbone` in `adapter.json`; see `fingerprint.describe_backbone`."""

    fingerprint: dict[str, str]
    exif: bool | None
    tokenizer: Annotated[str, Field(pattern=r"^[0-9a-f]*$")] = ""
    text_form: str | None = None  # of a pretrained model
    load_in: LoadIn = ""


@dataclass(frozen=True)
class BackboneOfAuthors:
    """Fields of `backbone` for an adapter of DePT's authors; see `Adapter.from_authors`."""

    name: str
    fingerprint: None
    visual_position_bias: None
    vision: None
    exif: None
    official_config: dict[str, Any]


@dataclass(frozen=True)
class Answering:
    """Facts about a task on your own data that are needed for predictions; `facts` depend on the task."""

    max_new_tokens: Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """Fields of `adapter.json`."""

    prompt: Sizes | None
    backbone: BackboneFields
    task: str
    metrics: dict[str, float]
    trainable_parameters: dict[str, int]
    format_version: int
    question_case: QuestionCase
    answering: dict[str, Answering] = field(default_factory=dict)


@dataclass(frozen=True)
class DescriptionOfAuthors(Description):
    """Fields of `adapter.json` for an adapter of DePT's authors."""

    backbone: BackboneOfAuthors  # type: ignore[assignment]


def read_description(path: Path) -> dict[str, Any]:
    """Read an `adapter.json`, and add default values for fields that older files lack.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, or has an unknown format version.
    """
    description: dict[str, Any] = read_json(path)
    kind: type[Description] = Description
    if isinstance(description, dict):
        version = description.get("format_version")
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"the adapter at {path.parent} has format version {version!r:.60}; this dept_vl reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}: use the dept_vl that wrote it"
            )
        # Missing fields come last, so that a file that has them keeps their order when it is written again.
        if isinstance(backbone := description.get("backbone"), dict):
            earlier = BEFORE_VISION | BEFORE_ORDER
            if "official_config" in backbone:
                kind, earlier = DescriptionOfAuthors, BEFORE_VISION
            description["backbone"] = backbone | {k: backbone.get(k, v) for k, v in earlier.items()}
        description.setdefault("question_case", "lower")
        if isinstance(prompt := description.get("prompt"), dict):
            description["prompt"] = prompt | {k: prompt.get(k, v) for k, v in BEFORE_METHODS.items()}
    try:
        check(description, kind)
        if description["prompt"] is not None:
            prompt, scale = description["prompt"], described_method(description["prompt"]).scale
            if not math.isclose(prompt["scale"], scale, rel_tol=1e-6):
                raise ValueError(f"expected prompt.scale to be {scale}, found {prompt['scale']!s:.60}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return description


def read_configuration(path: Path, peft_type: str, kind: Any) -> dict[str, Any]:
    """Read an `adapter_config.json` of PEFT, or of the fork of PEFT by DePT's authors.

    Missing fields of `kind`, a dataclass, count as null; further fields are allowed.

    Raises:
        ValueError: If the file is damaged, or has another `peft_type`.
    """
    config: dict[str, Any] = read_json(path)
    method = config.get("peft_type") if isinstance(config, dict) else config
    if not isinstance(config, dict) or method != peft_type:
        raise ValueError(
            f"{path} describes no adapter of DePT: expected peft_type {peft_type}, found {method!r:.60}"
        )
    try:
        check({field.name: config.get(field.name) for field in fields(kind)}, kind)
    except ValueError as error:
        raise ValueError(f"{path} does not describe the adapter: {error}") from None
    return config


def described_method(prompt: Mapping[str, Any]) -> Method:
    """Return the method and sizes of a prompt's description.

    Raises:
        UnknownNameError: If there is no method of this name.
        ValueError: If the method cannot be built with these sizes.
    """
    # JSON may have a whole number without a decimal point.
    sizes = {**BEFORE_METHODS, **prompt, "alpha": float(prompt["alpha"])}
    del sizes["scale"]  # follows from the others
    return sized(**sizes)
