"""Errors that users cause, by what is wrong; the command line prints each as one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """Options that are unknown, out of range, or do not fit each other. The command line exits with 2."""


class UnknownNameError(UsageError):
    """A name that nothing is registered under.

    Args:
        category: What the name should be of, such as `task`.
        name: As given.
        known: The names there are.
    """

    def __init__(self, category: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        closest = get_close_matches(name, known)
        meant = f"; closest: {', '.join(closest)}" if closest else ""
        super().__init__(f"unknown {category} {name!r:.80}; there are: {', '.join(known)}{meant}")
        self.category, self.name, self.known, self.closest = category, name, known, closest
