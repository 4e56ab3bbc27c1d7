"""Things by name: built-in ones are imported when first used, so that listing names costs nothing."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

from dept_vl._utils.errors import UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of names that users may add to.

    Args:
        category: What is registered, for messages, such as `task`.
        built_in: Name -> `module:attribute`, imported at the first look-up.
    """

    def __init__(self, category: str, built_in: Mapping[str, str]) -> None:
        self.category = category
        self._entries: dict[str, T | str] = dict(built_in)

    def __getitem__(self, name: str) -> T:
        """Return what is registered under a name; raise UnknownNameError otherwise."""
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownNameError(self.category, name, self)
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry

    def check(self, name: str) -> str:
        """Return a name that is registered, without importing its entry; raise UnknownNameError otherwise."""
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
        """Add an entry; raise ValueError if another has the name."""
        if name in self._entries:
            raise ValueError(f"a {self.category} {name!r} is registered already; choose another name")
        self._entries[name] = entry

    def unregister(self, name: str) -> None:
        """Remove an entry, as tests do with their own."""
        del self._entries[name]
