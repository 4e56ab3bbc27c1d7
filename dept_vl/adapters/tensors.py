"""Tensors of an adapter: collecting and counting them, and checking them against the description."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dept_vl._utils.tensors import load_exactly, under
from dept_vl.adapters.schema import described_method
from dept_vl.models.options import ObjectOrder
from dept_vl.models.projection import OBJECT_ORDER
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import Method, Shapes
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.methods import build

PREFIXES = ("prompt.", "visual_projection.", "language.")
"""Prefixes of tensor names, one for each module in an adapter."""
GROUPS = {"prompt": "prompt", "visual_projection": "visual_projection", "language": "backbone"}
"""Group of `PromptedModel.parameter_groups` by prefix. A prompt's tensors can also be in `low_rank`."""
FROZEN_ORDER = f"visual_projection.{OBJECT_ORDER}.weight"
"""Name of the object order, which is saved with the projection even if it is frozen."""


def count_trainable(model: PromptedModel) -> dict[str, int]:
    """Return the number of trained parameters of a model; see `count_parameters`."""
    return count_parameters(model.parameter_groups())


def count_parameters(parameter_groups: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    """Return the number of parameters by group, in total, and without the visual projection."""
    groups = {name: sum(p.numel() for p in group) for name, group in parameter_groups.items() if group}
    total = sum(groups.values())
    return {**groups, "total": total, "without_projection": total - groups.get("visual_projection", 0)}


def parts_of(model: PromptedModel) -> dict[str, nn.Module | None]:
    """Return the modules of a model that can be in an adapter, by the prefix of their tensors."""
    modules = (model.prompt, model.backbone.visual_projection, model.backbone.language)
    return dict(zip(PREFIXES, modules, strict=True))


def tensors_of(model: PromptedModel) -> dict[str, Tensor]:
    """Return the tensors that are saved in an adapter: all trained ones, and the visual projection."""
    return {
        prefix + name: parameter
        for prefix, module in parts_of(model).items()
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or module is model.backbone.visual_projection
    }


def filled(method: Method, tensors: Mapping[str, Tensor], what: str) -> DePT:
    """Return a prompt with these tensors; see `check_shapes`."""
    check_shapes(method, tensors, what)
    prompt = build(method)
    load_exactly(prompt, tensors, what)
    return prompt


def check_shapes(method: Method, tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors are those of a method and its sizes, before a prompt of that size is made.

    Raises:
        ValueError: If they are not. The message begins with `what`.
    """
    shapes = {name: shape for group in method.trained().values() for name, shape in group.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise ValueError(f"{what}: by its sizes the prompt has the tensors {shapes}; found {found!s:.200}")


def check_described(
    tensors: Mapping[str, Tensor],
    prompt: Mapping[str, Any] | None,
    trainable_parameters: Mapping[str, int],
    object_order: ObjectOrder | None = None,
) -> None:
    """Check that tensors fit their description, so that a model built from it is no larger than the file.

    The vectors of a frozen object order are not counted.

    Raises:
        ValueError: If the names, shapes or numbers of parameters differ from the description.
    """
    unknown = [name for name in tensors if not name.startswith(PREFIXES)]
    if unknown:
        raise ValueError(f"expected tensors of {', '.join(PREFIXES)} alone, found {unknown[:3]!r:.200}")
    expected: Mapping[str, Shapes] = {}
    if prompt is not None:
        method = described_method(prompt)
        expected = method.trained()
        check_shapes(method, under("prompt.", tensors), "its two files do not belong together")
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if name == FROZEN_ORDER and object_order == "frozen":
            continue
        low_rank = name.removeprefix("prompt.") in expected.get("low_rank", {})
        groups.setdefault("low_rank" if low_rank else GROUPS[name.split(".")[0]], []).append(tensor)
    if "visual_projection" not in trainable_parameters:
        groups.pop("visual_projection", None)  # kept, though frozen
    counts = count_parameters(groups)
    if counts != trainable_parameters:
        raise ValueError(
            f"the tensors have {counts} parameters, and trainable_parameters says "
            f"{trainable_parameters!s:.200}"
        )
