"""Before all other imports: check signatures by no more than they need, and look for no garbage."""

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_with_shapes = jaxtyping.jaxtyped
_types = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def checked(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Check what a signature says, as `jaxtyping.jaxtyped` does.

    That binds the arguments of every call and checks them twice, which was a quarter of the suite's
    time; most signatures have no shapes and need none of it.
    """
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if not inspect.isfunction(function) or any(map(_is_more_than_types, function.__annotations__.values())):
        return _with_shapes(function, typechecker=typechecker)
    types = _types(function)

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else types)(*args, **kwargs)

    return either


def _is_more_than_types(annotation: object) -> bool:
    """Whether there are shapes, or names that need not be known, which jaxtyping passes over."""
    return isinstance(annotation, str) or any(part in repr(annotation) for part in ("jaxtyping", "'"))


jaxtyping.jaxtyped = checked
gc.disable()  # what is imported stays; `conftest` ends this after its imports
