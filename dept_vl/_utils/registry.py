"""Registry of objects by name. Built-in objects are imported on first use, so that listing names is fast."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

from dept_vl._utils.errors import UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of names to objects that users can extend.

    Args:
        category: Category of the entries for messages, such as `task`.
        built_in: `module:attribute` by name, imported on first use.
    """

    def __init__(self, category: str, built_in: Mapping[str, str]) -> None:
        self.category = category
        self._entries: dict[str, T | str] = dict(built_in)

    def __getitem__(self, name: str) -> T:
        """Return the entry of a name; raise UnknownNameError if there is none."""
        entry = self._entries[self.check(name)]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry

    def check(self, name: str) -> str:
        """Return the name if it is registered, without importing the entry; else raise UnknownNameError."""
        if name not in self._entries:
            raise UnknownNameError(self.category, name, self)
        return name

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def register(self, name: object, entry: T) -> None:
        """Add an entry; ValueError if another one has the name, or a folder cannot have it.

        An entry that is defined anew, as by running a notebook's cell again, is replaced.
        """
        text = name if isinstance(name, str) else ""
        if not text.strip() or text != Path(text).name or text == ".." or "+" in text:
            raise ValueError(
                f"expected the {self.category} to have a name that a folder can have, without / and +; found "
                f"{name!r:.80}"
            )
        if text in self._entries and _origin(self._entries[text]) != _origin(entry):
            raise ValueError(f"a {self.category} {text!r} is registered already; choose another name")
        self._entries[text] = entry

    def unregister(self, name: str) -> None:
        """Remove an entry, for example at the end of a test."""
        del self._entries[name]


def _origin(entry: object) -> tuple[str, str]:
    """Return where the class of an entry is defined."""
    kind = entry if isinstance(entry, type) else type(entry)
    return kind.__module__, kind.__qualname__
