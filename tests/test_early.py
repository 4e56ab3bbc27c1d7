"""What is checked of a signature while the tests run."""

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from early import checked
from jaxtyping import Float
from torch import Tensor

from dept_vl.prompts.base import sized


def _turned(
    left: Float[Tensor, "batch width"],
    right: Float[Tensor, "batch other"] | None = None,
    *,
    times: int = 1,
    turn: bool = True,
) -> Float[Tensor, "width batch"]:
    return left.T * times if turn else left


def _named(model: "NotImported", parts: list["NotImported"]) -> object:  # type: ignore[name-defined]  # noqa: F821
    return model


@pytest.fixture
def turned() -> Callable[..., Tensor]:
    decorated: Callable[..., Tensor] = checked(typechecker=None)(_turned)  # type: ignore[arg-type]
    return decorated


LEFT = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((LEFT, torch.ones(3, 3)), {}),
        ((torch.ones(2),), {}),
        ((LEFT.long(),), {}),
        ((LEFT,), {"times": "2"}),
        ((LEFT,), {"turn": False}),
    ],
    ids=["another batch", "too few axes", "whole numbers", "another type", "what comes back"],
)
def test_what_a_signature_forbids(
    turned: Callable[..., Tensor], arguments: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        turned(*arguments, **options)


def test_what_it_allows(turned: Callable[..., Tensor]) -> None:
    assert turned(LEFT, torch.ones(2, 5)).shape == (3, 2)
    assert turned(torch.ones(4, 5), times=2).sum() == 40  # an axis is as long as in this call
    assert checked(_named, typechecker=beartype)(1, [2]) == 1


def test_the_package_is_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        sized(3)  # type: ignore[arg-type]
