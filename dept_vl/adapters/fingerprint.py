"""Fingerprints of backbones, which are saved with an adapter and compared before it is used."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dept_vl._utils.checksums import checksum
from dept_vl._utils.printable import printable, warn
from dept_vl.adapters.base_model import shown
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.options import BEFORE_ORDER
from dept_vl.models.quantised import fingerprint_of_words
from dept_vl.models.tokens import tokenised

PROBED = (
    "what color is the shape in the image, and how many people are there? yes, no, left, right, none; "
    "Which of these is TRUE: 0 1 2 3 4 5 6 7 8 9, a b c d e f g h i j k l m n o p q r s t u v w x y z"
)
"""Text whose token ids are compared; a tokenizer's files can differ between versions of its library."""

COMPARED = (
    *("fingerprint", "visual_position_bias", "object_order", "visual_norm", "image_fit", "vision"),
    *("tokenizer", "text_form"),
)
"""Fields of a description that have to be equal where both backbones have them."""


def describe_backbone(backbone: FrozenBackbone) -> dict[str, Any]:
    """Return the description of a backbone that is saved with an adapter; see `Adapter.backbone`."""
    tokens = tokenised(backbone.tokenizer, PROBED, add_special_tokens=False).input_ids
    return {
        "name": backbone.name,
        "fingerprint": backbone.fingerprint,
        "visual_position_bias": backbone.visual_position_bias,
        "object_order": backbone.object_order,
        "visual_norm": backbone.visual_norm,
        "image_fit": backbone.image_fit,
        "vision": None if backbone.vision is None else backbone.vision.options(),
        "exif": backbone.exif,
        "tokenizer": checksum(repr(tokens).encode()),
        **({} if backbone.text_form is None else {"text_form": backbone.text_form}),
        **({"load_in": backbone.load_in} if backbone.load_in else {}),
    }


def check_backbone(recorded: Mapping[str, Any], backbone: FrozenBackbone) -> None:
    """Check that an adapter was trained on a backbone.

    Files of DePT's authors have no hashes of weights, so only the names are compared, with a warning. The
    hidden size is checked by `PromptedModel`.

    Raises:
        ValueError: If they differ. The message has both names and fingerprints.
    """
    if recorded["fingerprint"] is None:
        _check_backbone_of_authors(recorded["name"], backbone)
        return
    given, expected = describe_backbone(backbone), {**BEFORE_ORDER, **recorded}
    if backbone.vision is not None and expected["image_fit"] is not None:
        expected["image_fit"] = backbone.vision.fit_of(expected["image_fit"])
    # Files of older versions, and kinds of backbones, lack some of these.
    compared = [key for key in COMPARED if None not in (given.get(key), expected.get(key))]
    if expected.get("load_in", "") != backbone.load_in:
        expected["fingerprint"] = _in_another_precision(expected, given, backbone)
    if any(expected[key] != given[key] for key in compared):
        raise ValueError(
            f"this adapter was trained on {_text(expected, compared)} and does not fit "
            f"{_text(given, compared)}; load the backbone it was trained on"
        )


def _in_another_precision(
    expected: Mapping[str, Any], given: Mapping[str, Any], backbone: FrozenBackbone
) -> Mapping[str, str]:
    """Return the backbone's fingerprint and warn if only the precision may differ; else the recorded one."""
    record, words = expected["fingerprint"], "its word embeddings are the same"
    if record.get("model") != backbone.fingerprint.get("model"):
        return record  # type: ignore[no-any-return]
    if "words" not in record:  # the adapter was trained in full precision
        words = "its weights could not be compared"
    elif record["words"] != fingerprint_of_words(backbone):
        return record  # type: ignore[no-any-return]
    precisions = [one.get("load_in") or "full precision" for one in (expected, given)]
    warn(
        f"this adapter was trained on {printable(expected['name'])} in {precisions[0]}, and {backbone.name} "
        f"is in {precisions[1]}; {words}",
        stacklevel=5,
    )
    return backbone.fingerprint


def check_name(name: str, backbone: FrozenBackbone, accepted: Collection[str]) -> None:
    """Raise ValueError if the last part of a name is not that of an accepted name.

    For example, "t5-base" is now "google-t5/t5-base" on the Hub, and can be a local folder.
    """
    if Path(name).name not in {Path(other).name for other in accepted}:
        raise ValueError(
            f"this adapter was trained on {printable(name)} and does not fit {backbone.name}; load that one, "
            "or set backbone.name if this is the same model under another name"
        )


def _check_backbone_of_authors(name: str, backbone: FrozenBackbone) -> None:
    if backbone.reads_images:
        raise ValueError(
            f"this adapter was trained on {printable(name)} for text alone and does not fit {backbone.name}, "
            "which has a vision tower; load the language model without one"
        )
    check_name(name, backbone, [backbone.name])
    warn(
        f"the authors' files do not say on which weights of {name} this adapter was trained; of "
        f"{backbone.name} only the name and the width were compared",
        stacklevel=5,
    )


def _text(identity: Mapping[str, Any], keys: Sequence[str]) -> str:
    values = {**identity, "fingerprint": shown(identity["fingerprint"])}
    return f"{printable(identity['name'])} ({', '.join(f'{key} {values[key]}' for key in keys)})"
