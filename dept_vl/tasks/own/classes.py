"""Names of classes, which `datasets` stores in the metadata of Parquet and Arrow files."""

import json
from collections.abc import Collection, Sequence
from typing import Any


def class_names(
    metadata: dict[bytes, bytes] | None, known: Collection[str] | None = None
) -> dict[str, list[str]]:
    """Return the class names of each column of classes, or of lists of them, if all of them are `known`."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        inner = {name: _inner(feature) for name, feature in features.items()}
        found = {name: one["names"] for name, one in inner.items() if one.get("_type") == "ClassLabel"}
        return {name: names for name, names in found.items() if known is None or {*names} <= {*known}}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _inner(feature: Any) -> dict[str, Any]:
    """Return the feature in a list of `datasets`, which is written in three ways."""
    if isinstance(feature, list):
        return _inner(feature[0]) if feature else {}
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict | list):
        return _inner(feature["feature"])
    return feature if isinstance(feature, dict) else {}


def named(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class, None for -1, which means unlabelled; also in lists."""
    if isinstance(value, list):
        return [named(one, names) for one in value]
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
