"""The tensors of an adapter: of which modules they are, how many, and whether they are those described."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dept_vl.adapters.schema import tensor_shapes
from dept_vl.models.options import ObjectOrder
from dept_vl.models.projection import OBJECT_ORDER
from dept_vl.models.prompted import PromptedModel

PREFIXES = ("prompt.", "visual_projection.", "language.")
"""Of the names of tensors, one for each module that an adapter may hold."""
GROUPS = {"prompt": "prompt", "visual_projection": "visual_projection", "language": "backbone"}
"""Group of `PromptedModel.parameter_groups`, by prefix; a prompt's second group is of its method."""
FROZEN_ORDER = f"visual_projection.{OBJECT_ORDER}.weight"
"""Kept with the projection, trained or not: without it the places of the tokens are lost."""


def count_trainable(model: PromptedModel) -> dict[str, int]:
    """Trained parameters by group, in all, and without the visual projection."""
    return count_parameters(model.parameter_groups())


def count_parameters(parameter_groups: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    """Parameters by group, in all, and without the visual projection."""
    groups = {name: sum(p.numel() for p in group) for name, group in parameter_groups.items() if group}
    total = sum(groups.values())
    return {
        **groups,
        "total": total,
        "without_projection": total - groups.get("visual_projection", 0),
    }


def parts_of(model: PromptedModel) -> dict[str, nn.Module | None]:
    """The modules that an adapter may hold, by the prefix of their tensors in the file."""
    modules = (model.prompt, model.backbone.visual_projection, model.backbone.language)
    return dict(zip(PREFIXES, modules, strict=True))


def tensors_of(model: PromptedModel) -> dict[str, Tensor]:
    """What an adapter keeps of a model: all that is trained, and the visual projection."""
    return {
        prefix + name: parameter
        for prefix, module in parts_of(model).items()
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or module is model.backbone.visual_projection
    }


def check_described(
    tensors: Mapping[str, Tensor],
    prompt: Mapping[str, Any] | None,
    trainable_parameters: Mapping[str, int],
    object_order: ObjectOrder | None = None,
) -> None:
    """Compare tensors with their description.

    A model that is built from the description is then no larger than the file.

    Args:
        tensors: By their names in the file.
        prompt: See `Adapter`.
        trainable_parameters: See `Adapter`.
        object_order: Of the backbone; frozen vectors are kept and not counted.

    Raises:
        ValueError: If there are others, of other shapes, or more or fewer parameters than described.
    """
    unknown = [name for name in tensors if not name.startswith(PREFIXES)]
    if unknown:
        raise ValueError(f"expected tensors of {', '.join(PREFIXES)} alone, found {unknown[:3]!r:.200}")
    expected = {} if prompt is None else tensor_shapes(prompt)
    shapes = {name: shape for group in expected.values() for name, shape in group.items()}
    prompt_shapes = {k: tuple(v.shape) for k, v in tensors.items() if k.startswith("prompt.")}
    if prompt_shapes != shapes:
        raise ValueError(f"by its sizes the prompt has the tensors {shapes}; found {prompt_shapes!s:.200}")
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if name == FROZEN_ORDER and object_order == "frozen":
            continue
        low_rank = name in expected.get("low_rank", {})
        groups.setdefault("low_rank" if low_rank else GROUPS[name.split(".")[0]], []).append(tensor)
    if "visual_projection" not in trainable_parameters:
        groups.pop("visual_projection", None)  # kept, though frozen
    counts = count_parameters(groups)
    if counts != trainable_parameters:
        raise ValueError(
            f"the tensors have {counts} parameters, and trainable_parameters says "
            f"{trainable_parameters!s:.200}"
        )
