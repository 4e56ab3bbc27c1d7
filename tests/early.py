"""Before all other imports: check signatures by no more than they need, and look for no garbage."""

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any, ForwardRef, Literal, get_args, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype

_thoroughly = jaxtyping.jaxtyped
_types = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def checked(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Check what a signature says, shapes and types, as `jaxtyping.jaxtyped` does.

    That binds the arguments of every call and checks them twice, for longer messages, and compiles two
    checks of every function, called or not: a quarter of the suite's time.
    """
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if not inspect.isfunction(function):
        return _thoroughly(function, typechecker=typechecker)

    @functools.cache
    def check() -> Callable[..., Any]:
        return _check(function, typechecker)

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else check())(*args, **kwargs)

    return either


def _check(function: Callable[..., Any], typechecker: Callable[[Any], Any]) -> Callable[..., Any]:
    annotations = function.__annotations__.values()
    if any(map(_has_names, annotations)):
        return _thoroughly(function, typechecker=typechecker)
    types: Callable[..., Any] = _types(function)
    if not any("jaxtyping" in repr(annotation) for annotation in annotations):
        return types

    def shapes(*args: Any, **kwargs: Any) -> Any:
        with _thoroughly("context"):  # in which an axis has one length
            return types(*args, **kwargs)

    return shapes


def _has_names(annotation: object) -> bool:
    """Whether a type is only named, perhaps one that is not imported, which jaxtyping passes over."""
    if isinstance(annotation, (str, ForwardRef)):
        return True
    parts = annotation if isinstance(annotation, list) else get_args(annotation)
    return get_origin(annotation) is not Literal and any(map(_has_names, parts))


jaxtyping.jaxtyped = checked
gc.disable()  # what is imported stays; `conftest` ends this after its imports
