"""Base of option dataclasses. Ranges are declared with the fields, and pydantic checks them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dept_vl._utils.errors import UsageError, closest

LARGEST_COUNT = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Positive = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # NumPy takes no other
Workers = Annotated[int, Field(ge=0, le=1024)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LONGEST_VALUE = 60
"""Maximum number of characters of a value quoted in a message."""


class Options:
    """Base class of option dataclasses. Unknown keys and values of other types are rejected."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


FILES = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Pydantic settings for reading files into types without settings of their own."""
T = TypeVar("T", bound=Options)


def to_json(options: Options) -> dict[str, Any]:
    """Return options as JSON types."""
    encoded: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))  # type: ignore[call-overload]
    return encoded


def build(kind: type[T], content: Any) -> T:
    """Build options from JSON, with defaults; UsageError lists every problem and what is allowed."""
    built, problems = _read(_adapter(kind), kind, content)
    if problems := _bad_text(content) or problems:
        raise UsageError("; ".join(problems))
    options: T = built
    return options


def check(content: Any, kind: Any) -> Any:
    """Convert JSON to a dataclass or other type; ValueError lists the problems and what is allowed."""
    built, problems = _read(_list_adapter(kind), kind, [content], inside=1, most=3)
    if problems:
        raise ValueError("; ".join(problems))
    return built[0]


_adapter: Callable[[Any], Any] = cache(TypeAdapter)


@cache
def _list_adapter(kind: Any) -> Any:
    """Wrap the type in a list, since pydantic accepts a config only for types without their own."""
    return TypeAdapter(list[kind], config=FILES)


def _read(
    adapter: Any, kind: Any, content: Any, inside: int = 0, most: int | None = None
) -> tuple[Any, list[str]]:
    """Return JSON as parsed by pydantic, or its first problems, located `inside` levels deeper."""
    try:
        return adapter.validate_json(json.dumps(content)), []
    except ValidationError as error:
        listed: set[str] = set()
        errors = error.errors(include_url=False)[:most]
        return None, [_problem(kind, {**one, "loc": one["loc"][inside:]}, listed) for one in errors]
    except RecursionError:
        return None, ["the content is nested too deeply"]


def validate(options: Options) -> None:
    """Check the values of options; UsageError lists every problem and what is allowed."""
    build(type(options), to_json(options))


def check_distinct(**lists: Sequence[Any]) -> None:
    """Raise UsageError if a list holds a value twice: runs would be counted twice, as if they were more."""
    for name, values in lists.items():
        repeated = next((value for value in values if list(values).count(value) > 1), None)
        if repeated is not None:
            raise UsageError(f"{name} names {repeated!r:.60} more than once; give each value once")


def _bad_text(content: Any) -> list[str]:
    """Return a message for each text that file systems or tokenizers cannot handle."""
    problems: list[str] = []
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), content)]
    while todo:  # no recursion: the content may be nested deeply
        place, value = todo.pop()
        if isinstance(value, dict):
            todo += [((*place, key), inner) for key, inner in value.items()]
            todo += [(place, key) for key in value]
        elif isinstance(value, list):
            todo += [((*place, number), inner) for number, inner in enumerate(value)]
        # Paths end at a zero byte, and a lone surrogate is not a character.
        elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
            problems.append(
                f"{_name(place)} is {_quoted(value)}; expected text without zero bytes and lone surrogates"
            )
    return problems


def _problem(kind: Any, details: Any, listed: set[str]) -> str:
    """Describe an error of pydantic; `listed` holds groups whose options another message has listed."""
    name, context = f"{_name(details['loc']):.200}", details.get("ctx", {})
    what = "option" if isinstance(kind, type) and issubclass(kind, Options) else "field"
    match details["type"]:
        case "missing":
            return f"{name} is missing"
        case "unexpected_keyword_argument":
            known = _names_beside(kind, details["loc"])
            meant = closest(get_close_matches(str(details["loc"][-1]), known))
            group = _name(details["loc"][:-1])
            if group not in listed:
                listed.add(group)
                meant = f"; there are: {', '.join(known)}{meant}"
            return f"unknown {what} {name}{meant}"
        case "dataclass_type":
            expected = f"an object with the {what}s of {context['class_name']}"
        case "greater_than_equal":
            expected = f"{context['ge']:,} or more"
        case "less_than_equal":
            expected = f"at most {context['le']:,}"
        case "literal_error":
            allowed: str = context["expected"]
            expected = allowed + closest(get_close_matches(repr(details["input"]), allowed.split(" or "), 1))
        case "value_error":
            return f"{name}: {context['error']}"
        case _:
            expected = details["msg"].removeprefix("Input should be ")
    return f"{name} is {_quoted(details['input'])}; expected {expected}"


def _names_beside(kind: Any, place: tuple[str | int, ...]) -> list[str]:
    """Return the known fields at the location of an unknown one."""
    schema = TypeAdapter(kind).json_schema()
    level: Any = {"properties": {"": schema}}
    for part in ("", *place[:-1]):
        if isinstance(part, int):
            level = level["prefixItems"][part] if "prefixItems" in level else level["items"]
        else:
            level = level["properties"][part] if "properties" in level else level["additionalProperties"]
        level = level.get("anyOf", [level])[0]  # or null
        if "$ref" in level:
            level = schema["$defs"][level["$ref"].rsplit("/", 1)[-1]]
    return sorted(level["properties"])


def _name(place: tuple[str | int, ...]) -> str:
    """Return a dotted name, such as `also[0].dev_limit`."""
    shown = (part if isinstance(part, int) or part.isprintable() else repr(part) for part in place)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in shown)
    return name.removeprefix(".") or "the content"


def _quoted(value: Any) -> str:
    try:
        return f"{value!r:.{LONGEST_VALUE}}"
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested deeply
        return "a value too long to show"
