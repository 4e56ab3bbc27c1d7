"""Registry of objects by name. Built-in objects are imported on first use, so that listing names is fast."""

from collections.abc import Iterator, Mapping
from importlib import import_module
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
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownNameError(self.category, name, self)
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

    def register(self, name: str, entry: T) -> None:
        """Add an entry; raise ValueError if the name is taken."""
        if name in self._entries:
            raise ValueError(f"a {self.category} {name!r} is registered already; choose another name")
        self._entries[name] = entry

    def unregister(self, name: str) -> None:
        """Remove an entry, for example at the end of a test."""
        del self._entries[name]
