"""Which backbone an adapter belongs to: what is recorded of it, and what is compared before it is used."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dept_vl.adapters.schema import BEFORE_VISION
from dept_vl.models.backbone import Backbone


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """Return what an adapter records of its backbone."""
    return {
        "name": backbone.name,
        "fingerprint": backbone.fingerprint,
        "visual_position_bias": backbone.visual_position_bias,
        "vision": None if backbone.vision is None else backbone.vision.options(),
        "exif": None if backbone.vision is None else backbone.vision.exif,
    }


def check_backbone(recorded: Mapping[str, Any], backbone: Backbone) -> None:
    """Compare a backbone with the one that an adapter was trained on.

    The authors' files record no weights: only the names are compared, with a warning. `PromptedModel` adds
    the width.

    Args:
        recorded: As `describe_backbone` returns it.
        backbone: The one at hand.

    Raises:
        ValueError: If they differ, with both names and fingerprints.
    """
    if recorded["fingerprint"] is None:
        _check_backbone_of_authors(recorded["name"], backbone)
        return
    given, expected = describe_backbone(backbone), {**BEFORE_VISION, **recorded}
    compared = ["fingerprint", "visual_position_bias"]
    if expected["vision"] is not None:
        compared.append("vision")
    if any(expected[key] != given[key] for key in compared):
        raise ValueError(
            f"this adapter was trained on {_text(expected, compared)} and does not fit "
            f"{_text(given, compared)}; load the backbone it was trained on"
        )


def check_name(name: str, backbone: Backbone, accepted: Collection[str]) -> None:
    """Compare names of models by their last part.

    "t5-base" is "google-t5/t5-base" on the Hub now, and any folder of that name on a disk.

    Raises:
        ValueError: If none of the accepted names is this one.
    """
    if Path(name).name not in {Path(other).name for other in accepted}:
        raise ValueError(
            f"this adapter was trained on {name} and does not fit {backbone.name}; load {name}, or set "
            "backbone.name if this is the same model under another name"
        )


def _check_backbone_of_authors(name: str, backbone: Backbone) -> None:
    if backbone.vision is not None:
        raise ValueError(
            f"this adapter was trained on {name} for text alone and does not fit {backbone.name}, "
            "which has a vision tower; load the language model without one"
        )
    check_name(name, backbone, [backbone.name])
    warnings.warn(
        f"the authors' files do not say on which weights of {name} this adapter was trained; of "
        f"{backbone.name} only the name and the width were compared",
        stacklevel=5,
    )


def _text(identity: Mapping[str, Any], keys: Sequence[str]) -> str:
    return f"{identity['name']} ({', '.join(f'{key} {identity[key]}' for key in keys)})"
