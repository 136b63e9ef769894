"""The only registry: names to classes, imported when they are first asked for.

Listing names never imports a method, so the command line stays fast and a method whose optional
dependency is missing breaks only itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Generic, TypeVar

from compress.errors import CompressError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects given directly or lazily as ``"package.module:attribute"``.

    Args:
        noun: what is registered, for messages ("method").
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._targets: dict[str, T | str] = {}
        self._summaries: dict[str, str] = {}

    def register(self, name: str, target: T | str, summary: str = "") -> T | str:
        """Add ``target`` under ``name``; the same target again is fine, another one is an error."""
        known = self._targets.get(name)
        if known is not None and known is not target and known != target:
            raise CompressError(
                f"a new name for a {self.noun}",
                f"{name!r}, which already stands for {known!r} (the newcomer is {target!r})",
                "Register it under another name",
            )
        self._targets[name] = target
        self._summaries[name] = summary
        return target

    def get(self, name: str) -> T:
        """Return the object registered under ``name``.

        Raises:
            CompressError: no such name; the message proposes the closest ones.
        """
        if name not in self._targets:
            raise CompressError(
                f"the name of a {self.noun}", repr(name), did_you_mean(name, list(self))
            )
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
            self._targets[name] = target
        return target

    def summary(self, name: str) -> str:
        """Return the one line given at registration (no import)."""
        return self._summaries.get(name, "")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        return name in self._targets
