"""`adapter.json`, and the configurations of others: what they may say, whoever has written them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dept_vl._utils.io import read_json
from dept_vl._utils.options import Seed, check
from dept_vl.models.options import BEFORE_ORDER, ImageFit, LoadIn, ObjectOrder, VisualNorm, VisualPositionBias
from dept_vl.models.vision import VisionOptions
from dept_vl.prompts.base import LARGEST_SIZE, Method, Shapes, sized
from dept_vl.prompts.options import PositiveSize, Size
from dept_vl.tasks.base import QuestionCase

FORMAT_VERSION = 2
"""Version 1 names A and B `lora_a` and `lora_b`."""
READABLE_VERSIONS = (1, FORMAT_VERSION)
BEFORE_VISION: dict[str, Any] = {"vision": None, "exif": None}
"""What is left out where a backbone was described before that was kept."""
BEFORE_METHODS = {"method": "dept", "seed": 0, "visual_offset": False}
"""What is left out where a prompt was described before there was more than one method, or an option of it."""


@dataclass(frozen=True)
class Sizes:
    """The prompt, as `Method.describe` returns it."""

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
class BackboneFields:
    """The backbone, as `fingerprint.describe_backbone` returns it."""

    name: str
    fingerprint: dict[str, str]
    visual_position_bias: VisualPositionBias
    object_order: ObjectOrder
    visual_norm: VisualNorm | None
    image_fit: ImageFit | None
    vision: VisionOptions | None
    exif: bool | None


@dataclass(frozen=True)
class PretrainedFields(BackboneFields):
    """The same, of a pretrained vision-language model."""

    text_form: str
    load_in: LoadIn = ""


@dataclass(frozen=True)
class BackboneOfAuthors:
    """The backbone of an adapter that was read from the authors' files (`Adapter.from_authors`)."""

    name: str
    fingerprint: None
    visual_position_bias: None
    vision: None
    exif: None
    official_config: dict[str, Any]


@dataclass(frozen=True)
class Answering:
    """What answering needs to know of your own data that were learnt; the task knows what its facts are."""

    max_new_tokens: Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """The fields of `adapter.json`."""

    prompt: Sizes | None
    backbone: BackboneFields
    task: str
    metrics: dict[str, float]
    trainable_parameters: dict[str, int]
    format_version: int
    question_case: QuestionCase
    answering: dict[str, Answering] = field(default_factory=dict)


@dataclass(frozen=True)
class DescriptionOfPretrained(Description):
    """The same, of an adapter of a pretrained vision-language model."""

    backbone: PretrainedFields


@dataclass(frozen=True)
class DescriptionOfAuthors(Description):
    """The same, of an adapter that was read from the authors' files."""

    backbone: BackboneOfAuthors  # type: ignore[assignment]


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
        earlier = BEFORE_VISION if of_authors else BEFORE_VISION | BEFORE_ORDER
        description["backbone"] = backbone | {k: backbone.get(k, v) for k, v in earlier.items()}
    if isinstance(description, dict):
        description.setdefault("question_case", "lower")
    if isinstance(description, dict) and isinstance(description.get("prompt"), dict):
        # Last, so that a file that says them is written again as it was.
        for name, value in BEFORE_METHODS.items():
            description["prompt"].setdefault(name, value)
    try:
        pretrained = isinstance(backbone, dict) and "text_form" in backbone
        kind = DescriptionOfPretrained if pretrained else Description
        check(description, DescriptionOfAuthors if of_authors else kind)
        if description["prompt"] is not None:
            _check_scale(description["prompt"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    checked: dict[str, Any] = description
    return checked


def read_configuration(path: Path, peft_type: str, kind: Any) -> dict[str, Any]:
    """Read an `adapter_config.json` of PEFT, or of the authors' fork of it.

    Args:
        path: The file.
        peft_type: The method that it has to be of.
        kind: Dataclass of the fields that are needed; a missing one counts as null. There may be others.

    Raises:
        ValueError: If it is damaged, or of another method.
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


def _check_scale(prompt: Mapping[str, Any]) -> None:
    scale = described_method(prompt).scale
    if not math.isclose(prompt["scale"], scale, rel_tol=1e-6):
        raise ValueError(f"expected prompt.scale to be {scale}, found {prompt['scale']!s:.60}")


def described_method(prompt: Mapping[str, Any]) -> Method:
    """Return the method at the sizes that a description has.

    Raises:
        UnknownNameError: If there is no method of this name.
        ValueError: If the method cannot be built with these sizes.
    """
    # A whole number may stand without its point in JSON.
    sizes = {**BEFORE_METHODS, **prompt, "alpha": float(prompt["alpha"])}
    del sizes["scale"]  # follows from the others
    return sized(**sizes)


def tensor_shapes(prompt: Mapping[str, Any]) -> dict[str, Shapes]:
    """Return the shapes of the tensors of a prompt, by its description: by group, by name in the file."""
    groups = described_method(prompt).trained()
    return {group: {f"prompt.{k}": v for k, v in named.items()} for group, named in groups.items()}
